// The elementwise product of two Gram tiles, summed over segments of columns.
#pragma once
#include "vectors.h"

namespace tokdyn {

// Two tiles [rows, n] of Gram matrices, adjacent in memory.
struct GramTiles {
    const float *a, *b;
    int64_t rows, n;
};

// out[r, segment[j]] += a[r, j] b[r, j]; out [rows, S] in double
void segment_dots(const GramTiles& tiles, const int64_t* segment, double* out, int64_t S, const VectorFns& fns, int threads);

}  // namespace tokdyn
