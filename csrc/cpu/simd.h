// A float vector of the instruction set that this file is compiled for: Vec, WIDTH and the few operations the loops need.
// Included only by *_simd.cpp, which setup.py compiles once per instruction set with TOKDYN_SIMD naming it. Everything here is
// in an anonymous namespace and nothing of the C++ library is used: an inline function emitted with AVX-512 instructions must
// never become the copy that the linker keeps for all.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define TOKDYN_X86 1
#endif

#ifndef TOKDYN_SIMD
#error "compile with -DTOKDYN_SIMD=portable|avx2|avx512"
#endif

namespace {

using bf16 = uint16_t;  // the upper half of a float

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

#if defined(__AVX512F__)
using Vec = __m512;
constexpr int WIDTH = 16;
inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
inline bool any_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a); }
using Count = __m512i;
inline Count no_count() { return _mm512_setzero_si512(); }
inline Count count_at_least(Count n, Vec a, Vec b) {
    return _mm512_mask_sub_epi32(n, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), n, _mm512_set1_epi32(-1));
}
inline int64_t total(Count n) { return _mm512_reduce_add_epi32(n); }
// p · 2^n for n = shifted - magic; gradual underflow is off, so it reaches exactly 0
constexpr float EXP_FLOOR = -110.0f;
inline Vec scale_by_power(Vec p, Vec n, Vec, Vec) { return _mm512_scalef_ps(p, n); }

#elif defined(__AVX2__)
using Vec = __m256;
constexpr int WIDTH = 8;
inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }  // b where either is NaN
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
inline bool any_above(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
inline float sum(Vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
using Count = __m256i;
inline Count no_count() { return _mm256_setzero_si256(); }
inline Count count_at_least(Count n, Vec a, Vec b) {
    return _mm256_sub_epi32(n, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
inline int64_t total(Count n) {
    int32_t lanes[WIDTH];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), n);
    int64_t s = 0;
    for (int32_t lane : lanes) s += lane;
    return s;
}
constexpr float EXP_FLOOR = -87.0f;
inline Vec scale_by_power(Vec p, Vec, Vec shifted, Vec t) {
    const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
    return _mm256_andnot_ps(_mm256_cmp_ps(t, splat(EXP_FLOOR), _CMP_LE_OQ), _mm256_castsi256_ps(bits));
}

#else  // 16-byte vectors in the compiler's own notation: SSE2, NEON, or plain scalars
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Int __attribute__((vector_size(16)));
typedef int64_t Long __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef uint16_t Half __attribute__((vector_size(8)));
constexpr int WIDTH = 4;
inline Vec splat(float x) { return Vec{x, x, x, x}; }
inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline Vec load(const bf16* p) {
    Half half;
    std::memcpy(&half, p, sizeof half);
    return (Vec)(__builtin_convertvector(half, Bits) << 16);
}
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline void store(float* p, Vec a) { std::memcpy(p, &a, sizeof a); }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) { return a < b ? yes : no; }
inline bool any_above(Vec a, Vec b) {
    const Long lanes = (Long)(a > b);
    return (lanes[0] | lanes[1]) != 0;
}
inline float sum(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
using Count = Int;
inline Count no_count() { return Int{0, 0, 0, 0}; }
inline Count count_at_least(Count n, Vec a, Vec b) { return n - (Int)(a >= b); }
inline int64_t total(Count n) { return int64_t{n[0]} + n[1] + n[2] + n[3]; }
constexpr float EXP_FLOOR = -87.0f;
inline Vec scale_by_power(Vec p, Vec, Vec shifted, Vec t) {
    const Vec scaled = (Vec)((Bits)p + ((Bits)shifted << 23));
    return (Vec)(~(Int)(t <= splat(EXP_FLOOR)) & (Int)scaled);
}
#endif

// e = e^t for four vectors of t <= 0, within about an ulp; exactly 0 at and below EXP_FLOOR, to which t must be clamped; NaN
// stays NaN. t = n ln2 + r with |r| <= ln2/2 (the usual two-part ln2), e^r = 1 + r + r² q(r) with q the degree-4 minimax fit of
// relative error 3.1e-9; n is the nearest integer, by adding and taking away 1.5·2^23. Four at a time, step by step: one chain
// alone waits on its own latency.
inline void exp_nonpositive(const Vec (&t)[4], Vec (&e)[4]) {
    const Vec magic = splat(12582912.0f);
    Vec shifted[4], n[4], r[4], p[4];
    for (int i = 0; i < 4; ++i) shifted[i] = fma(t[i], splat(1.44269504f), magic);
    for (int i = 0; i < 4; ++i) n[i] = sub(shifted[i], magic);
    for (int i = 0; i < 4; ++i) r[i] = fma(n[i], splat(-0.693359375f), t[i]);
    for (int i = 0; i < 4; ++i) r[i] = fma(n[i], splat(2.12194440e-4f), r[i]);
    for (int i = 0; i < 4; ++i) p[i] = fma(splat(1.38143205e-3f), r[i], splat(8.36885162e-3f));
    const float coefficients[] = {4.16684002e-2f, 1.66665196e-1f, 4.99999940e-1f, 1.0f, 1.0f};
    for (float coefficient : coefficients)
        for (int i = 0; i < 4; ++i) p[i] = fma(p[i], r[i], splat(coefficient));
    for (int i = 0; i < 4; ++i) e[i] = scale_by_power(p[i], n[i], shifted[i], t[i]);
}

// tanh of four vectors, within two ulp. Below 0.625: x + x³ q(x²), q the degree-4 minimax fit of relative error 4.2e-9; above:
// (1 - e)/(1 + e) with e = e^{-2|x|} <= 0.29, where 1 - e loses nothing. NaN stays NaN.
inline void tanh4(Vec (&x)[4]) {
    const Vec zero = splat(0.0f), one = splat(1.0f);
    Vec magnitude[4], t[4], e[4];
    for (int i = 0; i < 4; ++i) magnitude[i] = max(sub(zero, x[i]), x[i]);
    for (int i = 0; i < 4; ++i) t[i] = max(splat(-80.0f), mul(magnitude[i], splat(-2.0f)));
    exp_nonpositive(t, e);
    const float coefficients[] = {2.06506178e-2f, -5.37435077e-2f, 1.33314908e-1f, -3.33332837e-1f};
    for (int i = 0; i < 4; ++i) {
        const Vec square = mul(x[i], x[i]), far = div(sub(one, e[i]), add(one, e[i]));
        Vec q = splat(-5.71707496e-3f);
        for (float coefficient : coefficients) q = fma(q, square, splat(coefficient));
        const Vec near = fma(mul(q, square), x[i], x[i]);
        x[i] = where_less(magnitude[i], splat(0.625f), near, where_less(x[i], zero, sub(zero, far), far));
    }
}

// Results below 1.2e-38 become 0 while this lives: they cost some hundred cycles each and change no sum.
class FlushDenormals {
  public:
#ifdef TOKDYN_X86
    FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8000); }
    ~FlushDenormals() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#else
    FlushDenormals() {}
    ~FlushDenormals() {}
#endif
};

}  // namespace
