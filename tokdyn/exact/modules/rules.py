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

from ...model.calls import Call, Joined, floats
from ..products import Direction, scaled

Outputs = list[list[Tensor]]  # per call, per tensor it returns: [b, *shape]
Factors = list[tuple[Tensor, Tensor]]  # a [N, p] and δ [N, q] of N tokens


class Linear:
    """W a + b (nn.Linear, GPT-2's Conv1D, …): E_l = δ_lᵀ S with S = a·b (+ 1 where the bias moves)."""

    label = "outer product"

    def __init__(self, o: Sequence[Call], moves: set[str], P: Direction | None = None) -> None:
        self.outputs = _shapes(o)
        self.b = [call.inputs[0].flatten(0, -2) for call in o]
        self.moves, self.P = moves, P
        self.transposed = type(o[0].module) is not nn.Linear and P is not None and _is_transposed(o[0])
        self.size = sum(o[0].module.get_parameter(name).numel() for name in moves)
        self.written = 0 if P is None else self.size

    def is_short(self, positions: int) -> bool:
        """Whether the direction itself is smaller than the cotangents it is made of."""
        return self.P is not None or "weight" not in self.moves or self.b[0].shape[1] < positions

    @property
    def is_separable(self) -> bool:
        """Whether `factors` exist: a preconditioner couples a and δ."""
        return self.P is None

    def factors(self, call: Call, delta: Float[Tensor, "T q"], at: Int[Tensor, " N"], preconditioned: bool) -> Factors:
        """Of the tokens at these positions, each with its δ at its own: <Ẇ_m, Ẇ_l> = Σ over the list of (a_m·a_l) (δ_m·δ_l)."""
        a, d = call.inputs[0].flatten(0, -2)[at], delta[at]
        return [(x, d) for name, x in (("weight", a), ("bias", torch.ones_like(a[:, :1]))) if name in self.moves]

    def direction(self, calls: Sequence[Call], delta: Outputs) -> Direction:
        """Σ_s δ_s a_sᵀ and Σ_s δ_s, in the layout of the parameters."""
        a, d = _rows(calls), _flat(delta)
        found = {}
        if "weight" in self.moves:
            found["weight"] = torch.matmul(a.T, d) if self.transposed else torch.matmul(d.mT, a)
        if "bias" in self.moves:
            found["bias"] = d.sum(1)
        return found

    def tangent(self, u: Sequence[Call], delta: Outputs) -> Outputs:
        """E for each observed call, from the updated calls and the cotangents δ at their outputs."""
        if self.P is not None:
            W = scaled(self.direction(u, delta), self.P)
            E = [delta[0][0].new_zeros(()) for _ in self.b]
            if "weight" in W:
                E = [torch.matmul(x, W["weight"] if self.transposed else W["weight"].mT) for x in self.b]
            if "bias" in W:
                E = [e + W["bias"][:, None] for e in E]
        else:
            a, d = _rows(u), _flat(delta)
            E = [self._moved(a, d, x) for x in self.b]
        return [[e.expand(-1, len(x), -1).reshape(-1, *shape)] for e, x, (shape,) in zip(E, self.b, self.outputs, strict=True)]

    def _moved(self, a: Float[Tensor, "S p"], delta: Float[Tensor, "b S q"], x: Float[Tensor, "N p"]) -> Tensor:
        (S, p), N = a.shape, x.shape[0]
        if "weight" not in self.moves:
            return delta.sum(1, keepdim=True)
        if S * N <= 3 * (S + N) * p:  # S costs (p + b q) S N; a written direction b p q (S + N)
            return torch.matmul(self._gram(x, a), delta)
        moved = torch.matmul(x, torch.matmul(a.T, delta))
        return moved + delta.sum(1, keepdim=True) if "bias" in self.moves else moved

    def _gram(self, x: Float[Tensor, "N p"], a: Float[Tensor, "S p"]) -> Float[Tensor, "N S"]:
        gram = x @ a.T
        return gram + 1 if "bias" in self.moves else gram

    def fill(self, u: Sequence[Call], delta: Outputs, outs: Sequence[Tensor]) -> bool:
        """Write E of each observed call where it is wanted; False where it has to be made first."""
        if self.P is not None or "weight" not in self.moves:
            return False
        a, d = _rows(u), _flat(delta)
        for x, out in zip(self.b, outs, strict=True):
            torch.matmul(self._gram(x, a), d, out=out.view(len(d), len(x), -1))
        return True


