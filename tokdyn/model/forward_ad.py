"""What lets a model run under torch.func and forward-mode AD for as long as it is traced.

Fused attention and grouped matrix products have no jvp, some custom autograd functions have only a backward, PEFT's adapters
of parameters write in their forward pass, and gradient checkpointing sets requires_grad in it. Each context manager here
changes one of these and puts it back on exit, also after an error.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from .attention import ATTENTION, register


@contextlib.contextmanager
def traceable(model: nn.Module, attention: str | None = None) -> Iterator[None]:
    """Let a model run under torch.func, jvp included, inside the block.

    attention: transformers' name for it; None takes `traceable_attention`.
    """
    implementations = _implementations(model, attention=attention or traceable_attention(model), experts="eager")
    with (
        implementations,
        _DerivativesOfAttention(),
        _forward_derivatives(model),
        _parameter_adapters(model),
        _IgnoreRequiresGrad(),
    ):
        yield


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Leave out what `traceable` does at every torch function, where a model is not run: two microseconds each."""
    with torch._C.DisableTorchFunction():
        yield


@contextlib.contextmanager
def with_modes() -> Iterator[None]:
    """Inside `without_modes`: as before, for a model or a module that is run there."""
    with torch._C._EnableTorchFunction():
        yield


class _DerivativesOfAttention(TorchFunctionMode):
    """Modules that call scaled_dot_product_attention themselves get, inside transforms, the form with a jvp."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        if func is not nn.functional.scaled_dot_product_attention or not transformed:
            return func(*args, **(kwargs or {}))
        with sdpa_kernel(SDPBackend.MATH):
            found = func(*args, **(kwargs or {}))
        return found.transpose(-3, -2).contiguous().transpose(-3, -2) if found.dim() == 4 else found


class _IgnoreRequiresGrad(TorchFunctionMode):
    """Skip requires_grad_() where torch.func refuses it: inside a transform, and where it changes nothing.

    Gradient checkpointing of adapters (TRL's default) hooks requires_grad_() onto the embedding's output; PEFT's adapters of
    parameters set it to what it already is. A transform's own calls, by which it marks what it differentiates, are let through.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        functorch = torch._C._functorch
        if func is Tensor.requires_grad_ and not functorch.get_inplace_requires_grad_allowed():
            wanted = (*args[1:], *(kwargs or {}).values(), True)[0]
            if functorch.peek_interpreter_stack() is not None or args[0].requires_grad == wanted:
                return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _implementations(model: nn.Module, attention: str, experts: str) -> Iterator[None]:
    """Choose a model's implementations of attention and of mixtures of experts, by transformers' names for them.

    They are written to the configurations, where every transformers model reads them at each call: set_attn_implementation
    refuses some models (Falcon) and does not reach experts.
    """
    keys = {"_attn_implementation_internal": attention, "_experts_implementation_internal": experts}
    configs = [config for module in model.modules() if hasattr(config := getattr(module, "config", None), "__dict__")]
    before = [(config, key, vars(config)[key]) for config in configs for key in keys if vars(config).get(key) is not None]
    try:
        for config, key, _ in before:
            setattr(config, key, keys[key])
        yield
    finally:
        for config, key, value in before:
            setattr(config, key, value)


def traceable_attention(model: Any) -> str:
    """ATTENTION where the model takes its attention from transformers' interface alone and has no sinks, else "eager".

    A family that does something only under attentions that it lists by name (the sparse mask of DeepSeek's and GLM's indexers)
    would not do it under ours, which short sequences need not show.
    """
    why = ""
    if not (hasattr(model, "_can_set_attn_implementation") and model._can_set_attn_implementation()):
        why = "does not take its attention from transformers' interface"
    elif any(hasattr(module, "sinks") for module in model.modules()):
        why = "has attention sinks"
    elif any(_lists_attentions(name) for name in {type(module).__module__ for module in model.modules()}):
        why = "does something under attentions that it lists by name"
    if why:
        _say_eager(type(model).__name__, why)
        return "eager"
    register()
    return ATTENTION


@functools.cache
def _lists_attentions(module: str) -> bool:
    """Whether a Python module's source asks whether the attention is one of several."""
    try:
        return bool(re.search(r"_attn_implementation\s+(not\s+)?in\b", inspect.getsource(sys.modules[module])))
    except (OSError, TypeError):  # no source
        return False


@functools.cache  # once for each kind of model
def _say_eager(model: str, why: str) -> None:
    logging.getLogger(__name__).warning(
        "%s %s: it is traced with eager attention, which keeps T x T numbers for every head and tangent", model, why
    )


@contextlib.contextmanager
def _forward_derivatives(model: nn.Module) -> Iterator[None]:
    """Give old-style autograd functions, which have only a backward, a jvp.

    They are those in the files of the model's modules, and, of packages other than torch and transformers, in all files
    (bitsandbytes keeps its functions apart from its modules).
    """
    files = {type(module).__module__ for module in model.modules()}
    packages = {name.partition(".")[0] for name in files} - {"torch", "transformers", "tokdyn", "builtins", "__main__"}
    files |= {name for name in list(sys.modules) if name.partition(".")[0] in packages and sys.modules[name] is not None}
    classes = {value for name in files for value in vars(sys.modules[name]).values() if isinstance(value, type)}
    old_style = [f for f in classes if issubclass(f, torch.autograd.Function) and _is_old_style(f)]
    try:
        for f in old_style:
            f.apply = _with_jvp(f).apply  # type: ignore[method-assign]
        yield
    finally:
        for f in old_style:
            del f.apply


def _is_old_style(f: type[torch.autograd.Function]) -> bool:
    """Whether a function's forward takes a context (no setup_context), and nobody has replaced its apply."""
    base = torch.autograd.Function
    return f is not base and f.setup_context is base.setup_context and "apply" not in vars(f)


@contextlib.contextmanager
def _parameter_adapters(model: nn.Module) -> Iterator[None]:
    """Let PEFT's adapters of parameters (expert stacks, routers) run under torch.func.

    In every forward pass they register a parametrization, which writes the frozen tensor onto itself: torch.func refuses that,
    although nothing changes, and it is skipped (as is the requires_grad_ that follows, see `_IgnoreRequiresGrad`).
    """
    wrapper = getattr(sys.modules.get("peft.tuners.lora.layer"), "ParamWrapper", ())
    if not any(isinstance(module, wrapper) for module in model.modules()):
        yield
        return
    write = parametrize._maybe_set
    try:
        parametrize._maybe_set = lambda dest, src: None if dest is src else write(dest, src)
        yield
    finally:
        parametrize._maybe_set = write


def _with_jvp(old: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """An old-style function as one that torch.func takes; its jvp J ẋ is the transpose of its backward g -> Jᵀ g.

    Its inputs may hold numbers and flags; where its backward returns None, as for those, an input has no derivative.
    """

    def forward_and_vjp(inputs: tuple[Any, ...]) -> tuple[Any, Callable[..., Any]]:
        context = _Context(inputs)
        output = old.forward(context, *inputs)
        return output, lambda *g: old.backward(context, *g)

    class New(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:  # type: ignore[override]
            return forward_and_vjp(inputs)[0]

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            tensors = [x for x in inputs if isinstance(x, Tensor)]
            ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
            ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> Any:  # type: ignore[override]
            return forward_and_vjp(_inputs(ctx))[1](*g)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:  # type: ignore[override]
            inputs = _inputs(ctx)
            output, pull_back = forward_and_vjp(inputs)
            moving = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point()]

            def pulled(*g: Tensor) -> tuple[Tensor, ...]:
                found = pull_back(*g)
                found = found if isinstance(found, tuple) else (found,)  # a backward with one result returns no tuple
                return tuple(torch.zeros_like(inputs[i]) if found[i] is None else found[i] for i in moving)

            single = isinstance(output, Tensor)
            zeros = [torch.zeros_like(x) for x in ([output] if single else output)]
            wanted = tuple(torch.zeros_like(inputs[i]) if tangents[i] is None else tangents[i] for i in moving)
            moved = vjp(pulled, *zeros)[1](wanted)
            return moved[0] if single else moved

    return New


class _Context:
    """What an old-style function is given as its context outside autograd."""

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(x, Tensor) and x.is_floating_point() for x in inputs)
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *saved: Tensor | None) -> None:
        self.saved_tensors = saved

    def mark_non_differentiable(self, *outputs: Tensor) -> None:
        """Nothing to do: its cotangent is zero."""

    def set_materialize_grads(self, value: bool) -> None:
        """Nothing to do: every cotangent is a tensor."""


def _inputs(ctx: Any) -> tuple[Any, ...]:
    """The inputs of a function whose tensors were saved and whose other inputs are beside them."""
    saved = iter(ctx.saved_tensors)
    return tuple(next(saved) if tensor else x for tensor, x in zip(ctx.is_tensor, ctx.others, strict=True))
