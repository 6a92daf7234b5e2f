// Sums over segments of the product of two Gram tiles, rows over threads.
#include "dual_gram.h"

#include "parallel.h"

namespace tokdyn {
namespace {

constexpr int64_t PER_THREAD = 1 << 16;  // fewest products for one thread

}  // namespace

void segment_dots(const GramTiles& tiles, const int64_t* segment, double* out, int64_t S, const VectorFns& fns, int threads) {
    threads = static_cast<int>(std::min<int64_t>(threads, 1 + tiles.rows * tiles.n / PER_THREAD));
    parallel_for(tiles.rows, threads, [&](int64_t r) {
        const float *a = tiles.a + r * tiles.n, *b = tiles.b + r * tiles.n;
        for (int64_t begin = 0, end; begin < tiles.n; begin = end) {  // runs of columns of one segment
            for (end = begin + 1; end < tiles.n && segment[end] == segment[begin];) ++end;
            out[r * S + segment[begin]] += fns.dot(a + begin, b + begin, end - begin);
        }
    });
}

}  // namespace tokdyn
