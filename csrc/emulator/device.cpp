#include "device.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// What the layer itself reads and writes is no part of the kernels that TSan looks at.
#define UNSEEN __attribute__((no_sanitize("thread")))

namespace fluxkern::emulator {
namespace {

constexpr size_t PAGE = 4096;
constexpr int MAX_THREADS = 1024;
constexpr size_t SHARED_WITHOUT_ASKING = 48 << 10;
constexpr size_t SHARED_AT_MOST = 227 << 10;  // sm_90, sm_100

// Saves the registers that a function must keep, changes the stack and takes back those left there.
extern "C" void fluxkern_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl fluxkern_emulator_switch
.hidden fluxkern_emulator_switch
.type fluxkern_emulator_switch, @function
fluxkern_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size fluxkern_emulator_switch, .-fluxkern_emulator_switch
)");

#if defined(__SANITIZE_THREAD__)
constexpr bool SEES_RACES = true;
#else
constexpr bool SEES_RACES = false;
#endif

struct Scheduler {  // the context that hands out turns
    void* stack_pointer;
    void* asan_stack;
    const void* stack_bottom;
    size_t stack_size;
    void* tsan_fiber;
};

Scheduler scheduler;
const std::function<void()>* kernel_body;
char launch_end;         // TSan: what all threads of a launch did before its end
char block_released[2];  // TSan: before a barrier, by the barrier's parity
int block_phase;
std::mutex one_launch;
std::string message;
std::map<const void*, int> allowed_shared;
int stacks = MAX_THREADS, first_stack;  // TSan: not the block before's, which it can race with
char block_start;  // TSan: what was there when the block began

int64_t serial;  // of the block
int block_threads;
std::string stopped;  // why, if a thread has ended the launch

// sanitizers

UNSEEN void change_stack(void** save, void* load, [[maybe_unused]] void** asan_save,
                         [[maybe_unused]] const void* bottom, [[maybe_unused]] size_t size,
                         [[maybe_unused]] void* tsan_fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(asan_save, bottom, size);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
    fluxkern_emulator_switch(save, load);
}

UNSEEN void after_change([[maybe_unused]] void* asan_stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(asan_stack, nullptr, nullptr);
#endif
}

// turns

UNSEEN char* stack_of(Thread& thread) {
    return reinterpret_cast<char*>(&thread + 1) - STACK;
}

UNSEEN void back_to_scheduler(Thread& thread) {
    void** const asan_save = thread.state == State::done ? nullptr : &thread.asan_stack;
    change_stack(&thread.stack_pointer, scheduler.stack_pointer, asan_save, scheduler.stack_bottom,
                 scheduler.stack_size, scheduler.tsan_fiber);
    after_change(thread.asan_stack);
}

UNSEEN void first_turn() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack_bottom, &scheduler.stack_size);
#endif
    acquire(&block_start);
    (*kernel_body)();
    if (self().products) stop("a thread has ended before its products");
    release(&launch_end);
    self().state = State::done;
    back_to_scheduler(self());
    std::abort();  // a thread that is done gets no turn
}

UNSEEN void give_turn(Thread& thread) {
    change_stack(&scheduler.stack_pointer, thread.stack_pointer, &scheduler.asan_stack,
                 stack_of(thread), STACK, thread.tsan_fiber);
    after_change(scheduler.asan_stack);
}

UNSEEN void wait(State state, Site site) {
    Thread& thread = self();
    thread.state = state;
    thread.site = site;
    back_to_scheduler(thread);
}

// the threads of a block

// One stack a thread, its lowest page out of bounds; made once.
UNSEEN Thread& thread_at(int i) {
    static char* const memory = [] {
        const size_t size = (MAX_THREADS + 1) * STACK;
        void* const all = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (all == MAP_FAILED) std::abort();
        const auto start = (reinterpret_cast<uintptr_t>(all) + STACK - 1) & ~(STACK - 1);
        char* const first = reinterpret_cast<char*>(start);
        for (int i = 0; i < MAX_THREADS; ++i) mprotect(first + i * STACK, PAGE, PROT_NONE);
        return first;
    }();
    const int stack = (first_stack + i) % stacks;
    return reinterpret_cast<Thread*>(memory + (stack + 1) * STACK)[-1];
}

