// CUDA's execution model on the CPU, as much of it as csrc/cuda uses, so that the kernels' own source runs where there is no GPU.
// Every thread of a block is a fibre; a fibre runs until it reaches a collective (barrier, shuffle, ballot) and then waits for the
// others. A collective that some thread never reaches ends the run with an error, as it would hang a GPU. The fibre that goes
// on is always the first that can, or always the last: one end of the block runs ahead as far as the barriers let it, so that
// a barrier that is missing shows in one of the two orders.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::isfinite;
using std::isnan;
using std::max;
using std::min;

struct dim3 {
    unsigned x, y = 1, z = 1;
    explicit dim3(unsigned x) : x(x) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

namespace emulation {

constexpr size_t STACK = 128 * 1024;
constexpr int WARP = 32;
inline bool falling = false;  // the last fibre that can goes on, not the first
inline int processors = 4;

struct Collective {
    int size = 0, arrived = 0;
    unsigned generation = 0;
    uint64_t given[WARP] = {}, taken[2][WARP] = {};
};
struct Fibre {
    ucontext_t context;  // where it starts
    jmp_buf place;       // where it goes on: cheaper than a ucontext, which asks the kernel
    std::unique_ptr<char[]> stack;
    bool started = false;
};
inline std::vector<Fibre> fibres;
inline std::vector<Collective> warps;
inline Collective block;
inline std::vector<uint32_t> ready;  // a bit for each fibre, a word for each warp
inline jmp_buf scheduler;
inline unsigned current, left, block_index, block_size;

inline void (*body)(const void*);
inline const void* body_argument;

inline void let_others() {
    if (_setjmp(fibres[current].place) == 0) _longjmp(scheduler, 1);
}
inline void resume(Fibre& fibre) {
    if (_setjmp(scheduler)) return;
    if (fibre.started) _longjmp(fibre.place, 1);
    fibre.started = true;
    setcontext(&fibre.context);
}
inline void wait_for(Collective& c) {
    ready[current / WARP] &= ~(1u << current % WARP);
    if (++c.arrived == c.size) {  // the last one wakes them all
        std::memcpy(c.taken[c.generation++ % 2], c.given, sizeof c.given);
        c.arrived = 0;
        if (&c == &block) ready.assign(ready.size(), ~0u);
        else ready[current / WARP] = ~0u;
    }
    let_others();
}
inline const uint64_t* exchange(uint64_t mine) {
    Collective& warp = warps[current / WARP];
    warp.given[current % WARP] = mine;
    const unsigned generation = warp.generation;
    wait_for(warp);
    return warp.taken[generation % 2];
}
template <class T>
T from_lane(T value, int source) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = exchange(bits)[source];
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline void start() {
    body(body_argument);
    ready[current / WARP] &= ~(1u << current % WARP);
    --left;
    let_others();
}
inline void run_block() {
    fibres.resize(block_size);
    warps.assign(block_size / WARP, {});
    for (Collective& warp : warps) warp.size = WARP;
    block = {};
    block.size = static_cast<int>(block_size);
    for (Fibre& fibre : fibres) {
        if (!fibre.stack) fibre.stack.reset(new char[STACK]);
        fibre.started = false;
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.get();
        fibre.context.uc_stack.ss_size = STACK;
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, start, 0);
    }
    ready.assign(block_size / WARP, ~0u);
    for (left = block_size; left; resume(fibres[current])) {
        int warp = falling ? static_cast<int>(ready.size()) - 1 : 0;
        while (warp >= 0 && warp < static_cast<int>(ready.size()) && !ready[warp]) warp += falling ? -1 : 1;
        if (warp < 0 || warp == static_cast<int>(ready.size())) {
            std::fprintf(stderr, "a collective that not every thread reached, in block %u\n", block_index);
            std::abort();
        }
        current = warp * WARP + (falling ? 31 - __builtin_clz(ready[warp]) : __builtin_ctz(ready[warp]));
    }
}

struct Index {
    unsigned (*value)();
    operator unsigned() const { return value(); }
};
struct Indices {
    Index x;
};

}  // namespace emulation

inline const emulation::Indices threadIdx{{[] { return emulation::current; }}};
inline const emulation::Indices blockIdx{{[] { return emulation::block_index; }}};
inline const emulation::Indices blockDim{{[] { return emulation::block_size; }}};

inline void __syncthreads() { emulation::wait_for(emulation::block); }
inline void __syncwarp() { emulation::exchange(0); }
template <class T>
T __shfl_sync(unsigned, T value, int source) {
    return emulation::from_lane(value, source);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int step) {
    return emulation::from_lane(value, emulation::current % emulation::WARP ^ step);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
    const int lane = emulation::current % emulation::WARP;
    return emulation::from_lane(value, lane < step ? lane : lane - step);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    const uint64_t* votes = emulation::exchange(vote);
    unsigned mask = 0;
    for (int lane = 0; lane < emulation::WARP; ++lane) mask |= static_cast<unsigned>(votes[lane]) << lane;
    return mask;
}
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof x);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = emulation::processors;
    return cudaSuccess;
}
template <class Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 threads, void** parameters, size_t, cudaStream_t) {
    struct Call {
        void (*kernel)(Args);
        const Args* args;
    };
    const Call call{kernel, static_cast<const Args*>(parameters[0])};
    emulation::body = [](const void* c) { static_cast<const Call*>(c)->kernel(*static_cast<const Call*>(c)->args); };
    emulation::body_argument = &call;
    emulation::block_size = threads.x;
    for (emulation::block_index = 0; emulation::block_index < grid.x; ++emulation::block_index) emulation::run_block();
    emulation::body_argument = nullptr;
    return cudaSuccess;
}

// In place of csrc/cuda/ptx.h.
#define TOKDYN_CUDA_PTX_H
namespace tokdyn::cuda {

inline float max_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : a > b ? a : b; }
inline uint32_t max_nan_pair(uint32_t a, uint32_t b) {
    const float low = max_nan(__uint_as_float(a << 16), __uint_as_float(b << 16));
    const float high = max_nan(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u));
    return __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000u);
}
// As wrong as the instruction may be: a relative error of up to 2^-22 whose sign and size vary from one argument to the next.
inline float exp2_fast(float x) {
    if (x < -126) return 0;
    const double error = static_cast<double>(static_cast<int32_t>(__float_as_uint(x) * 2654435761u)) / 2147483648.0;
    return static_cast<float>(std::exp2(static_cast<double>(x)) * (x == 0 ? 1 : 1 + error * 0x1p-23));
}
inline uint32_t count_pair_at_least(uint32_t counts, uint32_t a, uint32_t b) {
    const auto add = [](uint32_t count, uint32_t x, uint32_t y) {
        const float sum = __uint_as_float(count) + (__uint_as_float(x) >= __uint_as_float(y) ? 1 : 0);
        if (sum > 256) std::abort();  // a bfloat16 does not count so far
        return __float_as_uint(sum);
    };
    return add(counts << 16, a << 16, b << 16) >> 16 | add(counts & 0xffff0000u, a & 0xffff0000u, b & 0xffff0000u);
}
inline void load_16_bytes(const void* address, uint32_t (&words)[4]) {
    if (reinterpret_cast<uintptr_t>(address) % 16) std::abort();
    std::memcpy(words, address, 16);
}

}  // namespace tokdyn::cuda
