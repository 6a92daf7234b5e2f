// The running sums of a softmax that one thread keeps over the logits it sees.
#pragma once
#include "row.h"

namespace tokdyn::cuda {

// Σ e, Σ e u and Σ e² with e = 2^u and u = a x - c: a is log2(e) and c the same multiple of a reference m near the largest logit
// seen. The reference moves only if a logit exceeds it by SLACK bits, which is rare after a thread's first groups; u never
// exceeds SLACK, so no sum overflows. Groups are summed into a batch and batches into the total, so that rounding does not grow
// along a row. With MOMENTS false only Σ e is kept.
template <class T, bool MOMENTS>
class SoftmaxSum {
  public:
    // Adds groups whose largest logit is `top`. A NaN in them makes the sums NaN or is left out; -inf adds 0.
    template <int N>
    __device__ void add(const Group<T> (&groups)[N], float top) {
        if (top > limit_) raise(top);
#pragma unroll
        for (const Group<T>& group : groups) add_below_limit(group);
    }

    // To be called every 16 groups or so.
    __device__ void flush() {
        total_.sum += batch_.sum, total_.xsum += batch_.xsum, total_.sqsum += batch_.sqsum;
        batch_ = {};
    }

    // Adds the sums taken relative to `top`, in nats: Σ e^{x-top}, Σ e^{x-top} (x-top), Σ e^{2(x-top)}. `top` is finite and no
    // logit that was added exceeds it.
    __device__ void add_to(double top, double& sum, double& xsum, double& sqsum) {
        flush();
        const double rounded = static_cast<double>(c_) - static_cast<double>(a_) * m_;  // u = a (x - m) - rounded
        const double apart = m_ - top, factor = limit_ == -INFINITY ? 0 : exp2(apart * 1.4426950408889634 + rounded);
        if (factor == 0) return;
        const double near = a_ == LOG2_E ? total_.xsum + rounded * total_.sum : 0;
        sum += factor * total_.sum;
        xsum += factor * (0.6931471805599453 * near + apart * total_.sum);
        sqsum += factor * factor * total_.sqsum;
    }

  private:
    struct Sums {
        float sum = 0, xsum = 0, sqsum = 0;
    };

    __device__ __forceinline__ void add_below_limit(Group<T> group) {
        constexpr int WIDTH = Group<T>::WIDTH;
        group.clamp(floor_);  // -inf becomes finite, so that 0 · u is 0
        float e[WIDTH], xsum = 0, sqsum = 0;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            const float u = fmaf(group[i], a_, -c_);
            e[i] = exp2_fast(u);
            if (MOMENTS) {
                xsum = fmaf(e[i], u, xsum);
                sqsum = fmaf(e[i], e[i], sqsum);
            }
        }
#pragma unroll
        for (int n = WIDTH / 2; n; n /= 2)
#pragma unroll
            for (int i = 0; i < n; ++i) e[i] += e[i + n];
        batch_.sum += e[0];
        if (MOMENTS) batch_.xsum += xsum, batch_.sqsum += sqsum;
    }

    // Makes `top` the reference and rescales the sums to it. Logits beyond 2^100 lie so far apart that e is 1 or 0 whatever
    // a is; a small one keeps a x finite there. Then Σ e u, of which no term counts, may become NaN, and is left out.
    __device__ __forceinline__ void raise(float top) {
        flush();
        const bool huge = fabsf(top) >= 0x1p100f;
        const float a = huge ? 0x1p-40f : LOG2_E, c = a * top;
        const float d = limit_ != -INFINITY && a == a_ ? fmaxf(c_ - c, -200.0f) : -200.0f;  // what it adds to u
        const float factor = exp2_fast(d);
        total_.xsum = factor > 0 ? factor * fmaf(d, total_.sum, total_.xsum) : 0;
        total_.sum *= factor;
        total_.sqsum *= factor * factor;
        m_ = top, a_ = a, c_ = c;
        limit_ = huge ? top : top + SLACK / LOG2_E;
        floor_ = Group<T>::bound(huge ? -INFINITY : FLOOR);
    }

    static constexpr float LOG2_E = 1.44269504f, SLACK = 16, FLOOR = -0x1p127f;  // LOG2_E * FLOOR is finite
    float m_ = 0, a_ = LOG2_E, c_ = 0, limit_ = -INFINITY;
    typename Group<T>::Bound floor_ = Group<T>::bound(FLOOR);
    Sums batch_, total_;
};

}  // namespace tokdyn::cuda
