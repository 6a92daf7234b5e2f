"""What a profile or a scan will take: multiplications and bytes counted from a model's shapes, and seconds at a rate.

    shape = Shape.of(tracer)                            # or of configurations alone, for a model that is not there
    counted = profile_work(shape, observed, updated)    # multiplications, of the passes and of the matrix
    seconds = sum(counted[part] / rate[part] for part in counted)

A side is a list of (positions, scored tokens), a pair for each sequence. Counted are the products of linear layers, of
attention and of the readout; a rate is what a machine makes of them, measured on one batch (`measured`).
benchmarks/prediction.py compares both with what is then taken; docs/scale.md has its tables.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .exact import Asked, Scope, UnscoredProblem, choose, matrix_bytes
from .exact.memory import MEMORY, Graph, Widths, backward_numbers, pass_bytes, pass_numbers, reduction_bytes
from .model.layered import layers
from .model.trace import Tracer, trace
from .objectives import SFT
from .sequences import Chi

Side = Sequence[tuple[int, int]]  # positions and scored tokens of each sequence
FEW = 16  # scored tokens a side of the matrix that is timed
STEPS = 4  # forward passes over the observed side that the check by real steps takes
RESIDUAL = 2  # and those in which the readout's formula is compared with the model's logits


@dataclass(frozen=True)
class Shape:
    """What of a model decides time and memory.

    Attributes:
        widths: vocabulary, hidden width, widest layer.
        layers: how many.
        weights: numbers of the backbone's matrices that one position passes (of experts, those that it is sent to).
        outputs: numbers that these matrices give, a position.
        heads: numbers of the queries of all layers, a position.
        parameters, moving: numbers of all of them, and of those that move.
        kept: numbers a position that the graph of a backward pass keeps.
        item: bytes of a number.
    """

    widths: Widths
    layers: int
    weights: float
    outputs: float
    heads: int
    parameters: int
    moving: int
    kept: float
    item: int

    @classmethod
    def of(cls, tracer: Tracer, scope: str = "full", longest: int = 128) -> Shape:
        """Of a traced model. Cost: two forward passes of 64 and 128 tokens, or fewer where no sequence is longer."""
        uses = Scope.named(tracer, scope).uses
        moving = sum(tracer.params[tensor].numel() for tensor in set(uses.values()))
        shape = cls.of_modules(tracer.model, Widths.of(tracer), tracer.dtype.itemsize)
        return replace(shape, moving=moving, kept=Graph.of(tracer, uses, longest).each / tracer.dtype.itemsize)

    @classmethod
    def of_modules(cls, model: nn.Module, widths: Widths, item: int, kept: float = 0.0) -> Shape:
        """Of a model whose weights need not be there (the device "meta"); all of it moves."""
        config: Any = getattr(model, "config", None)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(getattr(head, "weight", None))}
        matrices = [p for p in model.parameters() if p.dim() > 1 and id(p) not in tables]
        routed = getattr(config, "num_experts_per_tok", None) or 1
        shares = [1.0 if p.dim() == 2 else min(1.0, routed / p.shape[0]) for p in matrices]
        count, wide = (getattr(config, name, None) or 0 for name in ("num_attention_heads", "hidden_size"))
        width = getattr(config, "head_dim", None) or (wide // count if count else 0)
        total = sum(p.numel() for p in model.parameters())
        return cls(
            widths, len(layers(model)), sum(s * p.numel() for s, p in zip(shares, matrices, strict=True)),
            sum(s * p.shape[-2] * (p.shape[0] if p.dim() == 3 else 1) for s, p in zip(shares, matrices, strict=True)),
            len(layers(model)) * count * width, total, total, kept, item,
        )  # fmt: skip


def side(chis: Sequence[Chi]) -> list[tuple[int, int]]:
    """The sizes of some sequences."""
    return [(chi.ids.numel(), len(chi)) for chi in chis]


# ---------------------------------------------------------------- multiplications


def forward_work(shape: Shape, of: Side) -> float:
    """A forward pass: every weight once a position, attention's two products, the readout at scored tokens."""
    V, d, _ = shape.widths
    return sum(T * (shape.weights + 2 * T * shape.heads) + N * V * d for T, N in of)


