"""The C++ topk_log_probs against its specification in float64, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tokdyn.kernels.topk_log_probs import cpp, reference

_C = pytest.importorskip("tokdyn._C")  # test_native_token_stats.py fails where it should have been built
LEVELS = _C.simd_levels()
EPS = 2.0**-24  # half an ulp of float32, relative


def random_logits(T: int, V: int, dtype: torch.dtype, scale: float = 3.0, offset: float = 0.0) -> Tensor:
    return (torch.randn(T, V, generator=torch.Generator().manual_seed(1000 * T + V)) * scale + offset).to(dtype)


def check(logits: Tensor, k: int) -> None:
    """Ids are those of a stable sort; values are within the band of token_stats' log_prob, 16 EPS, of float64."""
    truth, places = reference.topk_log_probs(logits.double(), k)
    for simd in LEVELS:
        values, ids = cpp.topk_log_probs(logits, k, simd=simd)
        assert values.dtype == torch.float32 and ids.dtype == torch.int64
        assert torch.equal(ids, places), simd
        torch.testing.assert_close(values.double(), truth, rtol=16 * EPS, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("V", "k"),
    [(1, 1), (2, 1), (7, 7), (63, 5), (65, 65), (4097, 1), (4097, 64), (4097, 4097), (50257, 20), (151936, 300)],
)
@pytest.mark.parametrize("T", [0, 1, 3])
def test_agrees_with_the_specification(T: int, V: int, k: int, dtype: torch.dtype):
    check(random_logits(T, V, dtype), k)


@pytest.mark.parametrize("k", [1, 40, 900])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_lower_id_comes_first(dtype: torch.dtype, k: int):
    check(torch.zeros(2, 1000, dtype=dtype), k)
    check(random_logits(50, 5000, dtype).float().round().to(dtype), k)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e30, 3e38])
def test_large_logits_keep_their_digits(offset: float):
    """Four equal logits are log ¼ each, however large, in the specification too."""
    logits = torch.full((2, 4), offset)
    for values, _ in (reference.topk_log_probs(logits, 3), *(cpp.topk_log_probs(logits, 3, simd=simd) for simd in LEVELS)):
        torch.testing.assert_close(values, torch.full((2, 3), -math.log(4.0)), rtol=4 * EPS, atol=0.0)


@pytest.mark.parametrize("descending", [False, True])
def test_sorted_rows(descending: bool):
    """Ascending logits make every column a candidate, descending ones none after the first k."""
    check(random_logits(3, 9000, torch.float32).sort(1, descending=descending).values, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 8, 3000])
def test_infinities_and_nan(k: int, dtype: torch.dtype):
    """Of a row without a softmax the values are undefined, the ids are those of a sort, which takes NaN for the largest."""
    logits = random_logits(8, 9001, dtype)
    logits[0, torch.arange(0, 9001, 2)] = -math.inf
    logits[1] = -math.inf
    logits[2, 5:] = -math.inf
    logits[3, [7, 4000, 8000]] = math.inf
    logits[4, 8999] = math.nan
    logits[5, [0, 4100]] = math.nan
    logits[6, [0, 4100]], logits[6, 4101] = math.nan, math.inf
    check(logits, k)


@pytest.mark.parametrize("offset", [-120.0, 90.0, -3.0e4])
def test_offset_logits(offset: float):
    check(random_logits(3, 7001, torch.float32, offset=offset), 12)


@pytest.mark.parametrize("gap", [5.0, 20.0, 75.0])
@pytest.mark.parametrize("simd", LEVELS)
def test_a_confident_first_choice_keeps_its_digits(gap: float, simd: str):
    """The band of `check`, and e^-gap carries the error of ln2 in float32 gap times (test_native_token_stats.py)."""
    V = 50257
    logits = torch.full((1, V), -gap)
    logits[0, 40000] = 0
    values, ids = cpp.topk_log_probs(logits, 2, simd=simd)
    log_S = math.log1p((V - 1) * math.exp(-gap))
    assert ids.tolist() == [[40000, 0]]
    expected = torch.tensor([[-log_S, -gap - log_S]], dtype=torch.float64)
    ln2 = abs(float(torch.tensor(math.log(2))) / math.log(2) - 1)
    torch.testing.assert_close(values.double(), expected, rtol=16 * EPS + ln2 * gap, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("simd", LEVELS)
def test_row_stride_and_padding(dtype: torch.dtype, simd: str):
    logits = random_logits(4, 1001, dtype)
    padded = torch.full((8, 1100), math.nan, dtype=dtype)  # whatever is read beyond the row shows
    view = padded[::2, 37:1038]
    view.copy_(logits)
    for strided, plain in zip(cpp.topk_log_probs(view, 9, simd=simd), cpp.topk_log_probs(logits, 9, simd=simd), strict=True):
        assert torch.equal(strided, plain)
    rows = cpp.topk_log_probs(logits[:1].expand(7, -1), 9, simd=simd)[1]
    assert torch.equal(rows, rows[:1].expand(7, -1))


@pytest.mark.parametrize("simd", LEVELS)
def test_rows_far_apart(simd: str):
    near, far = torch.randn(50), torch.randn(1 << 22)  # one on the heap, one mapped: a stride far beyond 32 bits
    low, high = sorted([near, far], key=Tensor.data_ptr)
    values, ids = torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.int64)
    stride = (high.data_ptr() - low.data_ptr()) // 4
    _C.topk_log_probs(low.data_ptr(), "float32", 2, 50, stride, 5, values.data_ptr(), ids.data_ptr(), threads=2, simd=simd)
    together = cpp.topk_log_probs(torch.stack([low[:50], high[:50]]), 5, simd=simd)
    assert torch.equal(values, together[0]) and torch.equal(ids, together[1])


def test_bits_do_not_depend_on_the_thread_count():
    logits, before = random_logits(5, 70001, torch.float32), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append(cpp.topk_log_probs(logits, 33))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, four) for one, four in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("logits", "k", "message"),
    [
        (torch.zeros(2, 5), 6, r"k must lie in \[1, V\]=\[1, 5\], got 6"),
        (torch.zeros(2, 5), 0, "k must lie in"),
        (torch.zeros(5), 1, r"must be \[T, V\]"),
        (torch.zeros(2, 5, dtype=torch.float64), 1, "float32 or bfloat16"),
        (torch.zeros(5, 2).T, 1, "adjacent"),
        (torch.zeros(2, 5, device="meta"), 1, "on the CPU"),
    ],
)
def test_bad_input_is_named(logits: Tensor, k: int, message: str):
    with pytest.raises(ValueError, match=message):
        cpp.topk_log_probs(logits, k)
