"""Module rules of the structured tangent: what one module's own parameters do to its output on the observed side.

A rule holds a module's inputs on both sides. The update token l moves its parameters by Σ_s ∂(output_s)/∂θᵀ δ_{l,s}, δ the
cotangent at the module's output at position s of the updated sequence. `tangent(δ)` is what that direction does to the
module's output on the observed side, without writing the direction down where it is an outer product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from .trace import Call


class Linear:
    """W a + b (nn.Linear, GPT-2's Conv1D): E_l = δ_lᵀ S with S = a·b (+ 1 where the bias moves)."""

    label = "outer product"

    def __init__(self, u: Sequence[Call], o: Sequence[Call], moves: set[str]) -> None:
        self.a = torch.cat([call.args[0].flatten(0, -2) for call in u])
        self.b = [call.args[0].flatten(0, -2) for call in o]
        self.moves = moves
        self.u_lengths = [call.args[0].shape[-2] for call in u]

    def tangent(self, delta: Float[Tensor, "b S q"], rows: Tensor) -> list[Float[Tensor, "b N q"]]:
        """E for each observed call; `rows` says which rows of the inputs the S cotangents belong to."""
        a, out = self.a[rows], []
        S, p = a.shape
        for x in self.b:
            N = x.shape[0]
            if "weight" not in self.moves:
                out.append(delta.sum(1, keepdim=True).expand(-1, N, -1))
            elif S * N <= 3 * (S + N) * p:  # S costs (p + b q) S N; a written direction b p q (S + N)
                gram = x @ a.T
                out.append(torch.matmul(gram + 1 if "bias" in self.moves else gram, delta))
            else:
                direction = torch.matmul(a.T, delta)  # [b, p, q]
                moved = torch.matmul(x, direction)
                out.append(moved + delta.sum(1, keepdim=True) if "bias" in self.moves else moved)
        return out


class Embedding:
    """A lookup, times a constant where the family scales it: S = scale² 1[id_s = id_t]."""

    label = "lookup"

    def __init__(self, u: Sequence[Call], o: Sequence[Call], moves: set[str]) -> None:
        self.u_ids = torch.cat([call.args[0].flatten() for call in u])
        self.o_ids = [call.args[0].flatten() for call in o]
        scale = getattr(u[0].module, "embed_scale", 1.0)
        self.scale = float(scale)
        self.u_lengths = [call.args[0].shape[-1] for call in u]

    def tangent(self, delta: Float[Tensor, "b S q"], rows: Tensor) -> list[Float[Tensor, "b N q"]]:
        """E for each observed call."""
        ids = self.u_ids[rows]
        return [torch.matmul((x[:, None] == ids).to(delta.dtype) * self.scale**2, delta) for x in self.o_ids]


class Scale:
    """A norm's elementwise gain (weight, or 1 + weight) and shift: E_l = (Σ_s δ_{l,s} ⊙ â_s) ⊙ b̂ + Σ_s δ_{l,s}."""

    label = "elementwise gain"

    def __init__(self, u: Sequence[Call], o: Sequence[Call], moves: set[str]) -> None:
        self.moves = moves
        self.a = torch.cat([_normalised(call).flatten(0, -2) for call in u])
        self.shape = [_normalised(call).shape for call in o]
        self.b = [_normalised(call).flatten(0, -2) for call in o]
        self.u_lengths = [call.args[0].shape[-2] for call in u]

    def tangent(self, delta: Float[Tensor, "b S q"], rows: Tensor) -> list[Float[Tensor, "b N q"]]:
        """E for each observed call."""
        gain = (delta * self.a[rows]).sum(1, keepdim=True) if "weight" in self.moves else 0
        shift = delta.sum(1, keepdim=True) if "bias" in self.moves else 0
        return [(gain * x + shift).expand(len(delta), len(x), -1) for x in self.b]


class Local:
    """Any other module: its vjp in its own parameters, then its jvp along the direction found. Exact, slower."""

    label = "module-local"

    def __init__(self, u: Sequence[Call], o: Sequence[Call], moves: set[str]) -> None:
        self.u, self.o = u, o
        self.own = {name: p.detach() for name, p in u[0].module.named_parameters(recurse=False) if name in moves}
        self.u_lengths = [call.output.flatten(0, -2).shape[0] for call in u]

    def tangent(self, delta: Float[Tensor, "b S q"], rows: Tensor) -> list[Float[Tensor, "b N q"]]:
        """E for each observed call."""
        whole = delta.new_zeros(delta.shape[0], sum(self.u_lengths), delta.shape[2])
        whole[:, rows] = delta
        direction: dict[str, Tensor] = {}
        for call, cotangent in zip(self.u, whole.split(self.u_lengths, 1), strict=True):
            pull = vjp(_of_own(call), self.own)[1]
            (part,) = vmap(pull)(cotangent.reshape(-1, *call.output.shape))
            direction = {name: direction[name] + part[name] if direction else part[name] for name in part}
        out = []
        for call in self.o:
            f = _of_own(call)
            moved = vmap(lambda d, f=f: jvp(f, (self.own,), (d,))[1])(direction)
            out.append(moved.flatten(1, -2))
        return out


Rule = Linear | Embedding | Scale | Local


def rule_for(u: Sequence[Call], o: Sequence[Call], moves: set[str]) -> Rule:
    """The rule of a module from its calls on both sides.

    Raises:
        Unsupported: it does not return one tensor.
    """
    module, output = u[0].module, u[0].output
    if not isinstance(output, Tensor):
        raise Unsupported(f"{u[0].name} ({type(module).__name__}) returns {type(output).__name__}, not one tensor")
    name = type(module).__name__
    if type(module) is nn.Linear or name == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return Linear(u, o, moves)
    if type(module) is nn.Embedding or name.endswith("ScaledWordEmbedding"):
        return Embedding(u, o, moves)
    if moves <= {"weight", "bias"} and _is_gain(u[0]):
        return Scale(u, o, moves)
    return Local(u, o, moves)


class Unsupported(Exception):
    """The structured engine does not cover this model; a slower exact method does."""


def _of_own(call: Call) -> Any:
    return lambda own: functional_call(call.module, own, call.args, call.kwargs)


def _own(call: Call) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in call.module.named_parameters(recurse=False)}


def _normalised(call: Call) -> Tensor:
    """∂output/∂weight of a module that is elementwise affine in its weight, in the layout of its output."""
    own = _own(call)
    tangent = {name: torch.ones_like(p) if name == "weight" else torch.zeros_like(p) for name, p in own.items()}
    return jvp(_of_own(call), (own,), (tangent,))[1]


def _is_gain(call: Call) -> bool:
    """Whether output = n(x) ⊙ (weight or 1 + weight) + bias, n independent of both: measured, not guessed from a name."""
    own = _own(call)
    if "weight" not in own or own["weight"].shape != call.output.shape[-1:] or set(own) - {"weight", "bias"}:
        return False
    f, n = _of_own(call), _normalised(call)
    generator = torch.Generator().manual_seed(0)
    shift = {name: torch.randn(p.shape, generator=generator).to(p) for name, p in own.items()}
    moved = f({name: p + shift[name] for name, p in own.items()}) - f(own)
    expected = n * shift["weight"] + shift.get("bias", 0)
    return float((moved - expected).norm()) <= 1e-3 * float(expected.norm()) + 1e-12
