// token_stats on the CPU: what the threaded driver (token_stats.cpp), the vector loop (token_stats_simd.cpp, compiled once per
// instruction set) and the binding share. Plain data and functions only, so that no template is instantiated twice.
#pragma once
#include <math.h>

#include <cstdint>

namespace tokdyn {

enum class Dtype { float32, bfloat16 };

// Statistics of a set of columns without the target y. With a = argmax, and every sum over the set without a:
//   sum = Σ e^{z_j - max}    xsum = Σ e^{z_j - max} (z_j - max)    sqsum = Σ e^{2 (z_j - max)}
// a and y are left out so that the sums of the other columns have full relative accuracy however peaked the row is.
struct Rest {
    float max;
    int64_t argmax;  // lowest column among ties; -1 while the set has no entry above -inf
    double sum, xsum, sqsum;
    int64_t above;  // columns that rank above the target: z_j > z_y, or z_j == z_y and j < y
};
constexpr Rest NO_COLUMNS = {-INFINITY, -1, 0, 0, 0, 0};

// Rescales the sums to a larger `max` and adds the set's own maximum to them. (static: each instruction set has its own copy.)
static inline void lower_to(double max, Rest& rest) {
    const double d = rest.max - max, s = exp(d);
    rest.xsum = s * (rest.xsum + d * (rest.sum + 1));
    rest.sum = s * (rest.sum + 1);
    rest.sqsum = s * s * (rest.sqsum + 1);
}

// Adds columns [first, first + n) of one row, at `data`, to `rest`. Column y is left out, and ranks are counted against z_y;
// for a row without a target y = -1 and z_y = NaN. One read, nothing allocated.
using FoldFn = void (*)(Rest& rest, const void* data, int64_t first, int64_t n, int64_t y, float z_y);

// The fp32 vector loop of every instruction set that this build holds; null where it was not compiled.
struct FoldFns {
    FoldFn float32, bfloat16;
};
namespace portable { extern const FoldFns fold_fns; }
namespace avx2 { extern const FoldFns fold_fns; }
namespace avx512 { extern const FoldFns fold_fns; }

struct TokenStatsOut {
    float *logsumexp, *log_prob, *entropy, *collision, *g_norm;
    int64_t *rank, *argmax;
    float* argmax_log_prob;
};

// Writes row t of the result from the target y, its logit and the sums over all other columns. Returns false, and writes
// nothing, if the row has no softmax: a NaN, a logit of +inf, or all logits -inf.
bool finish_row(const TokenStatsOut& out, int64_t t, int64_t y, float z_y, Rest rest);

// Writes a row that has no softmax: NaN, with the rank and argmax by comparison (0 and -1 if it holds a NaN).
void finish_undefined(const TokenStatsOut& out, int64_t t, int64_t rank, int64_t argmax);

struct TokenStatsArgs {
    const void* logits;
    Dtype dtype;
    int64_t T, V, row_stride;  // stride in elements; columns are adjacent
    const int64_t* targets;    // already checked to lie in [0, V)
    TokenStatsOut out;
};

// The result does not depend on `threads`: columns are always folded in the same fixed chunks.
void token_stats(const TokenStatsArgs& args, const FoldFns& fns, int threads);

}  // namespace tokdyn
