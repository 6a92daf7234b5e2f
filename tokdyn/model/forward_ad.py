"""What a model needs for forward derivatives and torch.func, for as long as it is traced: attention, experts, adapters.

Fused attention and grouped products have no forward derivative; some custom functions have only a backward; PEFT's adapters
of parameters write in their forward pass. All of it is put back on exit, also after an error.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from .attention import ATTENTION, register


@contextlib.contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Let a model run under torch.func inside the block."""
    implementations = _implementations(model, attention=_traceable_attention(model), experts="eager")
    with implementations, _forward_derivatives(model), _parameter_adapters(model):
        yield


@contextlib.contextmanager
def _implementations(model: nn.Module, **names: str) -> Iterator[None]:
    """Choose the implementations of attention and of mixtures of experts (grouped products have no forward derivative).

    They are written to the configurations, where every transformers model reads them at each call; set_attn_implementation
    refuses some models (Falcon) and reaches no experts.
    """
    keys = {"_attn_implementation_internal": names["attention"], "_experts_implementation_internal": names["experts"]}
    configs = [config for module in model.modules() if hasattr(config := getattr(module, "config", None), "__dict__")]
    before = [(config, key, vars(config)[key]) for config in configs for key in keys if vars(config).get(key) is not None]
    try:
        for config, key, _ in before:
            setattr(config, key, keys[key])
        yield
    finally:
        for config, key, value in before:
            setattr(config, key, value)


def _traceable_attention(model: Any) -> str:
    """The tracing attention where the model takes its attention from transformers' interface and has no sinks, else eager."""
    interface = hasattr(model, "_can_set_attn_implementation") and model._can_set_attn_implementation()
    sinks = any(hasattr(module, "sinks") for module in model.modules())
    if not interface or sinks:
        why = "has attention sinks" if sinks else "does not take its attention from transformers' interface"
        _say_eager(type(model).__name__, why)
        return "eager"
    register()
    return ATTENTION


@functools.cache  # once for each kind of model
def _say_eager(model: str, why: str) -> None:
    logging.getLogger(__name__).warning(
        "%s %s: it is traced with eager attention, which keeps T x T numbers for every head and tangent", model, why
    )


@contextlib.contextmanager
def _forward_derivatives(model: nn.Module) -> Iterator[None]:
    """Give the custom autograd functions beside the model's modules that have only a backward a forward derivative too."""
    beside = {type(module).__module__ for module in model.modules()}
    values = [value for name in beside for value in vars(sys.modules[name]).values() if isinstance(value, type)]
    old = [
        f for f in values if issubclass(f, torch.autograd.Function) and f.setup_context is torch.autograd.Function.setup_context
    ]
    old = [f for f in old if "apply" not in vars(f) and f is not torch.autograd.Function]
    try:
        for f in old:
            f.apply = _with_transpose(f).apply  # type: ignore[method-assign]
        yield
    finally:
        for f in old:
            del f.apply


@contextlib.contextmanager
def _parameter_adapters(model: nn.Module) -> Iterator[None]:
    """Let PEFT's adapters of parameters (expert stacks, routers) run under torch.func.

    In every forward pass they register a parametrization, which writes the frozen tensor onto itself and sets its
    requires_grad to what it is: torch.func refuses both, although nothing changes.
    """
    wrapper = getattr(sys.modules.get("peft.tuners.lora.layer"), "ParamWrapper", ())
    if not any(isinstance(module, wrapper) for module in model.modules()):
        yield
        return

    class SameGrad(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.requires_grad_ and args[0].requires_grad == (*args, True)[1]:
                return args[0]
            return func(*args, **(kwargs or {}))

    write = parametrize._maybe_set
    try:
        parametrize._maybe_set = lambda dest, src: None if dest is src else write(dest, src)
        with SameGrad():
            yield
    finally:
        parametrize._maybe_set = write


def _with_transpose(old: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """A function of tensors with only a backward w -> Jᵀw, as one that torch.func takes: J is the transpose of its backward."""

    def pull(inputs: tuple[Tensor, ...]) -> tuple[Tensor, Callable[..., Any]]:
        context = SimpleNamespace(needs_input_grad=(True,) * len(inputs), saved_tensors=())
        context.save_for_backward = lambda *saved: setattr(context, "saved_tensors", saved)
        output = old.forward(context, *inputs)
        return output, lambda w: old.backward(context, w)

    class New(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Tensor) -> Tensor:  # type: ignore[override]
            return pull(inputs)[0]

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, w: Tensor) -> Any:  # type: ignore[override]
            return pull(ctx.saved_tensors)[1](w)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor) -> Tensor:  # type: ignore[override]
            output, back = pull(ctx.saved_tensors)
            given = tangents if len(tangents) > 1 else tangents[0]
            return vjp(back, torch.zeros_like(output))[1](given)[0]

    return New
