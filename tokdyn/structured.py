"""The full force matrix by structured tangents: no gradient of parameter size, no vocabulary axis in the batched part.

    F[m,l] = F_readout[m,l] + <u_m, ḣ_{m,l}>,    u_m = ∂log pi(y_m)/∂h_m

One forward pass records every module's inputs on both sides. For a chunk of update tokens, one batched backward pass gives the
cotangents δ at every module's output; a rule per module (rules.py) turns them into what that module's parameters do to its
output on the observed side; one batched tangent pass carries all of them to ḣ. Cost per update token about 4·P·T flops,
memory chunk · T · Σ module widths. A tied embedding adds its two cross terms.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp, vmap

from . import exact
from .exact import Progress, Side
from .kernels.readout_forces.reference import logit_force
from .objectives import GTerm
from .rules import Embedding, NotAlone, Rule, Unsupported, rule_for
from .sequences import Batch
from .trace import Call, Tracer


@dataclass(frozen=True)
class Plan:
    """Which modules move and how the readout takes part."""

    moves: dict[str, set[str]]  # module -> its moving parameters, in the backbone, named from there
    module: dict[str, str]  # use of a tensor -> the module that moves it
    head: bool  # the readout weight moves as readout
    head_bias: bool
    lookup: str | None  # the module whose lookup shares the readout's weight, when both move

    @property
    def names(self) -> list[str]:
        """The modules that move."""
        return list(self.moves)


def plan(tracer: Tracer, uses: dict[str, str], seen: dict[str, set[tuple[str, ...]]], passed: Collection[str] = ()) -> Plan:
    """Sort the uses by the innermost module that was seen to use them (Tracer.usage) and is not passed over.

    Raises:
        Unsupported: a tensor that two modules share, other than a lookup tied to the readout.
    """
    head = tracer.readout
    before = {use: tensor for use, tensor in uses.items() if use not in (head.weight_name, head.bias_name)}
    moves: dict[str, set[str]] = {}
    module_of: dict[str, str] = {}
    for tensor in dict.fromkeys(before.values()):
        modules = {next((m for m in reversed(chain) if m not in passed), "") for chain in seen.get(tensor, ())}
        outermost = [m for m in modules if not any(n != m and _within(m, n) for n in modules)]
        if len(outermost) > 1:
            raise Unsupported(f"{tensor} is one tensor in two modules, {' and '.join(sorted(outermost))}")
        for module in outermost:
            names = [name for name, owner in tracer.owner.items() if owner == tensor and _within(name, module)]
            moves.setdefault(module, set()).add(names[0][len(module) + 1 if module else 0 :])
            module_of |= {use: module for use, other in before.items() if other == tensor}
    tied = tracer.owner[head.weight_name]
    lookup = next((module_of[use] for use, tensor in before.items() if tensor == tied and use in module_of), None)
    moving = head.weight_name in uses
    return Plan(moves, module_of, moving, head.bias_name in uses, lookup if moving else None)


def _within(name: str, module: str) -> bool:
    return not module or name.startswith(module + ".")


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
    residual = head.pull_back(z, logit_force(z, term.targets, term.c, term.v, term.uniform))
    u = residual @ head.weight.to(residual.dtype)  # residuals of a half-precision model are float32, and so is what they meet
    return Watched(batch, h.to(residual.dtype), residual, u, calls, slice(start, start + len(batch.targets)))


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
        Unsupported: tensors shared in other ways than a tied readout, or a readout that is not softcap(scale (W h + b)).
    """
    singles, done = one_by_one(u), 0
    p, pairs = _prepared(tracer, o, uses, tracer.usage([*o.batches, *singles.batches]))
    column = 0
    for b, batch in enumerate(singles.batches):
        source = watch(tracer, singles, b, (), column)
        column += len(batch.targets)
        b_max = chunk or _chunk(pairs, batch, memory, out.element_size())
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
    labels = {name: rule.label for _, rules in pairs for name, rule in rules.items()}
    head = tracer.readout
    return {
        use: "readout in closed form"
        if use in (head.weight_name, head.bias_name)
        else labels.get(p.module.get(use, ""), "not used in the forward pass")
        for use in uses
    }


def _prepared(
    tracer: Tracer, o: Side, uses: dict[str, str], seen: dict[str, set[tuple[str, ...]]]
) -> tuple[Plan, list[tuple[Watched, dict[str, Rule]]]]:
    """Which modules move, and the observed batches with a rule for each.

    A module that does not repeat its output when called alone is moved as part of the one around it.
    """
    passed: set[str] = set()
    while True:
        p, pairs, start = plan(tracer, uses, seen, passed), [], 0
        try:
            for b, batch in enumerate(o.batches):
                w = watch(tracer, o, b, p.names, start)
                pairs.append((w, _rules(p, w.calls)))
                if b == 0 and not passed:
                    error = tracer.readout_residual(w.batch)
                    if error > tracer.readout_bound:
                        raise Unsupported(
                            f"the logits differ by {error:.0e} from softcap(scale (W h + b)), the readout's formula"
                        )
                start += len(batch.targets)
            return p, pairs
        except NotAlone as error:
            if not error.name:
                raise Unsupported("the model does not repeat its output") from error
            passed.add(error.name)