class Embedding:
    """A lookup, times a constant where the family scales it: S = scale² 1[id_s = id_t]; its padding row has no gradient."""

    label = "lookup"

    def __init__(self, o: Sequence[Call], moves: set[str], P: Direction | None = None) -> None:
        found = [_lookup(call) for call in o]
        self.outputs = _shapes(o)
        self.o_ids, self.scale = [ids for ids, _ in found], found[0][1]
        padding: Any = o[0].module.padding_idx
        self.padding = -1 if padding is None else int(padding)
        self.P = P
        self.size = self.written = 0

    def is_short(self, positions: int) -> bool:
        """Never: a direction is the whole table."""
        return False

    is_separable = False

    def direction(self, calls: Sequence[Call], delta: Outputs) -> Direction:
        """Not made: see is_short."""
        raise AssertionError("a lookup's direction is never written down")

    def factors(self, call: Call, delta: Float[Tensor, "T q"], at: Int[Tensor, " N"], preconditioned: bool) -> Factors:
        """Not made: see is_separable."""
        raise AssertionError("a lookup meets in rows")

    def rows(self, calls: Sequence[Call], delta: Outputs) -> tuple[Int[Tensor, " S"], Float[Tensor, "b S q"]]:
        """The rows that the calls look up and the step there: P ⊙ scale · δ, nothing in the padding row."""
        ids, d = torch.cat([_lookup(call)[0] for call in calls]), _flat(delta)
        d = d * (ids.ne(self.padding).to(d.dtype) * self.scale)[:, None]
        return ids, d if self.P is None else d * self.P["weight"][ids]

    def tangent(self, u: Sequence[Call], delta: Outputs) -> Outputs:
        """E for each observed call."""
        ids, d = self.rows(u, delta)
        E = [torch.matmul((x[:, None] == ids).to(d.dtype) * self.scale, d) for x in self.o_ids]
        return [[e.reshape(-1, *shape)] for e, (shape,) in zip(E, self.outputs, strict=True)]

    def looked_up(self, residual: Float[Tensor, "b S"], h: Float[Tensor, "b d"], ids: Int[Tensor, " S"]) -> Tensor:
        """What a step residual hᵀ of a tied readout does to the lookups at `ids`, [b, S, d]."""
        found = (residual * (ids.ne(self.padding).to(residual.dtype) * self.scale))[..., None] * h[:, None]
        return found if self.P is None else found * self.P["weight"][ids]


