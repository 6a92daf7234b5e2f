"""The force matrix by pulling both sides back together, segment by segment: F[m,l] = Σ_modules <Ẇ_m, P Ẇ_l>.

    Ẇ_m = Σ_t δ_{m,t} b_tᵀ,  Ẇ_l = Σ_s δ_{l,s} a_sᵀ   =>   <Ẇ_m, Ẇ_l> = Σ_t δ_{m,t}·E_l(t),   E_l(t) = Σ_s δ_{l,s} (a_s·b_t)

One side is kept: of the segment at hand the cotangents δ of all its tokens (or the directions Ẇ, where they are smaller) stay
in memory; the other streams past in chunks. Between segments (segments.py) only cotangents at the cut remain. No forward
derivative, no gradient of model size, no vocabulary axis. What does not fit in memory is done in tiles of kept by streamed
tokens, at the price of pulling a side back once for each tile of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ... import ops
from ...model.calls import Call
from ...sequences import Batch
from ..modules.rules import Embedding, Linear, Outputs, Rule, Together, Unsupported
from ..products import Direction, scaled
from .plan import Plan, Watched
from .segments import OTHERWISE, Cuts, Outline, Segment

Found = dict[str, tuple[list[Call], Outputs]]  # module -> its calls and the cotangents at their outputs
SAVED = 2  # what a segment's graph keeps for its backward pass beside the outputs of its modules
SHORTEST = 64
LENGTHS = 8  # a sequence is unrolled at so many lengths, more where memory is short: a token needs nothing behind itself


class Budget(NamedTuple):
    """How much is done at a time."""

    chunk: int  # cotangents pulled together
    group: int  # streamed tokens that meet the kept ones together
    strip: int  # kept tokens that are pulled in one graph: a part of the kept ones is whole strips
    kept: int  # bytes of what is kept of a segment; what does not fit is done in parts, the streamed side pulled for each
    graphs: int  # bytes of graphs: so many segments are made in one forward pass, of all sequences of both sides


@dataclass(eq=False)
class Strip:
    """Consecutive tokens of a sequence, pulled back together: the sequence ends behind the last of them."""

    w: Watched
    rows: slice  # among the sequence's tokens
    at: slice  # on the tile's axis
    batch: Batch
    cuts: Cuts
    outline: Outline
    together: Tensor  # the tokens' cotangents at the current cut in one, while each stays at its own position
    graph: int  # how many segments are made at a time
    made: dict[int, Segment]
    cotangents: list[Tensor] = field(default_factory=list)  # of each chunk of tokens, [b, *cut], from there on

    @property
    def positions(self) -> Int[Tensor, " N"]:
        """Where the tokens are scored."""
        return self.batch.rows.to(self.w.u.device)

    def segment(self, depth: int) -> Segment:
        """A segment of the backbone on this sequence."""
        if depth not in self.made:
            stop = self.cuts.end(depth, self.graph)
            self.made.update(enumerate(self.cuts.segments(self.batch, depth, stop), depth))
        return self.made[depth]

    def leave(self, depth: int) -> None:
        """A segment is not wanted again."""
        self.made.pop(depth, None)

    def shapes(self, depth: int) -> list[tuple[str, list[torch.Size]]]:
        """The modules in a segment, call by call, and what they return."""
        return [(self.outline.names[i], self.outline.shapes[i]) for i in self.outline.segments(self.cuts.keys)[depth]]

    def pull_together(self, depth: int) -> Found:
        """Take all tokens through a segment that mixes no positions, as one cotangent."""
        segment = self.segment(depth)
        deltas, below = segment.pull(self.together[None])
        self.together = below[0]
        self.leave(depth)
        return _found(segment, deltas)

    def spread(self, chunk: int) -> None:
        """From one cotangent for all tokens to one for each of them, in chunks."""
        whole = self.together
        every = torch.arange(len(self.positions), device=whole.device)
        where = every if whole.dim() == 2 else self.positions  # before the first segment there are only the tokens
        for part in every.tensor_split(-(-len(every) // chunk)):
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
        start, segment = self.at.start, self.segment(depth)
        for i, cotangent in enumerate(self.cotangents):
            deltas, below = segment.pull(cotangent)
            if last:
                self.cotangents[i] = below
            yield slice(start, start + len(cotangent)), _found(segment, deltas)
            start += len(cotangent)
        if last:
            self.leave(depth)


def _found(segment: Segment, deltas: list[list[Tensor]]) -> Found:
    found: Found = {}
    for (call, _), delta in zip(segment.inside, deltas, strict=True):
        calls, all_deltas = found.setdefault(call.name, ([], []))
        calls.append(call)
        all_deltas.append(delta)
    return found


def in_strips(tokens: int, longest: int | None = None) -> list[slice]:
    """The tokens of a sequence in runs of about the same length, so many in one at most."""
    count = max(1, min(LENGTHS, tokens // SHORTEST), -(-tokens // (longest or tokens)))
    length = -(-tokens // count)
    return [slice(a, min(a + length, tokens)) for a in range(0, tokens, length)]


def strips(cuts: Cuts, tokens: Sequence[tuple[Watched, slice]], graphs: int, longest: int | None = None) -> list[Strip]:
    """The tokens of one side of a tile, with their cotangents at the input of the readout, so many in a strip at most.

    Their graphs take about so many bytes: they are made once where all fit, else some segments at a time when those are wanted.
    """
    cut: list[tuple[Watched, slice, Batch]] = []
    for w, rows in tokens:
        a = rows.start
        parts = [slice(a + of.start, a + of.stop) for of in in_strips(rows.stop - a, longest)]
        cut += [(w, part, w.batch.upto(part)) for part in parts]

    def size(w: Watched, batch: Batch, how: Callable[[list[int]], int]) -> int:
        values = how([sum(of) for of in cuts.outline(w.batch).values(cuts.keys)])
        return SAVED * w.dtype.itemsize * values * batch.ids.shape[1] // w.batch.ids.shape[1]

    fit = sum(size(w, batch, sum) for w, _, batch in cut) <= graphs
    graph = max(1, graphs // max(1, sum(size(w, batch, max) for w, _, batch in cut)))
    found, start = [], 0
    for w, part, batch in cut:
        at = slice(start, start + len(batch.rows))
        outline, made = cuts.whole(batch) if fit else (cuts.outline(batch), [])
        u = w.u[part].to(w.dtype)
        found.append(Strip(w, part, at, batch, cuts, outline, u, graph, dict(enumerate(made))))
        start = at.stop
    return found


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
    both, cuts = [*kept, *streamed], kept[0].cuts
    F = both[0].w.u.new_zeros(kept[-1].at.stop, streamed[-1].at.stop)
    room, desk = Room(F.device), Room(F.device)
    some = rules[id(kept[-1].w)]
    alone = _unmixed(max(both, key=lambda strip: strip.batch.ids.shape[1]), some)
    for depth in range(alone):
        _meet_alone(F, kept, streamed, some, depth)
    for strip in both:
        strip.spread(budget.chunk)
    for depth in range(alone, len(cuts)):
        parts = list(_fitting(kept, depth, rules, budget.kept))
        for part in parts:
            own = [rules[id(strips[0].w)] for strips in part]
            held = _reserve([_layout(strips, depth, of) for strips, of in zip(part, own, strict=True)], room, kept[0].w.dtype)
            sequences = list(zip(part, own, held, strict=True))
            for mine, of, blocks in sequences:
                _hold(mine, depth, of, blocks)
            for columns, group in _groups(streamed, depth, budget.group, last=part is parts[-1]):
                for mine, of, blocks in sequences:
                    _meet(p, F[:, columns], blocks, of, group, desk)
                    if p.lookup is not None and p.lookup in blocks:
                        _meet_tied(of[p.lookup], p.lookup, F[:, columns], mine, group)
                tick((depth + columns.stop / F.shape[1]) / len(cuts))
                del group  # before the next one is pulled
            del sequences, held, blocks
    return F


def _fitting(kept: list[Strip], depth: int, rules: dict[int, dict[str, Rule]], memory: int) -> Iterator[list[list[Strip]]]:
    """Kept strips in parts whose share of a segment fits in memory, by sequence."""
    part: list[list[Strip]] = []
    room = memory
    for strip in kept:
        own, item = rules[id(strip.w)], strip.w.dtype.itemsize
        size = 0
        for name, outputs in strip.shapes(depth):
            if name not in own:
                raise Unsupported(OTHERWISE)
            rule, values = own[name], sum(x.numel() for x in outputs)
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
    """How many segments from the readout down leave a cotangent at its own position, seen on random ones at three positions.

    The strip is the longest there is: in a sequence of one token there is nowhere else to go.
    """
    whole, positions = strip.together, strip.positions
    tokens = torch.tensor(sorted({0, len(whole) // 2, len(whole) - 1}), device=whole.device)
    cotangent = whole.new_zeros(len(tokens), *whole.shape)
    random = torch.randn(len(tokens), *whole.shape[1:], generator=torch.Generator().manual_seed(0))
    cotangent[torch.arange(len(tokens)), tokens] = random.to(whole)
    elsewhere = torch.ones(len(tokens), int(positions[-1]) + 1, dtype=torch.bool, device=whole.device)
    elsewhere[torch.arange(len(tokens)), positions[tokens]] = False
    for depth in range(len(strip.cuts)):
        segment = strip.segment(depth)
        names = [call.name for call, _ in segment.inside]
        deltas, cotangent = segment.pull(cotangent)
        seen = [x for delta in deltas for x in delta] + [cotangent]
        if len(set(names)) < len(names) or not all(name in rules and rules[name].is_separable for name in names):
            return depth
        if not cotangent.numel():
            return depth
        if any(x.dim() != 4 or x.shape[1:3] != (1, elsewhere.shape[1]) or bool(x[:, 0][elsewhere].any()) for x in seen):
            return depth
    return len(strip.cuts)


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
    """Memory that is used again: what is larger than a few MiB costs more to ask for than to fill, and leaves holes behind."""

    def __init__(self, device: torch.device) -> None:
        self.all = torch.empty(0, dtype=torch.uint8, device=device)

    def arrays(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> Iterator[Tensor]:
        """Arrays [rows, columns], not filled, one after the other; what was taken before may be overwritten."""
        sizes = [rows * columns * dtype.itemsize for rows, columns in shapes]
        starts = list(accumulate((-(-size // 64) * 64 for size in sizes), initial=0))
        if starts[-1] > len(self.all):
            device = self.all.device
            del self.all  # before the larger one is taken
            self.all = torch.empty(starts[-1], dtype=torch.uint8, device=device)
        for shape, start, size in zip(shapes, starts, sizes, strict=False):
            yield self.all[start : start + size].view(dtype).view(shape)


@dataclass(frozen=True)
class Block:
    """What is kept of a module for the tokens from `first` on: their directions, or their cotangents at some positions."""

    first: int  # on the tile's axis
    shape: tuple[int, int]  # tokens, numbers of each
    where: tuple[int, int, tuple[slice, ...]] | None = None  # which call, which of its outputs, which part; None: directions
    values: Tensor = torch.empty(0)

    @property
    def at(self) -> slice:
        """Its tokens on the tile's axis."""
        return slice(self.first, self.first + self.shape[0])


