// The CUDA part of tokdyn._C. An empty function where the build found no nvcc.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace py = pybind11;

#ifdef TOKDYN_HAS_CUDA
namespace {

namespace cuda = tokdyn::cuda;

template <class T>
T* at(uintptr_t address) {
    if (address == 0) throw py::value_error("null address");
    return reinterpret_cast<T*>(address);
}

void require_success(int code) {
    if (code != 0) throw std::runtime_error("CUDA error " + std::to_string(code) + ": " + cuda::error_text(code));
}

cuda::Logits logits_at(uintptr_t data, const std::string& dtype, int64_t T, int64_t V, int64_t row_stride) {
    if (dtype != "float32" && dtype != "bfloat16") throw py::value_error("dtype must be float32 or bfloat16, got " + dtype);
    if (T < 1 || T > cuda::MAX_T) throw py::value_error("T must lie in [1, 2^31), got " + std::to_string(T));
    if (V < 1 || V > cuda::MAX_V) throw py::value_error("V must lie in [1, 2^30], got " + std::to_string(V));
    return {at<const void>(data), dtype == "bfloat16", T, V, row_stride};
}

void token_stats(uintptr_t logits, const std::string& dtype, int64_t T, int64_t V, int64_t row_stride, uintptr_t targets,
                 const std::array<uintptr_t, 8>& out, int device, uintptr_t stream) {
    const cuda::TokenStatsArgs args{logits_at(logits, dtype, T, V, row_stride),
                                    at<const int64_t>(targets),
                                    at<float>(out[0]),
                                    at<float>(out[1]),
                                    at<float>(out[2]),
                                    at<float>(out[3]),
                                    at<float>(out[4]),
                                    at<int64_t>(out[5]),
                                    at<int64_t>(out[6]),
                                    at<float>(out[7])};
    py::gil_scoped_release without_gil;
    require_success(cuda::token_stats(args, device, reinterpret_cast<void*>(stream)));
}

void topk_log_probs(uintptr_t logits, const std::string& dtype, int64_t T, int64_t V, int64_t row_stride, int k, uintptr_t values,
                    uintptr_t ids, int device, uintptr_t stream) {
    if (k < 1 || k > V || k > cuda::MAX_K)
        throw py::value_error("k must lie in [1, min(V, " + std::to_string(cuda::MAX_K) + ")], got " + std::to_string(k));
    const cuda::TopKArgs args{logits_at(logits, dtype, T, V, row_stride), k, at<float>(values), at<int64_t>(ids)};
    py::gil_scoped_release without_gil;
    require_success(cuda::topk_log_probs(args, device, reinterpret_cast<void*>(stream)));
}

std::string cuda_here() {
    int count = 0;
    const int code = cuda::device_count(&count);
    if (code != 0) return std::string("no device: ") + cuda::error_text(code);
    return std::to_string(count) + (count == 1 ? " device" : " devices");
}

}  // namespace
#endif

void bind_cuda(py::module_& m) {
#ifdef TOKDYN_HAS_CUDA
    m.attr("CUDA_MAX_K") = cuda::MAX_K;
    m.def("cuda_here", &cuda_here, "The CUDA devices of this machine, or why there are none.");
    m.def("cuda_token_stats", &token_stats, py::arg("logits"), py::arg("dtype"), py::arg("T"), py::arg("V"),
          py::arg("row_stride"), py::arg("targets"), py::arg("out"), py::kw_only(), py::arg("device"), py::arg("stream"),
          "token_stats over device addresses, on a stream of that device.");
    m.def("cuda_topk_log_probs", &topk_log_probs, py::arg("logits"), py::arg("dtype"), py::arg("T"), py::arg("V"),
          py::arg("row_stride"), py::arg("k"), py::arg("values"), py::arg("ids"), py::kw_only(), py::arg("device"),
          py::arg("stream"), "topk_log_probs over device addresses, on a stream of that device.");
#else
    (void)m;
#endif
}
