// token_stats of a readout's logits: rows over threads, each row's statistics carried from chunk to chunk.
#include "linear_token_stats.h"

#include <cmath>

#include "parallel.h"

namespace tokdyn {

void fold_chunk(const Chunk& chunk, const int64_t* y, const float* z_y, Rest* rest, const FoldFns& fold, const LogitFns& logits,
                int threads) {
    parallel_for(chunk.rows, threads_for(chunk, threads), [&](int64_t r) {
        finish_logits(chunk, r, logits);
        fold_logits(chunk, r, rest[r], y ? y[r] : -1, z_y ? z_y[r] : NAN, fold);
    });
}

void finish_token_stats(const TokenStatsOut& out, int64_t rows, const int64_t* y, const float* z_y, const Rest* rest) {
    for (int64_t r = 0; r < rows; ++r) {
        if (finish_row(out, r, y[r], z_y[r], rest[r])) continue;
        const bool is_nan = std::isnan(z_y[r]) || std::isnan(rest[r].sum);  // sums are NaN-free at +inf: fold_logits
        const bool y_is_top = z_y[r] > rest[r].max || (z_y[r] == rest[r].max && y[r] < rest[r].argmax);
        const int64_t argmax = y_is_top ? y[r] : rest[r].argmax < 0 ? 0 : rest[r].argmax;
        finish_undefined(out, r, is_nan ? 0 : rest[r].above, is_nan ? -1 : argmax);
    }
}

}  // namespace tokdyn
