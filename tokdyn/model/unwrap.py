"""What a training loop wraps around a causal LM and its weights: PEFT, DDP, FSDP, torch.compile; and how to see through it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def unwrap(model: nn.Module) -> tuple[nn.Module, list[nn.Module], nn.Module | None]:
    """The causal LM inside, PEFT's wrappers around it from the outermost in, and torch.compile's wrapper or None.

    Raises:
        ValueError: none of the wrapped modules has output embeddings, they are replicated over devices in one process, or
            FSDP1 keeps their weights elsewhere.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: no model is wrapped in it
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


def require_no_prefix(wrappers: Iterable[nn.Module]) -> None:
    """Refuse PEFT's prompt, P- and prefix tuning where passes of our own go through the causal LM inside.

    Raises:
        ValueError: what is trained is a prefix, which the model inside does not have.
    """
    for wrapper in wrappers:
        if getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                f"{type(wrapper).__name__} trains virtual tokens before each sequence (prompt, P- or prefix tuning): its "
                "forces and what a step does to a probe are not computed; use LoRA, or a Monitor without a probe"
            )


def base_layer(head: Any) -> Any:
    """The layer that an adapter wraps, or the layer itself."""
    return head.base_layer if hasattr(head, "base_layer") else head


def whole(weight: Tensor) -> Tensor:
    """A weight detached, gathered where it is sharded (a collective: every rank must call it)."""
    return weight.detach().full_tensor() if is_sharded(weight) else weight.detach()  # type: ignore[attr-defined]


def local(weight: Tensor) -> Tensor:
    """The part of a weight that this rank holds, detached."""
    return weight.detach().to_local() if is_sharded(weight) else weight.detach()  # type: ignore[attr-defined]


def is_sharded(p: Tensor) -> bool:
    """Whether a parameter is a DTensor."""
    # not imported (40 MB): no parameter is one
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(p, module.DTensor)


def is_plain(p: Tensor) -> bool:
    """Whether a parameter is an ordinary floating-point tensor, or one spread over ranks; quantised weights are not."""
    return p.is_floating_point() and (type(p) in (Tensor, nn.Parameter) or is_sharded(p))


def backbone(lm: nn.Module) -> nn.Module | None:
    """The module whose output the readout takes (base_model in transformers), or None where the model names none."""
    inner = getattr(lm, "base_model", None)
    return inner if isinstance(inner, nn.Module) and inner is not lm else None


def swap_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """For each name of a parameter the one under which functional_call is to swap it.

    A module that has two names is swapped under its first alone: swapped under both, the second would put back what the first
    one wrote.
    """
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first.setdefault(id(module), name)
    found = {}
    for name in names:
        path, _, parameter = name.rpartition(".")
        module_name = first[id(model.get_submodule(path))]
        found[name] = f"{module_name}.{parameter}" if module_name else parameter
    return found
