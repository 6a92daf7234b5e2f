"""The C++ token_stats against its specification in float64, on every instruction set that this machine has."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from peaked import peaked_rows
from torch import Tensor

from tokdyn import _native
from tokdyn.kernels.token_stats import cpp, reference

NAMES = ("logsumexp", "log_prob", "entropy", "collision", "g_norm", "rank", "argmax", "argmax_log_prob")
EPS = 2.0**-24  # half an ulp of float32, relative
LN2 = abs(float(torch.tensor(math.log(2))) / math.log(2) - 1)  # what ln2 loses in float32, relative

_C, reason = _native.load()
if _C is None and not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
    pytest.skip(f"tokdyn._C is optional where there is no C++ compiler: {reason}", allow_module_level=True)


LEVELS = _C.simd_levels() if _C else ["missing"]


@pytest.fixture(params=LEVELS)
def simd(request: pytest.FixtureRequest) -> str:
    assert _C is not None, reason
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random_logits(T: int, V: int, dtype: torch.dtype, *, scale: float = 3.0, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * T + V)
    logits = (torch.randn(T, V, generator=generator) * scale + offset).to(dtype)
    return logits, torch.randint(0, V, (T,), generator=generator)


def check(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Error against float64 at most twice the largest of the same computation in torch, plus a rounding band.

    The band: e is within 4 EPS of exact (a test of its own, below) and enters collision squared, above and below the line:
    16 EPS of the result. All other outputs but one carry less; logsumexp may be near 0 while log S is not: 4 EPS more.
    """
    assert _C is not None, reason
    truth = dict(zip(NAMES, reference.token_stats(logits.double(), targets), strict=True))
    torch_32 = dict(zip(NAMES, reference.token_stats(logits, targets), strict=True))
    for simd in LEVELS:
        ours = dict(zip(NAMES, cpp.token_stats(logits, targets, simd=simd), strict=True))
        for name in NAMES:
            assert ours[name].shape == targets.shape
            if name in ("rank", "argmax"):
                assert ours[name].dtype == torch.int64
                assert torch.equal(ours[name], truth[name]), f"{name} with {simd}"
                continue
            assert ours[name].dtype == torch.float32
            exact = truth[name]
            finite = exact.isfinite()
            assert torch.equal(ours[name][~finite].double(), exact[~finite]), f"{name} with {simd}"
            error = (ours[name].double() - exact).abs()[finite]
            torch_error = (torch_32[name].double() - exact).abs()[finite]
            allowed = 16 * EPS * exact.abs()[finite] + 1e-14  # the latter is the rounding of the float64 reference itself
            if len(allowed):
                allowed += 2 * torch_error.max() + (4 * EPS if name == "logsumexp" else 0)
            assert (error <= allowed).all(), f"{name} with {simd}: {error.tolist()} > {allowed.tolist()}"
    return ours  # of the fastest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 2, 7, 63, 64, 65, 4097, 50257, 151936])