UNSEEN void prepare(Thread& thread) {
    auto top = reinterpret_cast<uintptr_t>(&thread) & ~uintptr_t(63);
    void** const frame = reinterpret_cast<void**>(top) - 8;  // 6 registers, the entry, its return
    for (int i = 0; i < 8; ++i) frame[i] = nullptr;
    frame[6] = reinterpret_cast<void*>(&first_turn);
    thread.stack_pointer = frame;
    thread.asan_stack = nullptr;
    thread.state = State::ready;
    thread.parity = false;
    thread.meetings = thread.copies = thread.products = 0;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_of(thread) + PAGE, STACK - PAGE);
#endif
#if defined(__SANITIZE_THREAD__)
    if (thread.tsan_fiber == nullptr) thread.tsan_fiber = __tsan_create_fiber(0);
#endif
}

UNSEEN uint3 unravel(int64_t i, dim3 sizes) {
    const unsigned x = i % sizes.x, y = i / sizes.x % sizes.y, z = i / sizes.x / sizes.y;
    return {x, y, z};
}

UNSEEN int64_t volume(dim3 sizes) {
    return int64_t(sizes.x) * sizes.y * sizes.z;
}

// barriers

UNSEEN bool same_wait(const Thread& a, const Thread& b) {
    return a.state == b.state && a.site.line == b.site.line && a.mask == b.mask &&
           std::strcmp(a.site.file, b.site.file) == 0;
}

UNSEEN bool open_block_barrier(int threads) {
    for (int i = 0; i < threads; ++i) {
        const Thread& thread = thread_at(i);
        if (thread.state != State::at_block_barrier || !same_wait(thread, thread_at(0))) {
            return false;
        }
    }
    for (int i = 0; i < threads; ++i) thread_at(i).state = State::ready;
    ++block_phase;
    return true;
}

// The lanes that `thread` waits for are there, at the same place: they exchange and go on.
UNSEEN bool open_warp_barrier(Thread& thread, int threads) {
    if (thread.state != State::at_warp_barrier && thread.state != State::at_exchange) return false;
    const int first = thread.linear / WARP * WARP;
    const int lanes = std::min(WARP, threads - first);
    uint64_t values[WARP];
    uint32_t parities = 0;
    for (int l = 0; l < lanes; ++l) {
        const Thread& other = thread_at(first + l);
        if ((thread.mask >> l & 1) && !same_wait(thread, other)) return false;
        values[l] = other.value;
        parities |= uint32_t(other.parity) << l;
    }
    const uint32_t mask = thread.mask;
    const bool barrier = thread.state == State::at_warp_barrier;
    for (int l = 0; l < lanes; ++l) {
        if (!(mask >> l & 1)) continue;
        Thread& other = thread_at(first + l);
        const bool there = other.source < lanes && (mask >> other.source & 1);
        if (!barrier) other.value = there ? values[other.source] : ~uint64_t(0);
        other.parities = parities;
        if (barrier) other.parity = !other.parity;
        other.state = State::ready;
    }
    return true;
}

UNSEEN std::string place(const Thread& thread) {
    static const char* const names[] = {"runs", "waits in __syncthreads", "waits in __syncwarp",
                                        "waits in a shuffle", "waits for a phase", "has ended"};
    std::string text = names[int(thread.state)];
    if (thread.state == State::done) return text;
    return text + " at " + thread.site.file + ":" + std::to_string(thread.site.line);
}

// Two threads of a block or warp, of which one waits and the other is elsewhere or done.
UNSEEN std::string divergence(int threads) {
    int waiting = 0;
    while (thread_at(waiting).state == State::done) ++waiting;
    const Thread& first = thread_at(waiting);
    const bool block = first.state == State::at_block_barrier;
    const int begin = block ? 0 : waiting / WARP * WARP;
    const int end = block ? threads : std::min(begin + WARP, threads);
    std::string text = "divergent barrier: thread " + std::to_string(waiting) + " " + place(first);
    for (int i = begin; i < end; ++i) {
        const bool expected = block || (first.mask >> (i - begin) & 1);
        if (expected && !same_wait(first, thread_at(i))) {
            return text + ", thread " + std::to_string(i) + " " + place(thread_at(i));
        }
    }
    return text + ", which its mask leaves out";
}

// a block, a launch

