"""The cotangent of a rotary embedding in closed form: three passes over memory where autograd takes seven.

    y = x ⊙ cos + (-x₂, x₁) ⊙ sin     =>     ∂L/∂x = (g₁ cos₁ + g₂ sin₂, g₂ cos₂ - g₁ sin₁)       x = (x₁, x₂) in halves

Models call a function for it, not a module. Whether what it returns has this form is seen on its own numbers.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

FUNCTION = "apply_rotary_pos_emb"  # (q, k, cos, sin, ...) -> (q, k) turned, in every family of transformers that has it


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


def _turned(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if not x.requires_grad or x.dim() != 4 or cos.dim() != 3 or x.shape != y.shape or cos.shape[-1] != x.shape[-1]:
        return y
    with torch.no_grad():
        cos, sin = (factor[:, None].to(x.dtype) for factor in (cos, sin))
        x1, x2 = x.chunk(2, -1)
        off = (x * cos + torch.cat([-x2, x1], -1) * sin - y).norm()
        if x1.shape != x2.shape or not bool(off <= 30 * torch.finfo(x.dtype).eps * y.norm()):
            return y
    return _Turned.apply(x, y.detach(), cos, sin)


@contextlib.contextmanager
def turned(model: nn.Module) -> Iterator[None]:
    """Let the rotary embeddings of a model have their derivative in closed form inside the block."""
    beside = {type(module).__module__ for module in model.modules()}
    found = [vars(sys.modules[name]) for name in sorted(beside) if callable(vars(sys.modules[name]).get(FUNCTION))]
    before: list[Callable[..., Any]] = [names[FUNCTION] for names in found]

    def closed(plain: Callable[..., Any]) -> Callable[..., Any]:
        def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **options: Any) -> Any:
            y = plain(q, k, cos, sin, *args, **options)
            return tuple(_turned(x, of, cos, sin) for x, of in zip((q, k), y, strict=True))

        return both

    try:
        for names, plain in zip(found, before, strict=True):
            names[FUNCTION] = closed(plain)
        yield
    finally:
        for names, plain in zip(found, before, strict=True):
            names[FUNCTION] = plain
