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
        _FormsWithTangents(),
        _forward_derivatives(),
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


class _FormsWithTangents(TorchFunctionMode):
    """Inside transforms, what a module calls itself by a form that has a jvp and a vmap: attention and sparse tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        form = FORMS.get(func)
        if form is None or torch._C._functorch.peek_interpreter_stack() is None:
            return func(*args, **(kwargs or {}))
        return form(*args, **(kwargs or {}))


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """scaled_dot_product_attention by torch's plain kernel; the fused ones have no jvp."""
    with sdpa_kernel(SDPBackend.MATH):
        found = nn.functional.scaled_dot_product_attention(*args, **kwargs)
    return found.transpose(-3, -2).contiguous().transpose(-3, -2) if found.dim() == 4 else found


def _dense(indices: Any, values: Any, size: Any = None, **kwargs: Any) -> Tensor:
    """torch.sparse_coo_tensor, whose backward takes what no vmap passes on, and which has no jvp: the same numbers, dense."""
    if size is None or kwargs or not isinstance(values, Tensor):
        return torch.sparse_coo_tensor(indices, values, size, **kwargs)
    where = tuple(torch.as_tensor(indices, device=values.device).long())
    return values.new_zeros(tuple(size)).index_put(where, values, accumulate=True)


FORMS: dict[Any, Callable[..., Tensor]] = {
    nn.functional.scaled_dot_product_attention: _attention,
    torch.sparse_coo_tensor: _dense,
}


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
    """ATTENTION where the model takes its attention from transformers' interface alone, else "eager".

    A family that does something only under attentions that it lists by name (the sparse mask of DeepSeek's and GLM's indexers)
    would not do it under ours, which short sequences need not show.
    """
    why = ""
    if not (hasattr(model, "_can_set_attn_implementation") and model._can_set_attn_implementation()):
        why = "does not take its attention from transformers' interface"
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
def _forward_derivatives() -> Iterator[None]:
    """Give old-style autograd functions, which have only a backward, a jvp and a backward that may run more than once.

    Whichever a model calls, torch's own aside: it is `Function.apply` that is asked.
    """
    base = torch.autograd.Function
    own, made = vars(base)["apply"], dict[Any, type[torch.autograd.Function]]()

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs or not _is_old_style(cls):
            return own.__func__(cls, *args, **kwargs)
        if cls not in made:
            made[cls] = _with_jvp(cls)
        return own.__func__(made[cls], *args)

    try:
        base.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
        yield
    finally:
        base.apply = own  # type: ignore[method-assign]


def _is_old_style(f: type[torch.autograd.Function]) -> bool:
    """Whether a function's forward takes a context (no setup_context), and it writes to none of its inputs by name."""
    own = f.__module__.partition(".")[0] in ("torch", "tokdyn")
    code = getattr(f.forward, "__code__", None)
    return (
        not own
        and f.setup_context is torch.autograd.Function.setup_context
        and "mark_dirty" not in getattr(code, "co_names", ())
    )


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

    Its inputs may hold numbers and flags; where its backward returns None, as for those, an input has no derivative. Forward
    and backward get copies: kernels write gradients over what was saved (SwiGLU of Liger) or over the gradient they are given
    (its RMSNorm), past the counter by which autograd would notice.
    """

    def forward_and_vjp(inputs: tuple[Any, ...]) -> tuple[Any, Callable[..., Any]]:
        inputs = _copied(inputs)
        context = _Context(inputs)
        output = old.forward(context, *inputs)
        return output, lambda *g: old.backward(context, *_copied(g))

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
            pull_back = forward_and_vjp(_inputs(ctx))[1]
            try:
                return pull_back(*g)
            except RuntimeError:  # under vmap, of kernels that read memory
                if torch._C._functorch.peek_interpreter_stack() is None:
                    raise
                pulled = _Pulled(lambda *g: forward_and_vjp(_inputs(ctx))[1](*g))
                return pulled.whole(_OneByOne.apply(pulled, *g))

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


class _Pulled:
    """A backward by its tensors alone: which of an input's derivatives are None is noted beside them."""

    def __init__(self, pull_back: Callable[..., Any]) -> None:
        self.pull_back, self.present = pull_back, list[bool]()

    def __call__(self, *g: Tensor) -> tuple[Tensor, ...]:
        found = self.pull_back(*g)
        found = found if isinstance(found, tuple) else (found,)
        self.present = [x is not None for x in found]
        return tuple(x for x in found if x is not None)

    def whole(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """The derivatives of all inputs."""
        rest = iter(tensors)
        return tuple(next(rest) if present else None for present in self.present)


class _OneByOne(torch.autograd.Function):
    """A backward that has no vmap, one cotangent after the other."""

    @staticmethod
    def forward(pulled: _Pulled, *g: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return pulled(*g)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        raise RuntimeError("the backward of a kernel is not differentiated again")

    @staticmethod
    def vmap(info: Any, in_dims: Any, pulled: _Pulled, *g: Tensor) -> Any:
        rows = [tuple(x if dim is None else x.select(dim, i) for x, dim in zip(g, in_dims[1:], strict=True))
                for i in range(info.batch_size)]  # fmt: skip
        found = tuple(torch.stack(parts) for parts in zip(*(_OneByOne.apply(pulled, *row) for row in rows), strict=True))
        return found, (0,) * len(found)


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


def _copied(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values with copies of the tensors."""
    return tuple(x.clone() if isinstance(x, Tensor) and x.is_floating_point() else x for x in values)


def _inputs(ctx: Any) -> tuple[Any, ...]:
    """The inputs of a function whose tensors were saved and whose other inputs are beside them."""
    saved = iter(ctx.saved_tensors)
    return tuple(next(saved) if tensor else x for tensor, x in zip(ctx.is_tensor, ctx.others, strict=True))
