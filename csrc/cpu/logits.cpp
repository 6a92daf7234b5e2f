// Products of hidden states and weights to logits, and logits into the running statistics of their rows.
#include "logits.h"

#include <algorithm>
#include <cmath>

namespace tokdyn {
namespace {

constexpr int64_t PER_THREAD = 1 << 16;  // fewest logits for one thread

bool any_nan(const float* z, int64_t n) {
    for (int64_t j = 0; j < n; ++j)
        if (std::isnan(z[j])) return true;
    return false;
}

}  // namespace

void finish_logits(const Chunk& chunk, int64_t r, const LogitFns& fns) {
    Readout readout = chunk.readout;
    if (!readout.bias && readout.scale == 1 && readout.softcap == 0 && readout.temperature == 1) return;
    if (readout.bias) readout.bias += chunk.first;
    fns.apply(row_of(chunk, r), chunk.n, readout);
}

void fold_logits(const Chunk& chunk, int64_t r, Rest& rest, int64_t y, float z_y, const FoldFns& fns) {
    const bool broken = std::isnan(rest.sum + rest.xsum + rest.sqsum);
    fns.float32(rest, row_of(chunk, r), chunk.first, chunk.n, y, z_y);
    if (rest.max < INFINITY) return;
    // with a logit of +inf the sums are NaN (inf - inf) without a NaN among the logits
    const bool is_nan = broken || any_nan(row_of(chunk, r), chunk.n);
    rest.sum = rest.xsum = rest.sqsum = is_nan ? NAN : 0.0;
}

int threads_for(const Chunk& chunk, int threads) {
    return static_cast<int>(std::min<int64_t>(threads, 1 + chunk.rows * chunk.n / PER_THREAD));
}

}  // namespace tokdyn
