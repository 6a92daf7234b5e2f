"""Module rules of the structured tangent: what one module's own parameters do to its output on the observed side.

The update token l moves a module's parameters by Σ_s ∂(output_s)/∂θᵀ δ_{l,s}, δ the cotangent at the module's output at
position s of the updated sequence. A rule holds the module's calls on the observed side; `tangent(u, δ)` is what that direction
does to their outputs, without writing the direction down where it is an outer product. Which rule a module goes by is found
from what it computes, not from its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from .trace import Call, floats

Outputs = list[list[Tensor]]  # per call, per tensor it returns: [b, *shape]


class Linear:
    """W a + b (nn.Linear, GPT-2's Conv1D, …): E_l = δ_lᵀ S with S = a·b (+ 1 where the bias moves)."""

    label = "outer product"

    def __init__(self, o: Sequence[Call], moves: set[str]) -> None:
        self.b = [call.inputs[0].flatten(0, -2) for call in o]
        self.shapes = [call.output.shape for call in o]
        self.moves = moves
        self.written = 0

    def tangent(self, u: Sequence[Call], delta: Outputs) -> Outputs:
        """E for each observed call, from the updated calls and the cotangents δ at their outputs."""
        a = torch.cat([call.inputs[0].flatten(0, -2) for call in u])
        d = torch.cat([x.flatten(1, -2) for (x,) in delta], 1)
        return [[self._moved(a, d, x).reshape(-1, *shape)] for x, shape in zip(self.b, self.shapes, strict=True)]

    def _moved(self, a: Float[Tensor, "S p"], delta: Float[Tensor, "b S q"], x: Float[Tensor, "N p"]) -> Tensor:
        (S, p), N = a.shape, x.shape[0]
        if "weight" not in self.moves:
            return delta.sum(1, keepdim=True).expand(-1, N, -1)
        if S * N <= 3 * (S + N) * p:  # S costs (p + b q) S N; a written direction b p q (S + N)
            gram = x @ a.T
            return torch.matmul(gram + 1 if "bias" in self.moves else gram, delta)
        moved = torch.matmul(x, torch.matmul(a.T, delta))
        return moved + delta.sum(1, keepdim=True) if "bias" in self.moves else moved


class Embedding:
    """A lookup, times a constant where the family scales it: S = scale² 1[id_s = id_t]; its padding row has no gradient."""

    label = "lookup"

    def __init__(self, o: Sequence[Call], moves: set[str]) -> None:
        found = [_lookup(call) for call in o]
        self.o_ids, self.scale = [ids for ids, _ in found], found[0][1]
        self.shapes = [call.output.shape for call in o]
        padding: Any = o[0].module.padding_idx
        self.padding = -1 if padding is None else int(padding)
        self.written = 0

    def rows(self, u: Sequence[Call], delta: Outputs) -> tuple[Int[Tensor, " S"], Float[Tensor, "b S q"]]:
        """The rows that the updated calls look up and the cotangents there."""
        ids, d = torch.cat([_lookup(call)[0] for call in u]), torch.cat([x.flatten(1, -2) for (x,) in delta], 1)
        return ids, d * ids.ne(self.padding)[:, None]

    def tangent(self, u: Sequence[Call], delta: Outputs) -> Outputs:
        """E for each observed call."""
        ids, d = self.rows(u, delta)
        E = [torch.matmul((x[:, None] == ids).to(d.dtype) * self.scale**2, d) for x in self.o_ids]
        return [[e.reshape(-1, *shape)] for e, shape in zip(E, self.shapes, strict=True)]


class Scale:
    """A norm's elementwise gain (weight, or 1 + weight) and shift: E_l = (Σ_s δ_{l,s} ⊙ â_s) ⊙ b̂ + Σ_s δ_{l,s}."""

    label = "elementwise gain"

    def __init__(self, o: Sequence[Call], moves: set[str]) -> None:
        self.moves = moves
        self.b = [_normalised(call) for call in o]
        self.written = 0

    def tangent(self, u: Sequence[Call], delta: Outputs) -> Outputs:
        """E for each observed call."""
        shape = _own(u[0])["weight"].shape
        a = torch.cat([_normalised(call).reshape(-1, *shape) for call in u])
        d = torch.cat([x.reshape(len(x), -1, *shape) for (x,) in delta], 1)
        gain = (d * a).sum(1) if "weight" in self.moves else d.new_zeros(len(d), *shape)
        shift = d.sum(1) if "bias" in self.moves else torch.zeros_like(gain)
        E = []
        for x in self.b:
            wide = (len(d), *(1,) * (x.dim() - len(shape)), *shape)
            E.append([(gain.view(wide) * x + shift.view(wide)).expand(-1, *x.shape)])
        return E


class Local:
    """Any other module: its vjp in its moving parameters, then its jvp along the direction found. Exact, slower.

    Raises:
        NotAlone: called again with the same inputs, the module returns something else.
    """

    label = "module-local"

    def __init__(self, o: Sequence[Call], moves: set[str]) -> None:
        self.o = o
        self.own = {name: o[0].module.get_parameter(name).detach() for name in sorted(moves)}
        self.written = sum(p.numel() for p in self.own.values())
        for call in o:
            for now, then in zip(_of(call)(self.own), call.outputs, strict=True):
                if not _close(now, then, relative=0.0):
                    raise NotAlone(call.name)

    def tangent(self, u: Sequence[Call], delta: Outputs) -> Outputs:
        """E for each observed call."""
        direction: dict[str, Tensor] = {}
        for call, cotangent in zip(u, delta, strict=True):
            (part,) = vmap(vjp(_of(call), self.own)[1])(tuple(cotangent))
            direction = {name: direction[name] + part[name] if direction else part[name] for name in part}

        def moved(call: Call) -> list[Tensor]:
            return list(vmap(lambda d: jvp(_of(call), (self.own,), (d,))[1])(direction))

        return [moved(call) for call in self.o]


Rule = Linear | Embedding | Scale | Local


@torch.no_grad()
def rule_for(o: Sequence[Call], moves: set[str]) -> Rule:
    """The rule of a module from its calls on the observed side."""
    for rule, fits in ((Linear, _is_linear), (Embedding, _is_lookup), (Scale, _is_gain)):
        if moves <= {"weight", "bias"} and isinstance(o[0].output, Tensor) and fits(o[0]):
            return rule(o, moves)
    return Local(o, moves)


class Unsupported(Exception):
    """The structured engine does not cover this model; a slower exact method does."""


class NotAlone(Exception):
    """A module whose output depends on what an outer module does meanwhile (PEFT's nested adapters of an expert stack)."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _of(call: Call) -> Callable[[dict[str, Tensor]], tuple[Tensor, ...]]:
    """What a call returns as a function of the module's parameters, named from the module."""
    return lambda own: tuple(floats(functional_call(call.module, own, call.args, call.kwargs)))


def _own(call: Call) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in call.module.named_parameters(recurse=False)}


