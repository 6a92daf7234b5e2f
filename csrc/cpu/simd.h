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
inline void load_pairs(const bf16* p, Vec& even, Vec& odd) {
    const __m512i pairs = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_epi32(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where either is NaN, as in min
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
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
constexpr float EXP_END = 110.0f;
inline bool all_within(const Vec (&s)[4]) {  // as unsigned bits, an s < 0 is large by its sign bit and an s > EXP_END by its size
    __m512i bits[4];
    for (int i = 0; i < 4; ++i) bits[i] = _mm512_castps_si512(s[i]);
    const __m512i most = _mm512_max_epu32(_mm512_max_epu32(bits[0], bits[1]), _mm512_max_epu32(bits[2], bits[3]));
    return _mm512_cmp_epu32_mask(most, _mm512_castps_si512(splat(EXP_END)), _MM_CMPINT_NLT) == 0;
}
// n in steps of 1/32, so two terms after 1 - r are enough: |r| <= ln2/64, relative error 5.3e-8 of either sign
inline void exp_negated(const Vec (&s)[4], Vec (&e)[4]) {
    alignas(64) static const float powers[32] = {  // 2^(k/32)
        1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
        1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
        1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
        1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};
    const Vec magic = splat(393216.0f), low = load(powers), high = load(powers + 16);  // magic: 1.5·2^18, an ulp is 1/32
    Vec shifted[4], n[4], r[4], p[4];
    for (int i = 0; i < 4; ++i) shifted[i] = fma(s[i], splat(-1.44269504f), magic);
    for (int i = 0; i < 4; ++i) n[i] = sub(shifted[i], magic);
    for (int i = 0; i < 4; ++i) r[i] = fma(n[i], splat(0.693147181f), s[i]);
    for (int i = 0; i < 4; ++i) p[i] = fma(r[i], splat(0.5f), splat(-1.00001466f));
    for (int i = 0; i < 4; ++i) p[i] = mul(p[i], r[i]);  // e^-r - 1
    for (int i = 0; i < 4; ++i) {
        const Vec power = _mm512_permutex2var_ps(low, _mm512_castps_si512(shifted[i]), high);
        p[i] = fma(power, p[i], power);
    }
    for (int i = 0; i < 4; ++i) e[i] = _mm512_scalef_ps(p[i], n[i]);  // by 2^floor(n); gradual underflow is off: reaches 0
}
inline Vec zero_at_end(Vec e, Vec) { return e; }  // it is 0 already

#elif defined(__AVX2__)
using Vec = __m256;
constexpr int WIDTH = 8;
inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void load_pairs(const bf16* p, Vec& even, Vec& odd) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }  // b where either is NaN, as in min
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
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
constexpr float EXP_END = 87.0f;
inline bool all_within(const Vec (&s)[4]) {
    __m256i bits[4];
    for (int i = 0; i < 4; ++i) bits[i] = _mm256_castps_si256(s[i]);
    const __m256i most = _mm256_max_epu32(_mm256_max_epu32(bits[0], bits[1]), _mm256_max_epu32(bits[2], bits[3]));
    const __m256i out = _mm256_cmpeq_epi32(_mm256_max_epu32(most, _mm256_castps_si256(splat(EXP_END))), most);
    return _mm256_testz_si256(out, out);
}
inline Vec less_n_ln2(Vec s, Vec n) { return fma(n, splat(0.693147181f), s); }
inline Vec scale_by_power(Vec p, Vec shifted) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
}

#else  // 16-byte vectors of the compiler's vector extension: SSE2, NEON, or plain scalars
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Int __attribute__((vector_size(16)));
typedef int64_t Long __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
constexpr int WIDTH = 4;
inline Vec splat(float x) { return Vec{x, x, x, x}; }
inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void load_pairs(const bf16* p, Vec& even, Vec& odd) {
    Bits pairs;
    std::memcpy(&pairs, p, sizeof pairs);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    odd = (Vec)(pairs << 16), even = (Vec)(pairs & 0xffff0000u);
#else
    even = (Vec)(pairs << 16), odd = (Vec)(pairs & 0xffff0000u);
#endif
}
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline void store(float* p, Vec a) { std::memcpy(p, &a, sizeof a); }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN, as in min
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
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
constexpr float EXP_END = 87.0f;
inline bool all_within(const Vec (&s)[4]) {
    const Vec zero = splat(0.0f), end = splat(EXP_END);
    Int within = (s[0] >= zero) & (s[0] < end);
    for (int i = 1; i < 4; ++i) within &= (s[i] >= zero) & (s[i] < end);
    const Long lanes = (Long)within;
    return (lanes[0] & lanes[1]) == -1;
}
inline Vec less_n_ln2(Vec s, Vec n) {  // ln2 in two parts: without an fma each product must be exact
    return fma(n, splat(-2.12194440e-4f), fma(n, splat(0.693359375f), s));
}
inline Vec scale_by_power(Vec p, Vec shifted) { return (Vec)((Bits)p + ((Bits)shifted << 23)); }
#endif

