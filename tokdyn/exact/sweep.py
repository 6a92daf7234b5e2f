"""The force matrix by pulling both sides back together, segment by segment: F[m,l] = Σ_modules <Ẇ_m, P Ẇ_l>.

    Ẇ_m = Σ_t δ_{m,t} b_tᵀ,  Ẇ_l = Σ_s δ_{l,s} a_sᵀ   =>   <Ẇ_m, Ẇ_l> = Σ_t δ_{m,t}·E_l(t),   E_l(t) = Σ_s δ_{l,s} (a_s·b_t)

One side is kept: of the segment at hand the cotangents δ of all its tokens (or the directions Ẇ, where they are smaller) stay
in memory; the other streams past in chunks. Between segments (segments.py) only cotangents at the cut remain. No forward
derivative, no gradient of model size, no vocabulary axis. What does not fit in memory is done in tiles of kept by streamed
tokens, at the price of pulling a side back once for each tile of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import ops
from ..sequences import Batch
from ..trace import Call, Tracer
from .motions import Direction, scaled
from .plan import Plan, Watched
from .rules import Embedding, Linear, Outputs, Rule, Unsupported
from .segments import Segment, Unrolled, common_cuts, segments

Found = dict[str, tuple[list[Call], Outputs]]  # module -> its calls and the cotangents at their outputs
SHORTEST = 32
LENGTHS = 8  # a sequence is unrolled at so many lengths at most: a token needs nothing behind itself


class Budget(NamedTuple):
    """How much is done at a time."""

    chunk: int  # cotangents pulled together
    group: int  # streamed tokens that meet the kept ones together
    kept: int  # bytes of what is kept of a segment; what does not fit is done in parts, the streamed side pulled for each


@dataclass(eq=False)
class Strip:
    """Consecutive tokens of a sequence, pulled back together: the sequence ends behind the last of them."""

    w: Watched
    rows: slice  # among the sequence's tokens
    at: slice  # on the tile's axis
    positions: Int[Tensor, " N"]
    graph: Unrolled
    together: Tensor  # the tokens' cotangents at the current cut in one, while each stays at its own position
    segments: list[Segment] = field(default_factory=list)
    cotangents: list[Tensor] = field(default_factory=list)  # of each chunk of tokens, [b, *cut], from there on

    def pull_together(self, depth: int) -> Found:
        """Take all tokens through a segment that mixes no positions, as one cotangent."""
        deltas, below = self.segments[depth].pull(self.together[None])
        self.together = below[0]
        return _found(self.segments[depth], deltas)

    def spread(self, chunk: int) -> None:
        """From one cotangent for all tokens to one for each of them, in chunks."""
        whole = self.together
        every = torch.arange(len(self.positions), device=whole.device)
        where = every if whole.dim() == 2 else self.positions  # before the first segment there are only the tokens
        for part in every.split(chunk):
            alone = whole.new_zeros(len(part), *whole.shape)
            alone.flatten(1, -2)[every[: len(part)], where[part]] = whole.flatten(0, -2)[where[part]]
            self.cotangents.append(alone)
        self.together = whole.new_empty(0)

    @property
    def half(self) -> int:
        """Half of the whole sequence: about how many positions a token's cotangents take."""
        return self.w.batch.ids.shape[1] // 2

    def pull(self, depth: int, last: bool = True) -> Iterator[tuple[slice, Found]]:
        """Take every chunk through a segment, the last time for good: where it lies on the tile's axis and what it found."""
        start = self.at.start
        for i, cotangent in enumerate(self.cotangents):
            deltas, below = self.segments[depth].pull(cotangent)
            if last:
                self.cotangents[i] = below
            yield slice(start, start + len(cotangent)), _found(self.segments[depth], deltas)
            start += len(cotangent)


def _found(segment: Segment, deltas: list[list[Tensor]]) -> Found:
    found: Found = {}
    for (call, _), delta in zip(segment.inside, deltas, strict=True):
        calls, all_deltas = found.setdefault(call.name, ([], []))
        calls.append(call)
        all_deltas.append(delta)
    return found