class Scale:
    """A norm's elementwise gain (weight, or 1 + weight) and shift: E_l = (Σ_s δ_{l,s} ⊙ â_s) ⊙ b̂ + Σ_s δ_{l,s}."""

    label = "elementwise gain"

    def __init__(self, o: Sequence[Call], moves: set[str], P: Direction | None = None) -> None:
        self.outputs = _shapes(o)
        self.moves, self.P = moves, P
        self.shape = _own(o[0])["weight"].shape
        self.o = o
        self.size = sum(o[0].module.get_parameter(name).numel() for name in moves)
        self.written = 0

    def is_short(self, positions: int) -> bool:
        """Always: a vector."""
        return True

    @property
    def is_separable(self) -> bool:
        """Whether `factors` exist: for a vector that is as wide as the output."""
        return len(self.shape) == 1

    def factors(self, call: Call, delta: Float[Tensor, "T q"], at: Int[Tensor, " N"], preconditioned: bool) -> Factors:
        """Of tokens at these positions, each with its δ at its own: <Ẇ_m, P Ẇ_l> = Σ over the list of (a_m·a_l) (δ_m·δ_l)."""
        one = torch.ones_like(delta[at, :1])
        found = {"weight": delta[at] * _normalised(call).reshape(-1, *self.shape)[at], "bias": delta[at]}
        found = {name: x for name, x in found.items() if name in self.moves}
        return [(one, x) for x in scaled(found, self.P if preconditioned else None).values()]

    def direction(self, calls: Sequence[Call], delta: Outputs) -> Direction:
        """Σ_s δ_s ⊙ â_s and Σ_s δ_s."""
        d = _end_to_end([x.reshape(len(x), -1, *self.shape) for (x,) in delta], 1)
        found = {}
        if "weight" in self.moves:
            a = _end_to_end([_normalised(call).reshape(-1, *self.shape) for call in calls], 0)
            found["weight"] = (d * a).sum(1)
        if "bias" in self.moves:
            found["bias"] = d.sum(1)
        return found

    def tangent(self, u: Sequence[Call], delta: Outputs) -> Outputs:
        """E for each observed call."""
        moved = scaled(self.direction(u, delta), self.P)
        E = []
        for call in self.o:
            x = _normalised(call)
            wide = (-1, *(1,) * (x.dim() - len(self.shape)), *self.shape)
            e = moved["weight"].view(wide) * x if "weight" in moved else torch.zeros_like(x)
            e = e + moved["bias"].view(wide) if "bias" in moved else e
            E.append([e])
        return E


class Local:
    """Any other module: its vjp in its moving parameters, then its jvp along the direction found. Exact, slower.

    Raises:
        NotAlone: called again with the same inputs, the module returns something else.
    """

    label = "module-local"
    is_separable = False

    def __init__(self, o: Sequence[Call], moves: set[str], P: Direction | None = None) -> None:
        self.outputs = _shapes(o)
        self.o, self.P = o, P
        self.own = {name: o[0].module.get_parameter(name).detach() for name in sorted(moves)}
        self.size = self.written = sum(p.numel() for p in self.own.values())
        for call in o:
            for now, then in zip(_of(call)(self.own), call.outputs, strict=True):
                if not _close(now, then, relative=0.0):
                    raise NotAlone(call.name)

    def is_short(self, positions: int) -> bool:
        """Whether the module's parameters are few beside what it returns."""
        return self.written <= 2 * sum(x.numel() for call in self.o for x in call.outputs)

    def factors(self, call: Call, delta: Float[Tensor, "T q"], at: Int[Tensor, " N"], preconditioned: bool) -> Factors:
        """Not made: see is_separable."""
        raise AssertionError("a module-local direction has no factors")

    def direction(self, calls: Sequence[Call], delta: Outputs) -> Direction:
        """The module's vjp."""
        found: Direction = {}
        for call, cotangent in zip(calls, delta, strict=True):
            (part,) = vmap(vjp(_of(call), self.own)[1])(tuple(cotangent))
            found = {name: found[name] + part[name] if found else part[name] for name in part}
        return found

    def tangent(self, u: Sequence[Call], delta: Outputs) -> Outputs:
        """E for each observed call."""
        moved = scaled(self.direction(u, delta), self.P)

        def along(call: Call) -> list[Tensor]:
            return list(vmap(lambda d: jvp(_of(call), (self.own,), (d,))[1])(moved))

        return [along(call) for call in self.o]


