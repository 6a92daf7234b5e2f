"""A forward pass whose graph keeps what enters each layer; the rest of a layer is made again in the backward pass.

torch.utils.checkpoint around every layer, for a model whose parameters are swapped (functional_call): what is made again must
see the same tensors, which are in their places no more when the backward pass runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from .forward_ad import with_modes


def layers(model: nn.Module) -> list[nn.Module]:
    """The modules of the outermost lists (transformers' decoder layers), each once; those without parameters are left out."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [of for name, of in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    found = {id(layer): layer for of in outermost for layer in of if next(layer.parameters(), None) is not None}
    return list(found.values())


class _Called(nn.Module):
    """A function as a module around a model, for functional_call to swap the model's parameters while it runs."""

    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result."""
        return self.run(*args, **kwargs)


@contextlib.contextmanager
def layers_made_again(model: nn.Module, swapped: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Inside the block every layer is a checkpoint; `swapped` stands in place of the model's parameters, None leaves all be."""
    inside = {f"model.{name}": value for name, value in (swapped or {}).items()}
    with contextlib.ExitStack() as stack:
        for layer in layers(model) if swapped is not None else ():
            own = vars(layer).get("forward")
            stack.callback(_put_back, layer, own)
            layer.forward = _Layer(_Called(model, layer.forward), inside)
        yield


class _Layer:
    """The forward of a layer, as a checkpoint; its hooks have run before, and do not run again."""

    def __init__(self, called: _Called, inside: Mapping[str, Tensor]) -> None:
        self.called, self.inside = called, dict(inside)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with with_modes():
                return functional_call(self.called, self.inside, args, kwargs, tie_weights=False)

        # An early stop is an exception, whose frames keep a layer's tensors until a collection.
        with set_checkpoint_early_stop(False):
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _put_back(layer: nn.Module, own: Any) -> None:
    """Let a layer have its forward again: one of its own, or its class's."""
    if own is None:
        del layer.forward
    else:
        layer.forward = own


def layers_can_be_made_again(
    logits: Callable[[Mapping[str, Tensor], bool], Tensor], params: Mapping[str, Tensor], bound: float
) -> bool:
    """Whether gradients are the same either way, up to a relative bound: seen on the norms of those of one short sequence.

    logits: of parameters, the layers made again or not.
    """
    norms = []
    for again in (False, True):
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        try:
            with torch.enable_grad():
                grads = torch.autograd.grad(logits(leaves, again).square().sum(), list(leaves.values()), allow_unused=True)
        except (RuntimeError, ValueError, TypeError):  # a layer that does not run twice
            return False
        norms.append(torch.stack([torch.zeros(()) if x is None else x.double().norm().float().cpu() for x in grads]))
    return bool(((norms[1] - norms[0]).abs() <= bound * norms[0]).all())
