// Threads take pairs of cotangent and key head; keys come in blocks that stay in the L2 cache.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "parallel.h"

namespace tokdyn {
namespace {

constexpr int64_t KEYS = 512;  // a block of scores is rows x KEYS

float* row_at(const Rows& x, int64_t n, int64_t b, int64_t h, int64_t g) {
    return x.at + n * x.n + b * x.batch + h * x.head + g * x.group;
}

}  // namespace

void cotangent_attention(const AttentionBlock& block, const Rows& d_o, const Rows& dq, const Rows& dk, const Rows& dv,
                         const ProductFns& products, const VectorFns& vectors, int threads) {
    const int64_t rows = block.rows, D = block.D, E = block.E, padded = block.padded, width = std::min(KEYS, padded);
    const auto pull_back = [&](int64_t task, float* scores, float* work) {
        const int64_t n = task / (block.B * block.Hk), head = task % (block.B * block.Hk), b = head / block.Hk, h = head % block.Hk;
        const float *k = block.k + head * block.keys * D, *v = block.v + head * E * padded;
        float *dk_head = row_at(dk, n, b, h, 0), *dv_head = row_at(dv, n, b, h, 0);
        for (int64_t g = 0; g < block.G; ++g) {
            const int64_t query = head * block.G + g;
            const float *P = block.P + query * rows * padded, *W = block.W + query * rows * padded;
            const float *q = block.q + query * rows * D, *o = block.o + query * rows * E;
            const float* given = row_at(d_o, n, b, h, g);
            float* dq_head = row_at(dq, n, b, h, g);
            for (int64_t t = 0; t < rows; ++t) work[t] = static_cast<float>(vectors.dot(given + t * d_o.row, o + t * E, E));
            for (int64_t first = 0; first < block.keys; first += KEYS) {
                const int64_t keys = std::min(KEYS, block.keys - first), columns = std::min(KEYS, padded - first);
                products.multiply({given, d_o.row, 1}, v + first, padded, scores, width, rows, columns, E, false);
                for (int64_t t = 0; t < rows; ++t)
                    products.shift_and_scale(scores + t * width, W + t * padded + first, work[t], columns);
                products.multiply({scores, width, 1}, k + first * D, D, dq_head, dq.row, rows, D, keys, first > 0);
                const int64_t old = g > 0 ? keys : std::clamp<int64_t>(block.old - first, 0, keys);
                for (const auto [start, stop] : {std::pair{int64_t{0}, old}, std::pair{old, keys}}) {
                    const int64_t at = first + start, n_keys = stop - start;
                    const bool add = stop <= old;
                    if (n_keys == 0) continue;
                    products.multiply({scores + start, 1, width}, q, D, dk_head + at * dk.row, dk.row, n_keys, D, rows, add);
                    products.multiply({P + at, 1, padded}, given, d_o.row, dv_head + at * dv.row, dv.row, n_keys, E, rows, add);
                }
            }
        }
    };
    const int64_t tasks = block.n * block.B * block.Hk, workers = std::clamp<int64_t>(tasks, 1, threads);
    std::vector<float> room(workers * rows * (width + 1));  // allocated here: a bad_alloc may not be thrown inside threads
    std::atomic<int64_t> next{0};
    parallel_for(workers, threads, [&](int64_t worker) {
        float* scores = room.data() + worker * rows * (width + 1);
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
            pull_back(task, scores, scores + rows * width);
    });
}

}  // namespace tokdyn
