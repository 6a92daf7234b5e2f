"""The Triton dual_gram, interpreted: tiles, cuBLAS blocks and both ways to sum segments against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokdyn import ops
from tokdyn.kernels.dual_gram import reference, triton

EPS = 2.0**-24


def problem(M: int, L: int, p: int, q: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(M)
    return [torch.randn(*shape, generator=g).to(dtype) for shape in ((M, p), (L, p), (M, q), (L, q))]


@pytest.fixture
def check(agree):
    def check(factors: list[Tensor], **options) -> Tensor:
        """Products of p and q terms, and sums of segments of M L of them, each off by EPS of the sum of absolute values."""
        ours = ops.dual_gram(*factors, **options, impl="triton")
        assert ours.dtype == torch.float32
        M, L, p, q = len(factors[0]), len(factors[1]), factors[0].shape[1], factors[2].shape[1]
        wide = [x.double() for x in factors]
        exact = reference.dual_gram(*wide, **options)
        terms = p + q + 2 + (M + L if options else 0)
        band = terms * EPS * reference.dual_gram(*(x.abs() for x in wide), **options)
        agree("dual_gram", ours, reference.dual_gram(*factors, **options), exact, band)
        return ours

    return check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_cublas", [False, True])
def test_agrees_with_the_definition(by_cublas: bool, dtype: torch.dtype, monkeypatch, check):
    monkeypatch.setattr(triton, "RANK", {2: 0, 4: 0} if by_cublas else {2: 999, 4: 999})
    monkeypatch.setattr(triton, "BUFFER", 4 * 37 * 20)  # blocks of 20 rows
    for M, L, p, q in ((70, 37, 20, 9), (1, 1, 1, 1), (5, 130, 70, 3)):
        check(problem(M, L, p, q, dtype))


@pytest.mark.parametrize("rank", [0, 999])
def test_adds_to_any_layout(rank: int, monkeypatch):
    monkeypatch.setattr(triton, "RANK", {2: rank, 4: rank})
    a1, a2, d1, d2 = problem(12, 9, 6, 4)
    factors = a1, torch.stack([a2, a2], 2)[..., 0], d1.mT.contiguous().mT, d2
    new = ops.dual_gram(*factors, impl="triton")
    for out in (torch.ones(12, 9), torch.ones(9, 12).T, torch.ones(12, 20)[:, ::2][:, :9]):
        assert ops.dual_gram(*factors, out=out, impl="triton") is out
        # the product and the sum are each rounded once, or both at once
        torch.testing.assert_close(out, 1 + new, rtol=4 * EPS, atol=4 * EPS)


@pytest.mark.parametrize("room", [0, 1 << 20], ids=["tiles", "outer products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_segments(dtype: torch.dtype, room: int, monkeypatch, check):
    """Of unsorted ids, some of which nobody has; a given out is added to, and what lies outside it is left out."""
    monkeypatch.setattr(triton, "ROOM", room)
    factors = problem(70, 37, 5, 9, dtype)
    g = torch.Generator().manual_seed(0)
    rows, columns = 2 * torch.randint(0, 3, (70,), generator=g), torch.randint(0, 2, (37,), generator=g)
    sums = check(factors, segments=(rows, columns))
    assert sums.shape == (5, 2) and not sums[1].any() and not sums[3].any()
    out = torch.ones(3, 2)
    left = ops.dual_gram(*factors, out=out, segments=(rows, columns), impl="triton")
    torch.testing.assert_close(left, 1 + sums[:3], rtol=1e-5, atol=200 * EPS * float(sums.abs().max()))


@pytest.mark.parametrize("room", [0, 1 << 20], ids=["tiles", "outer products"])
def test_an_infinite_row_stays_in_its_segment(room: int, monkeypatch):
    monkeypatch.setattr(triton, "ROOM", room)
    a1, a2, d1, d2 = problem(40, 40, 3, 3)
    a1[7] = torch.inf
    rows = torch.arange(40) // 5
    sums = ops.dual_gram(a1, a2, d1, d2, segments=(rows, rows), impl="triton")
    assert not sums[1].isfinite().any() and sums[torch.arange(8) != 1].isfinite().all()


@pytest.mark.parametrize("rank", [0, 999], ids=["cuBLAS", "tiles"])
def test_nan_stays_in_its_row(rank: int, monkeypatch):
    monkeypatch.setattr(triton, "RANK", {2: rank, 4: rank})
    factors = problem(20, 18, 3, 3)
    clean = ops.dual_gram(*factors, impl="triton")
    factors[0][7, 1], factors[3][2, 0] = torch.nan, torch.inf
    gram = ops.dual_gram(*factors, impl="triton")
    broken = torch.zeros(20, 18, dtype=torch.bool)
    broken[7] = broken[:, 2] = True
    assert not gram[broken].isfinite().any() and torch.equal(gram[~broken], clean[~broken])


def test_offsets_pass_two_to_the_31():
    storage = torch.empty(20 << 27, dtype=torch.bfloat16)  # pages that nobody touches are not there
    near, a2, d1, d2 = problem(20, 5, 3, 2, torch.bfloat16)
    far = storage.as_strided((20, 3), (1 << 27, 1))
    far.copy_(near)
    assert torch.equal(ops.dual_gram(far, a2, d1, d2, impl="triton"), ops.dual_gram(near, a2, d1, d2, impl="triton"))


def test_declaration_holds_and_torch_compile_keeps_one_graph():
    a1, a2, d1, d2 = problem(6, 5, 3, 2)
    ids = torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([0, 1, 1, 0, 1])
    for add, segments, shape in ((True, (None, None), (6, 5)), (False, ids, (2, 2))):
        torch.library.opcheck(triton._dual_gram, (a1, a2, d1, d2, torch.ones(shape), add, *segments))

    def twice(a1, a2, d1, d2):
        gram = ops.dual_gram(2 * a1, a2, d1, d2, impl="triton")
        return ops.dual_gram(a1, a2, d1, d2, out=gram, impl="triton") + ops.dual_gram(a1, a2, d1, d2, impl="triton")

    args = (a1, a2, d1, d2)
    assert torch.equal(torch.compile(twice, fullgraph=True, backend="aot_eager")(*args), twice(*args))


def test_nothing_to_do_and_mistakes():
    a1, a2, d1, d2 = problem(6, 5, 3, 2)
    assert ops.dual_gram(a1[:0], a2, d1[:0], d2, impl="triton").shape == (0, 5)
    none, ids = torch.zeros(0, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    out = ops.dual_gram(a1[:0], a2, d1[:0], d2, out=torch.ones(2, 2), segments=(none, ids), impl="triton")
    assert torch.equal(out, torch.ones(2, 2))
    for match, call in (
        (r"a1 \[M, p\], a2 \[L, p\]", lambda: triton.dual_gram(a1, d2, d1, d2)),
        ("as many rows as a1 and a2, 6 and 5, got 5 and 5", lambda: triton.dual_gram(a1, a2, d1[:5], d2)),
        ("all four must share", lambda: triton.dual_gram(a1, a2, d1.double(), d2.double())),
        (r"out must be float32 \[6, 5\]", lambda: triton.dual_gram(a1, a2, d1, d2, out=torch.ones(5, 6))),
        ("name one for each of M=6 rows and L=5", lambda: triton.dual_gram(a1, a2, d1, d2, segments=(ids, ids))),
        ("segments of rows must be int64", lambda: triton.dual_gram(a1, a2, d1, d2, segments=(ids.int(), ids))),
    ):
        with pytest.raises(ValueError, match=match):
            call()
