"""The causal LM and its readout inside what a training loop calls: PEFT's, DDP's, FSDP's and torch.compile's wrappers."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from .trace import Readout, scale_and_cap


def unwrap(model: nn.Module) -> tuple[nn.Module, list[nn.Module], nn.Module | None]:
    """The causal LM inside, PEFT's wrappers around it, and torch.compile's wrapper if there is one.

    Raises:
        ValueError: none of the wrapped modules has output embeddings, they are replicated over devices in one process, or
            FSDP1 keeps their weights elsewhere.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nobody has wrapped a model who has not loaded it
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "FSDP1 (FullyShardedDataParallel) keeps the weights elsewhere between the calls of its modules: use FSDP2 "
            "(torch.distributed.fsdp.fully_shard; fsdp_version 2 in accelerate, strategy fsdp2 in verl)"
        )
    outer: list[nn.Module] = []
    compiled, inner = None, model
    while True:
        if isinstance(inner, nn.DataParallel):
            raise ValueError(
                "torch.nn.DataParallel runs copies of the model that hooks do not reach: use DistributedDataParallel or one GPU"
            )
        if isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            compiled = compiled or inner
            inner = inner._orig_mod  # type: ignore[assignment]
        elif hasattr(inner, "get_base_model"):
            outer.append(inner)
            inner = inner.get_base_model()  # type: ignore[operator]
        elif not hasattr(type(inner), "get_output_embeddings") and isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module  # type: ignore[assignment]  # DDP; DeepSpeed forwards attributes too
        else:
            break
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise ValueError(
            f"{type(inner).__name__} has no output embeddings: tokdyn needs a causal language model with a readout"
        )
    return inner, outer, compiled


def readout_of(lm: nn.Module, adapted: bool) -> Readout:
    """The readout as a forward pass uses it: gathered where it is sharded, with its adapter where it has one and is called.

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
    return Readout(weight, None if bias is None else whole(bias), *scale_and_cap(lm), "", None, ())


def base_layer(head: Any) -> Any:
    """The layer that an adapter wraps, or the layer itself."""
    return head.base_layer if hasattr(head, "base_layer") else head


def whole(weight: Tensor) -> Tensor:
    """A weight on this rank alone, gathered where it is sharded; then every rank must ask."""
    return weight.detach().full_tensor() if is_sharded(weight) else weight.detach()  # type: ignore[attr-defined]


def local(weight: Tensor) -> Tensor:
    """What this rank holds of a weight, detached."""
    return weight.detach().to_local() if is_sharded(weight) else weight.detach()  # type: ignore[attr-defined]


def is_sharded(p: Tensor) -> bool:
    """Whether a parameter is a DTensor; where nobody has loaded that module (40 MB), none is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(p, module.DTensor)


def backbone(lm: nn.Module) -> nn.Module | None:
    """The module below the readout, where the model names one."""
    inner = getattr(lm, "base_model", None)
    return inner if isinstance(inner, nn.Module) and inner is not lm else None
