// The threads of a CUDA block, run one after the other by a CPU: each has a stack of its own and
// runs until it waits for others. Tests only; x86-64 Linux.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>

namespace fluxkern::emulator {

constexpr int WARP = 32;
constexpr int WORDS = 4;    // that a lane may bring when its warp meets
constexpr int COPIES = 64;  // that a thread may have under way
constexpr size_t STACK = size_t(1) << 18;  // bytes, a power of two; lies at a multiple of itself

struct Site {  // where a thread waits, or where nobody does
    const char* file = nullptr;
    int line = 0;

    static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

enum class State { ready, at_block_barrier, at_warp_barrier, at_exchange, at_condition, done };

using Condition = bool (*)(const void* on, uint64_t value);

struct Copy {  // under way to shared memory
    void* to;
    const void* from;  // none: zeros
    int bytes;
};

struct Thread {  // at the top of its own stack
    uint3 index, block_index, block_dim, grid_dim;
    int linear;
    void* shared;
    State state;
    Site site;
    uint32_t mask;    // lanes that a warp waits for
    int source;       // lane whose value this one asks for
    uint64_t value;   // its own before an exchange, the source's after it
    Condition holds;  // what it waits for, of `on` and `value`
    const void* on;
    int products;     // under way
    void* stack_pointer;
    void* asan_stack;
    void* tsan_fiber;
    bool parity;      // which of the two release points below the next barrier of the warp takes
    uint32_t parities;  // those the lanes of the barrier just left have taken
    char released[2];
    uint64_t brought[2][WORDS];  // to the last two meetings of the warp
    int meetings;
    int copies;
    Copy under_way[COPIES];
};

// The thread that runs, found by its stack: no global that TSan would see written by all.
inline Thread& self() {
    const auto frame = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    return reinterpret_cast<Thread*>((frame & ~(STACK - 1)) + STACK)[-1];
}

inline int lane() {
    return self().linear % WARP;
}

void block_barrier(Site site);
void warp_barrier(uint32_t mask, Site site);
uint64_t exchange(uint32_t mask, int source_lane, uint64_t value, Site site);
void meet(const uint64_t (&words)[WORDS], Site site);  // all lanes of the warp, with these
const void* brought(int lane);                         // to the last meeting

// Waits until it holds; gives the others a turn.
void wait_until(Condition holds, const void* on, uint64_t value, Site site);
void give_way();
// Ends the launch with an error.
[[noreturn]] void stop(const char* why);
int64_t block_serial();  // of all blocks that have run
bool is_waited_for(const void* on);
// Does a piece of what goes on beside the threads and is waited for, when none of them can go on,
// or of anything; false: there is none.
extern bool (*beside)(bool anything);

// TSan: what was done before the one is seen after the other.
void release(void* point);
void acquire(void* point);

// Asynchronous copies: what they go to holds NaN until they are waited for.
void start_copy(void* to, const void* from, int bytes);
void finish_copies();

// What the kernel asked for and did, checked as a GPU would.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& body);
cudaError_t allow_shared(const void* kernel, int bytes);
const char* why(cudaError_t error);

}  // namespace fluxkern::emulator
