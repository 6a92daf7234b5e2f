"""What TRL's trainers know about a batch beside its tokens: pairs, advantages, old log-probs, the clip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

CLIPPING = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # losses of TRL's GRPO in which a clipped token has no gradient


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
        if isinstance(mask := inputs.get("completion_mask"), Tensor) and mask.shape == ids.shape:
            found["mask"] = mask
    if isinstance(inputs.get("advantages"), Tensor):
        found["advantages"] = inputs["advantages"].detach()
        low, high = getattr(trainer, "epsilon_low", None), getattr(trainer, "epsilon_high", None)
        if low is not None and high is not None and getattr(trainer, "loss_type", "grpo") in CLIPPING:
            found |= dict(clip=(float(low), float(high)), level=getattr(trainer, "importance_sampling_level", "token"))
        if isinstance(inputs.get("old_per_token_logps"), Tensor):
            found["old_log_probs"] = inputs["old_per_token_logps"].detach()
        if isinstance(mask := inputs.get("completion_mask"), Tensor):
            found["mask"] = mask * inputs["tool_mask"] if isinstance(inputs.get("tool_mask"), Tensor) else mask
    return found
