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

// Takes the sums relative to a larger `max` instead, the set's own maximum now included. (static: one private copy per
// instruction set.)
static inline void lower_to(double max, Rest& rest) {
    const double d = rest.max - max, s = exp(d);
    rest.xsum = s * (rest.xsum + d * (rest.sum + 1));
    rest.sum = s * (rest.sum + 1);
    rest.sqsum = s * s * (rest.sqsum + 1);
}

// Columns [begin, end) of one row, without column y. One read, nothing allocated, nothing thrown.
using RestFn = Rest (*)(const void* row, int64_t begin, int64_t end, int64_t y);

// The fp32 vector loop of every instruction set that this build holds; null where it was not compiled.
struct RestFns {
    RestFn float32, bfloat16;
};
namespace portable { extern const RestFns rest_fns; }
namespace avx2 { extern const RestFns rest_fns; }
namespace avx512 { extern const RestFns rest_fns; }

struct TokenStatsArgs {
    const void* logits;
    Dtype dtype;
    int64_t T, V, row_stride;  // stride in elements; columns are adjacent
    const int64_t* targets;    // already checked to lie in [0, V)
    float *logsumexp, *log_prob, *entropy, *collision, *g_norm;
    int64_t *rank, *argmax;
    float* argmax_log_prob;
};

// The result does not depend on `threads`: columns are always folded in the same fixed chunks.
void token_stats(const TokenStatsArgs& args, const RestFns& fns, int threads);

}  // namespace tokdyn
