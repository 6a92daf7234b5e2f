"""Specification of linear_token_stats, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..readout_forces.reference import readout_logits
from ..token_stats.reference import token_stats


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    block: int = 256,
) -> tuple[Tensor, ...]:
    """token_stats(softcap(scale (W h + b)) / temperature, targets), `block` rows at a time.

    hidden [T, d], weight [V, d], targets [T], bias [V] -> eight tensors [T], in the order of token_stats.
    """
    parts = [
        token_stats(readout_logits(h, weight, bias=bias, scale=scale, softcap=softcap) / temperature, y)
        for h, y in zip(hidden.split(block), targets.split(block), strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
