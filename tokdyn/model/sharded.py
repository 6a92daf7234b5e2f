"""A causal LM whose weights are spread over ranks by FSDP2 (`fully_shard`): its passes, and their derivatives, as it runs.

Whole weights exist a layer at a time, as in FSDP2's own forward pass. A backward pass is FSDP2's: its gradients stay spread,
and those of the user are put back. A pass at θ + s θ̇, also as a tangent pass in s, gathers θ̇ beside the weights of each layer.
Every rank must make the same calls with the same sequences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .unwrap import is_sharded, whole

Entry = tuple[nn.Module, str, str]  # module, its own name of a parameter, the parameter's name in the model


@dataclass(frozen=True)
class Along:
    """A parameter at θ + s θ̇: the direction, spread over ranks, and s, a number or a tensor that is differentiated."""

    direction: Tensor
    step: Any


def any_sharded(model: nn.Module) -> bool:
    """Whether any parameter is a DTensor."""
    return any(is_sharded(p) for p in model.parameters())


def require_fully_sharded(model: nn.Module) -> None:
    """Raise unless every parameter that is spread over ranks is so by FSDP2.

    Raises:
        ValueError: some are spread otherwise (tensor parallelism), or are a sum over ranks that has not been made.
    """
    held = {name for module in model.modules() if _gathers(module) for _, _, name in _entries(model, module)}
    for name, p in model.named_parameters():
        if is_sharded(p) and name not in held:
            raise ValueError(
                f"parameter {name} is spread over ranks by other means than FSDP2 (tensor parallelism?): forces of such a "
                "model are not computed; load it under fully_shard alone"
            )
        if is_sharded(p) and any(each.is_partial() for each in p.placements):  # type: ignore[attr-defined]
            raise ValueError(f"parameter {name} is a sum over ranks that has not been made: forces are not computed from it")


def _gathers(module: nn.Module) -> bool:
    """Whether FSDP2 gathers weights for a module's call."""
    return hasattr(module, "reshard") and hasattr(module, "unshard")


def _entries(model: nn.Module, of: nn.Module) -> list[Entry]:
    """The parameters that are whole during the call of one of FSDP2's modules: of it and all inside, down to the next such."""
    found: list[Entry] = []

    def walk(module: nn.Module, path: str) -> None:
        found.extend((module, own, path + own) for own, p in module._parameters.items() if p is not None)
        for name, child in module.named_children():
            if not _gathers(child):
                walk(child, f"{path}{name}.")

    path = next(name for name, module in model.named_modules() if module is of)
    walk(of, f"{path}." if path else "")
    return found


@contextlib.contextmanager
def moved(model: nn.Module, params: Mapping[str, Along]) -> Iterator[None]:
    """Have the model's calls inside the block run at other values of some parameters, by any of their names."""

    def swap(entries: list[Entry], kept: list[Tensor]) -> None:
        for module, own, name in entries:
            p = module._parameters[own]
            assert p is not None
            kept.append(p)
            if name in params:
                module._parameters[own] = _at(p, params[name])  # type: ignore[assignment]

    def put_back(entries: list[Entry], kept: list[Tensor]) -> None:
        for (module, own, _), p in zip(entries, kept, strict=False):
            module._parameters[own] = p  # type: ignore[assignment]
        kept.clear()

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            entries, kept = _entries(model, module) if _gathers(module) else [], list[Tensor]()
            if any(name in params for _, _, name in entries):
                before = module.register_forward_pre_hook(lambda *_, e=entries, k=kept: swap(e, k))  # behind FSDP2's own
                after = module.register_forward_hook(
                    lambda *_, e=entries, k=kept: put_back(e, k), prepend=True
                )  # before its own
                for undo in (before.remove, after.remove, lambda e=entries, k=kept: put_back(e, k)):
                    stack.callback(undo)
        yield


def _at(p: Tensor, along: Along) -> Tensor:
    """A weight that FSDP2 has gathered, moved; the collective is made outside of torch.func's transforms."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack(), torch.no_grad():
        direction = whole(along.direction).to(p.dtype)
    return p.detach() + along.step * direction


@torch.enable_grad()
def pull_back(model: nn.Module, run: Callable[[], Tensor], cotangent: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The gradient of <cotangent, run()> by every parameter that has one, spread as the parameters are.

    The model's own gradients are as they were afterwards.
    """
    reshard(model)  # a pass may have left weights whole, which get no gradient of their own
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {name: p.grad for name, p in named.items()}
    try:
        for p in named.values():
            p.grad = None
        z = run()
        z.backward(cotangent(z.detach()).to(z))
        return {name: p.grad for name, p in named.items() if p.grad is not None}
    finally:
        for name, p in named.items():
            p.grad = own[name]


@torch.no_grad()
def move_along(run: Callable[[Mapping[str, Along]], Tensor], direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What a pass gives, and its velocity along a direction by parameter: the derivative by s at θ + s θ̇, forward."""
    zero, one = torch.zeros(()), torch.ones(())

    def at(s: Tensor) -> Tensor:
        return run({name: Along(x, s.to(x.device)) for name, x in direction.items()})

    z, velocity = torch.func.jvp(at, (zero,), (one,))[:2]
    return z, velocity


def require_adjoint(
    model: nn.Module,
    run: Callable[[Mapping[str, Along] | None], Tensor],
    some: Mapping[str, Tensor],
    named: Mapping[str, str],
    bound: float,
) -> None:
    """Raise unless <w, J d> by a tangent pass is <Jᵀ w, d> by a backward pass, for random w and d.

    Args:
        model: the model.
        run: parameters -> logits of a piece.
        some: the tensors in which d is drawn.
        named: every name of theirs -> theirs.
        bound: how far the two may lie apart, of ‖J d‖.

    Raises:
        ValueError: they differ.
    """
    generator = torch.Generator().manual_seed(1)
    d = {name: _spread(0.02 * torch.randn(p.shape, generator=generator), p) for name, p in some.items()}
    z, velocity = move_along(run, {name: d[tensor] for name, tensor in named.items()})
    w = torch.randn(z.shape, generator=generator).to(z)
    grads = pull_back(model, lambda: run(None), lambda _: w)
    pulled = sum(inner(grads[name], x) for name, x in d.items() if name in grads)
    pushed, size = float((w.double() * velocity.double()).sum()), float(velocity.double().norm())
    if not abs(pushed - pulled) <= bound * size:
        raise ValueError(
            f"under FSDP2 <w, J d> is {pushed:.4g} forward and {pulled:.4g} backward, so that no force can be trusted. Do all "
            "ranks make the same call? Gradients that wait to be accumulated (set_requires_gradient_sync(False)) and a "
            "gradient divide factor of one's own must be taken back before"
        )


def inner(a: Tensor, b: Tensor) -> float:
    """<a, b> of two tensors, spread over ranks or not."""
    return float(whole((a.double() * b.double()).sum()))


def _spread(x: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank holds whole, spread as another."""
    if not is_sharded(like):
        return x.to(like)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device, like.dtype), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def reshard(model: nn.Module) -> None:
    """Give back the whole weights that a forward pass outside training left on FSDP2's modules.

    Without it the root stays unsharded between backward and optimizer step, and the next forward trains on stale weights.
    """
    for module in model.modules():
        if _gathers(module):
            module.reshard()  # type: ignore[operator]