// all_within: every s of four vectors lies in [0, EXP_END); false where one is NaN.
//
// exp_negated: e = e^-s for four vectors of such s, within two ulp and 2.8e-9 s, a twentieth of what rounding s costs; NaN stays
// NaN. With n the nearest integer to -s/ln2, by adding and taking away 1.5·2^23, and r = s + n ln2: e^-r = 1 - r + r² q(r), q
// the degree-4 minimax fit of relative error 3.1e-9. Four at a time, step by step: one chain alone waits on its own latency. An
// s of EXP_END itself is legal too, and zero_at_end makes its exponential what it stands for, exactly 0.
#if !defined(__AVX512F__)
inline void exp_negated(const Vec (&s)[4], Vec (&e)[4]) {
    const Vec magic = splat(12582912.0f);
    Vec shifted[4], n[4], r[4], p[4];
    for (int i = 0; i < 4; ++i) shifted[i] = fma(s[i], splat(-1.44269504f), magic);
    for (int i = 0; i < 4; ++i) n[i] = sub(shifted[i], magic);
    for (int i = 0; i < 4; ++i) r[i] = less_n_ln2(s[i], n[i]);
    for (int i = 0; i < 4; ++i) p[i] = fma(splat(1.38143205e-3f), r[i], splat(-8.36885162e-3f));
    const float coefficients[] = {4.16684002e-2f, -1.66665196e-1f, 4.99999940e-1f, -1.0f, 1.0f};
    for (float coefficient : coefficients)
        for (int i = 0; i < 4; ++i) p[i] = fma(p[i], r[i], splat(coefficient));
    for (int i = 0; i < 4; ++i) e[i] = scale_by_power(p[i], shifted[i]);
}
inline Vec zero_at_end(Vec e, Vec s) { return where_less(s, splat(EXP_END), e, mul(sub(splat(EXP_END), s), e)); }
#endif

// Loads 4 WIDTH adjacent elements into four vectors, not in order: each bfloat16 of a 32-bit pair becomes a float by one
// instruction, and keeping the order would take a shuffle more.
inline void load4(const float* p, Vec (&x)[4]) {
    for (int i = 0; i < 4; ++i) x[i] = load(p + i * WIDTH);
}
inline void load4(const bf16* p, Vec (&x)[4]) {
    load_pairs(p, x[0], x[1]);
    load_pairs(p + 2 * WIDTH, x[2], x[3]);
}

// The largest element of four vectors; unspecified if one is NaN.
inline float top_of(const Vec (&x)[4]) {
    float lanes[WIDTH];
    store(lanes, max(max(x[0], x[1]), max(x[2], x[3])));
    float top = lanes[0];
    for (int i = 1; i < WIDTH; ++i) top = lanes[i] > top ? lanes[i] : top;
    return top;
}

// tanh of four vectors, within two ulp. Below 0.625: x + x³ q(x²), q the degree-4 minimax fit of relative error 4.2e-9; above:
// (1 - e)/(1 + e) with e = e^{-2|x|} <= 0.29, where 1 - e loses nothing. NaN stays NaN.
inline void tanh4(Vec (&x)[4]) {
    const Vec zero = splat(0.0f), one = splat(1.0f);
    Vec magnitude[4], s[4], e[4];
    for (int i = 0; i < 4; ++i) magnitude[i] = max(sub(zero, x[i]), x[i]);
    for (int i = 0; i < 4; ++i) s[i] = min(splat(80.0f), mul(magnitude[i], splat(2.0f)));
    exp_negated(s, e);
    const float coefficients[] = {2.06506178e-2f, -5.37435077e-2f, 1.33314908e-1f, -3.33332837e-1f};
    for (int i = 0; i < 4; ++i) {
        const Vec square = mul(x[i], x[i]), far = div(sub(one, e[i]), add(one, e[i]));
        Vec q = splat(-5.71707496e-3f);
        for (float coefficient : coefficients) q = fma(q, square, splat(coefficient));
        const Vec near = fma(mul(q, square), x[i], x[i]);
        x[i] = where_less(magnitude[i], splat(0.625f), near, where_less(x[i], zero, sub(zero, far), far));
    }
}

// While this object exists, results below 1.2e-38 become 0: denormals cost some hundred cycles each and change no sum.
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
