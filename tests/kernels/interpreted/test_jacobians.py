"""The Triton apply_A and softmax_jvp, interpreted, against their specifications in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tokdyn import ops
from tokdyn.kernels.apply_A import reference as apply_A
from tokdyn.kernels.apply_A import triton as apply_A_triton
from tokdyn.kernels.softmax_jvp import reference as softmax_jvp
from tokdyn.kernels.softmax_jvp import triton as softmax_jvp_triton

EPS = 2.0**-24
FORMS = {
    "apply_A": (apply_A_triton.apply_A, apply_A.apply_A, ops.apply_A),
    "softmax_jvp": (softmax_jvp_triton.softmax_jvp, softmax_jvp.softmax_jvp, ops.softmax_jvp),
}

pytestmark = pytest.mark.parametrize("op", FORMS)


def random_rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def check(agree, op: str, logits: Tensor, x: Tensor) -> Tensor:
    """The band: exponents are rounded, so pi is off by (2 |z - max| + 8) EPS and pi·x by that times pi·|x|, beside the rounding
    of x - pi·x; a half-precision result is cut, not rounded, by the interpreter."""
    fast, plain, _ = FORMS[op]
    ours, exact = fast(logits, x), plain(logits.double(), x.double())
    assert ours.dtype == torch.promote_types(logits.dtype, x.dtype)
    pi = logits.double().softmax(1)
    pi = pi if x.dim() == 2 else pi[..., None]
    below = logits.double().amax(1, keepdim=True) - logits.double()  # exp(-30) is nothing
    spread = float(below.clamp(max=30).nan_to_num(0, 0, 0).max())
    mean = (pi * x.double().abs()).sum(1, keepdim=True)
    band = (2 * spread + 8) * EPS * (x.double().abs() + mean) * (pi if op == "softmax_jvp" else 1)
    if ours.dtype == torch.bfloat16:
        band = band + 2.0**-7 * exact.abs()
    if ours.dtype == torch.float16:
        band = band + 2.0**-10 * exact.abs() + 2.0**-24
    agree(op, ours, plain(logits.float(), x.float()), exact, band.nan_to_num(0, 0, 0))
    return ours


@pytest.mark.parametrize("V", [1, 7, 1003])
def test_one_column(op: str, V: int, agree):
    check(agree, op, random_rows(2, V), random_rows(2, V, seed=1))


@pytest.mark.parametrize("k", [1, 3, 40])
def test_several_columns(op: str, k: int, agree):
    """40 columns are two parts of a row, the second of them ragged."""
    check(agree, op, random_rows(2, 301), random_rows(2, 301, k, seed=1))


@pytest.mark.parametrize(
    "types", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]
)
def test_half_precision(op: str, types: tuple[torch.dtype, torch.dtype], agree):
    check(agree, op, random_rows(1, 600, dtype=types[0]), random_rows(1, 600, 2, dtype=types[1], seed=1))


@pytest.mark.parametrize("V", [50257, 151936])
def test_several_tiles_and_a_wide_vocabulary(op: str, V: int, agree):
    check(agree, op, random_rows(1, V, dtype=torch.bfloat16), random_rows(1, V, seed=1))


@pytest.mark.parametrize("offset", [-120.0, -3.0e4])
def test_offset_logits(op: str, offset: float, agree):
    check(agree, op, random_rows(2, 501) + offset, random_rows(2, 501, seed=1))


def test_equal_logits_take_the_mean_away(op: str):
    """pi = 1 / V, so that A x = x - mean(x)."""
    x = random_rows(3, 700, seed=1)
    exact = x.double() - x.double().mean(1, keepdim=True)
    ours = FORMS[op][0](torch.full((3, 700), 2.5), x).double() * (700 if op == "softmax_jvp" else 1)
    assert ((ours - exact).abs() <= 16 * EPS * (x.abs() + x.abs().mean(1, keepdim=True))).all()


def test_rows_further_apart_than_32_bits(op: str, agree):
    apart = (1 << 31) + 12
    spread = torch.empty(apart + 300, dtype=torch.bfloat16)  # 4 GiB of addresses; only pages that are written come to exist
    logits, x = spread.as_strided((2, 130), (apart, 1)), spread.as_strided((2, 130), (apart, 1), 150)
    logits.copy_(random_rows(2, 130))
    x.copy_(random_rows(2, 130, seed=1))
    check(agree, op, logits, x)


def test_strides(op: str, agree):
    logits = torch.full((4, 400), math.nan)[::2, 37:338]
    logits.copy_(random_rows(2, 301))
    check(agree, op, logits, random_rows(2, 5, 301, seed=1).mT)
    check(agree, op, logits, random_rows(301, 2, seed=1).T)
    check(agree, op, logits, random_rows(1, 301, seed=1).expand(2, 301))


def test_infinities_and_nan_stay_in_their_row(op: str, agree):
    logits = random_rows(5, 103)
    logits[0, 5] = math.nan
    logits[1, 5] = math.inf
    logits[2] = -math.inf
    logits[3, 4:] = -math.inf
    ours = check(agree, op, logits, random_rows(5, 103, 2, seed=1))
    assert ours[:3].isnan().all() and ours[3:].isfinite().all()


def test_what_the_jacobian_conserves(op: str):
    """A 1 = 0, and the mean of A x under pi is 0; so softmax_jvp sums to 0."""
    logits, x = random_rows(2, 500), random_rows(2, 500, seed=1)
    fast, _, dispatch = FORMS[op]
    constant = fast(logits, torch.full_like(x, 3.0))
    assert constant.abs().max() <= 3 * 64 * EPS
    out = dispatch(logits, x, impl="triton")
    weights = logits.double().softmax(1) if op == "apply_A" else torch.ones_like(out)
    assert ((weights * out).sum(1).abs() <= 64 * EPS * x.abs().max()).all()


def test_empty_and_bad_input(op: str):
    fast = FORMS[op][0]
    assert fast(torch.zeros(0, 5), torch.zeros(0, 5, 2)).shape == (0, 5, 2)
    assert fast(torch.zeros(2, 5), torch.zeros(2, 5, 0)).shape == (2, 5, 0)
    with pytest.raises(ValueError, match=r"\[T, V\]=\[2, 5\]"):
        fast(torch.zeros(2, 5), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        fast(torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.float64))
