"""The cotangent of a normalisation in closed form: four passes over memory where autograd takes eleven.

    y = w ⊙ n + bias,  n = r (x - μ),  r = (mean (x - μ)² + ε)^(-1/2)     (LayerNorm; μ = 0 in RMSNorm)
    ∂L/∂x = r (w ⊙ g - mean(w ⊙ g) - n mean(w ⊙ g ⊙ n))                  (without the first mean in RMSNorm)

Whether a module is one of the two is found by comparing this with its own derivative; nothing is assumed from its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...model.calls import Call


class _Pulled(torch.autograd.Function):
    """y as it is, with a norm's derivative by x; what it needs is made again from x, which is kept anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, r: Tensor, gain: Tensor, centred: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, r, gain)
        ctx.centred = centred
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, r, gain = ctx.saved_tensors
        n = r * (x - x.mean(-1, keepdim=True) if ctx.centred else x)
        along = (g * (gain * n / x.shape[-1])).sum(-1, keepdim=True)
        dx = torch.addcmul(g * (r * gain), along, r * n, value=-1)
        return (dx - dx.mean(-1, keepdim=True) if ctx.centred else dx), None, None, None, None


@dataclass(frozen=True)
class Norm:
    """Which normalisation a module is: its gain is weight + offset, and it may take the mean away first."""

    offset: float
    centred: bool

    def __call__(self, call: Call) -> Tensor | None:
        """The call's output with its derivative in closed form, or None where a row is constant and r cannot be told."""
        x, y, own = call.inputs[0], call.output, dict(call.module.named_parameters(recurse=False))
        with torch.no_grad():
            gain = own["weight"] + self.offset
            away = x - x.mean(-1, keepdim=True) if self.centred else x
            wide = gain * away
            size = wide.square().sum(-1, keepdim=True)
            if not bool((size > 0).all()):
                return None
            r = ((y - own["bias"] if "bias" in own else y) * wide).sum(-1, keepdim=True) / size
        return _Pulled.apply(x, y.detach(), r, gain, self.centred)

    @classmethod
    def of(cls, call: Call) -> Norm | None:
        """The norm whose closed form is this module's derivative, seen on its own inputs and a random cotangent."""
        weight, inputs = getattr(call.module, "weight", None), call.inputs
        if weight is None or len(inputs) != 1 or inputs[0].dtype not in (torch.float32, torch.float64):
            return None
        if not isinstance(call.output, Tensor) or call.output.shape != inputs[0].shape or weight.shape != inputs[0].shape[-1:]:
            return None
        with torch.enable_grad():
            x = inputs[0].detach().requires_grad_()
            plain = call.module(x)
            g = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0)).to(plain)
            (expected,) = torch.autograd.grad(plain, x, g, retain_graph=True)
            for norm in (cls(offset, centred) for offset in (0.0, 1.0) for centred in (False, True)):
                form = norm(Call(call.name, call.module, (x,), {}, plain))
                if form is not None:
                    (found,) = torch.autograd.grad(form, x, g)
                    if bool((found - expected).norm() <= 30 * torch.finfo(x.dtype).eps * expected.norm()):
                        return norm
        return None