Held = dict[str, list[Block]]  # by module


def _layout(strips: list[Strip], depth: int, rules: dict[str, Rule]) -> Held:
    """What is to be kept of a segment's modules for tokens of one sequence, still without values."""
    first, last = strips[0].at.start, strips[-1].at.stop
    shapes = [strip.shapes(depth) for strip in strips]
    if any([name for name, _ in of] != [name for name, _ in shapes[0]] for of in shapes):
        raise Unsupported(OTHERWISE)
    calls_of: dict[str, list[int]] = {}
    for i, (name, _) in enumerate(shapes[0]):
        calls_of.setdefault(name, []).append(i)
    held: Held = {}
    for name, inside in calls_of.items():
        if rules[name].is_short(strips[0].half):
            held[name] = [Block(first, (last - first, rules[name].size))]
            continue
        blocks = []
        for c, i in enumerate(inside):
            for k in range(len(shapes[0][i][1])):
                before = None
                for strip, shape in zip(strips, shapes, strict=True):
                    for part in _between(before, shape[i][1][k]):
                        size = prod(x.stop - x.start for x in part)
                        blocks.append(Block(strip.at.start, (last - strip.at.start, size), (c, k, part)))
                    before = shape[i][1][k]
        held[name] = blocks
    return held


def _reserve(layouts: list[Held], room: Room, dtype: torch.dtype) -> list[Held]:
    """The same with memory for the values."""
    arrays = room.arrays([block.shape for held in layouts for blocks in held.values() for block in blocks], dtype)
    return [
        {name: [replace(block, values=next(arrays)) for block in blocks] for name, blocks in held.items()} for held in layouts
    ]