class Together:
    """The modules of a joint (fused.py), each by its own rule: E_l = Σ_i A_i ⊙ E_{l,i}, E_{l,i} from δ_i = A_i ⊙ δ."""

    label = Linear.label

    def __init__(self, o: Joined, parts: Sequence[Linear]) -> None:
        self.outputs = _shapes([o])
        self.parts, self.slopes = parts, [A for _, A in o.parts]
        self.size = self.written = 0

    def is_short(self, positions: int) -> bool:
        """Never: modules whose directions are shorter than their cotangents are not joined."""
        return False

    @property
    def is_separable(self) -> bool:
        """Whether `factors` exist."""
        return all(rule.is_separable for rule in self.parts)

    def factors(self, call: Call, delta: Float[Tensor, "T q"], at: Int[Tensor, " N"], preconditioned: bool) -> Factors:
        """Of the tokens at these positions, each with its δ at its own: those of all modules."""
        assert isinstance(call, Joined)
        own = zip(self.parts, call.parts, strict=True)
        return [x for rule, (of, A) in own for x in rule.factors(of, delta * A.flatten(0, -2), at, preconditioned)]

    def direction(self, calls: Sequence[Call], delta: Outputs) -> Direction:
        """Not made: see is_short."""
        raise AssertionError("modules are joined where their directions are not written down")

    def tangent(self, u: Sequence[Call], delta: Outputs) -> Outputs:
        """E for the observed call."""
        E = delta[0][0].new_empty(len(delta[0][0]), *self.outputs[0][0])
        self.fill(u, delta, [E])
        return [[E]]

    def fill(self, u: Sequence[Call], delta: Outputs, outs: Sequence[Tensor]) -> bool:
        """Write E of the observed call where it is wanted."""
        (whole,), ((d,),), (E,) = u, delta, outs
        assert isinstance(whole, Joined)
        for i, (rule, (call, A), slope) in enumerate(zip(self.parts, whole.parts, self.slopes, strict=True)):
            part = E if i == 0 else torch.empty_like(E)
            rule.fill([call], [[A * d]], [part])
            if i == 0:
                E *= slope
            else:
                E.addcmul_(part, slope)
        return True


def _shapes(calls: Sequence[Call]) -> list[list[torch.Size]]:
    return [[x.shape for x in call.outputs] for call in calls]


def _rows(calls: Sequence[Call]) -> Float[Tensor, "S p"]:
    return _end_to_end([call.inputs[0].flatten(0, -2) for call in calls], 0)


def _flat(delta: Outputs) -> Float[Tensor, "b S q"]:
    return _end_to_end([x.flatten(1, -2) for (x,) in delta], 1)


def _end_to_end(parts: list[Tensor], dim: int) -> Tensor:
    """torch.cat, which copies a single tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


Rule = Linear | Embedding | Scale | Local | Together


@torch.no_grad()
def rule_for(o: Sequence[Call], moves: set[str], P: Direction | None = None) -> Rule:
    """The rule of a module from its calls on the observed side; P preconditions its moving parameters."""
    for rule, fits in ((Linear, _is_linear), (Embedding, _is_lookup), (Scale, _is_gain)):
        if moves <= {"weight", "bias"} and isinstance(o[0].output, Tensor) and fits(o[0]):
            return rule(o, moves, P)
    return Local(o, moves, P)


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


def _is_transposed(call: Call) -> bool:
    """Whether a linear module computes a W rather than a Wᵀ."""
    own, a = _random(call), call.inputs[0]
    (output,) = _of(call)(own)
    W = own["weight"]
    return a.shape[-1] == W.shape[0] and _close(output, a @ W + own.get("bias", torch.zeros(()).to(a)))


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


@torch.no_grad()
def _normalised(call: Call) -> Tensor:
    """∂output/∂weight of a module that is elementwise affine in its weight, in the layout of its output: f(1) - f(0)."""
    f, nothing = _of(call), {name: torch.zeros_like(p) for name, p in _own(call).items()}
    return f(nothing | {"weight": torch.ones_like(nothing["weight"])})[0] - f(nothing)[0]


def _is_gain(call: Call) -> bool:
    """Whether output = n(x) ⊙ (weight or 1 + weight) + bias, n independent of both."""
    own = _own(call)
    if "weight" not in own or set(own) - {"weight", "bias"} or call.output.shape[-own["weight"].dim() :] != own["weight"].shape:
        return False
    f, n, shift = _of(call), _normalised(call), _random(call)
    moved = f({name: p + shift[name] for name, p in own.items()})[0] - f(own)[0]
    return _close(moved, n * shift["weight"] + shift.get("bias", torch.zeros_like(shift["weight"])))
