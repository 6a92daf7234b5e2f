"""Specification of topk_log_probs and linear_topk_log_probs, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..readout_forces.reference import readout_logits


def topk_log_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest log-probabilities of every row, in descending order, and their tokens; equal logits by id.

    logits [T, V] -> values [T, k], ids [T, k].
    """
    z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    ids = z.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return z.gather(1, ids) - z.logsumexp(1, keepdim=True), ids


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
