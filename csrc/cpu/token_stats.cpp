// token_stats on the CPU: chunks of columns over threads, and the scalar end of every row in double.
#include "token_stats.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "parallel.h"

namespace tokdyn {
namespace {

constexpr int64_t CHUNK = 32768;         // columns folded as one; fixed, so that no result depends on the thread count
constexpr int64_t PER_THREAD = 1 << 16;  // fewest logits for one thread
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

// Merges adjacent parts of one row; on a tie the left argmax is kept.
Rest merge(Rest left, Rest right) {
    if (right.max > left.max) std::swap(left, right);  // strict, so that a tie keeps the left argmax
    if (right.argmax >= 0) lower_to(left.max, right);
    left.sum += right.sum;  // even if right is empty: its sum may be a NaN, which must not be lost
    left.xsum += right.xsum;
    left.sqsum += right.sqsum;
    left.above += right.above;
    return left;
}

float logit(const TokenStatsArgs& args, int64_t t, int64_t j) {
    const int64_t i = t * args.row_stride + j;
    if (args.dtype == Dtype::float32) return static_cast<const float*>(args.logits)[i];
    const uint32_t bits = uint32_t{static_cast<const uint16_t*>(args.logits)[i]} << 16;
    float z;
    std::memcpy(&z, &bits, sizeof z);
    return z;
}

// A second pass over a row that has no softmax.
void look_again(const TokenStatsArgs& args, int64_t t) {
    const int64_t y = args.targets[t];
    const float z_y = logit(args, t, y);
    int64_t rank = 0, argmax = 0;
    for (int64_t j = 0; j < args.V; ++j) {
        const float z = logit(args, t, j);
        if (std::isnan(z)) return finish_undefined(args.out, t, 0, -1);
        rank += z > z_y || (z == z_y && j < y);
        if (z > logit(args, t, argmax)) argmax = j;
    }
    finish_undefined(args.out, t, rank, argmax);
}

}  // namespace

void finish_undefined(const TokenStatsOut& out, int64_t t, int64_t rank, int64_t argmax) {
    out.logsumexp[t] = out.log_prob[t] = out.entropy[t] = out.collision[t] = out.g_norm[t] = NOT_A_NUMBER;
    out.argmax_log_prob[t] = NOT_A_NUMBER;
    out.rank[t] = rank;
    out.argmax[t] = argmax;
}

// `top` is the argmax; `tail` = Σ e^{z_j - top} over all other columns, so S = 1 + tail, and no number below is a difference of
// two that nearly agree.
bool finish_row(const TokenStatsOut& out, int64_t t, int64_t y, float z_y, Rest rest) {
    const bool y_is_top = rest.argmax < 0 || z_y > rest.max || (z_y == rest.max && y < rest.argmax);
    const double top = y_is_top ? z_y : rest.max;
    if (std::isnan(z_y + rest.sum + rest.xsum + rest.sqsum) || !std::isfinite(top)) return false;
    out.rank[t] = rest.above;
    out.argmax[t] = y_is_top ? y : rest.argmax;

    const double x_y = z_y - top;      // <= 0, may be -inf
    const double e_y = std::exp(x_y);  // 1 if y is the argmax
    double others, tail, xsum, sqsum;  // others = Σ_{j≠y} e^{z_j - top}; xsum and sqsum are over all columns
    if (y_is_top) {
        if (rest.argmax >= 0) lower_to(top, rest);
        others = tail = rest.sum;
        xsum = rest.xsum;
    } else {
        others = 1 + rest.sum;
        tail = e_y + rest.sum;
        xsum = rest.xsum + (e_y > 0 ? e_y * x_y : 0);
        rest.sqsum += 1;
    }
    sqsum = rest.sqsum + e_y * e_y;
    const double S = 1 + tail, log_S = std::log1p(tail);
    out.logsumexp[t] = static_cast<float>(top + log_S);
    out.log_prob[t] = static_cast<float>(x_y - log_S);
    out.entropy[t] = static_cast<float>(log_S - xsum / S);
    out.collision[t] = static_cast<float>(sqsum / (S * S));
    out.g_norm[t] = static_cast<float>(std::sqrt(rest.sqsum + others * others) / S);
    out.argmax_log_prob[t] = static_cast<float>(-log_S);
    return true;
}

void token_stats(const TokenStatsArgs& args, const FoldFns& fns, int threads) {
    const bool fp32 = args.dtype == Dtype::float32;
    const FoldFn fold = fp32 ? fns.float32 : fns.bfloat16;
    const int64_t element = fp32 ? 4 : 2, chunks = (args.V + CHUNK - 1) / CHUNK;
    const auto chunk = [&](int64_t t, int64_t k) {
        const char* columns = static_cast<const char*>(args.logits) + (t * args.row_stride + k * CHUNK) * element;
        Rest rest = NO_COLUMNS;
        const int64_t y = args.targets[t];
        fold(rest, columns, k * CHUNK, std::min(CHUNK, args.V - k * CHUNK), y, logit(args, t, y));
        return rest;
    };
    const auto finish = [&](int64_t t, const Rest& rest) {
        const int64_t y = args.targets[t];
        if (!finish_row(args.out, t, y, logit(args, t, y), rest)) look_again(args, t);
    };

    threads = static_cast<int>(std::min<int64_t>(threads, 1 + args.T * args.V / PER_THREAD));
    if (args.T >= 4 * int64_t{threads}) {  // enough rows for all threads
        parallel_for(args.T, threads, [&](int64_t t) {
            Rest rest = chunk(t, 0);
            for (int64_t k = 1; k < chunks; ++k) rest = merge(rest, chunk(t, k));
            finish(t, rest);
        });
        return;
    }
    std::vector<Rest> parts(args.T * chunks);
    parallel_for(args.T * chunks, threads, [&](int64_t i) { parts[i] = chunk(i / chunks, i % chunks); });
    for (int64_t t = 0; t < args.T; ++t) {
        Rest rest = parts[t * chunks];
        for (int64_t k = 1; k < chunks; ++k) rest = merge(rest, parts[t * chunks + k]);
        finish(t, rest);
    }
}

}  // namespace tokdyn
