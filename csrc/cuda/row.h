// What the row kernels share: a row of logits as groups of 16 bytes, sortable entries, reductions over a block.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "launch.h"
#include "ptx.h"

namespace tokdyn::cuda {

constexpr int WARP = 32;
constexpr unsigned EVERY_LANE = 0xffffffffu;
constexpr int MAX_THREADS = 512;  // per block; a block takes one row
constexpr int TOGETHER = 4;       // groups that a thread loads at a time
constexpr int BATCH = 4;          // such loads between two flushes of a thread's sums

__device__ inline float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ inline uint32_t twice(float x) {  // a bfloat16 in both halves
    const uint32_t bits = __float_as_uint(x);
    return bits | bits >> 16;
}

// WIDTH adjacent logits as four words of memory; Bound is a logit in the form in which a word can be compared with it.
template <class T>
struct Group;

template <>
struct Group<float> {
    static constexpr int WIDTH = 4;
    using Bound = float;
    uint32_t words[4];

    __device__ static Bound bound(float x) { return x; }
    __device__ static Group nothing() { return {0xff800000u, 0xff800000u, 0xff800000u, 0xff800000u}; }  // all -inf
    __device__ float operator[](int i) const { return __uint_as_float(words[i]); }
    __device__ void set(int i, float x) { words[i] = __float_as_uint(x); }
    template <int N>
    __device__ static float max(const Group (&groups)[N]) {
        float top = groups[0][0];
#pragma unroll
        for (int i = 1; i < 4 * N; ++i) top = max_nan(top, groups[i / 4][i % 4]);
        return top;
    }
    __device__ void clamp(Bound floor) {
#pragma unroll
        for (int i = 0; i < 4; ++i) set(i, max_nan((*this)[i], floor));
    }
};

template <>
struct Group<__nv_bfloat16> {
    static constexpr int WIDTH = 8;
    using Bound = uint32_t;
    uint32_t words[4];

    __device__ static Bound bound(float x) { return twice(x); }
    __device__ static Group nothing() { return {0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u}; }
    __device__ float operator[](int i) const { return i % 2 ? high_half(words[i / 2]) : low_half(words[i / 2]); }
    __device__ void set(int i, float x) {
        const uint32_t bits = __float_as_uint(x);
        words[i / 2] = i % 2 ? (words[i / 2] & 0xffffu) | bits : (words[i / 2] & 0xffff0000u) | bits >> 16;
    }
    template <int N>
    __device__ static float max(const Group (&groups)[N]) {
        uint32_t pair = groups[0].words[0];
#pragma unroll
        for (int i = 1; i < 4 * N; ++i) pair = max_nan_pair(pair, groups[i / 4].words[i % 4]);
        return max_nan(low_half(pair), high_half(pair));
    }
    __device__ void clamp(Bound floor) {
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = max_nan_pair(words[i], floor);
    }
};

// The next number of type T above x, so that z >= above(x) means z > x.
template <class T>
__device__ float above(float x) {
    constexpr uint32_t step = sizeof(T) == 2 ? 0x10000u : 1u;
    const uint32_t bits = __float_as_uint(x);
    if (x == 0) return __uint_as_float(step);
    return __uint_as_float(x > 0 ? bits + step : bits - step);
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// A row as groups numbered 0 .. last: group 0 ends at the first 16-byte boundary and the last one begins at the last; these
// two may hold fewer than WIDTH columns, or none. Every row has its own boundaries: its stride is any number.
template <class T>
struct Row {
    static constexpr int WIDTH = Group<T>::WIDTH;
    const T* data;
    int V, head, whole, last;  // columns; columns of group 0; groups between the boundaries; whole + 1

    __device__ Row(const Logits& logits, int64_t t)
        : data(static_cast<const T*>(logits.data) + t * logits.row_stride), V(static_cast<int>(logits.V)) {
        const int past = static_cast<int>(reinterpret_cast<uintptr_t>(data) / sizeof(T) % WIDTH);
        head = min(V, past ? WIDTH - past : 0);
        whole = (V - head) / WIDTH;
        last = whole + 1;
    }
    __device__ int first_column(int g) const { return g == 0 ? 0 : head + (g - 1) * WIDTH; }
    __device__ int columns(int g) const { return g == 0 ? head : g == last ? V - first_column(g) : WIDTH; }
    __device__ float operator[](int64_t j) const { return to_float(data[j]); }

    __device__ Group<T> load(int g) const {  // 1 <= g <= whole
        Group<T> r;
        load_16_bytes(data + head + int64_t{WIDTH} * (g - 1), r.words);
        return r;
    }
    __device__ Group<T> load_if(bool wanted, int g) const {  // all -inf if not wanted
        return wanted ? load(g) : Group<T>::nothing();
    }
    __device__ Group<T> load_ragged(int g) const {  // 0 <= g <= last; what is missing is -inf
        Group<T> r = Group<T>::nothing();
#pragma unroll
        for (int i = 0; i < WIDTH; ++i)
            if (i < columns(g)) r.set(i, (*this)[first_column(g) + i]);
        return r;
    }
};

// (x, j) as one integer, larger for the larger logit and, of equal logits, for the lower j; NaN is the largest, -0 equals
// +0, and no entry is 0.
__device__ inline uint64_t entry(float x, uint32_t j) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    const uint32_t order = isnan(x) ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return uint64_t{order} << 32 | (0xffffffffu - j);
}
__device__ inline float entry_logit(uint64_t e) {
    const uint32_t order = static_cast<uint32_t>(e >> 32);
    return __uint_as_float(order == 0xffffffffu ? order : order & 0x80000000u ? order ^ 0x80000000u : ~order);
}
__device__ inline uint32_t entry_index(uint64_t e) { return 0xffffffffu - static_cast<uint32_t>(e); }

struct Larger {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a > b ? a : b;
    }
};
struct Plus {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};

template <class T, class Op>
__device__ T warp_reduce(T value, Op op) {
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) value = op(value, __shfl_xor_sync(EVERY_LANE, value, step));
    return value;
}

// Reduces one value per thread over the block; every thread gets the result. `scratch` holds 32 values, `none` is the identity.
template <class T, class Op>
__device__ T block_reduce(T value, Op op, T none, void* scratch) {
    T* const of_warp = static_cast<T*>(scratch);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    value = warp_reduce(value, op);
    __syncthreads();  // scratch may still be in use by an earlier call
    if (lane == 0) of_warp[warp] = value;
    __syncthreads();
    return warp_reduce(lane < static_cast<int>(blockDim.x) / WARP ? of_warp[lane] : none, op);
}

// One block for each row.
template <class Args>
int launch_rows(void (*kernel)(Args), Args args, int device, void* stream) {
    const int64_t T = args.logits.T;
    int processors = 0;
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    const int threads = T < 2 * processors ? MAX_THREADS : MAX_THREADS / 2;  // more threads per row if there are few rows
    void* parameters[] = {&args};
    return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(T)), dim3(threads), parameters, 0,
                            static_cast<cudaStream_t>(stream));
}

}  // namespace tokdyn::cuda
