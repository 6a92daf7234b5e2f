// token_stats on the CPU: what the threaded driver (token_stats.cpp), the vector loop (token_stats_simd.cpp, compiled once per
// instruction set) and the binding share. Plain data and functions only, so that no template is instantiated twice.
#pragma once
#include <math.h>

#include <cstdint>

namespace tokdyn {

enum class Dtype { float32, bfloat16 };

// Statistics of a set of columns that never holds the target y. With a = argmax, and every sum over the set without a:
//   sum = Σ e^{z_j - max}    xsum = Σ e^{z_j - max} (z_j - max)    sqsum = Σ e^{2 (z_j - max)}
// a and y stay outside the sums because what is left then has full relative accuracy however peaked the row is.
struct Rest {
    float max;
    int64_t argmax;  // lowest column among ties; -1 while the set has no entry above -inf
    double sum, xsum, sqsum;
    int64_t above;  // columns that rank above the target: z_j > z_y, or z_j == z_y and j < y
};
constexpr Rest NO_COLUMNS = {-INFINITY, -1, 0, 0, 0, 0};

// Takes the sums relative to a larger `max` instead, the set's own maximum now included. (static: one private copy per
// instruction set.)
static inline void lower_to(double max, Rest& rest) {
    const double d = rest.max - max, s = exp(d);
    rest.xsum = s * (rest.xsum + d * (rest.sum + 1));
    rest.sum = s * (rest.sum + 1);
    rest.sqsum = s * s * (rest.sqsum + 1);
}

// Takes n columns of one row, which stand at `data`, into `rest`; the first of them is column `first`. Column y is left out and
// z_y is what ranks are counted against: y = -1 and z_y = NaN for a row without a target. One read, nothing allocated.
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

// Row t of the result from the target y, its logit and every other column; false, and nothing written, where the row has no
// softmax: a NaN, a logit of +inf, or -inf throughout.
bool finish_row(const TokenStatsOut& out, int64_t t, int64_t y, float z_y, Rest rest);

// The row without a softmax: NaN, with the rank and argmax that its comparisons give (0 and -1 where a NaN leaves none).
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
