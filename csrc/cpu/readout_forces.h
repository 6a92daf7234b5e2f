// Turns chunks of products into the factors that the two sides of readout_forces multiply: exponentials, normalised at the
// end, or Γ if the row's statistics are known.
#pragma once
#include "logits.h"
#include "vectors.h"

namespace tokdyn {

// One row: out_j = slope_j (e_j (alpha + beta (t_j - mean)) + kappa) with t = z - reference, e = e^t, slope = 1 - (z/softcap)².
struct Residual {
    float reference, alpha, beta, mean, kappa, softcap;
};
struct ResidualFns {
    void (*residual)(float* z, int64_t n, const Residual& row);
};
namespace portable { extern const ResidualFns residual_fns; }
namespace avx2 { extern const ResidualFns residual_fns; }
namespace avx512 { extern const ResidualFns residual_fns; }

struct ForceFns {
    const FoldFns& fold;
    const LogitFns& logits;
    const ResidualFns& residual;
};

// Folds the products into `rest` and replaces them by e^{z - max} · slope, max the row's largest logit so far. The row's
// earlier exponentials must then be multiplied by factor [rows]; returns whether a factor is not 1. The n_dropped columns `dropped`
// (ascending) become 0.
bool exponentials(const Chunk& chunk, Rest* rest, float* factor, const int64_t* dropped, int64_t n_dropped, const ForceFns& fns,
                  int threads);

// The GTerm of each row: K targets with weights c, the entropy's weight v, the uniform target's u (v and u may be null).
struct Terms {
    const int64_t* targets;  // [rows, K]
    const int64_t* columns;  // [rows, K], the targets' columns in the chunks
    int64_t K;
    const float *c, *v, *u;
    double uniform;  // a token's probability under the uniform target: 1/V, or 0 if the other side sums to zero over the tokens
};

// Replaces products by Γ · slope, from the statistics of the whole row:
//   Γ_j = Σ_k c_k ([j = y_k] - pi_j) + v pi_j (log pi_j + H) + u (uniform - pi_j)
void forces(const Chunk& chunk, const Terms& terms, const Rest* rest, const ForceFns& fns, int threads);

// 1 / Σ_j e^{z_j - max}: what normalises the exponentials of a row; NaN where there is no softmax.
void normalisers(int64_t rows, const Rest* rest, float* out);

// matrix[m, l] *= by_row[m] · by_column[l]
void rescale(float* matrix, int64_t M, int64_t L, int64_t row_stride, const float* by_row, const float* by_column,
             const VectorFns& fns, int threads);

// out[r] += Σ_j a[r, j] b[r, j]
void add_row_dots(const float* a, const float* b, int64_t rows, int64_t n, int64_t a_stride, int64_t b_stride, double* out,
                  const VectorFns& fns, int threads);

}  // namespace tokdyn
