// The vector loop of readout_forces: logits to exponentials or forces, in place.
#include "readout_forces.h"
#include "simd.h"

namespace {

constexpr int GROUP = 4 * WIDTH;

void residual_group(float* z, const tokdyn::Residual& row) {
    Vec x[4], s[4], e[4];
    for (int i = 0; i < 4; ++i) x[i] = load(z + i * WIDTH);
    for (int i = 0; i < 4; ++i) s[i] = min(splat(EXP_END), sub(splat(row.reference), x[i]));  // keeps a NaN in this order
    exp_negated(s, e);
    for (int i = 0; i < 4; ++i) e[i] = zero_at_end(e[i], s[i]);
    const Vec alpha = splat(row.alpha);
    if (row.beta != 0)
        for (int i = 0; i < 4; ++i) e[i] = mul(e[i], fma(splat(-row.beta), add(s[i], splat(row.mean)), alpha));
    else
        for (int i = 0; i < 4; ++i) e[i] = mul(e[i], alpha);
    if (row.kappa != 0)
        for (int i = 0; i < 4; ++i) e[i] = add(e[i], splat(row.kappa));
    if (row.softcap > 0)
        for (int i = 0; i < 4; ++i) {
            const Vec ratio = div(x[i], splat(row.softcap));
            e[i] = mul(e[i], sub(splat(1.0f), mul(ratio, ratio)));
        }
    for (int i = 0; i < 4; ++i) store(z + i * WIDTH, e[i]);
}

void residual(float* z, int64_t n, const tokdyn::Residual& row) {
    const FlushDenormals flush_denormals;
    int64_t j = 0;
    for (; j + GROUP <= n; j += GROUP) residual_group(z + j, row);
    if (j == n) return;
    float end[GROUP] = {};
    std::memcpy(end, z + j, (n - j) * sizeof(float));
    residual_group(end, row);
    std::memcpy(z + j, end, (n - j) * sizeof(float));
}

}  // namespace

namespace tokdyn {
namespace TOKDYN_SIMD {
const ResidualFns residual_fns = {residual};
}
}  // namespace tokdyn
