// The derivative of softmax attention for many cotangents, over a block of queries whose softmax is given.
#pragma once
#include "products.h"
#include "vectors.h"

namespace tokdyn {

// Strides, in elements, of cotangents, batches, key heads, query heads of a key head, and rows; a row is contiguous.
struct Rows {
    float* at;
    int64_t n, batch, head, group, row;
};

// A block of `rows` queries and the keys that they see; dk and dv are added to for the first `old` keys and written for the
// others. P [B, Hk, G, rows, padded] and W = slope ⊙ P are 0 in the padding up to a multiple
// of 16; q [B, Hk, G, rows, D], k [B, Hk, keys, D], v transposed [B, Hk, E, padded], o [B, Hk, G, rows, E]; D and E multiples
// of 16.
struct AttentionBlock {
    int64_t n, B, Hk, G, rows, keys, old, padded, D, E;
    const float *P, *W, *q, *k, *v, *o;
};

// dv += Pᵀ dO,   dS = W ⊙ (dO Vᵀ - rowsum(dO ⊙ O)),   dq = dS K,   dk += dSᵀ Q
void cotangent_attention(const AttentionBlock& block, const Rows& d_o, const Rows& dq, const Rows& dk, const Rows& dv,
                         const ProductFns& products, const VectorFns& vectors, int threads);

}  // namespace tokdyn
