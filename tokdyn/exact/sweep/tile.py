"""One tile of the sweep: kept by streamed tokens, pulled back together from the readout down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product

import torch
from jaxtyping import Float
from torch import Tensor

from ... import ops
from ...model.calls import Call
from ...model.forward_ad import without_modes
from ..modules.base import OuterProduct, Outputs, Rule, cat, flat
from ..modules.lookup import Lookup, tied_force
from ..products import preconditioned
from ..progress import Progress
from .buffer import ScratchBuffer
from .kept import Block, CallsOf, Kept, layout, parts_that_fit, pull_into, recalled, reserve
from .plan import Plan, Rules
from .strips import Budget, Found, Strip

PIECE = 2 << 20  # bytes of kept cotangents that are taken times a slope at once
STEPS = 1000  # of a tile, in which its progress is told

Pulls = Iterator[tuple[slice, Found]]
Streamed = tuple[slice, tuple[Sequence[Call], Outputs] | None]  # place in the group, what E is made of
Group = list[tuple[slice, Strip, slice, Found]]  # chunks of streamed cells: place in the group, strip, place in the strip


@dataclass(eq=False)
class Tile:
    """The backbone's part of F for the tokens of two lists of strips. `fill` consumes their cotangents: a tile runs once.

    Attributes:
        plan: what moves.
        kept: the side of which a segment's directions or cotangents stay in memory; their sequences carry the rules.
        streamed: the side that passes by in groups. Strips that are also kept come first on both sides: they are pulled once.
        budget: how much at a time.
        narrow: modules with fewer inputs than this keep directions.
        progress: hears how much of the tile is done.
    """

    plan: Plan
    kept: list[Strip]
    streamed: list[Strip]
    budget: Budget
    narrow: float
    progress: Progress | None

    def __post_init__(self) -> None:
        like = self.kept[0].traced.cotangent
        self.F = like.new_zeros(self.plan.n_parts, self.kept[-1].where.stop, self.streamed[-1].where.stop)
        self._kept_memory, self._scratch = ScratchBuffer(like.device), ScratchBuffer(like.device)
        self._kept: dict[Strip, Kept] = {}  # of the segment at hand

    @without_modes()
    def fill(self, aligned: int) -> Float[Tensor, "parts M L"]:
        """All segments, from the readout down; in the first `aligned` of them cotangents stay at their own positions.

        A module's share goes to its part (Plan.part).
        """
        depths = len(self.kept[0].cuts)
        rules = self.kept[-1].traced.rules
        for depth in range(aligned):
            self._add_aligned(rules, depth)
        for strip in dict.fromkeys((*self.kept, *self.streamed)):
            strip.spread(self.budget.chunk)
        for depth in range(aligned, depths):
            self._add_segment(depth, depths)
        self._mirror()
        return self.F

    def _add_segment(self, depth: int, depths: int) -> None:
        """Add one segment's share Σ_modules <Ẇ_m, P Ẇ_l> to F, the kept side in as many parts as the budget's bytes require."""
        parts = list(parts_that_fit(self.kept, depth, self.budget.kept, self.narrow))
        for part in parts:
            layouts = [layout(strips, depth, self.narrow) for strips in part]
            reserved = reserve(layouts, self._kept_memory, self.kept[0].traced.dtype)
            sequences = list(zip(part, reserved, strict=True))
            calls: dict[Strip, CallsOf] = {}
            for strips, kept in sequences:
                calls |= pull_into(strips, depth, kept)
                self._kept |= dict.fromkeys(strips, kept)
            pulled = (self._pull(strip, depth, calls, last=part is parts[-1]) for strip in self.streamed)
            number = {strip: n for n, strips in enumerate(part) for strip in strips}
            for columns, group in groups(pulled, self.budget.group):
                first = min(number.get(strip, 0) for _, strip, _, _ in group)  # of batches before `_mirror` fills the block
                for strips, kept in sequences[first:]:
                    rules = strips[0].traced.rules
                    self._add_inner_products(self.F[..., columns], kept, rules, group)
                    tied = self.plan.tied_lookup(rules)
                    if tied is not None and self.plan.lookup in kept:
                        self._add_tied(self.F[self.plan.tied_part][:, columns], strips, tied, group)
                if self.progress:
                    self.progress(int(STEPS * (depth + columns.stop / self.F.shape[2]) / depths), STEPS)
                del group  # before the next one is pulled
            self._kept.clear()
            del sequences, reserved, kept

    def _mirror(self) -> None:
        """Of batches on both sides the blocks of an earlier kept one and a later streamed one: F is symmetric there."""
        start: dict[int, int] = {}
        streamed = set(self.streamed)
        for strip in (strip for strip in self.kept if strip in streamed):
            before, own = slice(start.setdefault(id(strip.traced), strip.where.start)), strip.where
            self.F[:, before, own] = self.F[:, own, before].mT

    def _pull(self, strip: Strip, depth: int, calls: dict[Strip, CallsOf], last: bool) -> tuple[Strip, Pulls]:
        """A streamed strip with its chunks in a segment: pulled back, or as they were kept."""
        if strip in self._kept:
            return strip, recalled(strip, self._kept[strip], calls[strip], self.budget.chunk)
        return strip, strip.pull(depth, last)

    @torch.no_grad()
    def _add_aligned(self, rules: Rules, depth: int) -> None:
        """Add the share of a segment in which every token's cotangent is at its own position: (a_m·a_l) (δ_m·δ_l).

        Rules of one sequence serve all: outer products read no call but the one they are given. `aligned_depths` has ruled out
        modules called twice and outputs of another form than [b, 1, T, q].
        """
        sides: list[dict[str, list]] = []
        pulled = {strip: strip.pull_aligned(depth) for strip in dict.fromkeys((*self.kept, *self.streamed))}
        for strips, is_streamed in ((self.kept, False), (self.streamed, True)):
            products: dict[str, list] = {}
            for strip in strips:
                for name, (calls, delta) in pulled[strip].items():
                    at_outputs = [x[0].flatten(0, -2) for x in delta[0]]
                    found = rules[name].outer_products(calls[0], at_outputs, strip.positions, is_streamed)
                    products.setdefault(name, []).append([_by_cell(of, strip) for of in found])
            sides.append(products)
        for name, left in sides[0].items():
            for o, u in zip(zip(*left, strict=True), zip(*sides[1][name], strict=True), strict=True):
                add_outer_products(self.F[self.plan.part_of(name)], OuterProduct.joined(o), OuterProduct.joined(u))

    @torch.no_grad()
    def _add_inner_products(self, parts: Float[Tensor, "parts M b"], kept: Kept, rules: Rules, group: Group) -> None:
        """Add a segment's share between the kept tokens of one batch and a group of streamed ones."""
        for name, blocks in kept.items():
            rule, F = rules[name], parts[self.plan.part_of(name)]
            if blocks[0].part is None:
                right = self._directions(name, rule, group, F.shape[1], blocks[0].values.dtype)
                F[blocks[0].where] += inner(blocks[0].values, right)
                continue
            for i, (term, slope) in enumerate(rule.terms):
                of = [(at, rule.of_term(i, *found[name]) if name in found else None) for at, _, _, found in group]
                E = self._tangents(term, of, F.shape[1], blocks[0].values.dtype)
                for block in blocks:
                    _meet(block.rows(F), block, E, slope)
            if (tied := self.plan.tied_lookup(rules)) is not None and name == self.plan.lookup:
                for block in blocks:
                    _add_looked_up(block.rows(parts[self.plan.tied_part]), block, tied, group)

    def _directions(self, name: str, rule: Rule, group: Group, columns: int, dtype: torch.dtype) -> Float[Tensor, "b K"]:
        """P Ẇ of a group's tokens, flat."""
        (right,) = self._scratch.arrays([(columns, rule.size)], dtype)
        for at, strip, cells, found in group:
            if strip in self._kept:
                start = strip.where.start
                right[at] = self._kept[strip][name][0].cells(slice(start + cells.start, start + cells.stop))
            elif name not in found:
                right[at] = 0
            elif (P := self.plan.P.get(name)) is not None:
                right[at] = flat(preconditioned(rule.direction(*found[name]), P))
            else:
                rule.direction_into(*found[name], right[at])
        return right

    def _tangents(self, rule: Rule, of: Sequence[Streamed], columns: int, dtype: torch.dtype) -> Outputs:
        """E of a group's tokens at each output of each observed call."""
        arrays = self._scratch.arrays([(columns, shape.numel()) for call in rule.shapes for shape in call], dtype)
        E = [[next(arrays).view(-1, *shape) for shape in call] for call in rule.shapes]
        for at, streamed in of:
            outs = [[e[at] for e in call] for call in E]
            if streamed is not None:
                rule.tangent_into(*streamed, outs)
            else:
                for e in (e for call in outs for e in call):
                    e.zero_()
        return E

    @torch.no_grad()
    def _add_tied(self, F: Float[Tensor, "M b"], kept: list[Strip], rule: Lookup, group: Group) -> None:
        """Add what the lookup of streamed tokens does where the same tensor is the readout of kept ones."""
        assert self.plan.lookup is not None
        for at, streamed, _, found in group:
            every, steps = rule.rows(*found[self.plan.lookup])
            for k, ids in enumerate(every):
                columns = slice(at.start + k, at.stop, streamed.sequences)
                for strip in kept:
                    own = strip.traced
                    h, residual = own.h[strip.tokens], own.residual_at(ids)[strip.tokens]
                    F[strip.where.start + strip.cells, columns] += tied_force(h, residual, steps[:, k]).T