@pytest.mark.parametrize("T", [0, 1, 3])
def test_agrees_with_the_specification(T: int, V: int, dtype: torch.dtype):
    check(*random_logits(T, V, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_target_position(dtype: torch.dtype):
    V = 150  # two groups of 64 and a ragged end
    row, _ = random_logits(1, V, dtype)
    check(row.expand(V, V), torch.arange(V))  # row stride 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_stride_and_padding(dtype: torch.dtype, simd: str):
    logits, targets = random_logits(4, 1001, dtype)
    padded = torch.full((8, 1100), math.nan, dtype=dtype)  # whatever is read beyond the row shows
    view = padded[::2, 37:1038]
    view.copy_(logits)
    spread = torch.stack([targets, -torch.ones_like(targets)], 1)[:, 0]
    assert view.stride(0) == 2200 and not spread.is_contiguous()
    ours = cpp.token_stats(view, spread, simd=simd)
    for strided, plain in zip(ours, cpp.token_stats(logits, targets, simd=simd), strict=True):
        assert torch.equal(strided, plain)


def test_rows_far_apart(simd: str):
    near, far = torch.randn(50), torch.randn(1 << 22)  # one on the heap, one mapped: usually 2**40 bytes between them
    low, high = sorted([near, far], key=Tensor.data_ptr)
    targets = torch.tensor([3, 41])
    outputs = [torch.zeros(2, dtype=torch.int64 if name in ("rank", "argmax") else torch.float32) for name in NAMES]
    stride = (high.data_ptr() - low.data_ptr()) // 4
    addresses = [output.data_ptr() for output in outputs]
    _C.token_stats(low.data_ptr(), "float32", 2, 50, stride, targets.data_ptr(), addresses, threads=2, simd=simd)
    copies = cpp.token_stats(torch.stack([low[:50], high[:50]]), targets, simd=simd)
    for far_apart, together in zip(outputs, copies, strict=True):
        assert torch.equal(far_apart, together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_rank_the_lower_column_first(dtype: torch.dtype):
    V = 1000
    level = torch.zeros(V, V, dtype=dtype)
    ours = check(level, torch.arange(V))
    assert torch.equal(ours["rank"], torch.arange(V)) and not ours["argmax"].any()
    logits, targets = random_logits(50, V, dtype, scale=2.0)
    check(logits.float().round().to(dtype), targets)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_sorted_rows(order: str):
    logits, targets = random_logits(3, 5000, torch.float32)
    check(logits.sort(1, descending=order == "descending").values, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_minus_infinity_is_legal(dtype: torch.dtype):
    logits, targets = random_logits(8, 70000, dtype)  # three chunks of columns
    generator = torch.Generator().manual_seed(0)
    logits[torch.rand(logits.shape, generator=generator) < 0.5] = -math.inf
    logits[0, :69990] = -math.inf  # whole chunks without a finite entry
    logits[1, 10:] = -math.inf
    logits[2] = -math.inf
    logits[2, targets[2]] = 1.5  # certain: p_y = 1
    logits[3, targets[3]] = -math.inf  # impossible: p_y = 0
    logits[4] = torch.finfo(dtype).min  # the finite mask value
    ours = check(logits, targets)
    assert [ours[name][2].item() for name in NAMES] == [1.5, 0, 0, 1, 0, 0, targets[2].item(), 0]
    assert ours["log_prob"][3] == -math.inf and ours["entropy"][3] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.02, 0.9])
def test_far_below_the_maximum(dtype: torch.dtype, share: float):
    """Logits whose exponentials vanish, in few groups of the vector loop or in nearly all, about where each level gives up."""
    logits, targets = random_logits(40, 3001, dtype)
    generator = torch.Generator().manual_seed(1)
    far = torch.rand(logits.shape, generator=generator) < share
    depth = torch.tensor([80.0, 86.5, 87.5, 95.0, 104.0, 110.5, 300.0, 1e30])[
        torch.randint(8, logits.shape, generator=generator)
    ]
    check(torch.where(far, logits - depth.to(dtype), logits), targets)


def test_rows_without_a_softmax(simd: str):
    logits, targets = random_logits(6, 3000, torch.float32)
    clean = cpp.token_stats(logits, targets, simd=simd)
    broken = logits.clone()
    broken[0] = -math.inf
    broken[1, 2999] = math.inf
    broken[2, 0] = math.nan
    broken[3, targets[3]] = math.nan
    broken[4, 2999] = math.nan
    broken.view(torch.int32)[4, 100:200] = -1  # a NaN with every bit set
    ours = dict(zip(NAMES, cpp.token_stats(broken, targets, simd=simd), strict=True))
    for name, before in zip(NAMES, clean, strict=True):
        assert torch.equal(ours[name][5], before[5]), "a row must not see its neighbours"
        if name not in ("rank", "argmax"):
            assert ours[name][:5].isnan().all(), name
    assert ours["rank"].tolist()[:5] == [targets[0], 1 + (logits[1, :2999] > logits[1, targets[1]]).sum(), 0, 0, 0]
    assert ours["argmax"].tolist()[:5] == [0, 2999, -1, -1, -1]


@pytest.mark.parametrize("offset", [-120.0, 90.0, -3.0e4])
def test_offset_logits(offset: float):
    check(*random_logits(3, 7001, torch.float32, offset=offset))


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0, 75.0])
def test_peaked_rows_keep_relative_accuracy(gap: float, simd: str):
    """One logit at 0, V - 1 at -gap: closed forms in log1p, where the naive expressions are 0 or rounding noise.

    The band of `check`, and e^-gap carries the error of ln2 gap times (the next test). Of the 16 EPS an entropy takes up 4 for
    e and √(128/3) for 128 equal terms that one lane of float32 adds up.
    """
    logits, targets, expected = peaked_rows(50257, 40000, gap)
    ours = torch.stack([column.double() for column in cpp.token_stats(logits, targets, simd=simd)], 1)
    torch.testing.assert_close(ours, expected, rtol=16 * EPS + LN2 * gap, atol=0)


