// The k largest logits of every row and their log-probabilities, chunk by chunk of the vocabulary.
#pragma once
#include "logits.h"

namespace tokdyn {

struct Candidate {
    float z;
    int64_t id;
};

// A row's state between chunks: best[0, count) holds at least the k best of the columns so far, unordered.
struct TopkRow {
    Rest rest;
    float threshold;  // a later column must exceed it
    int64_t count;
};

// Size of a row's candidate buffer; the larger it is, the more rarely it is reduced to k.
inline int64_t topk_capacity(int64_t k) { return k + k / 2 + 64; }

// The first column j in [begin, n) of a group of 64 (AVX-512) that holds an element above the threshold, or n.
using ScanFn = int64_t (*)(const void* data, int64_t begin, int64_t n, float threshold);
struct ScanFns {
    ScanFn float32, bfloat16;
    int64_t group;
};
namespace portable { extern const ScanFns scan_fns; }
namespace avx2 { extern const ScanFns scan_fns; }
namespace avx512 { extern const ScanFns scan_fns; }

struct TopkOut {
    int64_t k;
    float* values;  // [rows, k], descending; of equal logits the lower id first
    int64_t* ids;   // [rows, k]
};

// The top k of logits [T, V] in one read.
void topk_log_probs(const void* logits, Dtype dtype, int64_t T, int64_t V, int64_t row_stride, const TopkOut& out,
                    const FoldFns& fold, const ScanFns& scan, int threads);

// Adds one chunk of products to `state` and the rows' candidates, topk_capacity(k) each.
void topk_chunk(const Chunk& chunk, int64_t k, TopkRow* state, Candidate* best, const FoldFns& fold, const LogitFns& logits,
                const ScanFns& scan, int threads);

// Writes the results after the last chunk.
void finish_topk(int64_t rows, TopkRow* state, Candidate* best, const TopkOut& out, int threads);

}  // namespace tokdyn
