"""The Triton linear_token_stats, interpreted: chunks of products and the fused kernel against the specification in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tokdyn import ops
from tokdyn.kernels.linear_token_stats import reference, triton

NAMES = ops.TokenStats._fields
EPS = 2.0**-24

pytestmark = pytest.mark.parametrize("fused", [False, True])


def problem(T: int, V: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(V)
    hidden, weight = torch.randn(T, d, generator=g).to(dtype), torch.randn(V, d, generator=g).to(dtype)
    return hidden, weight, torch.randint(0, V, (T,), generator=g)


@pytest.fixture
def check(agree):
    def check(hidden: Tensor, weight: Tensor, targets: Tensor, *, fused: bool, **readout: Any) -> dict[str, Tensor]:
        """The band of token_stats, and what products of width d may be off by: d EPS Σ |h w| each, of which an entropy or a
        norm takes up at most four times as much."""
        wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in readout.items()}
        args = hidden, weight, targets
        ours = dict(zip(NAMES, triton.linear_token_stats(*args, fused=fused, **readout), strict=True))
        plain = dict(zip(NAMES, reference.linear_token_stats(*args, **readout), strict=True))
        truth = reference.linear_token_stats(hidden.double(), weight.double(), targets, **wide)
        exact = dict(zip(NAMES, truth, strict=True))
        size = float((hidden.double().abs() @ weight.double().abs().T).max())
        size += 0.0 if "bias" not in readout else float(readout["bias"].abs().nan_to_num(posinf=0.0).max())
        size *= abs(readout.get("scale", 1.0))
        products = 4 * hidden.shape[1] * EPS * size / readout.get("temperature", 1.0)
        relative = (16 + 4 * (exact["entropy"] - exact["argmax_log_prob"])) * EPS
        for name in NAMES:
            agree(name, ours[name], plain[name], exact[name], relative * exact[name].abs() + products)
        return ours

    return check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_specification(dtype: torch.dtype, fused: bool, monkeypatch, check):
    monkeypatch.setattr(triton, "BUFFER", 1)  # chunks of 1024
    monkeypatch.setattr(triton, "SPLIT", 512)
    many = triton._fold_shape(100_000)  # the launch for many rows
    monkeypatch.setattr(triton, "_fold_shape", lambda T: many)
    hidden, weight, targets = problem(3, 2601, 33, dtype)
    targets[:2] = torch.tensor([0, 2600])
    check(hidden, weight, targets, fused=fused)


def test_bias_scale_softcap_and_temperature(fused: bool, check):
    hidden, weight, targets = problem(2, 1030, 20)
    bias = torch.randn(1030, generator=torch.Generator().manual_seed(1))
    bias[7], bias[targets[1] - 1] = -math.inf, 50.0
    check(hidden, weight, targets, fused=fused, bias=bias, scale=0.5, softcap=3.0, temperature=0.7)
    check(hidden[:1], weight, targets[:1], fused=fused, bias=bias, temperature=2.0)


@pytest.mark.parametrize("V", [50257, 151936])
def test_large_vocabularies_far_below_zero(V: int, fused: bool, monkeypatch, check):
    """A bias of -120 everywhere, and -inf at every 7th token; the target is fifth, where logits lie further apart than their
    rounding. Wide tiles, of which the interpreter needs few."""
    monkeypatch.setattr(triton, "_tiles", lambda dtype: dict(BT=16, BV=2048, BD=16, num_warps=4, num_stages=1))
    hidden, weight, targets = problem(1, V, 3)
    bias = torch.full((V,), -120.0).index_fill(0, torch.arange(0, V, 7), -math.inf)
    targets = (hidden.double() @ weight.double().T + bias).topk(5).indices[:, 4]
    check(hidden, weight, targets, fused=fused, bias=bias)


def test_offsets_pass_two_to_the_31(fused: bool):
    storage = torch.empty(20 << 27, dtype=torch.bfloat16)  # pages that nobody touches are not there
    hidden, weight, targets = problem(2, 20, 5, torch.bfloat16)
    far = storage.as_strided((20, 5), (1 << 27, 1))
    far.copy_(weight)
    apart = storage.as_strided((2, 5), ((1 << 31) + 7, 1), 64)
    apart.copy_(hidden)
    ours = triton.linear_token_stats(apart, far, targets, fused=fused)
    for a, b in zip(ours, triton.linear_token_stats(hidden, weight, targets, fused=fused), strict=True):
        assert torch.equal(a, b)


def test_small_softcapped_logits_keep_their_digits(fused: bool, check):
    """tanh(x) for small x is x; as (1 - e) / (1 + e) it would be off by EPS, not by x EPS."""
    hidden, weight, targets = problem(1, 40, 8)
    ours = check(1e-3 * hidden, weight, targets, fused=fused, softcap=30.0)
    z = (1e-3 * hidden.double() @ weight.double().T)[0]
    z = 30 * (z / 30).tanh()
    spread = float(z.max() - z[targets[0]])
    got = float(ours["argmax_log_prob"][0].double() - ours["log_prob"][0].double())
    assert abs(got - spread) <= 16 * EPS * math.log(40)


def in_another_order(hidden: Tensor, weight: Tensor) -> float:
    """Twice what products of width d may be off by, of which a statistic takes up at most four times as much, as in `check`."""
    return 2 * 4 * hidden.shape[1] * EPS * float((hidden.abs() @ weight.abs().T).max())


def test_rows_are_taken_in_blocks(fused: bool, monkeypatch):
    hidden, weight, targets = problem(5, 70, 9)
    whole = triton.linear_token_stats(hidden, weight, targets, fused=fused)
    monkeypatch.setattr(triton, "ROWS", 2)
    for parts, together in zip(triton.linear_token_stats(hidden, weight, targets, fused=fused), whole, strict=True):
        torch.testing.assert_close(parts, together, rtol=64 * EPS, atol=in_another_order(hidden, weight))


def test_the_targets_own_logit_when_it_leads(fused: bool):
    """The row of y is 40 times as long as any other: 1 - pi_y is of size e^-gap and must be right relative to that.

    The exponent of e^-40 is rounded, which changes it by 2·40 EPS at most; sums and quotients come on top.
    """
    hidden, weight = torch.tensor([[1.0, 0.0]]), torch.zeros(600, 2)
    weight[431, 0] = 40.0
    stats = ops.TokenStats(*triton.linear_token_stats(hidden, weight, torch.tensor([431]), fused=fused))
    rest = 599 * math.exp(-40.0)
    assert float(stats.log_prob) == pytest.approx(-rest, rel=100 * EPS)
    assert float(stats.g_norm) == pytest.approx(math.sqrt(rest**2 + 599 * math.exp(-80.0)), rel=100 * EPS)
    assert float(stats.entropy) == pytest.approx(41 * rest, rel=100 * EPS)
    assert (int(stats.rank), int(stats.argmax)) == (0, 431)


def test_equal_weights_tie(fused: bool):
    hidden, weight = torch.ones(3, 4), torch.ones(300, 4)  # every product is exactly 4
    stats = ops.TokenStats(*triton.linear_token_stats(hidden, weight, torch.tensor([0, 150, 299]), fused=fused))
    assert stats.rank.tolist() == [0, 150, 299] and not stats.argmax.any()


def test_rows_without_a_softmax(fused: bool, check):
    hidden, weight, targets = problem(4, 200, 6)
    clean = triton.linear_token_stats(hidden, weight, targets, fused=fused)
    hidden[0, 3] = math.nan
    targets[1] = 200
    ours = dict(zip(NAMES, triton.linear_token_stats(hidden, weight, targets, fused=fused), strict=True))
    for name, before in zip(NAMES, clean, strict=True):
        assert torch.equal(ours[name][2:], before[2:]), "a row must not see its neighbours"
        if name not in ("rank", "argmax"):
            assert ours[name][:2].isnan().all(), name
    assert ours["rank"].tolist()[:2] == [0, 0] and ours["argmax"].tolist()[:2] == [-1, -1]
    closed = torch.full((200,), -math.inf)
    undefined = triton.linear_token_stats(hidden[2:3], weight, targets[2:3], bias=closed, fused=fused)
    assert undefined[0].isnan().all() and int(undefined[5]) == int(targets[2]) and int(undefined[6]) == 0


def test_one_token_no_rows_and_strides(fused: bool, check):
    check(*problem(2, 1, 5), fused=fused)
    hidden, weight, targets = problem(2, 50, 6)
    assert [len(column) for column in triton.linear_token_stats(hidden[:0], weight, targets[:0], fused=fused)] == [0] * 8
    strided = triton.linear_token_stats(hidden.T.contiguous().T, weight.T.contiguous().T, targets, fused=fused)
    for a, b in zip(strided, triton.linear_token_stats(hidden, weight, targets, fused=fused), strict=True):
        torch.testing.assert_close(a, b, rtol=64 * EPS, atol=in_another_order(hidden, weight))


def test_bad_input_is_named(fused: bool):
    hidden, weight, targets = problem(2, 50, 6)
    for arguments, options, message in (
        ((hidden, weight[:, :5], targets), {}, r"got \[2, 6\] and \[50, 5\]"),
        ((hidden, weight.bfloat16(), targets), {}, "must share"),
        ((hidden, weight, targets[:1]), {}, r"\[T\]=\[2\]"),
        ((hidden, weight, targets), dict(bias=torch.zeros(49)), r"bias must be \[V\]=\[50\]"),
        ((hidden, weight, targets), dict(softcap=0.0), "softcap"),
        ((hidden, weight, targets), dict(temperature=0.0), "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            triton.linear_token_stats(*arguments, fused=fused, **options)
