// token_stats of a readout's logits, chunk by chunk of the vocabulary.
#pragma once
#include "logits.h"

namespace tokdyn {

// Folds one chunk of products into the statistics `rest` of its rows. y [rows] are the targets and z_y [rows] their logits; the
// chunk's own value in column y is ignored.
void fold_chunk(const Chunk& chunk, const int64_t* y, const float* z_y, Rest* rest, const FoldFns& fold, const LogitFns& logits,
                int threads);

// Writes the results after the last chunk.
void finish_token_stats(const TokenStatsOut& out, int64_t rows, const int64_t* y, const float* z_y, const Rest* rest);

}  // namespace tokdyn
