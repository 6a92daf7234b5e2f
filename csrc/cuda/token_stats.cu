// token_stats on a GPU: one block per row, one read of the row, its end in double.
#include "softmax_sum.h"

namespace tokdyn::cuda {
namespace {

static_assert(TOGETHER * BATCH * 4 <= 256, "a bfloat16 counts to 256");

// Counts the logits that are not below a bound.
template <class T>
class Counter {
  public:
    __device__ void add(const Group<T>& group, typename Group<T>::Bound bound);
    __device__ void flush();
    __device__ int total() const { return total_; }

  private:
    uint32_t pair_ = 0;  // two counts as a pair of bfloat16, if logits are compared in pairs
    int total_ = 0;
};

template <>
__device__ void Counter<float>::add(const Group<float>& group, float bound) {
#pragma unroll
    for (int i = 0; i < 4; ++i) total_ += group[i] >= bound;
}
template <>
__device__ void Counter<float>::flush() {}

template <>
__device__ void Counter<__nv_bfloat16>::add(const Group<__nv_bfloat16>& group, uint32_t bound) {
#pragma unroll
    for (uint32_t word : group.words) {
#if __CUDA_ARCH__ >= 900
        pair_ = count_pair_at_least(pair_, word, bound);
#else
        total_ += low_half(word) >= low_half(bound);
        total_ += high_half(word) >= high_half(bound);
#endif
    }
}
template <>
__device__ void Counter<__nv_bfloat16>::flush() {
    total_ += static_cast<int>(low_half(pair_)) + static_cast<int>(high_half(pair_));
    pair_ = 0;
}

// One thread's statistics of a row, over the groups whose number is `thread` modulo `threads`.
template <class T>
struct Lane {
    SoftmaxSum<T, true> softmax;
    Counter<T> counter;
    float top = -INFINITY;  // NaN after a NaN
    int top_group = 0;      // first seen in this group or in one of the next TOGETHER - 1 of this thread

    // Groups g, g + stride, ...; those up to group `before` are counted against `at_least`, the others against `larger`.
    template <int N>
    __device__ void add(const Group<T> (&groups)[N], int g, int stride, int before, typename Group<T>::Bound at_least,
                        typename Group<T>::Bound larger) {
        const float largest = Group<T>::max(groups);
        top_group = largest > top || (largest == top && g < top_group) ? g : top_group;
        top = max_nan(top, largest);
#pragma unroll
        for (int i = 0; i < N; ++i) counter.add(groups[i], g + i * stride <= before ? at_least : larger);
        softmax.add(groups, largest);
    }
    __device__ void flush() {
        softmax.flush();
        counter.flush();
    }
};

// A row of finite softmax from its largest logit, at column `argmax`, and the sums relative to it over all other columns. As
// finish_row of cpu/token_stats.cpp: no output is a difference of two numbers that nearly agree.
__device__ void finish(const TokenStatsArgs& out, int64_t t, double top, double z_y, bool y_is_top, double tail, double xsum,
                       double sqsum) {
    const double x_y = z_y - top, e_y = exp(x_y);
    const double S = 1 + tail, log_S = log1p(tail);
    const double others = y_is_top ? tail : S - e_y;  // over all but y; a y that is not the top is at most half of S
    const double others_sq = y_is_top ? sqsum : 1 + sqsum - e_y * e_y;
    out.logsumexp[t] = static_cast<float>(top + log_S);
    out.log_prob[t] = static_cast<float>(x_y - log_S);
    out.entropy[t] = static_cast<float>(log_S - xsum / S);
    out.collision[t] = static_cast<float>((1 + sqsum) / (S * S));
    out.g_norm[t] = static_cast<float>(sqrt(others_sq + others * others) / S);
    out.argmax_log_prob[t] = static_cast<float>(-log_S);
}

template <class T>
__global__ void __launch_bounds__(MAX_THREADS, 2) token_stats_kernel(TokenStatsArgs args) {
    constexpr int WIDTH = Group<T>::WIDTH;
    __shared__ double scratch[WARP];
    __shared__ int argmax;
    const int threads = blockDim.x, thread = threadIdx.x;
    const int64_t t = blockIdx.x, y = args.targets[t];
    const Row<T> row(args.logits, t);
    const bool known = y >= 0 && y < row.V;
    const float z_y = known ? row[y] : NAN;

    // Before y a tie ranks above it, after y only a larger logit does. Groups 1 .. `before` lie wholly before y; ties in group
    // 0 and in y's own group are counted at the end.
    const int before = known && y >= row.head ? static_cast<int>((y - row.head) / WIDTH) : 0;
    const auto at_least = Group<T>::bound(z_y), larger = Group<T>::bound(above<T>(z_y));
    Lane<T> lane;
#pragma unroll 1
    for (int end = 0; end < 2; ++end)  // the columns outside the 16-byte boundaries
        if (const int g = end ? row.last : 0; g % threads == thread && row.columns(g) > 0)
            lane.add({row.load_ragged(g)}, g, 0, -1, at_least, larger);
    Group<T> groups[TOGETHER];
    int g = thread ? thread : threads;
    for (int turn = 1; g + (TOGETHER - 1) * threads <= row.whole; g += TOGETHER * threads, ++turn) {
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) groups[i] = row.load(g + i * threads);
        lane.add(groups, g, threads, before, at_least, larger);
        if (turn % BATCH == 0) lane.flush();
    }
    lane.flush();
    if (g <= row.whole) {
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) groups[i] = row.load_if(g + i * threads <= row.whole, g + i * threads);
        lane.add(groups, g, threads, before, at_least, larger);
    }
    lane.flush();

