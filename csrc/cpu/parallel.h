// parallel_for on plain threads, started per call: nothing to tear down, safe after fork, no second OpenMP runtime beside torch's.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace tokdyn {

// Calls body(i) for every i in [0, n), each once, on at most `threads` threads (the caller's included). body must not throw.
template <class Body>
void parallel_for(int64_t n, int threads, const Body& body) {
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(i);
    };
    std::vector<std::thread> helpers;
    const int64_t wanted = std::min<int64_t>(threads, n) - 1;
    if (wanted > 0) helpers.reserve(wanted);
    try {
        for (int64_t k = 0; k < wanted; ++k) helpers.emplace_back(work);
    } catch (const std::system_error&) {
        // the system grants no further thread: those that started, and this one, do the work
    }
    work();
    for (auto& helper : helpers) helper.join();
}

}  // namespace tokdyn