def _rules(p: Plan, calls: list[Call]) -> dict[str, Rule]:
    """A rule for each module that is called."""
    of: dict[str, list[Call]] = {}
    for call in calls:
        of.setdefault(call.name, []).append(call)
    rules = {name: rule_for(mine, p.moves[name]) for name, mine in of.items()}
    if p.lookup is not None and not isinstance(rules.get(p.lookup), Embedding):
        raise Unsupported(f"the readout's weight is tied to {p.lookup}, which is no plain lookup")
    return rules


def _readout_part(p: Plan, w: Watched, source: Watched, rows: slice) -> Float[Tensor, "M b"]:
    """The readout weight moved by its own use."""
    if not p.head and not p.head_bias:
        return torch.zeros(len(w.h), rows.stop - rows.start, dtype=w.h.dtype, device=w.h.device)
    features = (w.h @ source.h[rows].T if p.head else 0) + float(p.head_bias)
    return features * (w.residual @ source.residual[rows].T)


def _chunk(pairs: list[tuple[Watched, dict[str, Rule]]], batch: Batch, memory: int, itemsize: int) -> int:
    """Update tokens at a time such that cotangents, tangents and what is written of directions stay within `memory`."""
    widths = [sum(x.numel() for call in w.calls for x in call.outputs) / w.batch.ids.numel() for w, _ in pairs]
    tangents = max(width * w.batch.ids.numel() for width, (w, _) in zip(widths, pairs, strict=True))
    written = max(rule.written for _, rules in pairs for rule in rules.values()) if widths[0] else 0
    token = itemsize * (max(widths) * batch.ids.numel() + 3 * tangents + 2 * written)
    return int(max(1, min(32, memory // max(1, token))))


Deltas = dict[str, tuple[list[Call], list[list[Tensor]]]]


def _cotangents(tracer: Tracer, p: Plan, source: Watched, rows: slice) -> Deltas:
    """The calls of every moving module for a chunk of tokens, and δ [b, ...] at each of their outputs.

    The sequence is cut behind the chunk's last token: nothing later takes part.
    """
    batch = source.batch
    at = batch.rows[rows]
    cut = Batch(batch.ids[:, : int(at.max()) + 1], at, batch.targets[rows], batch.sequence[rows], batch.position[rows])
    h, calls = tracer.unroll(cut, p.names)
    b, d = h.shape
    cotangent = torch.zeros(b, b, d, dtype=h.dtype, device=h.device)
    index = torch.arange(b, device=h.device)
    cotangent[index, index] = source.u[rows].to(h.dtype)
    outputs = [x for call in calls for x in call.outputs]

    def back(v: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(h, outputs, v, retain_graph=True, allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, outputs, strict=True))

    deltas, found = iter(vmap(back)(cotangent)), Deltas()
    for call in calls:
        mine, delta = found.setdefault(call.name, ([], []))
        mine.append(call.detached())
        delta.append([next(deltas) for _ in call.outputs])
    return found


@torch.no_grad()
def _move(
    tracer: Tracer, p: Plan, w: Watched, rules: dict[str, Rule], source: Watched, rows: slice, deltas: Deltas
) -> Float[Tensor, "M b"]:
    """What the backbone's part of a chunk of update tokens does to one batch of observed ones."""
    b = rows.stop - rows.start
    waiting = {name: iter(rule.tangent(*deltas[name])) for name, rule in rules.items() if name in deltas}
    tangents, F = list[Tensor](), torch.zeros(len(w.h), b, dtype=w.h.dtype, device=w.h.device)
    if p.lookup is not None:  # the cross terms of a tied embedding: the lookup moves the readout, and the readout the lookup
        rule = rules[p.lookup]
        assert isinstance(rule, Embedding)
        ids, delta = rule.rows(*deltas[p.lookup])
        F += rule.scale * torch.einsum("bsd,md,ms->mb", delta.to(w.h.dtype), w.h, w.residual[:, ids])
        source_rows = [source.residual[rows][:, ids] * (rule.scale * ids.ne(rule.padding)) for ids in rule.o_ids]
        moved = ([x[..., None] * source.h[rows, None, :]] for x in source_rows)
    for call in w.calls:
        E = next(waiting[call.name]) if call.name in waiting else [x.new_zeros(b, *x.shape) for x in call.outputs]
        if call.name == p.lookup:
            E = [e + x.reshape_as(e) for e, x in zip(E, next(moved), strict=True)]
        tangents.extend(e.to(x.dtype) for e, x in zip(E, call.outputs, strict=True))
    zeros = tuple(torch.zeros_like(x) for call in w.calls for x in call.outputs)

    def forward(e: tuple[Tensor, ...]) -> Tensor:
        return jvp(lambda *x: tracer.steer(w.batch, p.names, x), zeros, e)[1]

    h_dot = vmap(forward)(tuple(tangents))
    return F + torch.einsum("bmd,md->mb", h_dot.to(w.u.dtype), w.u)