def strips(tracer: Tracer, p: Plan, tokens: Sequence[tuple[Watched, slice]]) -> list[Strip]:
    """The tokens of one side of a tile, unrolled, with their cotangents at the input of the readout."""
    found, start = [], 0
    for w, rows in tokens:
        n = rows.stop - rows.start
        length = -(-n // max(1, min(LENGTHS, n // SHORTEST)))
        for a in range(rows.start, rows.stop, length):
            part = slice(a, min(a + length, rows.stop))
            batch = cut(w.batch, part)
            graph = Unrolled.of(*p.unroll(tracer, batch))
            at = slice(start, start + len(batch.rows))
            found.append(Strip(w, part, at, batch.rows.to(w.u.device), graph, w.u[part].to(graph.h.dtype)))
            start = at.stop
    return found


def cut(batch: Batch, rows: slice) -> Batch:
    """Some tokens of a sequence, which ends behind the last of them."""
    at = batch.rows[rows]
    ids = batch.ids[:, : int(at.max()) + 1]
    return Batch(ids, at, batch.targets[rows], batch.sequence[rows], batch.position[rows])


def tile(
    p: Plan,
    kept: list[Strip],
    streamed: list[Strip],
    rules: dict[int, dict[str, Rule]],
    budget: Budget,
    tick: Callable[[float], None],
) -> Float[Tensor, "M L"]:
    """The backbone's part of F for the tokens of two lists of strips.

    Args:
        p: what moves.
        kept, streamed: both sides; used up.
        rules: by the kept sequence (its id).
        budget: how much at a time.
        tick: hears how much is done.
    """
    both = [*kept, *streamed]
    keys = common_cuts([strip.graph for strip in both])
    for strip in both:
        strip.segments = segments(strip.graph, keys)
    F = both[0].w.u.new_zeros(kept[-1].at.stop, streamed[-1].at.stop)
    room, desk = Room(F.device), Room(F.device)
    alone = _unmixed(kept[-1], rules[id(kept[-1].w)])
    for depth in range(alone):
        _meet_alone(F, kept, streamed, rules[id(kept[-1].w)], depth)
    for strip in both:
        strip.spread(budget.chunk)
    depths = len(both[0].segments)
    for depth in range(alone, depths):
        parts = list(_fitting(kept, depth, rules, budget.kept))
        for part in parts:
            room.clear()
            held = [(strips, _hold(strips, depth, rules[id(strips[0].w)], p.lookup, room)) for strips in part]
            for columns, group in _groups(streamed, depth, budget.group, last=part is parts[-1]):
                for strips, (of, looked_up) in held:
                    own = rules[id(strips[0].w)]
                    _meet(p, F[:, columns], of, own, group, desk)
                    if p.lookup is not None and looked_up:
                        _meet_tied(own[p.lookup], p.lookup, F[:, columns], looked_up, group)
                tick((depth + columns.stop / F.shape[1]) / depths)
    return F


def _fitting(kept: list[Strip], depth: int, rules: dict[int, dict[str, Rule]], memory: int) -> Iterator[list[list[Strip]]]:
    """Kept strips in parts whose share of a segment fits in memory, by sequence."""
    part: list[list[Strip]] = []
    room = memory
    for strip in kept:
        own, item = rules[id(strip.w)], strip.graph.h.element_size()
        size = 0
        for call, outputs in strip.segments[depth].inside:
            rule, values = own[call.name], sum(x.numel() for x in outputs)
            size += len(strip.positions) * item * (rule.size if rule.is_short(strip.half) else values)
        if part and size > room:
            yield part
            part, room = [], memory
        room -= size
        if part and part[-1][0].w is strip.w:
            part[-1].append(strip)
        else:
            part.append([strip])
    yield part


@torch.no_grad()
def _unmixed(strip: Strip, rules: dict[str, Rule]) -> int:
    """How many segments from the readout down leave a token's cotangent at its own position, seen on three tokens."""
    h, positions = strip.graph.h, strip.positions
    tokens = torch.tensor(sorted({0, len(h) // 2, len(h) - 1}), device=h.device)
    cotangent = h.new_zeros(len(tokens), *h.shape)
    cotangent[torch.arange(len(tokens)), tokens] = strip.together[tokens]
    elsewhere = torch.ones(len(tokens), int(positions[-1]) + 1, dtype=torch.bool, device=h.device)
    elsewhere[torch.arange(len(tokens)), positions[tokens]] = False
    for depth, segment in enumerate(strip.segments):
        names = [call.name for call, _ in segment.inside]
        deltas, cotangent = segment.pull(cotangent)
        seen = [x for delta in deltas for x in delta] + [cotangent]
        if len(set(names)) < len(names) or not all(rules[name].is_separable for name in names) or not cotangent.numel():
            return depth
        if any(x.dim() != 4 or x.shape[1:3] != (1, elsewhere.shape[1]) or bool(x[:, 0][elsewhere].any()) for x in seen):
            return depth
    return len(strip.segments)


@torch.no_grad()
def _meet_alone(F: Float[Tensor, "M L"], kept: list[Strip], streamed: list[Strip], rules: dict[str, Rule], depth: int) -> None:
    """Add what a segment's modules do where every token's cotangent is at its own position: (a_m·a_l) (δ_m·δ_l)."""
    sides: list[dict[str, list]] = []
    for strips_of, P in ((kept, False), (streamed, True)):
        factors: dict[str, list] = {}
        for strip in strips_of:
            for name, (calls, delta) in strip.pull_together(depth).items():
                factors.setdefault(name, []).append(rules[name].factors(calls[0], delta[0][0][0, 0], strip.positions, P))
        sides.append(factors)
    for name, left in sides[0].items():
        for o, u in zip(zip(*left, strict=True), zip(*sides[1][name], strict=True), strict=True):
            (a1, d1), (a2, d2) = ([torch.cat(x).to(F.dtype) for x in zip(*side, strict=True)] for side in (o, u))
            ops.dual_gram(a1, a2, d1, d2, out=F)


class Room:
    """Memory that is used again: what is larger than a few MiB costs more to ask for than to fill."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.parts, self.used = device, list[Tensor](), list[int]()

    def clear(self) -> None:
        """Everything taken so far may be overwritten; from now on in one piece."""
        size = sum(self.used)
        if len(self.parts) > 1:
            self.parts = []
            self.parts = [torch.empty(size, dtype=torch.uint8, device=self.device)]
        self.used = [0] * len(self.parts)

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """An array [rows, columns], not filled."""
        size = -(-rows * columns * like.element_size() // 64) * 64
        if not self.parts or self.used[-1] + size > self.parts[-1].numel():
            self.parts.append(torch.empty(size, dtype=torch.uint8, device=self.device))
            self.used.append(0)
        start = self.used[-1]
        self.used[-1] += size
        part = self.parts[-1][start : start + rows * columns * like.element_size()]
        return part.view(like.dtype).view(rows, columns)


@dataclass(frozen=True)
class Directions:
    """A module's directions of the kept tokens from `first` on."""

    first: int  # on the tile's axis
    values: Float[Tensor, "n K"]


@dataclass(frozen=True)
class Block:
    """Cotangents of the kept tokens from `first` on at some positions of one of a module's outputs."""

    first: int
    values: Float[Tensor, "n K"]
    call: int
    output: int
    part: tuple[slice, ...]  # of the output


Held = dict[str, Directions | list[Block]]
LookedUp = list[tuple[Strip, tuple[list[Call], Outputs]]]


@torch.no_grad()
def _hold(strips: list[Strip], depth: int, rules: dict[str, Rule], lookup: str | None, room: Room) -> tuple[Held, LookedUp]:
    """Pull kept tokens of one sequence through a segment: its modules' blocks, and what the tied lookup found as it was."""
    first, last = strips[0].at.start, strips[-1].at.stop
    shapes = [[[x.shape for x in outputs] for _, outputs in strip.segments[depth].inside] for strip in strips]
    calls_of: dict[str, list[int]] = {}
    for i, (call, _) in enumerate(strips[0].segments[depth].inside):
        calls_of.setdefault(call.name, []).append(i)
    held: Held = {}
    like = strips[0].graph.h
    for name, inside in calls_of.items():
        if rules[name].is_short(strips[0].half):
            held[name] = Directions(first, room.take(last - first, rules[name].size, like))
            continue
        blocks = []
        for c, i in enumerate(inside):
            for k in range(len(shapes[0][i])):
                before = None
                for strip, shape in zip(strips, shapes, strict=True):
                    for part in _between(before, shape[i][k]):
                        size = prod(x.stop - x.start for x in part)
                        blocks.append(Block(strip.at.start, room.take(last - strip.at.start, size, like), c, k, part))
                    before = shape[i][k]
        held[name] = blocks
    looked_up: LookedUp = []
    for strip in strips:
        seen = []
        for at, found in strip.pull(depth):
            for name, (calls, delta) in found.items():
                _keep(held[name], rules[name], calls, delta, at)
            seen += [found[lookup]] if lookup is not None and lookup in found else []
        looked_up += [(strip, _joined(seen))] if seen else []
    return held, looked_up


def _keep(held: Directions | list[Block], rule: Rule, calls: list[Call], delta: Outputs, at: slice) -> None:
    """Put a chunk's directions, or its cotangents, where they are kept."""
    if isinstance(held, Directions):
        _join(rule.direction(calls, delta), held.values[at.start - held.first : at.stop - held.first])
        return
    for block in held:
        if block.first <= at.start:
            rows = block.values[at.start - block.first : at.stop - block.first]
            part = delta[block.call][block.output][(slice(None), *block.part)]
            rows.view(part.shape).copy_(part)


def _join(direction: Direction, out: Float[Tensor, "n K"]) -> None:
    torch.cat([direction[name].flatten(1) for name in sorted(direction)], 1, out=out)


def _joined(parts: list[tuple[list[Call], Outputs]]) -> tuple[list[Call], Outputs]:
    """Chunks of the same calls as one."""
    calls, deltas = parts[0][0], [delta for _, delta in parts]
    return calls, [[torch.cat(same) for same in zip(*call, strict=True)] for call in zip(*deltas, strict=True)]


def _between(before: torch.Size | None, shape: torch.Size) -> list[tuple[slice, ...]]:
    """The part of an output that a longer sequence has beyond a shorter one, or all of it."""
    if before is None:
        return [tuple(slice(0, n) for n in shape)]
    longer = [i for i, (a, b) in enumerate(zip(before, shape, strict=True)) if a != b]
    if len(longer) > 1:
        raise Unsupported(f"an output of shape {list(before)} becomes {list(shape)} for a longer sequence")
    return [tuple(slice(before[i] if i in longer else 0, n) for i, n in enumerate(shape))] if longer else []


Group = list[tuple[slice, Strip, slice, Found]]  # chunks of streamed tokens: place in the group, strip, place in its sequence


def _groups(streamed: list[Strip], depth: int, size: int, last: bool) -> Iterator[tuple[slice, Group]]:
    """Pull streamed tokens through a segment, in groups: a matrix product of few columns does not run at full speed."""
    group: Group = []
    start = stop = 0
    for strip in streamed:
        for columns, found in strip.pull(depth, last):
            start = start if group else columns.start
            shift = strip.rows.start - strip.at.start
            rows = slice(columns.start + shift, columns.stop + shift)
            group.append((slice(columns.start - start, columns.stop - start), strip, rows, found))
            stop = columns.stop
            if stop - start >= size:
                yield slice(start, stop), group
                group = []
    if group:
        yield slice(start, stop), group


@torch.no_grad()
def _meet(p: Plan, F: Float[Tensor, "M b"], held: Held, rules: dict[str, Rule], group: Group, desk: Room) -> None:
    """Add what a segment's modules do, between the kept tokens of one sequence and a group of streamed ones."""
    columns = F.shape[1]
    for name, kept in held.items():
        rule = rules[name]
        desk.clear()
        if isinstance(kept, Directions):
            right = desk.take(columns, rule.size, kept.values)
            for at, _, _, found in group:
                _join(scaled(rule.direction(*found[name]), p.P.get(name)), right[at])
            F[kept.first : kept.first + len(kept.values)] += inner(kept.values, right)
            continue
        like = kept[0].values
        E = [[desk.take(columns, shape.numel(), like).view(-1, *shape) for shape in call] for call in rule.outputs]
        for at, _, _, found in group:
            if not (isinstance(rule, Linear) and rule.fill(*found[name], [e[at] for (e,) in E])):
                for call, tangents in zip(E, rule.tangent(*found[name]), strict=True):
                    for e, tangent in zip(call, tangents, strict=True):
                        e[at] = tangent
        for block in kept:
            near = E[block.call][block.output][(slice(None), *block.part)]
            F[block.first : block.first + len(block.values)] += inner(block.values, near.flatten(1))


@torch.no_grad()
def _meet_tied(rule: Rule, lookup: str, F: Float[Tensor, "M b"], kept: LookedUp, group: Group) -> None:
    """Add what one tensor does as lookup of one side and as readout of the other."""
    assert isinstance(rule, Embedding)
    for at, _, _, found in group:
        ids, d = rule.rows(*found[lookup])
        for o, _ in kept:
            F[o.at, at] += tied(o.w.h[o.rows], o.w.residual_at(ids)[o.rows], d).T
    h = torch.cat([strip.w.h[rows] for _, strip, rows, _ in group])
    for o, theirs in kept:
        ids, d = rule.rows(*theirs)
        F[o.at] += tied(h, torch.cat([strip.w.residual_at(ids)[rows] for _, strip, rows, _ in group]), d)


def tied(h: Float[Tensor, "n d"], residual: Float[Tensor, "n S"], rows: Float[Tensor, "k S d"]) -> Float[Tensor, "k n"]:
    """The readout's direction of n tokens, residual hᵀ, times the lookup's of k tokens, `rows` at the ids of `residual`."""
    return (torch.matmul(h, rows.to(h.dtype).mT) * residual).sum(2)


def inner(left: Float[Tensor, "m K"], right: Float[Tensor, "b K"]) -> Float[Tensor, "m b"]:
    """left rightᵀ, in float32 at least."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return left.to(wide) @ right.to(wide).T
