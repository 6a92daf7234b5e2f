// Elementwise products of two Gram tiles, written, added up, or summed over segments of columns.
#pragma once
#include "vectors.h"

namespace tokdyn {

// Two tiles [rows, n] of Gram matrices, adjacent in memory.
struct GramTiles {
    const float *a, *b;
    int64_t rows, n;
};

// out[r, j] = or += a[r, j] b[r, j]
void multiply(const GramTiles& tiles, float* out, int64_t out_stride, bool add, const VectorFns& fns, int threads);

// out[r, segment[j]] += a[r, j] b[r, j]; out [rows, S] in double
void segment_dots(const GramTiles& tiles, const int64_t* segment, double* out, int64_t S, const VectorFns& fns, int threads);

}  // namespace tokdyn
