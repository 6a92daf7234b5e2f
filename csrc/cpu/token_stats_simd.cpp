// The vector loop of token_stats: one read of a part of a row, leaving out the target.
#include "simd.h"
#include "token_stats.h"

namespace {

constexpr int GROUP = 4 * WIDTH;  // columns per turn
constexpr int FLUSH = 32;         // groups that are summed in fp32 lanes before they are added to double
constexpr int AHEAD = 2048;       // bytes to prefetch ahead: the hardware prefetcher stops at the end of a page of 4 KiB

// The running sums: double totals, and fp32 lanes for the last few groups. All relative to rest.max.
template <class T>
class Accumulator {
  public:
    Accumulator(const tokdyn::Rest& rest, float z_y, int64_t y) : z_y_(z_y), y_(y), rest_(rest) {
        reference_ = splat(empty() ? 0.0f : rest_.max);
        clear_lanes();
    }

    bool empty() const { return rest_.argmax < 0; }  // nothing above -inf so far

    // Adds a full group on one side of y; returns false, and adds nothing, if it holds a new maximum. Requires !empty().
    bool take(const T* p, Vec rank_threshold) {
        Vec x[4], s[4];
        for (int byte = 0; byte < GROUP * static_cast<int>(sizeof(T)); byte += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(p) + AHEAD + byte);
        load4(p, x);
        for (int i = 0; i < 4; ++i) s[i] = sub(reference_, x[i]);
        const bool plain = all_within(s);
        if (!plain && any_above(max(max(x[0], x[1]), max(x[2], x[3])), reference_)) return false;
        for (int i = 0; i < 4; ++i) above_ = count_at_least(above_, x[i], rank_threshold);
        if (plain)
            accumulate(s);
        else
            accumulate_clamped(s);
        return true;
    }

    // Adds any n <= GROUP columns from column j on; they may hold the target or a new maximum.
    void take_slowly(const T* p, int64_t j, int n, Vec rank_threshold) {
        float x[GROUP];
        for (int i = 0; i < 4; ++i) store(x + i * WIDTH, splat(-INFINITY));  // contributes nothing
        for (int i = 0; i < n; ++i) x[i] = to_float(p[i]);
        const bool holds_y = y_ >= j && y_ < j + n;
        if (holds_y) x[y_ - j] = -INFINITY;
        Vec lanes[4];
        load4(x, lanes);
        if (holds_y || n < GROUP)
            for (int i = 0; i < n; ++i) rest_.above += x[i] > z_y_ || (x[i] == z_y_ && j + i < y_);
        else
            for (int i = 0; i < 4; ++i) above_ = count_at_least(above_, lanes[i], rank_threshold);
        const float top = top_of(lanes);
        if (top > rest_.max) {
            raise(top);
            int a = 0;
            while (x[a] != top) ++a;
            rest_.argmax = j + a;
            x[a] = -INFINITY;
            load4(x, lanes);
        }
        for (int i = 0; i < 4; ++i) lanes[i] = sub(reference_, lanes[i]);
        accumulate_clamped(lanes);
    }

    tokdyn::Rest finish() {
        flush();
        return rest_;
    }

  private:
    void clear_lanes() {
        sum_ = xsum_ = sqsum_ = splat(0.0f);
        above_ = no_count();
        groups_ = 0;
    }

    void flush() {
        rest_.sum += sum(sum_);
        rest_.xsum -= sum(xsum_);
        rest_.sqsum += sum(sqsum_);
        rest_.above += total(above_);
        clear_lanes();
    }

    // Takes a higher maximum: rescales the sums to it and adds the old maximum to them.
    void raise(float top) {
        flush();
        if (!empty()) tokdyn::lower_to(top, rest_);
        rest_.max = top;
        reference_ = splat(top);
    }

    // For s = max - z that may be inf, NaN or beyond EXP_END.
    void accumulate_clamped(Vec (&s)[4]) {
        for (int i = 0; i < 4; ++i) s[i] = min(splat(EXP_END), s[i]);  // min with the operands in this order keeps a NaN
        Vec e[4];
        exp_negated(s, e);
        for (int i = 0; i < 4; ++i) e[i] = zero_at_end(e[i], s[i]);
        accumulate(s, e);
    }

    // For s = max - z in [0, EXP_END).
    void accumulate(const Vec (&s)[4]) {
        Vec e[4];
        exp_negated(s, e);
        accumulate(s, e);
    }

    void accumulate(const Vec (&s)[4], const Vec (&e)[4]) {
        sum_ = add(sum_, add(add(e[0], e[1]), add(e[2], e[3])));
        for (int i = 0; i < 4; ++i) xsum_ = fma(e[i], s[i], xsum_);
        for (int i = 0; i < 4; ++i) sqsum_ = fma(e[i], e[i], sqsum_);
        if (++groups_ == FLUSH) flush();
    }

    const float z_y_;
    const int64_t y_;
    tokdyn::Rest rest_;
    Vec reference_, sum_, xsum_, sqsum_;
    Count above_;
    int groups_;
};

template <class T>
void fold(tokdyn::Rest& rest, const void* data, int64_t first, int64_t n, int64_t y, float z_y) {
    const FlushDenormals flush_denormals;
    const T* columns = static_cast<const T*>(data);
    Accumulator<T> accumulator(rest, z_y, y);
    // before y a tie ranks above the target, after it only a larger logit does: the least float above z_y is the threshold
    const Vec before = splat(z_y), after = splat(z_y < INFINITY ? nextafterf(z_y, INFINITY) : NAN);
    for (int64_t i = 0; i < n; i += GROUP) {
        const int64_t j = first + i;
        const bool plain = i + GROUP <= n && (y < j || y >= j + GROUP) && !accumulator.empty();
        const Vec threshold = j < y ? before : after;
        if (!plain || !accumulator.take(columns + i, threshold))
            accumulator.take_slowly(columns + i, j, static_cast<int>(n - i < GROUP ? n - i : GROUP), threshold);
    }
    rest = accumulator.finish();
}

}  // namespace

namespace tokdyn {
namespace TOKDYN_SIMD {
const FoldFns fold_fns = {fold<float>, fold<bf16>};
}
}  // namespace tokdyn
