// Matrix products by tiles of c that stay in registers during the loop over k.
#include "products.h"
#include "simd.h"

namespace {

constexpr int ROWS = 6;                         // rows of a tile
constexpr int COLUMNS = WIDTH == 16 ? 4 : 2;    // vectors per row of a tile: leaves registers for a row of b and one of a
constexpr int64_t DEPTH = 256;                  // rows of a panel of b, which stays in the L1 cache

template <int R, int C>
void tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t K,
          bool add_up) {
    Vec sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < C; ++j) sums[r][j] = add_up ? load(c + r * c_row + j * WIDTH) : splat(0.0f);
    for (int64_t k = 0; k < K; ++k, a += a_column, b += b_row) {
        Vec row[C];
        for (int j = 0; j < C; ++j) row[j] = load(b + j * WIDTH);
        for (int r = 0; r < R; ++r) {
            const Vec factor = splat(a[r * a_row]);
            for (int j = 0; j < C; ++j) sums[r][j] = fma(factor, row[j], sums[r][j]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < C; ++j) store(c + r * c_row + j * WIDTH, sums[r][j]);
}

template <int C>
void strip(tokdyn::Strided a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t M, int64_t K, bool add_up) {
    int64_t i = 0;
    for (; i + ROWS <= M; i += ROWS) tile<ROWS, C>(a.at + i * a.row, a.row, a.column, b, b_row, c + i * c_row, c_row, K, add_up);
    const float* rest = a.at + i * a.row;
    c += i * c_row;
    switch (M - i) {
        case 5: return tile<5, C>(rest, a.row, a.column, b, b_row, c, c_row, K, add_up);
        case 4: return tile<4, C>(rest, a.row, a.column, b, b_row, c, c_row, K, add_up);
        case 3: return tile<3, C>(rest, a.row, a.column, b, b_row, c, c_row, K, add_up);
        case 2: return tile<2, C>(rest, a.row, a.column, b, b_row, c, c_row, K, add_up);
        case 1: return tile<1, C>(rest, a.row, a.column, b, b_row, c, c_row, K, add_up);
        default: return;
    }
}

void multiply(tokdyn::Strided a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t M, int64_t N, int64_t K,
              bool add_up) {
    const FlushDenormals flush_denormals;
    for (int64_t k = 0; k < K || k == 0; k += DEPTH) {
        const int64_t depth = K - k < DEPTH ? K - k : DEPTH;
        const tokdyn::Strided part = {a.at + k * a.column, a.row, a.column};
        const bool more = add_up || k > 0;
        int64_t j = 0;
        for (; j + COLUMNS * WIDTH <= N; j += COLUMNS * WIDTH)
            strip<COLUMNS>(part, b + k * b_row + j, b_row, c + j, c_row, M, depth, more);
        for (; j < N; j += WIDTH) strip<1>(part, b + k * b_row + j, b_row, c + j, c_row, M, depth, more);
    }
}

void shift_and_scale(float* x, const float* w, float shift, int64_t n) {
    const FlushDenormals flush_denormals;
    for (int64_t j = 0; j < n; j += WIDTH) store(x + j, mul(sub(load(x + j), splat(shift)), load(w + j)));
}

}  // namespace

namespace tokdyn {
namespace TOKDYN_SIMD {
const ProductFns product_fns = {multiply, shift_and_scale};
}
}  // namespace tokdyn
