"""The cotangent of a rotary embedding in closed form: three passes over memory where autograd takes seven.

    y = x ⊙ cos + (-x₂, x₁) ⊙ sin     =>     ∂L/∂x = (g₁ cos₁ + g₂ sin₂, g₂ cos₂ - g₁ sin₁)       x = (x₁, x₂) in halves

Models call a function for it, not a module. Whether what it returns has this form is seen on its own numbers.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

FUNCTION = "apply_rotary_pos_emb"  # the name that families of transformers have for it


class _Turned(torch.autograd.Function):
    """y as it is, with its derivative by x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        (g1, g2), (c1, c2), (s1, s2) = (x.chunk(2, -1) for x in (g, *ctx.saved_tensors))
        dx = torch.cat([torch.addcmul(g1 * c1, g2, s2), torch.addcmul(g2 * c2, g1, s1, value=-1)], -1)
        return dx, None, None, None


def _turned(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, heads: int = 1) -> Tensor:
    """y with its derivative in closed form where it is x turned by cos and sin [B, T, D]; y as it is where it is not."""
    if not x.requires_grad or x.dim() != 4 or cos.dim() != 3 or x.shape != y.shape or cos.shape[-1] != x.shape[-1]:
        return y
    if cos.shape != sin.shape or x.shape[-1] % 2 or not x.is_floating_point():
        return y
    with torch.no_grad():
        cos, sin = (factor.unsqueeze(heads).to(x.dtype) for factor in (cos, sin))
        if any(n not in (1, size) for n, size in zip(cos.shape, x.shape, strict=True)):
            return y
        x1, x2 = x.chunk(2, -1)
        off = (x * cos + torch.cat([-x2, x1], -1) * sin - y).norm()
        if not bool(off <= 30 * torch.finfo(x.dtype).eps * y.norm()):
            return y
    return _Turned.apply(x, y.detach(), cos, sin)


def _closed(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A family's function for it, with the derivative in closed form where a call has been seen to fit.

    Families differ in order and number of the arguments: (q, k, cos, sin), (x, sin, cos), (x, cos, sin), some by keyword. Which
    are cos and sin is read from the function's own signature; what it returns is compared with what is given in its place.
    """
    try:
        signature = inspect.signature(plain)
    except (TypeError, ValueError):  # written in C, or no function
        return plain

    def turning(*args: Any, **options: Any) -> Any:
        y = plain(*args, **options)
        given = dict(signature.bind(*args, **options).arguments)
        cos, sin = given.pop("cos", None), given.pop("sin", None)
        heads = given.pop("unsqueeze_dim", 1)
        xs = [x for x in given.values() if isinstance(x, Tensor) and x.dim() == 4]
        ys = [y] if isinstance(y, Tensor) else list(y) if isinstance(y, tuple) else []
        fits = isinstance(cos, Tensor) and isinstance(sin, Tensor) and heads in (1, 2) and len(xs) == len(ys)
        if not fits or not all(isinstance(of, Tensor) for of in ys):
            return y
        found = [_turned(x, of, cos, sin, heads) for x, of in zip(xs, ys, strict=True)]
        return found[0] if isinstance(y, Tensor) else tuple(found)

    return turning


@contextlib.contextmanager
def turned(model: nn.Module) -> Iterator[None]:
    """Let the rotary embeddings of a model have their derivative in closed form inside the block."""
    beside = {type(module).__module__ for module in model.modules()}
    found = [vars(sys.modules[name]) for name in sorted(beside) if callable(vars(sys.modules[name]).get(FUNCTION))]
    before: list[Callable[..., Any]] = [names[FUNCTION] for names in found]

    try:
        for names, plain in zip(found, before, strict=True):
            names[FUNCTION] = _closed(plain)
        yield
    finally:
        for names, plain in zip(found, before, strict=True):
            names[FUNCTION] = plain
