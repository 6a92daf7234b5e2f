// The CUDA kernels compiled for the CPU (cuda_runtime.h beside this file), behind a C interface for ctypes.
#include "token_stats.cu"
#include "topk_log_probs.cu"

extern "C" {

void set_emulation(int falling, int processors) {
    emulation::falling = falling;
    emulation::processors = processors;
}

int emulated_token_stats(const void* logits, int bf16, int64_t T, int64_t V, int64_t row_stride, const int64_t* targets,
                         void** out) {
    using namespace tokdyn::cuda;
    const auto real = [&](int i) { return static_cast<float*>(out[i]); };
    const auto whole = [&](int i) { return static_cast<int64_t*>(out[i]); };
    return token_stats({{logits, bf16 != 0, T, V, row_stride}, targets, real(0), real(1), real(2), real(3), real(4), whole(5),
                        whole(6), real(7)}, 0, nullptr);
}

int emulated_topk(const void* logits, int bf16, int64_t T, int64_t V, int64_t row_stride, int k, float* values, int64_t* ids) {
    return tokdyn::cuda::topk_log_probs({{logits, bf16 != 0, T, V, row_stride}, k, values, ids}, 0, nullptr);
}

}
