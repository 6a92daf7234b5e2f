// Logits to exponentials or forces, row by row over threads; targets' columns in double beside the vector loop.
#include "readout_forces.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "parallel.h"

namespace tokdyn {
namespace {

constexpr int64_t PER_THREAD = 1 << 16;

// What Γ of a row needs of its statistics; with e = e^{z - max}, S is their sum.
struct Softmax {
    double max, S, tail, mean;  // tail = S - 1, summed; mean = Σ e (z - max) / S, so that log pi + H = z - max - mean

    explicit Softmax(const Rest& rest) {
        max = is_undefined(rest) ? NAN : rest.max;
        tail = rest.sum;
        S = 1 + tail;
        mean = rest.xsum / S;
    }
};

// `own` is scratch for K numbers.
void force_row(const Chunk& chunk, int64_t r, const Terms& terms, const Rest& rest, const ForceFns& fns, double* own) {
    float* z = row_of(chunk, r);
    const int64_t K = terms.K, *y = terms.targets + r * K, *column = terms.columns + r * K;
    const float* c = terms.c + r * K;
    const double v = terms.v ? terms.v[r] : 0, u = terms.u ? terms.u[r] : 0, softcap = chunk.readout.softcap;
    const Softmax p(rest);
    double C = 0;
    for (int64_t k = 0; k < K; ++k) C += c[k];

    const auto here = [&](int64_t k) { return column[k] >= chunk.first && column[k] < chunk.first + chunk.n; };
    for (int64_t k = 0; k < K; ++k) {  // before the vector loop overwrites the logits
        if (!here(k)) continue;
        const double z_y = z[column[k] - chunk.first], t = z_y - p.max, e = std::exp(t), pi = e / p.S;
        const double others = (y[k] == rest.argmax ? p.tail : p.S - e) / p.S;  // 1 - pi_y, without that subtraction
        double c_y = 0;
        for (int64_t i = 0; i < K; ++i) c_y += y[i] == y[k] ? c[i] : 0;
        own[k] = C * others + (c_y - C) + (pi > 0 ? v * pi * (t - p.mean) : 0) + u * (terms.uniform - pi);
        if (softcap > 0) own[k] *= 1 - (z_y / softcap) * (z_y / softcap);
    }
    const Residual row = {static_cast<float>(p.max),  static_cast<float>(-(C + u) / p.S),    static_cast<float>(v / p.S),
                          static_cast<float>(p.mean), static_cast<float>(u * terms.uniform), chunk.readout.softcap};
    fns.residual.residual(z, chunk.n, row);
    for (int64_t k = 0; k < K; ++k)
        if (here(k)) z[column[k] - chunk.first] = static_cast<float>(own[k]);
}

}  // namespace

bool exponentials(const Chunk& chunk, Rest* rest, float* factor, const int64_t* dropped, int64_t n_dropped, const ForceFns& fns,
                  int threads) {
    const int64_t* begin = std::lower_bound(dropped, dropped + n_dropped, chunk.first);
    const int64_t* end = std::lower_bound(begin, dropped + n_dropped, chunk.first + chunk.n);
    std::atomic<bool> any{false};
    parallel_for(chunk.rows, threads_for(chunk, threads), [&](int64_t r) {
        finish_logits(chunk, r, fns.logits);
        const Rest before = rest[r];
        fold_logits(chunk, r, rest[r], -1, NAN, fns.fold);
        const bool raised = before.argmax >= 0 && rest[r].max > before.max;
        factor[r] = raised ? std::exp(before.max - rest[r].max) : 1.0f;
        if (raised) any.store(true, std::memory_order_relaxed);
        const float reference = rest[r].argmax < 0 ? 0 : rest[r].max;  // all logits -inf so far: exponentials are 0
        fns.residual.residual(row_of(chunk, r), chunk.n, {reference, 1, 0, 0, 0, chunk.readout.softcap});
        for (const int64_t* id = begin; id < end; ++id) row_of(chunk, r)[*id - chunk.first] = 0;
    });
    return any;
}

void forces(const Chunk& chunk, const Terms& terms, const Rest* rest, const ForceFns& fns, int threads) {
    std::vector<double> own(chunk.rows * terms.K);
    parallel_for(chunk.rows, threads_for(chunk, threads), [&](int64_t r) {
        finish_logits(chunk, r, fns.logits);
        force_row(chunk, r, terms, rest[r], fns, own.data() + r * terms.K);
    });
}

void normalisers(int64_t rows, const Rest* rest, float* out) {
    for (int64_t r = 0; r < rows; ++r) out[r] = is_undefined(rest[r]) ? NAN : static_cast<float>(1 / (1 + rest[r].sum));
}

void rescale(float* matrix, int64_t M, int64_t L, int64_t row_stride, const float* by_row, const float* by_column,
             const VectorFns& fns, int threads) {
    threads = static_cast<int>(std::min<int64_t>(threads, 1 + M * L / PER_THREAD));
    parallel_for(M, threads, [&](int64_t m) { fns.scale(matrix + m * row_stride, L, by_row[m], by_column); });
}

void add_row_dots(const float* a, const float* b, int64_t rows, int64_t n, int64_t a_stride, int64_t b_stride, double* out,
                  const VectorFns& fns, int threads) {
    threads = static_cast<int>(std::min<int64_t>(threads, 1 + rows * n / PER_THREAD));
    parallel_for(rows, threads, [&](int64_t r) { out[r] += fns.dot(a + r * a_stride, b + r * b_stride, n); });
}

}  // namespace tokdyn
