"""The full force matrix by structured tangents: no gradient of parameter size, no vocabulary axis in the batched part.

    F[m,l] = F_readout[m,l] + <u_m, ḣ_{m,l}>,    u_m = ∂log pi(y_m)/∂h_m

One forward pass records every module's inputs on both sides. For a chunk of update tokens, one batched backward pass gives the
cotangents δ at every module's output; a rule per module (rules.py) turns them into what that module's parameters do to its
output on the observed side; one batched tangent pass carries all of them to ḣ. Cost per update token about 4·P·T flops,
memory chunk · T · Σ module widths. A tied embedding adds its two cross terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp, vmap

from . import exact
from .exact import Progress, Side
from .kernels.readout_forces.reference import logit_force
from .objectives import GTerm
from .rules import Embedding, Rule, Unsupported, rule_for
from .sequences import Batch
from .trace import Call, Tracer


@dataclass(frozen=True)
class Plan:
    """Which modules move and how the readout takes part."""

    moves: dict[str, set[str]]  # module -> its moving parameters, in the backbone
    head: bool  # the readout weight moves as readout
    head_bias: bool
    lookup: str | None  # the module whose lookup shares the readout's weight, when both move

    @property
    def names(self) -> list[str]:
        """The modules that move."""
        return list(self.moves)


def plan(tracer: Tracer, uses: dict[str, str]) -> Plan:
    """Sort the uses by module.

    Raises:
        Unsupported: a tensor that two modules share, other than a lookup tied to the readout.
    """
    head = tracer.readout
    moves: dict[str, set[str]] = {}
    seen: dict[str, str] = {}
    for use, tensor in uses.items():
        if use in (head.weight_name, head.bias_name):
            continue
        module, _, parameter = use.rpartition(".")
        if tensor in seen:
            other = seen[tensor].rpartition(".")[0]
            if tracer.model.get_submodule(other) is tracer.model.get_submodule(module):
                continue  # one module under two names: its calls are counted under the first
            raise Unsupported(f"{use} and {seen[tensor]} are one tensor in two modules")
        seen[tensor] = use
        moves.setdefault(module, set()).add(parameter)
    moving = head.weight_name in uses
    tied = [use for use in head.tied if use in uses and use in seen.values()]
    lookup = tied[0].rpartition(".")[0] if moving and tied else None
    return Plan(moves, moving, head.bias_name in uses, lookup)


@dataclass(frozen=True)
class Watched:
    """One batch of observed tokens, ready to be moved: residuals at the logits and at h, and the modules' calls."""

    batch: Batch
    h: Float[Tensor, "M d"]
    residual: Float[Tensor, "M V"]  # Γ pulled back through softcap and scale
    u: Float[Tensor, "M d"]  # Wᵀ residual
    calls: list[Call]
    columns: slice  # its rows in F


def watch(tracer: Tracer, side: Side, b: int, names: Sequence[str], start: int) -> Watched:
    """Record one batch of a side."""
    batch = side.batches[b]
    h, calls = tracer.record(batch, names)
    head = tracer.readout
    z = head.logits(h)
    term = side.terms[b]
    residual = logit_force(z, term.targets, term.c, term.v, term.uniform) * head.scale
    if head.softcap is not None:
        residual = residual * (1 - (z / head.softcap).square())
    return Watched(batch, h, residual, residual @ head.weight, calls, slice(start, start + len(batch.targets)))


def one_by_one(side: Side) -> Side:
    """The same tokens with every sequence in a batch of its own, cut behind its last scored token."""
    batches, terms = [], []
    for batch, term in zip(side.batches, side.terms, strict=True):
        T = batch.ids.shape[1]
        for s in batch.sequence.unique().tolist():
            mine = batch.sequence == s
            b = int(batch.rows[mine][0]) // T
            rows = batch.rows[mine] - b * T
            ids = batch.ids[b : b + 1, : int(rows.max()) + 1]
            batches.append(Batch(ids, rows, batch.targets[mine], batch.sequence[mine], batch.position[mine]))
            at = mine.to(term.c.device)
            cut = [None if x is None else x[at] for x in (term.v, term.uniform)]
            terms.append(GTerm(term.targets[at], term.c[at], *cut))
    return Side(batches, terms)


