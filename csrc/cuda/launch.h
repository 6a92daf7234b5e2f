// The flat launchers of csrc/cuda: addresses, strides, sizes and a stream in, a CUDA error code out (0 is success). They allocate
// nothing, wait for nothing and know neither Python nor torch. A launch goes to `device`, which the caller has made current for
// the stream; `stream` is a cudaStream_t of that device.
#pragma once
#include <cstdint>

namespace tokdyn::cuda {

// Rows of logits in device memory: columns are adjacent, the stride is in elements.
struct Logits {
    const void* data;
    bool bf16;  // or float
    int64_t T, V, row_stride;
};

struct TokenStatsArgs {
    Logits logits;
    const int64_t* targets;
    float *logsumexp, *log_prob, *entropy, *collision, *g_norm;
    int64_t *rank, *argmax;
    float* argmax_log_prob;
};

struct TopKArgs {
    Logits logits;
    int k;          // 1 <= k <= min(V, MAX_K)
    float* values;  // [T, k]
    int64_t* ids;   // [T, k]
};

constexpr int MAX_K = 32;                        // one for each lane of a warp
constexpr int64_t MAX_V = int64_t{1} << 30;      // columns are counted in 32 bits
constexpr int64_t MAX_T = (int64_t{1} << 31) - 1;  // limit of blocks in a grid

int token_stats(const TokenStatsArgs& args, int device, void* stream);
int topk_log_probs(const TopKArgs& args, int device, void* stream);

int device_count(int* count);  // an error code where there is no driver
const char* error_text(int code);

}  // namespace tokdyn::cuda
