// What the kernels over chunks of logits share: a BLAS writes the products x = W h of some rows and n adjacent columns to a
// buffer; here they are turned into logits in place and folded into the statistics of their rows.
#pragma once
#include "token_stats.h"

namespace tokdyn {

// z = softcap(scale (x + bias)) / temperature with softcap(x) = s tanh(x/s); bias null: none, softcap 0: none.
struct Readout {
    const float* bias;
    float scale, softcap, temperature;
};

struct LogitFns {
    void (*apply)(float* z, int64_t n, const Readout& readout);  // readout.bias points at the first of the n columns
};
namespace portable { extern const LogitFns logit_fns; }
namespace avx2 { extern const LogitFns logit_fns; }
namespace avx512 { extern const LogitFns logit_fns; }

// A chunk of products: `rows` rows, columns [first, first + n) of the vocabulary.
struct Chunk {
    float* z;
    int64_t rows, row_stride, first, n;
    Readout readout;  // its bias points at column 0 of the vocabulary
};

inline float* row_of(const Chunk& chunk, int64_t r) { return chunk.z + r * chunk.row_stride; }

// Turns one row of products into logits.
void finish_logits(const Chunk& chunk, int64_t r, const LogitFns& fns);

// Folds logits into the row's statistics. After a +inf the row has max = +inf, and sums that are NaN if it holds a NaN, else 0.
void fold_logits(const Chunk& chunk, int64_t r, Rest& rest, int64_t y, float z_y, const FoldFns& fns);

// Whether the softmax is undefined: a NaN, a logit of +inf, or none above -inf.
inline bool is_undefined(const Rest& rest) {
    return rest.argmax < 0 || !(rest.max < INFINITY) || !(rest.sum + rest.xsum < INFINITY);
}

int threads_for(const Chunk& chunk, int threads);

}  // namespace tokdyn
