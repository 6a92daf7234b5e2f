// Finds the next logit above a threshold.
#include "simd.h"
#include "topk.h"

namespace {

constexpr int GROUP = 4 * WIDTH;

template <class T>
int64_t scan(const void* data, int64_t begin, int64_t n, float threshold) {
    const T* z = static_cast<const T*>(data);
    const Vec bound = splat(threshold);
    int64_t j = begin;
    for (; j + GROUP <= n; j += GROUP) {
        Vec x[4];
        load4(z + j, x);
        if (any_above(max(max(x[0], x[1]), max(x[2], x[3])), bound)) return j;
    }
    for (; j < n; ++j)
        if (to_float(z[j]) > threshold) return j;
    return n;
}

}  // namespace

namespace tokdyn {
namespace TOKDYN_SIMD {
const ScanFns scan_fns = {scan<float>, scan<bf16>, GROUP};
}
}  // namespace tokdyn
