"""The Triton topk_log_probs and linear_topk_log_probs, interpreted, against a stable sort in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tokdyn import ops
from tokdyn.kernels.topk_log_probs import reference, triton

EPS = 2.0**-24


@pytest.fixture
def check(agree):
    def check(logits: Tensor, k: int) -> None:
        """Ids exactly; the logits are exact, so a value is off by log S alone: its rounding and the exponent's, 2 |x| EPS."""
        values, ids = triton.topk_log_probs(logits, k)
        plain, _ = reference.topk_log_probs(logits, k)
        exact, order = reference.topk_log_probs(logits.double(), k)
        agree("ids", ids, order, order, 0)
        agree("values", values, plain, exact, 16 * EPS * (1 + exact.abs().nan_to_num(0, 0, 0)))

    return check


def random_logits(T: int, V: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(T, V, generator=torch.Generator().manual_seed(V))).to(dtype)


@pytest.mark.parametrize(("V", "k"), [(1, 1), (7, 7), (33, 2), (2003, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_a_stable_sort(V: int, k: int, dtype: torch.dtype, check):
    check(random_logits(2, V, dtype), k)  # in bfloat16 there are ties


def test_whole_blocks_and_ragged_edges(check):
    check(random_logits(2, 50257, torch.bfloat16)[1:], 5)
    check(random_logits(1, 151936), 5)
    check(random_logits(1, 9001, torch.float16), triton.MOST)


def test_neighbours_may_all_be_among_the_first(check):
    """A group of 32 holds 32 of the first 40, and so does the group that follows where groups of 32 groups meet."""
    for start in (64, 1000, 1023):
        logits = random_logits(1, 3000)
        logits[0, start : start + 32] += 100
        check(logits, 40)


def test_ties_take_the_lower_id(check):
    check(torch.zeros(1, 2100), 64)
    check(torch.tensor([[0.0, -0.0, 1.0, -0.0, 0.0]]), 5)
    check(random_logits(2, 2100).round(), 40)


def test_large_logits_keep_their_digits():
    for offset in (1e4, -1e30):
        values, _ = triton.topk_log_probs(torch.full((1, 4), offset), 3)
        torch.testing.assert_close(values, torch.full((1, 3), -math.log(4.0)), rtol=4 * EPS, atol=0.0)


def test_rows_with_infinities_and_nan(check):
    logits = random_logits(6, 1003)
    logits[0, 5] = logits[0, 900] = math.nan
    logits.view(torch.int32)[0, 300] = -1  # a NaN whose sign is set
    logits[1, 7] = math.inf
    logits[2] = -math.inf
    logits[3, 3:] = -math.inf
    logits[4] = math.nan
    check(logits, 6)


@pytest.mark.parametrize("offset", [-120.0, -3.0e4])
def test_offset_logits(offset: float, check):
    check(random_logits(2, 1501) + offset, 7)


def test_rows_further_apart_than_32_bits(check):
    apart = (1 << 31) + 12
    spread = torch.empty(apart + 500, dtype=torch.bfloat16)  # 4 GiB of addresses; only pages that are written come to exist
    rows = spread.as_strided((2, 500), (apart, 1))
    rows.copy_(random_logits(2, 500, torch.bfloat16))
    check(rows, 4)


def test_strides(check):
    wide = torch.full((4, 1100), math.nan)
    view = wide[::2, 37:1038]
    view.copy_(random_logits(2, 1001))
    check(view, 9)


def test_rows_are_taken_in_blocks(monkeypatch, check):
    monkeypatch.setattr(triton, "BUFFER", 1)
    check(random_logits(3, 500), 4)


def test_linear_form_of_a_large_vocabulary_far_below_zero():
    """A bias of -120 everywhere, -inf at every 7th token, and a row whose hidden state is NaN."""
    V, g = 50257, torch.Generator().manual_seed(0)
    h, W = torch.randn(2, 3, generator=g), 3 * torch.randn(V, 3, generator=g)
    b = torch.full((V,), -120.0).index_fill(0, torch.arange(0, V, 7), -math.inf)
    h[1, 0] = math.nan
    values, ids = ops.linear_topk_log_probs(h, W, 5, bias=b, impl="triton")
    exact, order = reference.linear_topk_log_probs(h[:1].double(), W.double(), 5, bias=b.double())
    assert values[1].isnan().all() and torch.equal(ids[:1], order)
    assert (
        (values[:1] - exact).abs() <= 16 * EPS * (1 + exact.abs()) + 8 * EPS * (120 + 3 * h[0].abs().sum() * W.abs().max())
    ).all()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_linear_form_is_that_of_the_readouts_logits(softcap: float | None, monkeypatch):
    g = torch.Generator().manual_seed(0)
    h, W, b = (torch.randn(*s, generator=g) for s in ((3, 20), (2600, 20), (2600,)))
    monkeypatch.setattr(triton, "BUFFER", 1)  # chunks of 1024
    monkeypatch.setattr(triton, "ROWS", 2)
    readout = dict(scale=0.5, softcap=softcap)
    values, ids = triton.linear_topk_log_probs(h, W, 9, bias=b, **readout)
    exact, order = reference.linear_topk_log_probs(h.double(), W.double(), 9, bias=b.double(), **readout)
    plain, _ = reference.linear_topk_log_probs(h, W, 9, bias=b, **readout)
    assert torch.equal(ids, order)
    products = 20 * EPS * float((h.abs() @ W.abs().T).max())
    assert ((values - exact).abs() <= 2 * (plain - exact).abs().max() + 16 * EPS * (1 + exact.abs()) + products).all()
    chained = ops.linear_topk_log_probs(h.bfloat16(), W.bfloat16(), 3, impl="triton")
    _, expected = reference.linear_topk_log_probs(h.bfloat16(), W.bfloat16(), 3)
    assert torch.equal(chained[1], expected)


def test_the_first_ids_have_the_first_ranks():
    logits = random_logits(2, 700)
    _, ids = ops.topk_log_probs(logits, 3, impl="triton")
    for place in range(3):
        assert ops.token_stats(logits, ids[:, place], impl="triton").rank.tolist() == [place] * 2


def test_empty_batch_and_bad_input():
    values, ids = triton.topk_log_probs(torch.zeros(0, 5), 2)
    assert values.shape == ids.shape == (0, 2)
    with pytest.raises(ValueError, match=r"k in \[1, min\(V, 128\)\]=\[1, 5\], got 6"):
        triton.topk_log_probs(torch.zeros(1, 5), 6)
    with pytest.raises(ValueError, match="got 129"):
        ops.topk_log_probs(torch.zeros(1, 500), 129, impl="triton")
    with pytest.raises(ValueError, match="adjacent"):
        triton.topk_log_probs(torch.zeros(5, 2).T, 1)
