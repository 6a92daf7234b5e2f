// parallel_for on the OpenMP threads of torch if this process has them, else on threads started per call.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <system_error>
#include <thread>
#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#define TOKDYN_DLSYM 1
#endif

namespace tokdyn {

// GNU OpenMP's entry point (LLVM's and Intel's have it too) if a library of the process has it, as torch does. A second pool of
// threads would compete with OpenMP's for the processor, because those spin for a while after their loop.
using Team = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
inline Team openmp_team() {
#ifdef TOKDYN_DLSYM
    static const Team team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return team;
#else
    return nullptr;
#endif
}

// Calls body(i) for every i in [0, n), each once, on at most `threads` threads (the caller's included). body must not throw.
// It returns when the last body has returned; a thread that starts too late finds nothing to do and is not waited for.
template <class Body>
void parallel_for(int64_t n, int threads, const Body& body) {
    struct Progress {
        std::atomic<int64_t> next{0}, done{0};
    };
    const auto progress = std::make_shared<Progress>();  // shared, because a late thread may outlive this call
    const auto work = [progress, n, &body] {
        for (int64_t i; (i = progress->next.fetch_add(1, std::memory_order_relaxed)) < n;) {
            body(i);
            progress->done.fetch_add(1, std::memory_order_release);
        }
    };
    const int64_t all = std::min<int64_t>(threads, n);
    if (all > 1 && openmp_team()) {
        openmp_team()([](void* data) { (*static_cast<decltype(work)*>(data))(); }, const_cast<void*>(static_cast<const void*>(&work)),
                      static_cast<unsigned>(all), 0);
        return;
    }
    try {
        for (int64_t k = 1; k < all; ++k) std::thread(work).detach();
    } catch (const std::system_error&) {
        // no further thread can be started: the others and this one do the work
    }
    work();
    while (progress->done.load(std::memory_order_acquire) < n) std::this_thread::yield();
}

}  // namespace tokdyn
