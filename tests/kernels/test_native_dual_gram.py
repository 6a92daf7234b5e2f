"""The C++ dual_gram against its specification in float64, whole and summed over segments, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tokdyn.kernels.dual_gram import cpp, reference

_C = pytest.importorskip("tokdyn._C")  # test_native_token_stats.py fails where it should have been built
LEVELS = _C.simd_levels()
EPS = 2.0**-24  # half an ulp of float32, relative


def factors(M: int, L: int, p: int, q: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(1000 * M + L)
    return [torch.randn(*s, generator=g).to(dtype) for s in ((M, p), (L, p), (M, q), (L, q))]


def check(parts: list[Tensor], segments: tuple[Tensor, Tensor] | None = None, levels: list[str] = LEVELS) -> Tensor:
    """At most twice the largest error of torch in float32, and (p + q + 4) EPS of what is added up in one entry."""
    truth = reference.dual_gram(*(x.double() for x in parts), segments=segments)
    torch_32 = reference.dual_gram(*(x.float() for x in parts), segments=segments)
    size = reference.dual_gram(*(x.double().abs() for x in parts), segments=segments)
    allowed = 2 * (torch_32 - truth).abs().max() + (parts[0].shape[1] + parts[2].shape[1] + 4) * EPS * size
    for simd in levels:
        ours = cpp.dual_gram(*parts, segments=segments, simd=simd)
        assert ours.dtype == torch.float32 and ours.shape == truth.shape
        assert ((ours - truth).abs() <= allowed).all(), simd
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("M", "L", "p", "q"), [(1, 1, 1, 1), (5, 4, 3, 6), (37, 65, 64, 17), (1100, 2300, 8, 5)])
def test_agrees_with_the_specification(M: int, L: int, p: int, q: int, dtype: torch.dtype):
    check(factors(M, L, p, q, dtype))


def segments_of(M: int, L: int, S_o: int, S_u: int, order: str) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(M)
    ids = [torch.randint(0, S, (n,), generator=g) for n, S in ((M, S_o), (L, S_u))]
    for one, S in zip(ids, (S_o, S_u), strict=True):
        one[-1] = S - 1
    return tuple(one.sort().values if order == "sorted" else one for one in ids)


@pytest.mark.parametrize("order", ["sorted", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("M", "L", "p", "q", "S_o", "S_u"),
    [(1, 1, 1, 1, 1, 1), (5, 4, 3, 6, 2, 3), (130, 90, 33, 17, 130, 90), (1300, 1100, 17, 33, 5, 7), (40, 50, 90, 70, 3, 50)],
)
def test_segments_agree_by_either_way(M, L, p, q, S_o, S_u, dtype, order, monkeypatch: pytest.MonkeyPatch):
    """As tiles of the matrices, as inner products of summed outer products, 3 columns at a time or all, and as chosen."""
    parts, segments = factors(M, L, p, q, dtype), segments_of(M, L, S_o, S_u, order)
    check(parts, segments)
    for block in (0, 3, q):
        monkeypatch.setattr(cpp, "outer_block", lambda *_, block=block: min(block, q))
        check(parts, segments, levels=LEVELS if block == 0 else [""])


def test_the_way_is_chosen_by_its_cost():
    assert cpp.outer_block(8192, 8192, (64, 64), 64, 64) == 64
    assert cpp.outer_block(8192, 8192, (8192, 8192), 64, 64) == 0  # every token its own segment
    assert cpp.outer_block(20, 20, (2, 2), 896, 896) == 0  # few tokens, large matrices
    block = cpp.outer_block(8192, 8192, (8, 8), 896, 4864)
    assert 0 < block < 4864 and 8 * 896 * block * 4 <= cpp.ROOM


@pytest.mark.parametrize("whole", [True, False])
def test_adds_to_out_in_place(whole: bool):
    parts = factors(40, 30, 5, 6)
    segments = None if whole else segments_of(40, 30, 7, 4, "mixed")
    alone = cpp.dual_gram(*parts, segments=segments)
    padded = torch.full((alone.shape[0], alone.shape[1] + 5), math.nan)
    out = padded[:, 2:-3]
    out.fill_(3.0)
    assert cpp.dual_gram(*parts, out=out, segments=segments) is out
    assert torch.allclose(out, alone + 3, rtol=0, atol=2 * EPS * float(alone.abs().max() + 3))
    assert padded[:, :2].isnan().all() and padded[:, -3:].isnan().all()
    larger = torch.zeros(9, 9)  # more segments than occur
    if not whole:
        cpp.dual_gram(*parts, out=larger, segments=segments)
        assert torch.equal(larger[:7, :4], alone) and not larger[7:].any() and not larger[:, 4:].any()


def test_nan_stays_in_its_row():
    parts = factors(9, 8, 3, 4)
    clean = cpp.dual_gram(*parts)
    parts[0][2, 1] = math.nan
    ours = cpp.dual_gram(*parts)
    assert ours[2].isnan().all()
    ours[2] = clean[2]
    assert torch.equal(ours, clean)


def test_strides_and_empty_sides():
    a1, a2, d1, d2 = factors(9, 8, 6, 4)
    plain = cpp.dual_gram(a1, a2, d1, d2)
    strided = cpp.dual_gram(a1.T.contiguous().T, torch.cat([a2, a2], 1)[:, 6:], d1.repeat_interleave(2, 0)[::2], d2)
    size = reference.dual_gram(
        *(x.abs() for x in (a1, a2, d1, d2))
    )  # each is within (p + q + 1) EPS of it, in any order of sums
    assert ((strided - plain).abs() <= 2 * (6 + 4 + 1) * EPS * size).all()
    assert cpp.dual_gram(a1[:0], a2, d1[:0], d2).shape == (0, 8)
    none = torch.zeros(0, dtype=torch.int64)
    assert cpp.dual_gram(a1[:0], a2, d1[:0], d2, segments=(none, torch.zeros(8, dtype=torch.int64))).shape == (0, 1)
    assert not cpp.dual_gram(a1[:, :0], a2[:, :0], d1, d2).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(a2=torch.zeros(4, 2)), r"a1 \[M, p\], a2 \[L, p\]"),
        (dict(d1=torch.zeros(4, 2)), "as many rows as a1 and a2, 5 and 4, got 4 and 4"),
        (dict(a1=torch.zeros(5, 3, dtype=torch.float64)), "a1 must be float32 or bfloat16"),
        (dict(out=torch.zeros(5, 5)), r"out must be \[M, L\]=\[5, 4\], got \[5, 5\]"),
        (dict(out=torch.zeros(4, 5).T), "adjacent columns"),
        (dict(out=torch.zeros(5, 4, dtype=torch.bfloat16)), "out must be float32"),
        (dict(segments=(torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64))), "segments must be"),
        (dict(segments=(-torch.ones(5, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))), "segments must lie in"),
        (dict(segments=(torch.zeros(5), torch.zeros(4))), "must be int64"),
    ],
)
def test_bad_input_is_named(change: dict, message: str):
    good = dict(a1=torch.zeros(5, 3), a2=torch.zeros(4, 3), d1=torch.zeros(5, 2), d2=torch.zeros(4, 2))
    with pytest.raises(ValueError, match=message):
        cpp.dual_gram(**(good | change))
