// parallel_for on plain threads, started per call: nothing to tear down, safe after fork, no second OpenMP runtime beside torch's.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <system_error>
#include <thread>

namespace tokdyn {

// Calls body(i) for every i in [0, n), each once, on at most `threads` threads (the caller's included). body must not throw.
// It returns when the last body has: a helper that the system starts late, because another thread still spins on its processor
// as torch's do after a matrix product, finds nothing left to do and is not waited for.
template <class Body>
void parallel_for(int64_t n, int threads, const Body& body) {
    struct Progress {
        std::atomic<int64_t> next{0}, done{0};
    };
    const auto progress = std::make_shared<Progress>();  // outlives this call where a helper does
    const auto work = [progress, n, &body] {
        for (int64_t i; (i = progress->next.fetch_add(1, std::memory_order_relaxed)) < n;) {
            body(i);
            progress->done.fetch_add(1, std::memory_order_release);
        }
    };
    const int64_t helpers = std::min<int64_t>(threads, n) - 1;
    try {
        for (int64_t k = 0; k < helpers; ++k) std::thread(work).detach();
    } catch (const std::system_error&) {
        // the system grants no further thread: those that started, and this one, do the work
    }
    work();
    while (progress->done.load(std::memory_order_acquire) < n) std::this_thread::yield();
}

}  // namespace tokdyn
