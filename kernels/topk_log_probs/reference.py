"""Specification of topk_log_probs and linear_topk_log_probs, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..readout_forces.reference import readout_logits


def topk_log_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest log-probabilities of every row, in descending order, and their tokens; equal logits by id.

    logits [T, V] -> values [T, k], ids [T, k]. As in token_stats, (z - max) - log1p(R) with R the sum of e^{z-max} over all but
    the argmax: no difference of two large numbers. Of a row without a softmax (NaN, inf, or -inf alone) z - max.
    """
    z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    falling, ids = z.sort(dim=1, descending=True, stable=True)  # NaN counts as the largest
    shifted = falling - falling[:, :1]
    log_S = shifted[:, 1:].exp().sum(1, keepdim=True).log1p()
    return shifted[:, :k] - torch.where(falling[:, :1].isfinite(), log_S, torch.zeros_like(log_S)), ids[:, :k]


def linear_topk_log_probs(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    block: int = 256,
) -> tuple[Tensor, Tensor]:
    """topk_log_probs of the readout's logits, `block` rows at a time; hidden [T, d], weight [V, d]."""
    rows = [topk_log_probs(readout_logits(h, weight, bias=bias, scale=scale, softcap=softcap), k) for h in hidden.split(block)]
    values, ids = zip(*rows, strict=True)
    return torch.cat(values), torch.cat(ids)