@torch.no_grad()
def _hold(strips: list[Strip], depth: int, rules: dict[str, Rule], held: Held) -> None:
    """Pull kept tokens of one sequence through a segment into what is held."""
    for strip in strips:
        _see_prefix(strip, depth)
        for at, found in strip.pull(depth):
            for name, (calls, delta) in found.items():
                _keep(held[name], rules[name], calls, delta, at)


def _see_prefix(strip: Strip, depth: int) -> None:
    """A strip's cotangents meet tangents made for the whole sequence: its modules must return what begins theirs.

    Raises:
        Unsupported: they do not (the rows of a module may be in another order).
    """
    if strip.batch.ids.shape == strip.w.batch.ids.shape:
        return
    near = max(1e-3, torch.finfo(strip.w.dtype).eps ** 0.5)
    whole: dict[str, Iterator[Tensor]] = {}
    for call, _ in strip.segment(depth).inside:
        if call.name not in whole:
            whole[call.name] = iter([x for of in strip.w.calls if of.name == call.name for x in of.outputs])
        for x in call.outputs:
            begin = next(whole[call.name], x.new_empty(0))
            begin = begin[tuple(slice(0, n) for n in x.shape)] if begin.dim() == x.dim() else begin
            if begin.shape != x.shape or not bool((begin - x).norm() <= near * x.norm()):
                raise Unsupported(f"{call.name} returns something else for the beginning of a sequence than for all of it")


