"""The C++ linear_token_stats and linear_topk_log_probs against their specification in float64, on every instruction set."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tokdyn.kernels.linear_token_stats import cpp, reference
from tokdyn.kernels.readout_forces.reference import readout_logits
from tokdyn.kernels.topk_log_probs import cpp as topk_cpp
from tokdyn.kernels.topk_log_probs import reference as topk_reference

_C = pytest.importorskip("tokdyn._C")  # test_native_token_stats.py fails where it should have been built
LEVELS = _C.simd_levels()
NAMES = ("logsumexp", "log_prob", "entropy", "collision", "g_norm", "rank", "argmax", "argmax_log_prob")
EPS = 2.0**-24  # half an ulp of float32, relative
READOUTS = {
    "plain": {},
    "bias and scale": dict(bias=True, scale=0.7),
    "softcap": dict(softcap=30.0, temperature=0.6),
    "all": dict(bias=True, scale=1.5, softcap=20.0, temperature=1.3),
}


def case(T: int, d: int, V: int, dtype: torch.dtype, bias: bool = False, **options) -> tuple[tuple[Tensor, ...], dict]:
    g = torch.Generator().manual_seed(1000 * T + V)
    h, W = (torch.randn(*shape, generator=g).to(dtype) for shape in ((T, d), (V, d)))
    if bias:
        options["bias"] = torch.randn(V, generator=g).to(dtype)
    return (h, W * 2 / math.sqrt(d), torch.randint(0, V, (T,), generator=g)), options


def double(x):
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def logits(h: Tensor, W: Tensor, options: dict) -> Tensor:
    plain = {key: value for key, value in options.items() if key != "temperature"}
    return readout_logits(h, W, **plain) / options.get("temperature", 1.0)


def check(args: tuple[Tensor, ...], options: dict) -> dict[str, Tensor]:
    """Against float64, for every instruction set.

    delta is twice the largest error of a logit computed by torch in float32. A change of delta in every logit changes
    logsumexp by delta at most, log_prob by 2 delta, and every other statistic by less than 4 delta of itself; 16 EPS of the
    result is the band of token_stats given the logits. A rank may differ by the logits within 2 delta of the target's.
    """
    h, W, y = args
    exact_options = {key: double(value) for key, value in options.items()}
    z = logits(h.double(), W.double(), exact_options)
    delta = 2 * (logits(h, W, options).double() - z).abs().max() if len(h) else 0.0
    truth = dict(zip(NAMES, reference.linear_token_stats(h.double(), W.double(), y, **exact_options), strict=True))
    z_y = z.gather(1, y[:, None])
    for simd in LEVELS:
        ours = dict(zip(NAMES, cpp.linear_token_stats(*args, simd=simd, **options), strict=True))
        for name in NAMES:
            exact, one = truth[name], ours[name]
            assert one.shape == y.shape and one.dtype == (torch.int64 if name in ("rank", "argmax") else torch.float32)
            if name == "rank":
                surely, perhaps = (z > z_y + 2 * delta).sum(1), (z >= z_y - 2 * delta).sum(1) - 1
                assert ((surely <= one) & (one <= perhaps)).all(), f"rank with {simd}"
            elif name == "argmax":
                assert (z.gather(1, one[:, None]).squeeze(1) >= z.max(1).values - 2 * delta).all(), f"argmax with {simd}"
            else:
                slack = (16 * EPS + 4 * delta) * exact.abs() + (2 * delta if name in ("logsumexp", "log_prob") else 0)
                assert ((one.double() - exact).abs() <= slack).all(), f"{name} with {simd}"
    return ours


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "d", "V"), [(1, 1, 1), (1, 33, 7), (7, 65, 1001), (3, 8, 50257), (2, 4, 151936)])
def test_agrees_with_the_specification(T: int, d: int, V: int, dtype: torch.dtype, readout: str):
    check(*case(T, d, V, dtype, **READOUTS[readout]))


def test_more_rows_and_columns_than_a_block(monkeypatch: pytest.MonkeyPatch):
    """Three blocks of rows, of unlike length, and chunks of 256 columns: each row carries its statistics across them."""
    monkeypatch.setattr("tokdyn.kernels.native.ROWS", 13)
    monkeypatch.setattr("tokdyn.kernels.native.BUFFER", 4 * 13 * 256)
    check(*case(31, 17, 1500, torch.float32, **READOUTS["all"]))
    check(*case(31, 17, 1500, torch.bfloat16, **READOUTS["all"]))


def whole_numbers(T: int, d: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Small integers, so that every product is exact, and equal logits are equal whatever the BLAS does."""
    g = torch.Generator().manual_seed(V)
    h, W = (torch.randint(-2, 3, shape, generator=g).to(dtype) for shape in ((T, d), (V, d)))
    return h, W, torch.randint(0, V, (T,), generator=g)


