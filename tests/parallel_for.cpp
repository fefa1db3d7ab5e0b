// torch_parallel_for by threads that ThreadSanitizer sees; preloaded before torch's own, which runs
// on OpenMP. Three parts, however small the grain; with -DOVERLAP=1 a part takes one element more.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#ifndef OVERLAP
#define OVERLAP 0
#endif

extern "C" __attribute__((visibility("default"))) int32_t torch_parallel_for(
    int64_t begin, int64_t end, int64_t, void (*range)(int64_t, int64_t, void*), void* context) {
    constexpr int64_t PARTS = 3;
    const int64_t step = (end - begin + PARTS - 1) / PARTS;
    std::vector<std::thread> threads;
    for (int64_t from = begin; from < end; from += step) {
        const int64_t to = std::min(end, from + step + OVERLAP);
        threads.emplace_back([=] { range(from, to, context); });
    }
    for (std::thread& thread : threads) thread.join();
    return 0;
}
