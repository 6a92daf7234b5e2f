// Instructions without a C++ intrinsic, one function each. No other file of csrc/cuda holds PTX.
#ifndef TOKDYN_CUDA_PTX_H
#define TOKDYN_CUDA_PTX_H
#include <cstdint>

namespace tokdyn::cuda {

// Maxima that return NaN if an operand is NaN; the second works on pairs of bfloat16.
__device__ inline float max_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
__device__ inline uint32_t max_nan_pair(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// 2^x: relative error below 2^-22, exactly 1 at 0, 0 from -126 downwards.
__device__ inline float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// counts + (a >= b ? 1 : 0) in two bfloat16 each; exact while a count is below 256.
__device__ inline uint32_t count_pair_at_least(uint32_t counts, uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 900
    uint32_t ones;
    asm("set.ge.bf16x2.bf16x2 %0, %1, %2;" : "=r"(ones) : "r"(a), "r"(b));
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(counts) : "r"(counts), "r"(ones));
#endif
    return counts;
}

// Loads 16 read-only bytes that are not reused, without allocating in the L1 cache.
__device__ inline void load_16_bytes(const void* address, uint32_t (&words)[4]) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(address));
}

}  // namespace tokdyn::cuda
#endif