@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 300, 5003])
def test_ties_rank_the_lower_token_first(V: int, dtype: torch.dtype, simd: str):
    h, W, y = whole_numbers(257, 6, V, dtype)
    ours = cpp.linear_token_stats(h, W, y, simd=simd)
    truth = reference.linear_token_stats(h.double(), W.double(), y)
    assert torch.equal(ours[5], truth[5]) and torch.equal(ours[6], truth[6])
    k = min(V, 70)
    values, ids = topk_cpp.linear_topk_log_probs(h, W, k, simd=simd)
    exact, places = topk_reference.linear_topk_log_probs(h.double(), W.double(), k)
    assert torch.equal(ids, places)
    assert ((values - exact).abs() <= 16 * EPS * exact.abs()).all()  # the logits are exact; the band of token_stats given them


@pytest.mark.parametrize("simd", LEVELS)
def test_equal_rows_of_the_weight(simd: str):
    """Tokens with one and the same embedding: the statistics are those of the specification on the logits they have."""
    (h, W, y), _ = case(300, 40, 600, torch.float32)
    W[::3] = W[0]
    ours = dict(zip(NAMES, cpp.linear_token_stats(h, W, torch.full_like(y, 300), simd=simd), strict=True))
    exact = h.double() @ W.double().T
    above = (exact > exact[:, :1] + 1e-4).sum(1)
    assert ((ours["rank"] >= above) & (ours["rank"] < above + 200)).all()
    assert (ours["argmax_log_prob"] >= ours["log_prob"]).all()
    assert torch.equal(ours["rank"] == 0, ours["argmax"] == 300)


@pytest.mark.parametrize("simd", LEVELS)
def test_undefined_rows_stay_alone(simd: str):
    h, W, y = whole_numbers(6, 8, 3001)
    clean = cpp.linear_token_stats(h, W, y, simd=simd)
    broken = h.clone()
    broken[1, 3] = math.nan
    broken[4] = math.nan
    for name, ours, before in zip(NAMES, cpp.linear_token_stats(broken, W, y, simd=simd), clean, strict=True):
        assert torch.equal(ours[[0, 2, 3, 5]], before[[0, 2, 3, 5]]), "a row must not see its neighbours"
        expected = {"rank": 0, "argmax": -1}.get(name, math.nan)
        assert torch.equal(ours[[1, 4]], torch.full((2,), expected, dtype=ours.dtype)) or ours[[1, 4]].isnan().all()


BIASES = {
    "half of the tokens": lambda b: b.index_fill_(0, torch.arange(0, len(b), 2), -math.inf),
    "whole chunks": lambda b: b.__setitem__(slice(0, 4900), -math.inf),
    "all but one": lambda b: b.__setitem__(slice(1, None), -math.inf),
    "all": lambda b: b.fill_(-math.inf),
    "plus infinity": lambda b: b.__setitem__(slice(7, None, 1000), math.inf),
    "NaN": lambda b: b.__setitem__(4321, math.nan),
    "NaN and plus infinity": lambda b: (b.__setitem__(5, math.inf), b.__setitem__(4321, math.nan)),
    "offset": lambda b: b.sub_(120),
}