    const int near = thread < WIDTH ? thread : row.first_column(before + 1) + thread - WIDTH;
    const bool tied = thread < 2 * WIDTH && known && near < y && (thread >= WIDTH || near < row.head) && row[near] == z_y;
    const int rank = block_reduce(lane.counter.total() + tied, Plus(), 0, scratch);

    // The largest logit of the block, then the first group that holds it.
    const float top = entry_logit(block_reduce(entry(lane.top, 0), Larger(), uint64_t{0}, scratch));
    const bool held = top > -INFINITY;  // and no NaN
    int mine = row.last + 1;
    for (int g = lane.top_group; held && lane.top == top && mine > row.last; g += threads)
        if (const Group<T> seen[1] = {row.load_ragged(g)}; Group<T>::max(seen) == top) mine = g;
    const int top_group = -block_reduce(-mine, Larger(), -row.last - 1, scratch), owner = top_group % threads;

    // In the sums of the thread that owns it, it would drown the rest of a peaked row. All threads together read that thread's
    // groups again without this column.
    SoftmaxSum<T, true> again;
    for (int g = owner + thread * threads; held && g <= row.last; g += threads * threads) {
        Group<T> group[1] = {row.load_ragged(g)};
        if (g == top_group) {
            int i = WIDTH;
#pragma unroll
            for (int j = WIDTH; j-- > 0;) i = group[0][j] == top ? j : i;
#pragma unroll
            for (int j = 0; j < WIDTH; ++j)
                if (j == i) group[0].set(j, -INFINITY);
            argmax = row.first_column(g) + i;
        }
        again.add(group, Group<T>::max(group));
        again.flush();
    }
    double tail = 0, xsum = 0, sqsum = 0;
    again.add_to(top, tail, xsum, sqsum);
    if (thread != owner) lane.softmax.add_to(top, tail, xsum, sqsum);
    tail = block_reduce(tail, Plus(), 0.0, scratch);
    xsum = block_reduce(xsum, Plus(), 0.0, scratch);
    sqsum = block_reduce(sqsum, Plus(), 0.0, scratch);
    if (thread > 0) return;
    const bool broken = !known || isnan(top);
    args.rank[t] = broken ? 0 : rank;
    args.argmax[t] = broken ? -1 : held ? argmax : 0;
    if (known && isfinite(top)) return finish(args, t, top, z_y, y == argmax, tail, xsum, sqsum);
    args.logsumexp[t] = args.log_prob[t] = args.entropy[t] = args.collision[t] = args.g_norm[t] = NAN;  // no softmax
    args.argmax_log_prob[t] = NAN;
}

}  // namespace

int token_stats(const TokenStatsArgs& args, int device, void* stream) {
    return launch_rows(args.logits.bf16 ? token_stats_kernel<__nv_bfloat16> : token_stats_kernel<float>, args, device, stream);
}

}  // namespace tokdyn::cuda
