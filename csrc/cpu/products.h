// Products of small strided matrices, for kernels whose blocks are too small for a BLAS.
#pragma once
#include <cstdint>

namespace tokdyn {

// A matrix by its strides of rows and columns, in elements.
struct Strided {
    const float* at;
    int64_t row, column;
};

struct ProductFns {
    // c[i, j] = (add ? c[i, j] : 0) + Σ_k a[i, k] b[k, j] for i < M, j < N, k < K; the columns of b and c are adjacent, and N is
    // a multiple of 16.
    void (*multiply)(Strided a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t M, int64_t N, int64_t K, bool add);
    // x[j] = (x[j] - shift) w[j], n a multiple of 16
    void (*shift_and_scale)(float* x, const float* w, float shift, int64_t n);
};
namespace portable { extern const ProductFns product_fns; }
namespace avx2 { extern const ProductFns product_fns; }
namespace avx512 { extern const ProductFns product_fns; }

}  // namespace tokdyn