def matrix(
    tracer: Tracer,
    o: Side,
    u: Side,
    uses: dict[str, str],
    out: Float[Tensor, "M L"],
    progress: Progress | None = None,
    memory: int = 2 << 30,
) -> dict[str, str]:
    """structured_matrix, looped over the side that makes it cheaper (F is a bilinear form); returns each parameter's rule.

    Where a module is beyond the rules it is one pull and one push per token, and the rule says why.
    """
    positions = [sum(batch.ids.numel() for batch in side.batches) for side in (o, u)]
    try:
        if len(u) * positions[0] <= len(o) * positions[1]:
            return structured_matrix(tracer, o, u, uses, out, progress, memory)
        return structured_matrix(tracer, u, o, uses, out.T, progress, memory)
    except Unsupported as reason:
        exact.tangent_matrix(tracer, o, u, uses, None, out, progress)
        return dict.fromkeys(uses, f"one direction per token ({reason})")


def structured_matrix(
    tracer: Tracer,
    o: Side,
    u: Side,
    uses: dict[str, str],
    out: Float[Tensor, "M L"],
    progress: Progress | None = None,
    memory: int = 2 << 30,
    chunk: int | None = None,
) -> dict[str, str]:
    """F [M, L] into out; returns the rule each moving parameter went by.

    Args:
        tracer, uses: the model and what moves (exact.select).
        o, u: observed and updated side. The updated one is looped over, in chunks of tokens of one sequence.
        memory: bytes that the tangents of a chunk may take; sets the chunk where it is not given.
        chunk: update tokens at a time.

    Raises:
        Unsupported: a module that returns no single tensor, or tensors shared in other ways than a tied readout.
    """
    p = plan(tracer, uses)
    singles, start, done = one_by_one(u), 0, 0
    watched = []
    for b, batch in enumerate(o.batches):
        watched.append(watch(tracer, o, b, p.names, start))
        start += len(batch.targets)
    rules_seen: dict[str, str] = {}
    column = 0
    for b, batch in enumerate(singles.batches):
        source = watch(tracer, singles, b, p.names, column)
        column += len(batch.targets)
        pairs = [(w, _rules(p, source.calls, w.calls)) for w in watched]
        for _, rules in pairs:
            rules_seen |= {f"{name}.{x}": rule.label for name, rule in rules.items() for x in p.moves[name]}
        b_max = chunk or _chunk(watched, source, memory, out.element_size())
        for n in range(0, len(batch.targets), b_max):
            rows = slice(n, min(n + b_max, len(batch.targets)))
            at = slice(source.columns.start + rows.start, source.columns.start + rows.stop)
            deltas = _cotangents(tracer, p, source, rows) if p.moves else {}
            for w, rules in pairs:
                backbone = _move(tracer, p, w, rules, source, rows, deltas) if p.moves else 0
                out[w.columns, at] = _readout_part(p, w, source, rows) + backbone
            done += rows.stop - rows.start
            if progress:
                progress(done, out.shape[1])
    head = tracer.readout
    for use, moving in ((head.weight_name, p.head), (head.bias_name, p.head_bias)):
        if use is not None and moving:
            rules_seen[use] = "readout in closed form"
    return rules_seen


def _rules(p: Plan, u: list[Call], o: list[Call]) -> dict[str, Rule]:
    """A rule for each module that is called on both sides."""
    of: dict[str, tuple[list[Call], list[Call]]] = {}
    for side, calls in enumerate((u, o)):
        for call in calls:
            of.setdefault(call.name, ([], []))[side].append(call)
    rules = {name: rule_for(a, b, p.moves[name]) for name, (a, b) in of.items() if a and b}
    if p.lookup is not None and not isinstance(rules.get(p.lookup), Embedding):
        raise Unsupported(f"the readout's weight is tied to {p.lookup}, which is no plain lookup")
    return rules


