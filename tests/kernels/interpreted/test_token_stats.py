"""The Triton token_stats, interpreted, against its specification in float64."""

from __future__ import annotations

import math

import pytest
import torch
from peaked import peaked_rows
from torch import Tensor

from tokdyn import ops
from tokdyn.kernels.token_stats import reference, triton

NAMES = ops.TokenStats._fields
EPS = 2.0**-24  # half an ulp of float32, relative


def random_logits(T: int, V: int, dtype: torch.dtype, *, scale: float = 3.0, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * T + V)
    logits = (torch.randn(T, V, generator=generator) * scale + offset).to(dtype)
    return logits, torch.randint(0, V, (T,), generator=generator)


@pytest.fixture
def check(agree):
    def check(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The band: the exponent of e = exp2(x log2 e) is rounded, so e is off by (2 |x| + 4) EPS, whose mean over pi entropy
        and log S bound; collision squares e and divides by S²: 16 + 4 (H + log S). logsumexp may be near 0 while log S is not.
        """
        ours = dict(zip(NAMES, triton.token_stats(logits, targets), strict=True))
        plain = dict(zip(NAMES, reference.token_stats(logits, targets), strict=True))
        exact = dict(zip(NAMES, reference.token_stats(logits.double(), targets), strict=True))
        relative = (16 + 4 * (exact["entropy"] - exact["argmax_log_prob"])) * EPS
        for name in NAMES:
            extra = 4 * EPS * (1 + exact["argmax_log_prob"].abs()) if name in ("logsumexp", "log_prob") else 0
            agree(name, ours[name], plain[name], exact[name], relative * exact[name].abs() + extra + 1e-14)
        return ours

    return check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 2, 7, 1000, 2003])
def test_agrees_with_the_specification(V: int, dtype: torch.dtype, check):
    check(*random_logits(3 if V == 2003 else 1, V, dtype))


def test_whole_blocks_and_ragged_edges(check):
    """V = 50257 is odd, so that the second row begins inside a 16-byte load: first block, whole blocks and last block."""
    logits, targets = random_logits(2, 50257, torch.bfloat16)
    check(logits[1:], targets[1:])
    check(*random_logits(1, 9001, torch.float16))
    check(*random_logits(1, 151936, torch.bfloat16))


def test_few_and_many_rows_give_the_same(monkeypatch, check):
    """Many rows are launched with fewer lanes each."""
    many = triton._shape(100_000, torch.float32)
    assert many["LANES"] < triton._shape(1, torch.float32)["LANES"]
    monkeypatch.setattr(triton, "_shape", lambda T, dtype: many)
    check(*random_logits(1, 5000, torch.float32))


def test_every_place_of_the_target(check):
    V = 2500  # a whole block and a ragged one
    row, _ = random_logits(1, V, torch.float32)
    place = torch.tensor([0, 1023, 1024, 2047, 2048, V - 1])
    check(row.expand(6, V), place)  # row stride 0


def test_ties_rank_the_lower_column_first(check):
    V = 2600
    place = torch.tensor([0, 700, 2047, 2100, V - 1])
    ours = check(torch.zeros(5, V), place)
    assert torch.equal(ours["rank"], place) and not ours["argmax"].any()
    logits, targets = random_logits(2, V, torch.float32, scale=2.0)
    check(logits.round(), targets)
    beyond = torch.zeros(1, 9004)[:, 3:]  # whole blocks, and before them the ragged first one, which is read after them
    assert [int(column) for column in triton.token_stats(beyond, torch.tensor([8500]))[5:7]] == [8500, 0]
    signed = torch.tensor([[0.0, -0.0, 0.0]]).expand(3, 3)
    assert triton.token_stats(signed, torch.arange(3))[5].tolist() == [0, 1, 2]


def test_a_flat_row_of_a_large_vocabulary(check):
    """Σ e^{z - max} = V: the square of what stands for it must not pass the largest float."""
    ours = check(torch.zeros(1, 40001, dtype=torch.bfloat16), torch.tensor([7]))
    assert float(ours["g_norm"]) == pytest.approx(math.sqrt((1 - 1 / 40001) ** 2 + 40000 / 40001**2), rel=16 * EPS)


def test_minus_infinity_is_legal(check):
    logits, targets = random_logits(6, 2500, torch.float32)
    generator = torch.Generator().manual_seed(0)
    logits[torch.rand(logits.shape, generator=generator) < 0.5] = -math.inf
    logits[0, :2490] = -math.inf  # whole blocks without a finite entry
    logits[1, 3:] = -math.inf
    logits[2] = -math.inf
    logits[2, targets[2]] = 1.5  # certain: p_y = 1
    logits[3, targets[3]] = -math.inf  # impossible: p_y = 0
    logits[4] = torch.finfo(torch.float32).min  # the finite mask value
    ours = check(logits, targets)
    assert [ours[name][2].item() for name in NAMES] == [1.5, 0, 0, 1, 0, 0, targets[2].item(), 0]
    assert ours["log_prob"][3] == -math.inf and ours["entropy"][3] > 0


def test_rows_without_a_softmax():
    logits, targets = random_logits(7, 2500, torch.float32)
    clean = triton.token_stats(logits, targets)
    broken = logits.clone()
    broken[0] = -math.inf
    broken[1, 2499] = math.inf
    broken[2, 0] = math.nan
    broken[3, targets[3]] = math.nan
    broken[4] = math.nan
    outside = targets.clone()
    outside[5] = 2500
    ours = dict(zip(NAMES, triton.token_stats(broken, outside), strict=True))
    for name, before in zip(NAMES, clean, strict=True):
        assert torch.equal(ours[name][6], before[6]), "a row must not see its neighbours"
        if name not in ("rank", "argmax"):
            assert ours[name][:6].isnan().all(), name
    ahead = 1 + (logits[1, :2499] > logits[1, targets[1]]).sum()
    assert ours["rank"].tolist()[:6] == [targets[0], ahead, 0, 0, 0, 0]
    assert ours["argmax"].tolist()[:6] == [0, 2499, -1, -1, -1, -1]


@pytest.mark.parametrize("offset", [-120.0, -3.0e4])
def test_offset_logits(offset: float, check):
    check(*random_logits(2, 1501, torch.float32, offset=offset))


@pytest.mark.parametrize("gap", [5.0, 40.0, 75.0])
def test_peaked_rows_keep_relative_accuracy(gap: float):
    """One logit at 0, V - 1 at -gap: closed forms in log1p, where the naive expressions are 0 or rounding noise."""
    logits, targets, expected = peaked_rows(2003, 1500, gap)
    ours = torch.stack([column.double() for column in triton.token_stats(logits, targets)], 1)
    torch.testing.assert_close(ours, expected, rtol=(2 * gap + 8) * EPS, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_stride_and_padding(dtype: torch.dtype):
    logits, targets = random_logits(2, 1001, dtype)
    padded = torch.full((4, 1100), math.nan, dtype=dtype)  # whatever is read beyond the row shows
    view = padded[::2, 37:1038]
    view.copy_(logits)
    spread = torch.stack([targets, -torch.ones_like(targets)], 1)[:, 0]
    assert view.stride(0) == 2200 and view.data_ptr() % 16 and not spread.is_contiguous()
    for strided, plain in zip(triton.token_stats(view, spread), triton.token_stats(logits, targets), strict=True):
        torch.testing.assert_close(strided, plain, rtol=64 * EPS, atol=0)  # each within some 40 EPS, as in `check`


def test_rows_further_apart_than_32_bits():
    """Two rows whose distance, in elements, no 32-bit offset holds."""
    V, apart = 50, (1 << 31) + 12
    spread = torch.empty(apart + V, dtype=torch.bfloat16)  # 4 GiB of addresses; only pages that are written come to exist
    rows = spread.as_strided((2, V), (apart, 1))
    logits, targets = random_logits(2, V, torch.bfloat16)
    rows.copy_(logits)
    for far, near in zip(triton.token_stats(rows, targets), triton.token_stats(logits, targets), strict=True):
        torch.testing.assert_close(far, near, rtol=64 * EPS, atol=0)  # each within some 40 EPS, as in `check`


def test_empty_batch():
    assert [len(column) for column in triton.token_stats(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))] == [0] * 8


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 0), torch.tensor([0, 0]), "V >= 1"),
        (torch.zeros(2, 5), torch.tensor([0]), r"\[T\]=\[2\], got torch.int64 \[1\]"),
        (torch.zeros(5), torch.tensor([0]), r"must be \[T, V\]"),
        (torch.zeros(2, 5, dtype=torch.float64), torch.tensor([0, 0]), "float32, bfloat16 or float16"),
        (torch.zeros(2, 5), torch.tensor([0, 0], dtype=torch.int32), "int64"),
        (torch.zeros(5, 2).T, torch.tensor([0, 0]), "adjacent"),
    ],
)
def test_bad_input_is_named(logits: Tensor, targets: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        triton.token_stats(logits, targets)


def test_the_dispatcher_takes_it():
    logits, targets = random_logits(1, 100, torch.bfloat16)
    for ours, direct in zip(ops.token_stats(logits, targets, impl="triton"), triton.token_stats(logits, targets), strict=True):
        assert torch.equal(ours, direct)