UNSEEN bool backwards() {
    const char* const value = std::getenv("FLUXKERN_EMULATOR_REVERSE");
    return value != nullptr && std::strcmp(value, "1") == 0;
}

// The threads whose condition has come to hold go on.
UNSEEN bool open_conditions(int threads) {
    bool opened = false;
    for (int i = 0; i < threads; ++i) {
        Thread& thread = thread_at(i);
        if (thread.state != State::at_condition || !thread.holds(thread.on, thread.value)) continue;
        thread.state = State::ready;
        opened = true;
    }
    return opened;
}

// Gives turns until all threads are done; false when they wait for each other forever.
UNSEEN bool run_threads(int threads, bool reverse) {
    for (;;) {
        int done = 0;
        bool opened = false;
        for (int i = 0; i < threads; ++i) {
            Thread& thread = thread_at(reverse ? threads - 1 - i : i);
            if (thread.state == State::ready) give_turn(thread);
            if (!stopped.empty()) return false;
            done += thread.state == State::done;
            opened |= thread.state == State::ready;  // it gave way
        }
        if (done == threads) {
            if (beside != nullptr && beside(true)) stopped = "a block has ended before its copies";
            return stopped.empty();
        }
        opened |= open_block_barrier(threads);
        for (int i = 0; i < threads; ++i) opened |= open_warp_barrier(thread_at(i), threads);
        opened |= open_conditions(threads);
        while (!opened && beside != nullptr && beside(false)) opened = open_conditions(threads);
        if (!stopped.empty() || !opened) return false;
    }
}

using SharedMemory = std::unique_ptr<void, decltype(&std::free)>;

UNSEEN SharedMemory new_shared(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, bytes ? bytes : 1) != 0) std::abort();
    std::memset(memory, 0xff, bytes);  // NaN in every float type
    return {memory, &std::free};
}

UNSEEN bool run_block(const cudaLaunchConfig_t& config, uint3 block_index, void* shared,
                      bool reverse) {
    const int threads = int(volume(config.blockDim));
    block_phase = 0;
    ++serial;
    block_threads = threads;
    if (SEES_RACES) {
        stacks = std::min(2 * threads, MAX_THREADS);
        first_stack = (first_stack + 377) % stacks;
    }
    for (int i = 0; i < threads; ++i) {
        Thread& thread = thread_at(i);
        thread.index = unravel(i, config.blockDim);
        thread.linear = i;
        thread.block_dim = {config.blockDim.x, config.blockDim.y, config.blockDim.z};
        thread.grid_dim = {config.gridDim.x, config.gridDim.y, config.gridDim.z};
        thread.block_index = block_index;
        thread.shared = shared;
        prepare(thread);
    }
    release(&block_start);
    const bool finished = run_threads(threads, reverse);
    if (!finished) message = stopped.empty() ? divergence(threads) : stopped;
    stopped.clear();
    return finished;
}

std::string refused(const cudaLaunchConfig_t& config, const void* kernel) {
    const dim3 grid = config.gridDim, block = config.blockDim;
    const int64_t threads = volume(block);
    if (threads < 1 || threads > MAX_THREADS) return std::to_string(threads) + " threads a block";
    if (volume(grid) < 1 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
        return "a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
               std::to_string(grid.z);
    }
    const auto found = allowed_shared.find(kernel);
    const size_t allowed = found == allowed_shared.end() ? SHARED_WITHOUT_ASKING : found->second;
    if (config.dynamicSmemBytes <= allowed) return "";
    return std::to_string(config.dynamicSmemBytes) + " bytes of shared memory, allowed are " +
           std::to_string(allowed);
}

}  // namespace

bool (*beside)(bool) = nullptr;

UNSEEN void release([[maybe_unused]] void* point) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(point);
#endif
}

UNSEEN void acquire([[maybe_unused]] void* point) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(point);
#endif
}

UNSEEN void wait_until(Condition holds, const void* on, uint64_t value, Site site) {
    Thread& thread = self();
    if (holds(on, value)) return;
    thread.holds = holds;
    thread.on = on;
    thread.value = value;
    thread.mask = 0;
    wait(State::at_condition, site);
}

UNSEEN void give_way() {
    wait(State::ready, self().site);
}

