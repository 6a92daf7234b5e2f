// tokdyn._C: plain pybind11 over raw addresses. No torch header, so the build needs pybind11 and nothing else; the Python
// wrappers (kernels/<op>/cpp.py) own the tensors and check dtype, device and layout. Addresses travel as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/token_stats.h"

#ifdef __clang__
#define TOKDYN_COMPILER "clang " __clang_version__
#else
#define TOKDYN_COMPILER "g++ " __VERSION__
#endif

namespace py = pybind11;

namespace {

struct Level {
    std::string name;
    const tokdyn::RestFns* token_stats;
};

// The instruction sets that are both compiled in and supported by this processor, the fastest last.
std::vector<Level> levels() {
    std::vector<Level> found{{"portable", &tokdyn::portable::rest_fns}};
#ifdef TOKDYN_HAS_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back({"avx2", &tokdyn::avx2::rest_fns});
#endif
#ifdef TOKDYN_HAS_AVX512
    if (__builtin_cpu_supports("avx512f")) found.push_back({"avx512", &tokdyn::avx512::rest_fns});
#endif
    return found;
}

std::vector<std::string> simd_levels() {
    std::vector<std::string> names;
    for (const Level& level : levels()) names.push_back(level.name);
    return names;
}

Level choose(const std::string& name) {
    const std::vector<Level> known = levels();
    if (name.empty()) return known.back();
    std::string listed;
    for (const Level& level : known) {
        if (level.name == name) return level;
        listed += (listed.empty() ? "" : ", ") + level.name;
    }
    throw py::value_error("simd must be one of " + listed + " on this machine, got '" + name + "'");
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void token_stats(uintptr_t logits, const std::string& dtype, int64_t T, int64_t V, int64_t row_stride, uintptr_t targets,
                 const std::array<uintptr_t, 8>& out, int threads, const std::string& simd) {
    if (dtype != "float32" && dtype != "bfloat16") throw py::value_error("dtype must be float32 or bfloat16, got " + dtype);
    if (T < 0 || threads < 1) throw py::value_error("T must be at least 0 and threads at least 1");
    const Level level = choose(simd);
    if (T == 0) return;
    if (V < 1) throw py::value_error("logits must have at least one column");
    if (logits == 0 || targets == 0) throw py::value_error("null address");
    for (uintptr_t address : out)
        if (address == 0) throw py::value_error("null address");

    const int64_t* y = at<const int64_t>(targets);
    for (int64_t t = 0; t < T; ++t)
        if (y[t] < 0 || y[t] >= V)
            throw py::value_error("targets must lie in [0, " + std::to_string(V) + "), got " + std::to_string(y[t]) +
                                  " at position " + std::to_string(t));

    tokdyn::TokenStatsArgs args{};
    args.logits = at<const void>(logits);
    args.dtype = dtype == "float32" ? tokdyn::Dtype::float32 : tokdyn::Dtype::bfloat16;
    args.T = T, args.V = V, args.row_stride = row_stride;
    args.targets = y;
    args.logsumexp = at<float>(out[0]);
    args.log_prob = at<float>(out[1]);
    args.entropy = at<float>(out[2]);
    args.collision = at<float>(out[3]);
    args.g_norm = at<float>(out[4]);
    args.rank = at<int64_t>(out[5]);
    args.argmax = at<int64_t>(out[6]);
    args.argmax_log_prob = at<float>(out[7]);
    py::gil_scoped_release without_gil;
    tokdyn::token_stats(args, *level.token_stats, threads);
}

py::dict build() {
    py::dict parts;
    parts["compiler"] = TOKDYN_COMPILER;
    parts["simd"] = TOKDYN_SIMD_BUILT;
    parts["cuda"] = TOKDYN_CUDA_NOTE;
    return parts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of tokdyn over raw addresses; the checked entry points are tokdyn.kernels.<op>.cpp.";
    m.def("build", &build, "What this binary holds: compiler, instruction sets compiled in, CUDA.");
    m.def("simd_levels", &simd_levels, "Instruction sets compiled in and supported by this processor, the fastest last.");
    m.def("token_stats", &token_stats, py::arg("logits"), py::arg("dtype"), py::arg("T"), py::arg("V"), py::arg("row_stride"),
          py::arg("targets"), py::arg("out"), py::kw_only(), py::arg("threads"), py::arg("simd") = "",
          "Row statistics of logits [T, V] at targets [T], written to eight arrays of length T in the order logsumexp, log_prob, "
          "entropy, collision, g_norm, rank, argmax, argmax_log_prob.");
}
