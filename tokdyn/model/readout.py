"""The readout: the map from the last hidden state to the logits, and where a model keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..kernels.readout_forces.reference import readout_logits
from ..ops.rows import blocks
from .readout_scale import measured_scaling
from .unwrap import base_layer, whole


@dataclass(frozen=True)
class Readout:
    """The map from the final hidden state to the logits, z = softcap(scale (W h + b)).

    Args:
        weight: W, [V, d].
        bias: b, [V], or None.
        scale: multiplies W h + b.
        softcap: z = softcap tanh(· / softcap) where it is given.
        weight_name, bias_name: names of W and b among the model's parameters.
        tied: names under which the same W is used elsewhere (the input embedding).
    """

    weight: Float[Tensor, "V d"]
    bias: Float[Tensor, " V"] | None
    scale: float
    softcap: float | None
    weight_name: str
    bias_name: str | None
    tied: tuple[str, ...]

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the readout operators."""
        return dict(bias=self.bias, scale=self.scale, softcap=self.softcap)

    def logits(self, hidden: Float[Tensor, "N d"]) -> Float[Tensor, "N V"]:
        """z of given hidden states."""
        return readout_logits(hidden, self.weight, **self.options)

    def residual(self, hidden: Float[Tensor, "N d"], z: Float[Tensor, "N V"]) -> float:
        """How far given logits lie from those of hidden states, relative to their norm; in blocks of rows, beside z."""
        apart = [(self.logits(hidden[rows]) - z[rows]).norm() for rows in blocks(z)]
        return float(torch.stack(apart).norm() / z.norm())

    def uncapped(self, hidden: Float[Tensor, "N d"]) -> Float[Tensor, "N V"]:
        """scale (W h + b)."""
        return readout_logits(hidden, self.weight, bias=self.bias, scale=self.scale)

    def cap(self, z: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """The softcap of uncapped logits, where there is one."""
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def pull_back(self, logits: Float[Tensor, "N V"], force: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """The vjp of softcap and scale: a force at the logits as a force at W h + b."""
        slope = self.scale if self.softcap is None else self.scale * (1 - (logits / self.softcap).square())
        return slope * force


def traced_readout(model: nn.Module, params: Mapping[str, Tensor], owner: Mapping[str, str]) -> Readout:
    """The readout of a model whose parameters are given under each of their names (Tracer.params, Tracer.owner).

    Raises:
        ValueError: no output embeddings, or one without a weight of its own (an adapter wraps it).
    """
    name, module = output_embeddings(model)
    scale, softcap = scale_and_cap(model)
    weight_name, bias_name = f"{name}.weight", f"{name}.bias"
    if weight_name not in params:
        raise ValueError(
            f"the output embedding {name} is a {type(module).__name__} with no weight of its own: its "
            "forces cannot be resolved; leave it out of PEFT's target_modules and modules_to_save, or merge the adapter"
        )
    return Readout(
        weight=params[weight_name],
        bias=params.get(bias_name),
        scale=scale,
        softcap=softcap,
        weight_name=weight_name,
        bias_name=bias_name if bias_name in params else None,
        tied=tuple(n for n, first in owner.items() if first == owner[weight_name] and n != weight_name),
    )


def output_embeddings(model: nn.Module) -> tuple[str, nn.Module]:
    """The name and the module of a model's output embeddings.

    Raises:
        ValueError: it has none, or they are not one of its modules.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings: tokdyn needs a causal language model with a readout"
        )
    for name, module in model.named_modules():
        if module is head:
            return name, head
    raise ValueError(f"the output embeddings of {type(model).__name__} are not one of its modules")


def readout_of(lm: nn.Module, adapted: bool) -> Readout:
    """The readout as a forward pass in training uses it: weights whole where they are sharded, names left out.

    Args:
        lm: the causal LM; every rank must ask where its readout is sharded.
        adapted: the pass calls the head's module: add the deltas of the adapters that are active on it. Otherwise hidden states
            are the backbone's.

    Raises:
        ValueError: its weight is empty (ZeRO-3 keeps it elsewhere between the calls of its module).
    """
    head: Any = lm.get_output_embeddings()  # type: ignore[operator]
    base = base_layer(head)
    weight, bias = whole(base.weight), getattr(base, "bias", None)
    if adapted and hasattr(head, "lora_A") and not head.merged and not head.disable_adapters:
        for name in head.active_adapters:
            weight = weight + whole(head.get_delta_weight(name)) if name in head.lora_A else weight
    if weight.numel() == 0:
        raise ValueError("the output embedding is empty here (DeepSpeed ZeRO-3 keeps it elsewhere): use ZeRO-2 or FSDP2")
    return Readout(weight, None if bias is None else whole(bias), *scale_and_cap(lm, not adapted), "", None, ())


def scale_and_cap(lm: nn.Module, from_backbone: bool = False) -> tuple[float, float | None]:
    """Scale and softcap of the logits, measured (readout_scale.py), or as the configuration names them where that fails.

    from_backbone: of W times the backbone's output, for losses that do not call the head's module: what a family does to hidden
        states before the head (MiniCPM3) is then part of the scale.
    """
    found = measured_scaling(lm)
    if found is None:
        return _named_scale_and_cap(lm)
    return found.scale * (found.before if from_backbone else 1.0), found.softcap


def _named_scale_and_cap(lm: nn.Module) -> tuple[float, float | None]:
    """Scale and softcap of the logits by the names that families give them."""
    config: Any = getattr(lm, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier"):
        if value := getattr(config, name, None):
            divides = name == "logits_scaling" and getattr(config, "model_type", "") != "hyperclovax"  # that one multiplies
            scale *= 1 / value if divides else value
    return scale, getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None) or None