def _meet(F: Float[Tensor, "slots B b"], block: Block, E: Outputs, slope: Tensor | None) -> None:
    """Add Σ_t δ_{m,t}·(A ⊙ E_l)(t) of one module, as <A ⊙ δ, E>: the kept cotangents are fewer than the tangents."""
    right = block.of(E).transpose(0, 1)
    if slope is None:
        F.add_(inner(block.values, right).transpose(0, 1))
        return
    A, step = block.of([[slope[None]]])[0], max(1, PIECE // (block.size * block.values.itemsize))
    for k, a in product(range(block.sequences), range(0, block.slots, step)):
        F[a : a + step, k] += inner(block.values[k, a : a + step] * A[k], right[k])


def _add_looked_up(F: Float[Tensor, "slots B b"], block: Block, rule: Lookup, group: Group) -> None:
    """Add what the readout's step of streamed tokens does at the lookups of kept ones that share its weight."""
    assert block.part is not None
    call, _, part = block.part
    every = rule.o_ids[call].view(block.sequences, -1)[:, part[-2]]
    for at, strip, cells, _ in group:
        own = strip.traced
        h = strip.by_cell(own.h[strip.tokens])[cells]
        for k, ids in enumerate(every):
            residual = strip.by_cell(own.residual_at(ids)[strip.tokens])[cells]
            F[:, k, at] += rule.readout_force(h, residual, ids, block.values[k].unflatten(-1, (len(ids), -1)))


def groups(streamed: Iterable[tuple[Strip, Pulls]], size: int) -> Iterator[tuple[slice, Group]]:
    """Chunks of streamed strips in groups: a matrix product of few columns does not run at full speed."""
    group: Group = []
    start = stop = 0
    for strip, pulls in streamed:
        for columns, found in pulls:
            start = start if group else columns.start
            cells = slice(columns.start - strip.where.start, columns.stop - strip.where.start)
            group.append((slice(columns.start - start, columns.stop - start), strip, cells, found))
            stop = columns.stop
            if stop - start >= size:
                whole, group = _joined(group), []
                yield slice(start, stop), whole
    if group:
        yield slice(start, stop), _joined(group)


@torch.no_grad()
def _joined(group: Group) -> Group:
    """The same group with the chunks of one strip as one: what does not depend on the token is then computed once for it."""
    joined: Group = []
    for strip, chunks in groupby(group, key=lambda of: of[1]):
        ats, _, cells, found = zip(*chunks, strict=True)
        whole = Found()
        for name, (calls, _) in found[0].items():
            by_call = zip(*(of[name][1] for of in found), strict=True)
            whole[name] = calls, [[cat(list(x), 0) for x in zip(*call, strict=True)] for call in by_call]
        at, where = (slice(of[0].start, of[-1].stop) for of in (ats, cells))
        joined.append((at, strip, where, whole))
    return joined


def _by_cell(of: OuterProduct, strip: Strip) -> OuterProduct:
    """Of a strip's tokens as of its cells, on the tile's axis where it tells which they are."""
    if of.tokens is None:
        return OuterProduct(strip.by_cell(of.a), strip.by_cell(of.delta))
    return of._replace(tokens=strip.where.start + strip.cells[of.tokens])


def add_outer_products(F: Float[Tensor, "M L"], o: OuterProduct, u: OuterProduct) -> None:
    """Add (a_m·a_l) (δ_m·δ_l) between the tokens of both."""
    (a1, d1), (a2, d2) = ([x.to(F.dtype) for x in (of.a, of.delta)] for of in (o, u))
    if o.tokens is None or u.tokens is None:
        ops.dual_gram(a1, a2, d1, d2, out=F)
    elif len(o.tokens) and len(u.tokens):
        block = ops.dual_gram(a1, a2, d1, d2)
        F.index_add_(0, o.tokens, F.new_zeros(len(o.tokens), F.shape[1]).index_add_(1, u.tokens, block))


def inner(left: Float[Tensor, "... m K"], right: Float[Tensor, "... b K"]) -> Float[Tensor, "... m b"]:
    """left rightᵀ, in float32 at least."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return left.to(wide) @ right.to(wide).mT