def backward_work(shape: Shape, of: Side, again: bool = False) -> float:
    """A forward and a backward pass: thrice, and attention's scores once more; a further forward if layers are made `again`."""
    V, d, _ = shape.widths
    found = sum(T * (3 * shape.weights + 7 * T * shape.heads) + 3 * N * V * d for T, N in of)
    return found + sum(T * (shape.weights + 2 * T * shape.heads) for T, _ in of) * again


def tangent_work(shape: Shape, of: Side, G: int = 1) -> float:
    """A forward pass with G tangents: each weight meets the tangent of its input, and its own meets the input.

    The tangent of attention makes the scores and their means again.
    """
    return (1 + 2 * G) * forward_work(shape, of) + sum(2 * T * T * shape.heads for T, _ in of)


def reduction_work(shape: Shape, source: Side, sink: Side) -> float:
    """A backward pass over one side, a tangent pass over the other."""
    return backward_work(shape, source) + tangent_work(shape, sink)


def matrix_work(shape: Shape, observed: Side, updated: Side) -> float:
    """The sweep (docs/exact.md): every token pulled back, E of every update token at all observed positions, their products.

    W Σ N T of both sides, and q Σ_l T_l Σ_o T_o + q L Σ_m T_m for outputs q; nothing is saved by causality.
    """
    V, d, _ = shape.widths
    pulled = [sum(N * T for T, N in of) for of in (observed, updated)]
    L, M, positions = sum(N for _, N in updated), sum(N for _, N in observed), sum(T for T, _ in observed)
    readout = (M + L) * V * d + M * L * V
    return shape.weights * sum(pulled) + shape.outputs * (pulled[1] * positions + L * pulled[0]) + readout


def profile_work(shape: Shape, observed: Side, updated: Side, matrix: bool = True) -> dict[str, float]:
    """Multiplications of a profile: scoring, the whole step, real steps and their checks ("passes"), and the "matrix"."""
    passes = forward_work(shape, observed) + 2 * forward_work(shape, updated) + reduction_work(shape, updated, observed)
    passes += (STEPS + RESIDUAL) * forward_work(shape, observed)
    return {"passes": passes} | ({"matrix": matrix_work(shape, observed, updated)} if matrix else {})


def scan_work(shape: Shape, probe: Sequence[Side], row: Side, rows: int) -> dict[str, float]:
    """Multiplications of a scan: a backward pass a group, once; of each row a forward pass with a tangent a group."""
    pulled = sum(backward_work(shape, group) for group in probe)
    return {"passes": pulled + rows * tangent_work(shape, row, len(probe))}


# ---------------------------------------------------------------- bytes


def reduction_memory(shape: Shape, source: Side, sink: Side, memory: int = MEMORY) -> dict[str, float]:
    """Bytes of a reduction by what holds them, one sequence a batch; see memory.reduction_bytes, which looks at the model."""
    direction = shape.item * shape.moving
    plain = [shape.item * (shape.kept * T + backward_numbers(shape.widths, T, N)) for T, N in source]
    entering = shape.layers * shape.widths.d
    again = [
        shape.item * (shape.kept / max(1, shape.layers) * T + backward_numbers(shape.widths, T, N))
        + max(shape.item * entering * T, direction)
        for T, N in source
    ]  # fmt: skip
    return {
        "model": shape.item * shape.parameters,
        "direction": direction,
        "backward": max(b if a > memory else a for a, b in zip(plain, again, strict=True)),
        "tangents": shape.item * max(pass_numbers(shape.widths, T, N, 1, T) for T, N in sink),
    }


def profile_memory(shape: Shape, observed: Side, updated: Side, matrix: bool = True, memory: int = MEMORY) -> dict[str, float]:
    """The same of a profile: also the weights after a step, and the matrix with what `memory` lets it take."""
    found = reduction_memory(shape, updated, observed, memory)
    found["stepped"] = shape.item * (shape.moving + max(pass_numbers(shape.widths, T, N, 0, T) for T, N in observed))
    if matrix:
        M, L = (sum(N for _, N in of) for of in (observed, updated))
        T, N = max([*observed, *updated])
        cuts = shape.item * shape.widths.d * sum(T * N for T, N in [*observed, *updated])
        segment = shape.item * shape.outputs / max(1, 2 * shape.layers) * sum(T * N for T, N in observed)
        graphs = 2 * shape.item * shape.kept * T
        found["matrix"] = 4 * M * L + min(memory, cuts + segment + graphs)
    return found


