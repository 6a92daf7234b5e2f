// Dot products and scaling.
#include "simd.h"
#include "vectors.h"

namespace {

constexpr int GROUP = 4 * WIDTH;
constexpr int FLUSH = 32;  // groups whose products stay in fp32 lanes before they go to double

double dot(const float* a, const float* b, int64_t n) {
    double total = 0;
    int64_t j = 0;
    while (j + GROUP <= n) {
        Vec s[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
        for (int group = 0; group < FLUSH && j + GROUP <= n; ++group, j += GROUP)
            for (int i = 0; i < 4; ++i) s[i] = fma(load(a + j + i * WIDTH), load(b + j + i * WIDTH), s[i]);
        total += sum(add(add(s[0], s[1]), add(s[2], s[3])));
    }
    for (; j < n; ++j) total += static_cast<double>(a[j]) * b[j];
    return total;
}

void scale(float* a, int64_t n, float factor, const float* factors) {
    int64_t j = 0;
    for (; j + WIDTH <= n; j += WIDTH) store(a + j, mul(load(a + j), mul(splat(factor), load(factors + j))));
    for (; j < n; ++j) a[j] *= factor * factors[j];
}

}  // namespace

namespace tokdyn {
namespace TOKDYN_SIMD {
const VectorFns vector_fns = {dot, scale};
}
}  // namespace tokdyn
