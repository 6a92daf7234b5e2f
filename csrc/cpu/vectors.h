// Plain vector loops that several kernels share.
#pragma once
#include <cstdint>

namespace tokdyn {

struct VectorFns {
    double (*dot)(const float* a, const float* b, int64_t n);
    void (*scale)(float* a, int64_t n, float factor, const float* factors);  // a_j *= factor · factors_j
};
namespace portable { extern const VectorFns vector_fns; }
namespace avx2 { extern const VectorFns vector_fns; }
namespace avx512 { extern const VectorFns vector_fns; }

}  // namespace tokdyn