def _random(call: Call) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(p.shape, generator=generator).to(p) for name, p in _own(call).items()}


def _close(value: Tensor, expected: Tensor, relative: float = 1e-3) -> bool:
    relative = max(relative, 10 * torch.finfo(expected.dtype).eps)
    return value.shape == expected.shape and float((value - expected).norm()) <= relative * float(expected.norm()) + 1e-12


def _is_linear(call: Call) -> bool:
    """Whether output = W a + b or Wᵀ a + b."""
    if type(call.module) is nn.Linear:
        return True
    own, a = _random(call), call.inputs[0]
    W = own.get("weight")
    if W is None or W.dim() != 2 or set(own) - {"weight", "bias"} or not a.is_floating_point() or a.shape[-1] not in W.shape:
        return False
    (output,) = _of(call)(own)
    return any(a.shape[-1] == X.shape[0] and _close(output, a @ X + own.get("bias", torch.zeros(()).to(a))) for X in (W.T, W))


def _lookup(call: Call) -> tuple[Int[Tensor, " S"], float]:
    """The rows that a lookup takes and the constant it multiplies them with: its answers to weights of 1 and of 0, 1, 2."""
    if type(call.module) is nn.Embedding:
        return call.inputs[0].flatten(), 1.0
    weight = _own(call)["weight"]
    column = torch.arange(weight.shape[0], dtype=torch.float64, device=weight.device)[:, None]
    (ones,), (count,) = (_of(call)({"weight": x}) for x in (torch.ones_like(column), column))
    return (count / ones).round().long().flatten(), float(ones.flatten()[0])


def _is_lookup(call: Call) -> bool:
    """Whether output = constant · weight[ids], for a lookup whatever its signature (OPT's positions start at 2)."""
    own = _random(call)
    if not isinstance(call.module, nn.Embedding) or set(own) != {"weight"}:
        return False
    ids, scale = _lookup(call)
    (output,) = _of(call)(own)
    return _close(output, (scale * own["weight"][ids]).reshape_as(output))


def _normalised(call: Call) -> Tensor:
    """∂output/∂weight of a module that is elementwise affine in its weight, in the layout of its output."""
    own = _own(call)
    tangent = {name: torch.ones_like(p) if name == "weight" else torch.zeros_like(p) for name, p in own.items()}
    return jvp(_of(call), (own,), (tangent,))[1][0]


def _is_gain(call: Call) -> bool:
    """Whether output = n(x) ⊙ (weight or 1 + weight) + bias, n independent of both."""
    own = _own(call)
    if "weight" not in own or set(own) - {"weight", "bias"} or call.output.shape[-own["weight"].dim() :] != own["weight"].shape:
        return False
    f, n, shift = _of(call), _normalised(call), _random(call)
    moved = f({name: p + shift[name] for name, p in own.items()})[0] - f(own)[0]
    return _close(moved, n * shift["weight"] + shift.get("bias", torch.zeros_like(shift["weight"])))