@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize("shape", BIASES)
def test_infinite_logits(shape: str, simd: str, monkeypatch: pytest.MonkeyPatch):
    """-inf is legal; +inf, NaN and -inf throughout leave no softmax, but ranks wherever there is no NaN."""
    monkeypatch.setattr("tokdyn.kernels.native.BUFFER", 4 * 40 * 256)
    h, W, y = whole_numbers(40, 4, 5000)
    y[:8] = torch.tensor([0, 1, 5, 7, 4321, 4999, 1007, 4998])
    bias = torch.zeros(5000)
    BIASES[shape](bias)
    ours = cpp.linear_token_stats(h, W, y, bias=bias, simd=simd)
    truth = reference.linear_token_stats(h.double(), W.double(), y, bias=bias.double())
    for name, one, exact in zip(NAMES, ours, truth, strict=True):
        if name in ("rank", "argmax"):
            assert torch.equal(one, exact), name
        else:
            torch.testing.assert_close(one.double(), exact, rtol=16 * EPS, atol=1e-14, equal_nan=True)
    values, ids = topk_cpp.linear_topk_log_probs(h, W, 9, bias=bias, simd=simd)
    exact, places = topk_reference.linear_topk_log_probs(h.double(), W.double(), 9, bias=bias.double())
    assert torch.equal(ids, places)
    torch.testing.assert_close(values.double(), exact, rtol=16 * EPS, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize("cap", [0.01, 1.0, 50.0])
def test_softcap_keeps_its_digits(cap: float, simd: str):
    """Of a vocabulary of one token logsumexp is the logit: cap tanh(x/cap), relative to itself, on both branches of tanh.

    A quotient, two ulp of tanh and a product: 6 EPS.
    """
    x = torch.cat([torch.linspace(-12, 12, 40001), torch.logspace(-30, 1, 1000), torch.tensor([0.0, -100.0, math.inf])]) * cap
    y = torch.zeros(len(x), dtype=torch.int64)
    ours = cpp.linear_token_stats(x[:, None], torch.ones(1, 1), y, softcap=cap, simd=simd)[0]
    cap = float(torch.tensor(cap))
    exact = cap * (x.double() / cap).tanh()
    assert ((ours.double() - exact).abs() <= 6 * EPS * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(dtype: torch.dtype):
    (h, W, y), options = case(9, 12, 700, dtype, bias=True)
    ours = cpp.linear_token_stats(
        h.T.contiguous().T,
        torch.stack([W, W], 2)[:, :, 0],
        torch.stack([y, -y], 1)[:, 0],
        bias=torch.stack([options["bias"], options["bias"]], 1)[:, 1],
    )
    for one, plain in zip(ours, cpp.linear_token_stats(h, W, y, **options), strict=True):
        torch.testing.assert_close(one, plain, rtol=1e-5, atol=1e-5)  # another layout, another kernel of the BLAS


def test_empty_batch():
    args, options = case(0, 5, 30, torch.float32, bias=True)
    assert [len(x) for x in cpp.linear_token_stats(*args, **options)] == [0] * 8
    assert [x.shape for x in topk_cpp.linear_topk_log_probs(*args[:2], 3)] == [(0, 3), (0, 3)]


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "V", "k"), [(1, 7, 7), (40, 1001, 1), (5, 50257, 100)])
def test_topk_agrees_with_the_specification(T: int, V: int, k: int, dtype: torch.dtype, readout: str):
    (h, W, _), options = case(T, 33, V, dtype, **READOUTS[readout])
    options.pop("temperature", None)
    exact_options = {key: double(value) for key, value in options.items()}
    log_pi = logits(h.double(), W.double(), exact_options).log_softmax(1)
    delta = 2 * (logits(h, W, options).double().log_softmax(1) - log_pi).abs().max()
    truth, _ = topk_reference.linear_topk_log_probs(h.double(), W.double(), k, **exact_options)
    for simd in LEVELS:
        values, ids = topk_cpp.linear_topk_log_probs(h, W, k, simd=simd, **options)
        assert (ids.sort(1).values.diff(dim=1) > 0).all() and (values.diff(dim=1) <= 0).all()
        assert ((values - truth).abs() <= 2 * delta + 16 * EPS * truth.abs()).all()
        assert ((log_pi.gather(1, ids) - values).abs() <= 2 * delta + 16 * EPS * truth.abs()).all()


def peak_of(call: Callable[[], object]) -> int:
    """KiB of resident memory that a call needed at its peak; what was freed before goes back to the system first."""

    def resident(which: str) -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(which))

    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the resident memory from /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_than_64_MiB(dtype: torch.dtype):
    """The logits would take 320 MiB."""
    (h, W, y), _ = case(4096, 32, 20480, dtype)
    cpp.linear_token_stats(h[:64], W, y[:64])  # what BLAS and the loader keep from their first call
    assert peak_of(lambda: cpp.linear_token_stats(h, W, y)) <= 64 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(targets=torch.tensor([0, 5])), r"targets must lie in \[0, V\)=\[0, 5\), got 0 to 5"),
        (dict(targets=torch.tensor([0])), r"targets must have shape \[T\]=\[2\], got \[1\]"),
        (dict(targets=torch.tensor([0, 1], dtype=torch.int32)), "targets must be int64"),
        (dict(hidden=torch.zeros(2, 4)), r"hidden must be \[rows, d\] with d=3"),
        (dict(hidden=torch.zeros(2, 3, dtype=torch.float16)), "hidden must be float32 or bfloat16, got torch.float16"),
        (dict(weight=torch.zeros(5, 3, device="meta")), "weight must be on the CPU, got meta"),
        (dict(weight=torch.zeros(0, 3)), "V >= 1"),
        (dict(bias=torch.zeros(4)), r"bias must have shape \[V\]=\[5\], got \[4\]"),
        (dict(softcap=0.0), "softcap must be above 0"),
        (dict(temperature=0.0), "temperature must be above 0"),
        (dict(simd="mmx"), "simd must be one of portable"),
    ],
)
def test_bad_input_is_named(change: dict, message: str):
    good = dict(hidden=torch.zeros(2, 3), weight=torch.zeros(5, 3), targets=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=message):
        cpp.linear_token_stats(**(good | change))
