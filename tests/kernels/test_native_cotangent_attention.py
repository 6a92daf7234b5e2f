"""The C++ cotangent_attention against its specification in float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokdyn import ops
from tokdyn.kernels.cotangent_attention import cpp, reference

_C = pytest.importorskip("tokdyn._C")  # test_native_token_stats.py fails where it should have been built
LEVELS = _C.simd_levels()
EPS = 2.0**-24  # half an ulp of float32, relative


def inputs(n: int, B: int, Hk: int, G: int, T: int, S: int, D: int, E: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(T + S)
    return [torch.randn(*s, generator=g) for s in ((B, Hk, G, T, D), (B, Hk, S, D), (B, Hk, S, E), (n, B, Hk, G, T, E))]


def masks(B: int, T: int, S: int) -> dict[str, Tensor | None]:
    causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    padded = causal.expand(B, 1, T, S).clone()
    padded[-1, :, :, : S // 3] = False  # the first rows of the last sequence see nothing
    return {
        "none": None,
        "causal": causal[None, None],
        "window": (causal & causal.triu(S - T - 5).bool())[None, None],  # blocks of queries do not begin at the first key
        "padded": padded,
        "gap": (causal & (torch.arange(S) % (S // 2 + 1) < S // 3))[None, None],  # keys that nobody sees, also the last ones
    }


def check(args: list[Tensor], mask: Tensor | None, scale: float, softcap: float | None) -> None:
    """At most four times the largest error of torch in float32, both measured against float64."""
    truth = reference.cotangent_attention(*(x.double() for x in args), mask, scale, softcap)
    torch_32 = reference.cotangent_attention(*args, mask, scale, softcap)
    for simd in LEVELS:
        for ours, theirs, exact in zip(
            cpp.cotangent_attention(*args, mask, scale, softcap, simd=simd), torch_32, truth, strict=True
        ):
            assert ours.shape == exact.shape and ours.dtype == torch.float32
            allowed = 4 * (theirs - exact).abs().max() + EPS * exact.abs().max()
            assert (ours - exact).abs().max() <= allowed, simd


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("name", masks(1, 2, 2))
@pytest.mark.parametrize(
    "shape",
    [(3, 2, 2, 3, 7, 7, 16, 16), (2, 1, 2, 1, 131, 131, 32, 64), (1, 2, 1, 2, 5, 20, 80, 48), (4, 1, 1, 1, 1, 1, 16, 16)],
)
def test_agrees_with_the_specification(shape, name, softcap):
    n, B, Hk, G, T, S, D, E = shape
    check(inputs(*shape), masks(B, T, S)[name], 0.3, softcap)


def test_more_keys_than_a_block_of_scores():
    """Scores are made for 512 keys at a time, depth 256 of a product at a time."""
    check(inputs(2, 1, 1, 2, 70, 1100, 16, 16), masks(1, 70, 1100)["causal"], 0.25, None)


def test_cotangents_may_lie_in_any_order_in_memory_and_the_result_has_positions_before_heads():
    args = inputs(3, 2, 2, 2, 9, 9, 16, 16)
    mask = masks(2, 9, 9)["causal"]
    plain = cpp.cotangent_attention(*args, mask, 0.3)
    turned = args[3].permute(0, 1, 4, 2, 3, 5).contiguous().permute(0, 1, 3, 4, 2, 5)
    wide = torch.stack([args[3], args[3]], -1)[..., 0]  # columns that are not adjacent
    for do in (turned, wide):
        for a, b in zip(plain, cpp.cotangent_attention(*args[:3], do, mask, 0.3), strict=True):
            assert torch.equal(a, b)
    dq, dk, _ = plain
    assert dq.permute(0, 1, 4, 2, 3, 5).is_contiguous() and dk.transpose(2, 3).is_contiguous()


def test_threads_do_not_change_a_bit():
    args, before = inputs(5, 2, 2, 2, 100, 100, 32, 32), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(cpp.cotangent_attention(*args, masks(2, 100, 100)["causal"], 0.2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_operator_takes_it_where_it_can_and_says_where_it_cannot():
    args = inputs(2, 1, 1, 1, 6, 6, 16, 16)
    mine, chosen = cpp.cotangent_attention(*args, None, 0.3), ops.cotangent_attention(*args, None, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(mine, chosen, strict=True))
    odd = inputs(2, 1, 1, 1, 6, 6, 12, 16)
    assert ops.cotangent_attention(*odd, None, 0.3)[0].shape == (2, 1, 1, 1, 6, 12)  # by the specification
    for bad in (odd, [x.double() for x in args]):
        with pytest.raises(ValueError, match="multiple of 16, got"):
            ops.cotangent_attention(*bad, None, 0.3, impl="cpp")
