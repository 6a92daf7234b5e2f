// tokdyn._C: plain pybind11 over raw addresses. No torch header, so the build needs pybind11 and nothing else; the Python
// wrappers (kernels/<op>/cpp.py) own the tensors and check dtype, device and layout. Addresses travel as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/attention.h"
#include "cpu/dual_gram.h"
#include "cpu/linear_token_stats.h"
#include "cpu/readout_forces.h"
#include "cpu/token_stats.h"
#include "cpu/topk.h"

#ifdef __clang__
#define TOKDYN_COMPILER "clang " __clang_version__
#else
#define TOKDYN_COMPILER "g++ " __VERSION__
#endif

namespace py = pybind11;

namespace {

struct Level {
    std::string name;
    const tokdyn::FoldFns* fold;
    const tokdyn::LogitFns* logits;
    const tokdyn::ScanFns* scan;
    const tokdyn::ResidualFns* residual;
    const tokdyn::VectorFns* vectors;
    const tokdyn::ProductFns* products;

    tokdyn::ForceFns forces() const { return {*fold, *logits, *residual}; }
};

#define TOKDYN_LEVEL(level) \
    {#level, &tokdyn::level::fold_fns, &tokdyn::level::logit_fns, &tokdyn::level::scan_fns, &tokdyn::level::residual_fns, \
     &tokdyn::level::vector_fns, &tokdyn::level::product_fns}

// The instruction sets that are compiled in and supported by this processor, the fastest last.
std::vector<Level> levels() {
    std::vector<Level> found{TOKDYN_LEVEL(portable)};
#ifdef TOKDYN_HAS_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(TOKDYN_LEVEL(avx2));
#endif
#ifdef TOKDYN_HAS_AVX512
    if (__builtin_cpu_supports("avx512f")) found.push_back(TOKDYN_LEVEL(avx512));
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

tokdyn::Dtype dtype_of(const std::string& name) {
    if (name == "float32") return tokdyn::Dtype::float32;
    if (name == "bfloat16") return tokdyn::Dtype::bfloat16;
    throw py::value_error("dtype must be float32 or bfloat16, got " + name);
}

void require_addresses(std::initializer_list<uintptr_t> addresses) {
    for (uintptr_t address : addresses)
        if (address == 0) throw py::value_error("null address");
}

using Outputs = std::array<uintptr_t, 8>;
tokdyn::TokenStatsOut outputs_at(const Outputs& out) {
    for (uintptr_t address : out) require_addresses({address});
    return {at<float>(out[0]), at<float>(out[1]),   at<float>(out[2]),   at<float>(out[3]),
            at<float>(out[4]), at<int64_t>(out[5]), at<int64_t>(out[6]), at<float>(out[7])};
}

// (z, rows, row stride, first column, number of columns) and (bias or 0, scale, softcap or 0, temperature)
using ChunkOf = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t>;
using ReadoutOf = std::tuple<uintptr_t, float, float, float>;
tokdyn::Chunk chunk_at(const ChunkOf& chunk, const ReadoutOf& readout) {
    const auto& [z, rows, row_stride, first, n] = chunk;
    const auto& [bias, scale, softcap, temperature] = readout;
    if (rows < 0 || n < 0 || first < 0 || row_stride < n) throw py::value_error("a chunk has a negative size or stride");
    if (rows * n > 0) require_addresses({z});
    return {at<float>(z), rows, row_stride, first, n, {at<const float>(bias), scale, softcap, temperature}};
}

void token_stats(uintptr_t logits, const std::string& dtype, int64_t T, int64_t V, int64_t row_stride, uintptr_t targets,
                 const Outputs& out, int threads, const std::string& simd) {
    tokdyn::TokenStatsArgs args{};
    args.dtype = dtype_of(dtype);
    if (T < 0 || threads < 1) throw py::value_error("T must be at least 0 and threads at least 1");
    const Level level = choose(simd);
    if (T == 0) return;
    if (V < 1) throw py::value_error("logits must have at least one column");
    require_addresses({logits, targets});

    const int64_t* y = at<const int64_t>(targets);
    for (int64_t t = 0; t < T; ++t)
        if (y[t] < 0 || y[t] >= V)
            throw py::value_error("targets must lie in [0, " + std::to_string(V) + "), got " + std::to_string(y[t]) +
                                  " at position " + std::to_string(t));
    args.logits = at<const void>(logits);
    args.T = T, args.V = V, args.row_stride = row_stride;
    args.targets = y;
    args.out = outputs_at(out);
    py::gil_scoped_release without_gil;
    tokdyn::token_stats(args, *level.fold, threads);
}

void clear_rows(uintptr_t rest, int64_t rows) {
    std::fill_n(at<tokdyn::Rest>(rest), rows, tokdyn::NO_COLUMNS);
}

void apply_readout(const ChunkOf& chunk, const ReadoutOf& readout, const std::string& simd) {
    const tokdyn::Chunk c = chunk_at(chunk, readout);
    const Level level = choose(simd);
    py::gil_scoped_release without_gil;
    for (int64_t r = 0; r < c.rows; ++r) tokdyn::finish_logits(c, r, *level.logits);
}

void fold_chunk(const ChunkOf& chunk, const ReadoutOf& readout, uintptr_t targets, uintptr_t target_logits, uintptr_t rest,
                int threads, const std::string& simd) {
    const tokdyn::Chunk c = chunk_at(chunk, readout);
    const Level level = choose(simd);
    py::gil_scoped_release without_gil;
    tokdyn::fold_chunk(c, at<const int64_t>(targets), at<const float>(target_logits), at<tokdyn::Rest>(rest), *level.fold,
                       *level.logits, threads);
}

void finish_token_stats(int64_t rows, uintptr_t targets, uintptr_t target_logits, uintptr_t rest, const Outputs& out) {
    tokdyn::finish_token_stats(outputs_at(out), rows, at<const int64_t>(targets), at<const float>(target_logits),
                               at<const tokdyn::Rest>(rest));
}

void topk_log_probs(uintptr_t logits, const std::string& dtype, int64_t T, int64_t V, int64_t row_stride, int64_t k,
                    uintptr_t values, uintptr_t ids, int threads, const std::string& simd) {
    const tokdyn::Dtype type = dtype_of(dtype);
    const Level level = choose(simd);
    if (k < 1 || k > V) throw py::value_error("k must lie in [1, " + std::to_string(V) + "], got " + std::to_string(k));
    if (T == 0) return;
    require_addresses({logits, values, ids});
    py::gil_scoped_release without_gil;
    const tokdyn::TopkOut out = {k, at<float>(values), at<int64_t>(ids)};
    tokdyn::topk_log_probs(at<const void>(logits), type, T, V, row_stride, out, *level.fold, *level.scan, threads);
}

void clear_topk(uintptr_t state, int64_t rows) {
    std::fill_n(at<tokdyn::TopkRow>(state), rows, tokdyn::TopkRow{tokdyn::NO_COLUMNS, 0.0f, 0});
}

void topk_chunk(const ChunkOf& chunk, const ReadoutOf& readout, int64_t k, uintptr_t state, uintptr_t candidates, int threads,
                const std::string& simd) {
    const tokdyn::Chunk c = chunk_at(chunk, readout);
    const Level level = choose(simd);
    py::gil_scoped_release without_gil;
    tokdyn::topk_chunk(c, k, at<tokdyn::TopkRow>(state), at<tokdyn::Candidate>(candidates), *level.fold, *level.logits,
                       *level.scan, threads);
}

void finish_topk(int64_t rows, int64_t k, uintptr_t state, uintptr_t candidates, uintptr_t values, uintptr_t ids, int threads) {
    py::gil_scoped_release without_gil;
    tokdyn::finish_topk(rows, at<tokdyn::TopkRow>(state), at<tokdyn::Candidate>(candidates),
                        {k, at<float>(values), at<int64_t>(ids)}, threads);
}

bool exponentials(const ChunkOf& chunk, const ReadoutOf& readout, uintptr_t rest, uintptr_t factor, uintptr_t dropped,
                  int64_t n_dropped, int threads, const std::string& simd) {
    const tokdyn::Chunk c = chunk_at(chunk, readout);
    const Level level = choose(simd);
    py::gil_scoped_release without_gil;
    return tokdyn::exponentials(c, at<tokdyn::Rest>(rest), at<float>(factor), at<const int64_t>(dropped), n_dropped,
                                level.forces(), threads);
}

// (targets, their columns, K of them per row, c, v or 0, u or 0, the uniform target's probability of a token)
using TermsOf = std::tuple<uintptr_t, uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t, double>;
void forces(const ChunkOf& chunk, const ReadoutOf& readout, const TermsOf& terms, uintptr_t rest, int threads,
            const std::string& simd) {
    const tokdyn::Chunk c = chunk_at(chunk, readout);
    const Level level = choose(simd);
    const auto& [targets, columns, K, weights, v, u, uniform] = terms;
    const tokdyn::Terms t = {at<const int64_t>(targets), at<const int64_t>(columns), K, at<const float>(weights),
                             at<const float>(v), at<const float>(u), uniform};
    py::gil_scoped_release without_gil;
    tokdyn::forces(c, t, at<const tokdyn::Rest>(rest), level.forces(), threads);
}

void normalisers(uintptr_t rest, int64_t rows, uintptr_t out) {
    tokdyn::normalisers(rows, at<const tokdyn::Rest>(rest), at<float>(out));
}

void rescale(uintptr_t matrix, int64_t M, int64_t L, int64_t row_stride, uintptr_t by_row, uintptr_t by_column, int threads,
             const std::string& simd) {
    const Level level = choose(simd);
    py::gil_scoped_release without_gil;
    tokdyn::rescale(at<float>(matrix), M, L, row_stride, at<const float>(by_row), at<const float>(by_column), *level.vectors,
                    threads);
}

void add_row_dots(uintptr_t a, uintptr_t b, int64_t rows, int64_t n, uintptr_t out, int threads, const std::string& simd) {
    const Level level = choose(simd);
    py::gil_scoped_release without_gil;
    tokdyn::add_row_dots(at<const float>(a), at<const float>(b), rows, n, n, n, at<double>(out), *level.vectors, threads);
}

void segment_dots(uintptr_t a, uintptr_t b, int64_t rows, int64_t n, uintptr_t segment, uintptr_t out, int64_t S, int threads,
                  const std::string& simd) {
    const Level level = choose(simd);
    const int64_t* s = at<const int64_t>(segment);
    if (std::any_of(s, s + n, [S](int64_t i) { return i < 0 || i >= S; }))
        throw py::value_error("segments must lie in [0, " + std::to_string(S) + ")");
    py::gil_scoped_release without_gil;
    tokdyn::segment_dots({at<const float>(a), at<const float>(b), rows, n}, s, at<double>(out), S, *level.vectors, threads);
}

// (address, then the strides in elements of cotangents, batches, key heads, query heads of a key head, and rows)
using RowsOf = std::array<int64_t, 6>;
tokdyn::Rows rows_at(const RowsOf& x) {
    require_addresses({static_cast<uintptr_t>(x[0])});
    return {at<float>(static_cast<uintptr_t>(x[0])), x[1], x[2], x[3], x[4], x[5]};
}

void cotangent_attention(const std::array<int64_t, 10>& sizes, const std::array<uintptr_t, 6>& given, const RowsOf& d_o,
                         const RowsOf& dq, const RowsOf& dk, const RowsOf& dv, int threads, const std::string& simd) {
    const auto& [n, B, Hk, G, rows, keys, old, padded, D, E] = sizes;
    if (D % 16 || E % 16 || padded % 16 || keys > padded) throw py::value_error("widths must be multiples of 16");
    for (uintptr_t address : given) require_addresses({address});
    const Level level = choose(simd);
    const tokdyn::AttentionBlock block = {n, B, Hk, G, rows, keys, old, padded, D, E,
                                          at<const float>(given[0]), at<const float>(given[1]), at<const float>(given[2]),
                                          at<const float>(given[3]), at<const float>(given[4]), at<const float>(given[5])};
    const tokdyn::Rows o = rows_at(d_o), q = rows_at(dq), k = rows_at(dk), v = rows_at(dv);
    py::gil_scoped_release without_gil;
    tokdyn::cotangent_attention(block, o, q, k, v, *level.products, *level.vectors, threads);
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
    m.def("topk_log_probs", &topk_log_probs, py::arg("logits"), py::arg("dtype"), py::arg("T"), py::arg("V"),
          py::arg("row_stride"), py::arg("k"), py::arg("values"), py::arg("ids"), py::kw_only(), py::arg("threads"),
          py::arg("simd") = "", "The k most likely columns of logits [T, V]: log-probabilities and ids, [T, k].");

    // Kernels over chunks. A chunk is (z, rows, row stride, first column, columns) of products W h in float32, a readout
    // (bias or 0, scale, softcap or 0, temperature); a row's running statistics take ROW_BYTES bytes.
    m.attr("ROW_BYTES") = sizeof(tokdyn::Rest);
    m.attr("TOPK_ROW_BYTES") = sizeof(tokdyn::TopkRow);
    m.attr("CANDIDATE_BYTES") = sizeof(tokdyn::Candidate);
    m.def("topk_capacity", &tokdyn::topk_capacity, py::arg("k"), "Candidates that a row of topk_chunk needs room for.");
    m.def("clear_rows", &clear_rows, py::arg("rows"), py::arg("n"), "Rows that have seen no column yet.");
    m.def("clear_topk", &clear_topk, py::arg("rows"), py::arg("n"), "Rows of topk_chunk that have seen no column yet.");
    m.def("apply_readout", &apply_readout, py::arg("chunk"), py::arg("readout"), py::kw_only(), py::arg("simd") = "",
          "Products to logits, in place.");
    m.def("fold_chunk", &fold_chunk, py::arg("chunk"), py::arg("readout"), py::arg("targets"), py::arg("target_logits"),
          py::arg("rows"), py::kw_only(), py::arg("threads"), py::arg("simd") = "",
          "A chunk into the statistics of its rows; targets and their logits [rows], or 0 for rows without a target.");
    m.def("finish_token_stats", &finish_token_stats, py::arg("n"), py::arg("targets"), py::arg("target_logits"), py::arg("rows"),
          py::arg("out"), "The statistics of token_stats once every column was folded.");
    m.def("topk_chunk", &topk_chunk, py::arg("chunk"), py::arg("readout"), py::arg("k"), py::arg("rows"), py::arg("candidates"),
          py::kw_only(), py::arg("threads"), py::arg("simd") = "", "A chunk into the candidates of its rows.");
    m.def("finish_topk", &finish_topk, py::arg("n"), py::arg("k"), py::arg("rows"), py::arg("candidates"), py::arg("values"),
          py::arg("ids"), py::kw_only(), py::arg("threads"), "The result of topk_log_probs once every column went by.");
    m.def("exponentials", &exponentials, py::arg("chunk"), py::arg("readout"), py::arg("rows"), py::arg("factor"),
          py::arg("dropped"), py::arg("n_dropped"), py::kw_only(), py::arg("threads"), py::arg("simd") = "",
          "A chunk to e^(z - max), max the largest logit so far; the factor for what came before; True if one is not 1.");
    m.def("forces", &forces, py::arg("chunk"), py::arg("readout"), py::arg("terms"), py::arg("rows"),
          py::kw_only(), py::arg("threads"), py::arg("simd") = "", "A chunk to the forces of its rows, once each was folded.");
    m.def("normalisers", &normalisers, py::arg("rows"), py::arg("n"), py::arg("out"), "1 / sum of e^(z - max) of each row.");
    m.def("rescale", &rescale, py::arg("matrix"), py::arg("M"), py::arg("L"), py::arg("row_stride"), py::arg("by_row"),
          py::arg("by_column"), py::kw_only(), py::arg("threads"), py::arg("simd") = "",
          "matrix[m, l] *= by_row[m] by_column[l]");
    m.def("add_row_dots", &add_row_dots, py::arg("a"), py::arg("b"), py::arg("rows"), py::arg("n"), py::arg("out"),
          py::kw_only(), py::arg("threads"), py::arg("simd") = "", "out[r] += a[r]·b[r] in double");

    // Tiles [rows, n] of two Gram matrices.
    m.def("segment_dots", &segment_dots, py::arg("a"), py::arg("b"), py::arg("rows"), py::arg("n"), py::arg("segment"),
          py::arg("out"), py::arg("S"), py::kw_only(), py::arg("threads"), py::arg("simd") = "",
          "out[r, segment[j]] += a[r, j] b[r, j], out [rows, S] in double");

    // A block of queries of an attention: sizes (n, B, Hk, G, rows, keys, old, padded, D, E), P, W, q, k, v transposed and o.
    m.def("cotangent_attention", &cotangent_attention, py::arg("sizes"), py::arg("given"), py::arg("d_o"), py::arg("dq"),
          py::arg("dk"), py::arg("dv"), py::kw_only(), py::arg("threads"), py::arg("simd") = "",
          "dq = dS K, dk += dS^T Q and dv += P^T dO with dS = W * (dO V^T - rowsum(dO * O)), for n cotangents; "
          "of dk and dv the first `old` keys are added to, the others written");

    void bind_cuda(py::module_&);
    bind_cuda(m);  // cuda/bindings.cpp
}
