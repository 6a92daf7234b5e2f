// Products W h to logits in place: bias, scale, softcap, temperature.
#include "logits.h"
#include "simd.h"

namespace {

constexpr int GROUP = 4 * WIDTH;

void apply_group(float* z, const float* bias, const tokdyn::Readout& readout) {
    Vec x[4];
    for (int i = 0; i < 4; ++i) x[i] = load(z + i * WIDTH);
    if (bias)
        for (int i = 0; i < 4; ++i) x[i] = add(x[i], load(bias + i * WIDTH));
    for (int i = 0; i < 4; ++i) x[i] = mul(x[i], splat(readout.scale));
    if (readout.softcap > 0) {
        const Vec cap = splat(readout.softcap);
        for (int i = 0; i < 4; ++i) x[i] = div(x[i], cap);
        tanh4(x);
        for (int i = 0; i < 4; ++i) x[i] = mul(x[i], cap);
    }
    if (readout.temperature != 1)
        for (int i = 0; i < 4; ++i) x[i] = div(x[i], splat(readout.temperature));
    for (int i = 0; i < 4; ++i) store(z + i * WIDTH, x[i]);
}

void apply(float* z, int64_t n, const tokdyn::Readout& readout) {
    int64_t j = 0;
    for (; j + GROUP <= n; j += GROUP) apply_group(z + j, readout.bias ? readout.bias + j : nullptr, readout);
    if (j == n) return;
    float end[GROUP] = {}, end_bias[GROUP] = {};
    std::memcpy(end, z + j, (n - j) * sizeof(float));
    if (readout.bias) memcpy(end_bias, readout.bias + j, (n - j) * sizeof(float));
    apply_group(end, readout.bias ? end_bias : nullptr, readout);
    std::memcpy(z + j, end, (n - j) * sizeof(float));
}

}  // namespace

namespace tokdyn {
namespace TOKDYN_SIMD {
const LogitFns logit_fns = {apply};
}
}  // namespace tokdyn