def most(parts: dict[str, float]) -> float:
    """The most that is held at once."""
    at = parts.get
    passes = max(parts["backward"], at("gradients", 0.0), parts["direction"] + max(parts["tangents"], at("stepped", 0.0)))
    return parts["model"] + max(passes, parts["direction"] + at("matrix", 0.0))


# ---------------------------------------------------------------- this machine


def measured(tracer: Tracer, shape: Shape, asked: Asked, matrix: bool = True, scope: str = "full") -> dict[str, float]:
    """Multiplications a second on this machine, from one batch: a reduction of a sequence a side, and a few tokens' matrix.

    In seconds of this process on a CPU, of the clock elsewhere.
    """
    few = _few(asked.update), _few(asked.observe)
    own = Asked(*few, SFT())
    device = tracer.device.type
    unscored, sides = UnscoredProblem.about(own, Scope.named(tracer, scope)), (side(few[0]), side(few[1]))
    problem, seconds = _timed(lambda: unscored.reduced("update")[1], device)
    found = {"passes": reduction_work(shape, *sides) / seconds}
    if matrix:
        F = problem.empty()
        _, seconds = _timed(lambda: choose(problem, "tangent")(problem, F), device)
        found["matrix"] = matrix_work(shape, sides[1], sides[0]) / seconds
    return found


def profile_memory_of(tracer: Tracer, asked: Asked, scope: str, matrix: bool, memory: int) -> tuple[Shape, dict[str, float]]:
    """The model's shape, and `profile_memory` by looking at its graphs, at batches, and at what the matrix's engine counts."""
    observed, updated = side(asked.observe), side(asked.update)
    shape = Shape.of(tracer, scope, max(T for T, _ in [*observed, *updated]))
    problem = UnscoredProblem.about(asked, Scope.named(tracer, scope))
    sides = problem.updated.batches, problem.observed.batches
    held: dict[str, float] = dict(reduction_bytes(tracer, problem.uses, *sides, memory))
    held |= {"model": shape.item * shape.parameters}
    held |= {"stepped": shape.item * shape.moving + max(pass_bytes(tracer, batch, 0) for batch in problem.observed.batches)}
    if matrix:
        held["matrix"] = matrix_bytes(problem.scored(memory), memory)
    return shape, held


def told(model: nn.Module, asked: Asked, scope: str, matrix: bool, memory: int, timed: bool = True) -> dict[str, str]:
    """What a profile will take, in words: its memory, and where it is timed on one batch its time on this machine.

    Raises:
        ValueError: the model cannot be traced; sequences that do not fit it.
    """
    observed, updated = side(asked.observe), side(asked.update)
    with trace(model) as tracer:
        shape, held = profile_memory_of(tracer, asked, scope, matrix, memory)
        parts = ", ".join(f"{what} {held[what] / 2**20:,.0f}" for what in held)
        found = {"memory": f"about {most(held) / 2**20:,.0f} MiB at the peak; its parts, not all there at once: {parts}"}
        if timed:
            rate = measured(tracer, shape, asked, matrix, scope)
            work = profile_work(shape, observed, updated, matrix)
            total = duration(sum(work[part] / rate[part] for part in work))
            shares = ", ".join(f"{what} {work[what]:.2g} at {rate[what]:.2g} a second" for what in work)
            found["time"] = f"about {total}, by multiplications at the rates of one batch: {shares}"
    return found


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _few(chis: Sequence[Chi]) -> list[Chi]:
    """The sequence in the middle by length, with its last few tokens scored."""
    one = sorted(chis, key=lambda chi: chi.ids.numel())[len(chis) // 2]
    scored = one.scored.clone()
    scored[one.scored.nonzero().flatten()[:-FEW]] = False
    return [Chi(one.ids, scored)]


def _timed(call: Any, device: str) -> tuple[Any, float]:
    """What a call returns the second time, and its seconds then."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    call()
    begin = clock()
    found = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return found, clock() - begin
