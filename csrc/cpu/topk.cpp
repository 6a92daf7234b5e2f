// The k largest logits of every row: candidates above a rising threshold, thinned to k whenever their buffer is full.
#include "topk.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace tokdyn {
namespace {

constexpr int64_t STRETCH = 4096;        // columns that are folded into the sums, then scanned while they are in the cache
constexpr int64_t PER_THREAD = 1 << 16;  // fewest logits for one thread

float widen(float z) { return z; }
float widen(uint16_t z) {
    const uint32_t bits = uint32_t{z} << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// NaN ranks highest, as in a sort of torch; equal logits rank by their id.
bool above(float z, float than) { return z > than || (std::isnan(z) && !std::isnan(than)); }
bool outranks(const Candidate& a, const Candidate& b) { return above(a.z, b.z) || (!above(b.z, a.z) && a.id < b.id); }

void thin(TopkRow& row, Candidate* best, int64_t k) {
    std::nth_element(best, best + (k - 1), best + row.count, outranks);
    row.count = k;
    row.threshold = best[k - 1].z;
}

// Columns [first, first + n) of a row, at z.
template <class T>
void take(TopkRow& row, Candidate* best, int64_t k, const T* z, int64_t first, int64_t n, const ScanFn& scan, int64_t group) {
    const int64_t capacity = topk_capacity(k);
    const auto push = [&](int64_t j) {
        best[row.count++] = {widen(z[j]), first + j};
        if (row.count == capacity) thin(row, best, k);
    };
    int64_t j = 0;
    if (row.count < k) {  // the first k columns are candidates, whatever their logits
        for (; j < n && row.count < k; ++j) push(j);
        if (row.count < k) return;
        thin(row, best, k);
    }
    const bool plain = !std::isnan(row.rest.sum + row.rest.xsum);  // otherwise there may be a NaN, which the scan would miss
    while (j < n) {
        if (plain && (j = scan(z, j, n, row.threshold)) == n) return;
        for (const int64_t end = std::min(n, j + group); j < end; ++j)
            if (above(widen(z[j]), row.threshold)) push(j);
    }
}

void finish(TopkRow& row, Candidate* best, int64_t t, const TopkOut& out) {
    std::partial_sort(best, best + out.k, best + row.count, outranks);
    const Rest& rest = row.rest;
    const float top = best[0].z;  // the log-sum-exp if the softmax is undefined: NaN, inf or -inf
    const double log_S = std::log1p(rest.sum);
    for (int64_t i = 0; i < out.k; ++i) {
        const float z = best[i].z;
        out.values[t * out.k + i] = is_undefined(rest) ? z - top : static_cast<float>((double{z} - rest.max) - log_S);
        out.ids[t * out.k + i] = best[i].id;
    }
}

template <class T>
void topk(const T* logits, int64_t rows, int64_t V, int64_t row_stride, const TopkOut& out, FoldFn fold, ScanFn scan,
          int64_t group, int threads) {
    const int64_t capacity = topk_capacity(out.k);
    std::vector<Candidate> candidates(threads * capacity);  // allocated here: a bad_alloc may not be thrown inside threads
    parallel_for(threads, threads, [&](int64_t worker) {
        Candidate* best = candidates.data() + worker * capacity;
        for (int64_t t = worker; t < rows; t += threads) {
            const T* z = logits + t * row_stride;
            TopkRow row = {NO_COLUMNS, 0.0f, 0};
            for (int64_t j = 0; j < V; j += STRETCH) {
                const int64_t n = std::min(STRETCH, V - j);
                fold(row.rest, z + j, j, n, -1, NAN);
                take(row, best, out.k, z + j, j, n, scan, group);
            }
            finish(row, best, t, out);
        }
    });
}

}  // namespace

void topk_log_probs(const void* logits, Dtype dtype, int64_t T, int64_t V, int64_t row_stride, const TopkOut& out,
                    const FoldFns& fold, const ScanFns& scan, int threads) {
    threads = static_cast<int>(std::min<int64_t>({threads, T, 1 + T * V / PER_THREAD}));
    if (dtype == Dtype::float32)
        topk(static_cast<const float*>(logits), T, V, row_stride, out, fold.float32, scan.float32, scan.group, threads);
    else
        topk(static_cast<const uint16_t*>(logits), T, V, row_stride, out, fold.bfloat16, scan.bfloat16, scan.group, threads);
}

void topk_chunk(const Chunk& chunk, int64_t k, TopkRow* state, Candidate* best, const FoldFns& fold, const LogitFns& logits,
                const ScanFns& scan, int threads) {
    parallel_for(chunk.rows, threads_for(chunk, threads), [&](int64_t r) {
        finish_logits(chunk, r, logits);
        fold_logits(chunk, r, state[r].rest, -1, NAN, fold);
        take(state[r], best + r * topk_capacity(k), k, row_of(chunk, r), chunk.first, chunk.n, scan.float32, scan.group);
    });
}

void finish_topk(int64_t rows, TopkRow* state, Candidate* best, const TopkOut& out, int threads) {
    parallel_for(rows, threads, [&](int64_t r) { finish(state[r], best + r * topk_capacity(out.k), r, out); });
}

}  // namespace tokdyn
