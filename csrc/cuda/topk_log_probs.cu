// topk_log_probs on a GPU: one block per row, one read of the row; every warp keeps the k largest logits it has seen in its lanes.
#include "softmax_sum.h"

namespace tokdyn::cuda {
namespace {

constexpr int MAX_WARPS = MAX_THREADS / WARP;

// Sorts a bitonic sequence of one entry per lane in descending order.
__device__ uint64_t falling(uint64_t e) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) {
        const uint64_t other = __shfl_xor_sync(EVERY_LANE, e, step);
        e = (lane & step) == 0 ? max(e, other) : min(e, other);
    }
    return e;
}

// The 32 largest entries that a warp has seen, one per lane, descending; a new entry must exceed the k-th. 0 is no entry.
class WarpTop {
  public:
    __device__ explicit WarpTop(int k) : k_(k) {}

    // Whether columns with this largest logit may hold a new entry; `later` ones follow all offered before. A NaN always may.
    __device__ bool open_to(float largest, bool later) const {
        return worst_ == 0 || !(later ? largest <= worst_logit_ : largest < worst_logit_);
    }

    // One entry per lane, in any order; 0 for none.
    __device__ void offer(uint64_t e) {
        for (unsigned open; (open = __ballot_sync(EVERY_LANE, e > worst_));) {
            const int source = __ffs(open) - 1, lane = threadIdx.x % WARP;
            const uint64_t added = __shfl_sync(EVERY_LANE, e, source);
            const int place = __popc(__ballot_sync(EVERY_LANE, top_ > added));
            const uint64_t above = __shfl_up_sync(EVERY_LANE, top_, 1);
            top_ = lane < place ? top_ : lane == place ? added : above;
            worst_ = __shfl_sync(EVERY_LANE, top_, k_ - 1);
            if (lane == source) e = 0;
        }
        worst_logit_ = entry_logit(worst_);
    }

    // Merges the 32 entries of another warp, one per lane, descending.
    __device__ void merge(const uint64_t* other) { top_ = falling(max(top_, other[WARP - 1 - threadIdx.x % WARP])); }
    __device__ uint64_t mine() const { return top_; }

  private:
    int k_;
    uint64_t top_ = 0, worst_ = 0;
    float worst_logit_ = -INFINITY;
};

template <class T>
__global__ void __launch_bounds__(MAX_THREADS, 2) topk_kernel(TopKArgs args) {
    constexpr int WIDTH = Group<T>::WIDTH, UNIT = TOGETHER * WIDTH;  // columns that a lane holds at a time, at most a warp's lanes
    static_assert(UNIT <= WARP);
    __shared__ double scratch[WARP];
    __shared__ uint64_t tops[MAX_WARPS][WARP];
    __shared__ Group<T> handed[MAX_WARPS][TOGETHER];
    const int threads = blockDim.x, thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, warps = threads / WARP;
    const int64_t t = blockIdx.x;
    const Row<T> row(args.logits, t);
    SoftmaxSum<T, false> softmax;
    WarpTop best(args.k);
    float top = -INFINITY;  // NaN after a NaN

    // The columns outside the boundaries are the first warp's, one per lane: those before first, so that columns come in order.
    const auto take_ragged = [&](int g) {
        const float x = lane < row.columns(g) ? row[row.first_column(g) + lane] : -INFINITY;
        best.offer(lane < row.columns(g) ? entry(x, row.first_column(g) + lane) : 0);
        top = max_nan(top, x);
        Group<T> one = Group<T>::nothing();
        one.set(0, x);
        softmax.add({one}, x);
    };
    if (warp == 0) take_ragged(0);
    Group<T> groups[TOGETHER];
    int turn = 1;
    for (int first = 1 + warp * WARP; first <= row.whole; first += TOGETHER * threads, ++turn) {  // the same for a whole warp
        const int g = first + lane;
        if (first + WARP - 1 + (TOGETHER - 1) * threads <= row.whole) {
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) groups[i] = row.load(g + i * threads);
        } else {
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) groups[i] = row.load_if(g + i * threads <= row.whole, g + i * threads);
        }
        const float largest = Group<T>::max(groups);
        top = max_nan(top, largest);
        softmax.add(groups, largest);
        if (turn % BATCH == 0) softmax.flush();
        unsigned waiting = __ballot_sync(EVERY_LANE, best.open_to(largest, true));
        while (waiting) {  // the warp takes the waiting lanes' groups one after the other
            const int source = __ffs(waiting) - 1;
            __syncwarp();
            if (lane == source)
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) handed[warp][i] = groups[i];
            __syncwarp();
            const int from = first + source + lane / WIDTH * threads;
            const bool there = lane < UNIT && from <= row.whole;
            const int j = row.first_column(from) + lane % WIDTH;
            best.offer(there ? entry(to_float(reinterpret_cast<const T*>(handed[warp])[lane]), j) : 0);
            waiting &= __ballot_sync(EVERY_LANE, lane > source && best.open_to(largest, false));
        }
    }
    if (warp == 0) take_ragged(row.last);

    top = entry_logit(block_reduce(entry(top, 0), Larger(), uint64_t{0}, scratch));
    double sum = 0, unused = 0;
    if (isfinite(top)) softmax.add_to(top, sum, unused, unused);
    sum = block_reduce(sum, Plus(), 0.0, scratch);
    for (int half = warps / 2; half; half /= 2) {  // the lower half of the warps merges the upper half's entries
        if (warp >= half && warp < 2 * half) tops[warp][lane] = best.mine();
        __syncthreads();
        if (warp < half) best.merge(tops[warp + half]);
    }
    if (thread < args.k) {
        const uint64_t e = best.mine();
        const float z = entry_logit(e);
        args.values[t * args.k + thread] = isfinite(top) ? static_cast<float>(z - top - log(sum)) : z - top;
        args.ids[t * args.k + thread] = entry_index(e);
    }
}

}  // namespace

int topk_log_probs(const TopKArgs& args, int device, void* stream) {
    return launch_rows(args.logits.bf16 ? topk_kernel<__nv_bfloat16> : topk_kernel<float>, args, device, stream);
}

}  // namespace tokdyn::cuda
