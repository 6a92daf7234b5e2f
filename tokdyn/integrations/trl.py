"""What TRL's trainers know about a batch beside its tokens: pairs, advantages, old log-probs, the clip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def about_batch(trainer: Any, inputs: Any) -> dict[str, Any]:
    """The arguments of `Monitor.micro_batch` for the inputs of a trainer's loss; empty for what is not recognised.

    Preference trainers stack all chosen answers before all rejected ones; policy-gradient trainers hand over advantages.
    """
    if not isinstance(inputs, Mapping):
        return {}
    found: dict[str, Any] = {}
    ids = inputs.get("input_ids")
    paired = any(cls.__name__ in ("DPOTrainer", "CPOTrainer", "ORPOTrainer") for cls in type(trainer).__mro__)
    if paired and isinstance(ids, Tensor) and ids.dim() == 2 and len(ids) % 2 == 0:
        B = len(ids) // 2
        found |= dict(roles=["chosen"] * B + ["rejected"] * B, groups=[*range(B), *range(B)])
    if isinstance(inputs.get("advantages"), Tensor):
        found["advantages"] = inputs["advantages"].detach()
        low, high = getattr(trainer, "epsilon_low", None), getattr(trainer, "epsilon_high", None)
        if low is not None and high is not None:
            found["clip"] = (float(low), float(high))
        if isinstance(inputs.get("old_per_token_logps"), Tensor):
            found["old_log_probs"] = inputs["old_per_token_logps"].detach()
    return found