def test_the_exponential_is_within_two_ulp(simd: str):
    """Logits 0, -inf (the target) and -t: argmax_log_prob = -log1p(e^-t) carries the relative error of e^-t from t = 4 on.

    Beside two ulp (4 EPS) that of ln2 in float32, t times: a twentieth of what rounding t itself would cost.
    """
    t = torch.linspace(4, 86, 20001)
    logits = torch.stack([torch.zeros_like(t), torch.full_like(t, -math.inf), -t], 1)
    ours = cpp.token_stats(logits, torch.ones(len(t), dtype=torch.int64), simd=simd)[7].double()
    exact = -torch.log1p(torch.exp(-t.double()))
    assert ((ours / exact - 1).abs() <= 4 * EPS + LN2 * t).all()


@pytest.mark.parametrize("T", [3, 40])
def test_bits_do_not_depend_on_the_thread_count(T: int, simd: str, threads):
    logits, targets = random_logits(T, 70001, torch.float32)
    threads(1)
    alone = cpp.token_stats(logits, targets, simd=simd)
    threads(4)
    for one, four in zip(alone, cpp.token_stats(logits, targets, simd=simd), strict=True):
        assert torch.equal(one, four)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 5), torch.tensor([0, 5]), r"targets must lie in \[0, 5\), got 5 at position 1"),
        (torch.zeros(2, 5), torch.tensor([-1, 0]), r"got -1 at position 0"),
        (torch.zeros(2, 0), torch.tensor([0, 0]), "at least one column"),
        (torch.zeros(2, 5), torch.tensor([0]), r"\[2, 5\] and \[1\]"),
        (torch.zeros(5), torch.tensor([0]), r"must be \[T, V\]"),
        (torch.zeros(2, 5, dtype=torch.float64), torch.tensor([0, 0]), "float32 or bfloat16"),
        (torch.zeros(2, 5, dtype=torch.float16), torch.tensor([0, 0]), "float32 or bfloat16"),
        (torch.zeros(2, 5), torch.tensor([0, 0], dtype=torch.int32), "int64"),
        (torch.zeros(5, 2).T, torch.tensor([0, 0]), "adjacent"),
        (torch.zeros(2, 5, device="meta"), torch.tensor([0, 0]), "on the CPU"),
    ],
)
def test_bad_input_is_named(logits: Tensor, targets: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        cpp.token_stats(logits, targets)


def test_unknown_instruction_set_is_named():
    with pytest.raises(ValueError, match="simd must be one of portable"):
        cpp.token_stats(torch.zeros(1, 2), torch.tensor([0]), simd="mmx")


def test_parts_name_what_was_built():
    parts = _native.parts()
    assert set(parts) == {"extension", "cpu kernels", "cuda"} and all(parts.values())
    assert parts["cpu kernels"].startswith(_C.simd_levels()[-1])