UNSEEN void stop(const char* why) {
    stopped = std::string(why) + ": thread " + std::to_string(self().linear);
    wait(State::at_condition, self().site);
    std::abort();  // no turn comes
}

UNSEEN int64_t block_serial() {
    return serial;
}

UNSEEN bool is_waited_for(const void* on) {
    for (int i = 0; i < block_threads; ++i) {
        const Thread& thread = thread_at(i);
        if (thread.state == State::at_condition && thread.on == on) return true;
    }
    return false;
}

UNSEEN void block_barrier(Site site) {
    char* const point = &block_released[block_phase & 1];  // the other one while this opens
    self().mask = 0;
    release(point);
    wait(State::at_block_barrier, site);
    acquire(point);
}

UNSEEN void warp_barrier(uint32_t mask, Site site) {
    Thread& thread = self();
    thread.mask = mask;
    release(&thread.released[thread.parity]);
    wait(State::at_warp_barrier, site);
    const int first = thread.linear / WARP * WARP;
    for (int l = 0; l < WARP; ++l) {
        if (mask >> l & 1) acquire(&thread_at(first + l).released[thread.parities >> l & 1]);
    }
}

// No order of memory comes with a shuffle, so TSan is told of none.
UNSEEN uint64_t exchange(uint32_t mask, int source_lane, uint64_t value, Site site) {
    Thread& thread = self();
    thread.mask = mask;
    thread.source = source_lane;
    thread.value = value;
    wait(State::at_exchange, site);
    return thread.value;
}

// Words of one meeting stay until the next but one, which no lane comes to before all have read.
UNSEEN void meet(const uint64_t (&words)[WORDS], Site site) {
    Thread& thread = self();
    ++thread.meetings;
    for (int i = 0; i < WORDS; ++i) thread.brought[thread.meetings & 1][i] = words[i];
    exchange(~0u, thread.linear % WARP, 0, site);
}

UNSEEN const void* brought(int lane) {
    const Thread& thread = self();
    return thread_at(thread.linear / WARP * WARP + lane).brought[thread.meetings & 1];
}

UNSEEN void start_copy(void* to, const void* from, int bytes) {
    Thread& thread = self();
    if (thread.copies == COPIES) std::abort();
    thread.under_way[thread.copies++] = {to, from, bytes};
    std::memset(to, 0xff, bytes);
}

UNSEEN void finish_copies() {
    Thread& thread = self();
    for (int i = 0; i < thread.copies; ++i) {
        const Copy& copy = thread.under_way[i];
        if (copy.from == nullptr) std::memset(copy.to, 0, copy.bytes);
        if (copy.from != nullptr) std::memcpy(copy.to, copy.from, copy.bytes);
    }
    thread.copies = 0;
}

UNSEEN cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                          const std::function<void()>& body) {
    const std::lock_guard lock(one_launch);
    message = refused(config, kernel);
    if (!message.empty()) return cudaErrorInvalidConfiguration;
    kernel_body = &body;
#if defined(__SANITIZE_THREAD__)
    scheduler.tsan_fiber = __tsan_get_current_fiber();
#endif
    const bool reverse = backwards();
    const int64_t blocks = volume(config.gridDim);
    std::vector<SharedMemory> used;  // TSan: freed when all threads have come to the end
    bool finished = true;
    for (int64_t i = 0; i < blocks && finished; ++i) {
        if (!SEES_RACES) used.clear();
        used.push_back(new_shared(config.dynamicSmemBytes));
        const uint3 index = unravel(reverse ? blocks - 1 - i : i, config.gridDim);
        finished = run_block(config, index, used.back().get(), reverse);
    }
    acquire(&launch_end);
    return finished ? cudaSuccess : cudaErrorLaunchFailure;
}

cudaError_t allow_shared(const void* kernel, int bytes) {
    if (bytes < 0 || size_t(bytes) > SHARED_AT_MOST) return cudaErrorInvalidValue;
    allowed_shared[kernel] = bytes;
    return cudaSuccess;
}

const char* why(cudaError_t error) {
    if (message.empty()) message = "CUDA error " + std::to_string(int(error));
    return message.c_str();
}

}  // namespace fluxkern::emulator

extern "C" const char* cudaGetErrorString(cudaError_t error) {
    return fluxkern::emulator::why(error);
}
