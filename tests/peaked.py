"""Two rows of logits that a softmax puts on one token, with their statistics in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def peaked_rows(V: int, top: int, gap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [2, V], 0 at `top` and -gap elsewhere; targets `top` and 7, below it; what token_stats must give, float64 [2, 8].

    In log1p, where the naive expressions are 0 or rounding noise.
    """
    logits = torch.full((2, V), -gap)
    logits[:, top] = 0
    each = math.exp(-gap)
    rest = (V - 1) * each
    S, log_S = 1 + rest, math.log1p(rest)
    entropy, collision = log_S + rest * gap / S, (1 + (V - 1) * each**2) / S**2
    g_top = math.sqrt((V - 1) * each**2 + rest**2) / S
    g_low = math.sqrt(1 + (V - 2) * each**2 + (S - each) ** 2) / S
    expected = [
        (log_S, -log_S, entropy, collision, g_top, 0, top, -log_S),
        (log_S, -gap - log_S, entropy, collision, g_low, 8, top, -log_S),
    ]
    return logits, torch.tensor([top, 7]), torch.tensor(expected, dtype=torch.float64)
