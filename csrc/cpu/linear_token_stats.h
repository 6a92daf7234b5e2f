// token_stats of a readout's logits, chunk by chunk of the vocabulary.
#pragma once
#include "logits.h"

namespace tokdyn {

// One chunk of products into the statistics `rest` of its rows; y [rows] the targets, z_y [rows] their logits, which stand for
// column y whatever the chunk holds there.
void fold_chunk(const Chunk& chunk, const int64_t* y, const float* z_y, Rest* rest, const FoldFns& fold, const LogitFns& logits,
                int threads);

// The result once every column went by.
void finish_token_stats(const TokenStatsOut& out, int64_t rows, const int64_t* y, const float* z_y, const Rest* rest);

}  // namespace tokdyn