def _keep(blocks: list[Block], rule: Rule, calls: list[Call], delta: Outputs, at: slice) -> None:
    """Put a chunk's directions, or its cotangents, where they are kept."""
    for block in blocks:
        if block.first <= at.start:
            rows = block.values[at.start - block.first : at.stop - block.first]
            if block.where is None:
                _join(rule.direction(calls, delta), rows)
            else:
                call, output, part = block.where
                found = delta[call][output][(slice(None), *part)]
                rows.view(found.shape).copy_(found)


def _join(direction: Direction, out: Float[Tensor, "n K"]) -> None:
    torch.cat([direction[name].flatten(1) for name in sorted(direction)], 1, out=out)


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
    for name, blocks in held.items():
        rule, dtype = rules[name], blocks[0].values.dtype
        if blocks[0].where is None:
            (right,) = desk.arrays([(columns, rule.size)], dtype)
            for at, _, _, found in group:
                if name in found:
                    _join(scaled(rule.direction(*found[name]), p.P.get(name)), right[at])
                else:
                    right[at] = 0
            F[blocks[0].at] += inner(blocks[0].values, right)
            continue
        flat = desk.arrays([(columns, shape.numel()) for call in rule.outputs for shape in call], dtype)
        E = [[next(flat).view(-1, *shape) for shape in call] for call in rule.outputs]
        for at, _, _, found in group:
            if name not in found:
                for e in (e for call in E for e in call):
                    e[at] = 0
            elif not (isinstance(rule, Linear | Together) and rule.fill(*found[name], [e[at] for (e,) in E])):
                for call, tangents in zip(E, rule.tangent(*found[name]), strict=True):
                    for e, tangent in zip(call, tangents, strict=True):
                        e[at] = tangent
        if name == p.lookup:
            assert isinstance(rule, Embedding)
            for at, strip, rows, _ in group:
                for ids, (e,) in zip(rule.o_ids, E, strict=True):
                    e[at] += rule.looked_up(strip.w.residual_at(ids)[rows], strip.w.h[rows], ids).view_as(e[at])
        for block in blocks:
            assert block.where is not None
            of, output, part = block.where
            F[block.at] += inner(block.values, E[of][output][(slice(None), *part)].flatten(1))


@torch.no_grad()
def _meet_tied(rule: Rule, lookup: str, F: Float[Tensor, "M b"], kept: list[Strip], group: Group) -> None:
    """Add what the lookup of streamed tokens does where the same tensor is the readout of kept ones."""
    assert isinstance(rule, Embedding)
    for at, _, _, found in group:
        ids, d = rule.rows(*found[lookup])
        for strip in kept:
            F[strip.at, at] += tied(strip.w.h[strip.rows], strip.w.residual_at(ids)[strip.rows], d).T


def tied(h: Float[Tensor, "n d"], residual: Float[Tensor, "n S"], rows: Float[Tensor, "k S d"]) -> Float[Tensor, "k n"]:
    """The readout's direction of n tokens, residual hᵀ, times the lookup's of k tokens, `rows` at the ids of `residual`."""
    return (torch.matmul(h, rows.to(h.dtype).mT) * residual).sum(2)


def inner(left: Float[Tensor, "m K"], right: Float[Tensor, "b K"]) -> Float[Tensor, "m b"]:
    """left rightᵀ, in float32 at least."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return left.to(wide) @ right.to(wide).T