def _readout_part(p: Plan, w: Watched, source: Watched, rows: slice) -> Float[Tensor, "M b"]:
    """The readout weight moved by its own use."""
    if not p.head and not p.head_bias:
        return torch.zeros(len(w.h), rows.stop - rows.start, dtype=w.h.dtype, device=w.h.device)
    features = (w.h @ source.h[rows].T if p.head else 0) + float(p.head_bias)
    return features * (w.residual @ source.residual[rows].T)


def _chunk(watched: list[Watched], source: Watched, memory: int, itemsize: int) -> int:
    """Update tokens at a time such that cotangents and tangents stay within `memory`."""

    def width(calls: list[Call]) -> int:
        return sum(call.output.numel() for call in calls)

    token = itemsize * (width(source.calls) + 3 * max(width(w.calls) for w in watched))
    return max(1, min(32, memory // max(1, token)))


def _cotangents(tracer: Tracer, p: Plan, source: Watched, rows: slice) -> dict[str, tuple[Tensor, Tensor]]:
    """δ [b, S, q] at the outputs of every moving module for a chunk of tokens, and the rows of its inputs they belong to.

    The sequence is cut behind the chunk's last token: nothing later takes part.
    """
    batch, T = source.batch, source.batch.ids.shape[1]
    at = batch.rows[rows]
    S = int(at.max()) + 1
    cut = Batch(batch.ids[:, :S], at, batch.targets[rows], batch.sequence[rows], batch.position[rows])
    order: list[str] = [call.name for call in source.calls]
    h, outputs = tracer.unroll(cut, p.names)
    b, d = h.shape
    cotangent = torch.zeros(b, b, d, dtype=h.dtype, device=h.device)
    index = torch.arange(b, device=h.device)
    cotangent[index, index] = source.u[rows]

    def back(v: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(h, outputs, v, retain_graph=True, allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, outputs, strict=True))

    found: dict[str, list[Tensor]] = {}
    for name, delta in zip(order, vmap(back)(cotangent), strict=True):
        found.setdefault(name, []).append(delta.flatten(1, -2))
    kept = {}
    for name, deltas in found.items():
        inputs = [call for call in source.calls if call.name == name]
        lengths = [call.output.flatten(0, -2).shape[0] for call in inputs]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        spans = [torch.arange(s, s + delta.shape[1], device=h.device) for s, delta in zip(starts, deltas, strict=True)]
        kept[name] = (torch.cat(deltas, 1), torch.cat(spans))
    assert T >= S
    return kept


def _move(
    tracer: Tracer,
    p: Plan,
    w: Watched,
    rules: dict[str, Rule],
    source: Watched,
    rows: slice,
    deltas: dict[str, tuple[Tensor, Tensor]],
) -> Float[Tensor, "M b"]:
    """What the backbone's part of a chunk of update tokens does to one batch of observed ones."""
    b = rows.stop - rows.start
    waiting = {name: iter(rule.tangent(*deltas[name])) for name, rule in rules.items()}
    tangents, F = [], torch.zeros(len(w.h), b, dtype=w.h.dtype, device=w.h.device)
    if p.lookup is not None:
        rule = rules[p.lookup]
        assert isinstance(rule, Embedding)
        delta, at = deltas[p.lookup]
        ids = rule.u_ids[at]
        F += rule.scale * torch.einsum("bsd,md,ms->mb", delta, w.h, w.residual[:, ids])
    for call in w.calls:
        if call.name not in rules:
            tangents.append(torch.zeros(b, *call.output.shape, dtype=call.output.dtype, device=call.output.device))
            continue
        E = next(waiting[call.name])
        if call.name == p.lookup:
            E = E + rules[call.name].scale * source.residual[rows][:, call.args[0].flatten(), None] * source.h[rows, None, :]  # type: ignore[union-attr]
        tangents.append(E.reshape(b, *call.output.shape))
    zeros = tuple(torch.zeros_like(call.output) for call in w.calls)

    def forward(e: tuple[Tensor, ...]) -> Tensor:
        return jvp(lambda *x: tracer.steer(w.batch, p.names, x), zeros, e)[1]

    with torch.no_grad():
        h_dot = vmap(forward)(tuple(tangents))
    return F + torch.einsum("bmd,md->mb", h_dot, w.u)
