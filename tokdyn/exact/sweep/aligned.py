"""Segments in which a token's cotangent stays at its own position: one cotangent then carries all tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...sequences import Batch
from ..modules.base import Rule
from .segments import Segment


@torch.no_grad()
def aligned_depths(segments: Sequence[Segment], batch: Batch, rules: Mapping[str, Rule]) -> int:
    """How many segments from the readout down are such, seen on random cotangents.

    Args:
        segments: of the backbone, on `batch`.
        batch: some tokens of the longest sequence there is: in one of a single token there is nowhere else to go.
        rules: of the modules; those of such a segment give outer products, are called once and return a row for each position.
    """
    N, T = len(batch.rows), batch.ids.shape[1]
    top = segments[0].top
    cotangent = top.new_zeros(N, *top.shape)
    random = torch.randn(N, *top.shape[1:], generator=torch.Generator().manual_seed(0))
    cotangent[torch.arange(N), torch.arange(N)] = random.to(top)
    elsewhere = torch.ones(N, T, dtype=torch.bool, device=top.device)
    elsewhere[torch.arange(N), batch.rows] = False
    for depth, segment in enumerate(segments):
        names = [call.name for call, _ in segment.inside]
        if len(set(names)) < len(names) or not all(name in rules and rules[name].has_outer_products for name in names):
            return depth
        deltas, cotangent = segment.pull(cotangent)
        seen = [x for delta in deltas for x in delta] + [cotangent]
        if cotangent.dim() != 4 or any(_moves_elsewhere(x, elsewhere) for x in seen):
            return depth
    return len(segments)


def _moves_elsewhere(x: Float[Tensor, "n ..."], elsewhere: Bool[Tensor, "n T"]) -> bool:
    """Whether cotangents are not zero at other positions than their own, or there is no telling which positions they are at."""
    n, T = elsewhere.shape
    return x.dim() < 3 or x.shape[1:-1].numel() != T or bool(x.reshape(n, T, -1)[elsewhere].any())
