"""One tile of the sweep: kept by streamed tokens, pulled back together from the readout down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ... import ops
from ..modules.base import Rule
from ..modules.lookup import Lookup, tied_force
from ..products import preconditioned
from ..progress import Progress
from .buffer import ScratchBuffer
from .kept import Kept, flatten, layout, parts_that_fit, pull_into, reserve
from .plan import Plan, Rules
from .strips import Budget, Found, Strip

STEPS = 1000  # of a tile, in which its progress is told

Group = list[tuple[slice, Strip, slice, Found]]  # chunks of streamed tokens: place in the group, strip, place in its sequence


@dataclass(eq=False)
class Tile:
    """The backbone's part of F for the tokens of two lists of strips. `fill` consumes their cotangents: a tile runs once.

    Attributes:
        plan: what moves.
        kept: the side of which a segment's directions or cotangents stay in memory; their sequences carry the rules.
        streamed: the side that passes by in groups.
        budget: how much at a time.
        progress: hears how much of the tile is done.
    """

    plan: Plan
    kept: list[Strip]
    streamed: list[Strip]
    budget: Budget
    progress: Progress | None

    def __post_init__(self) -> None:
        like = self.kept[0].traced.cotangent
        self.F = like.new_zeros(self.kept[-1].where.stop, self.streamed[-1].where.stop)
        self._kept_memory, self._scratch = ScratchBuffer(like.device), ScratchBuffer(like.device)

    def fill(self) -> Float[Tensor, "M L"]:
        """All segments, from the readout down."""
        both, depths = [*self.kept, *self.streamed], len(self.kept[0].cuts)
        rules = self.kept[-1].traced.rules
        aligned = aligned_depths(max(both, key=lambda strip: strip.batch.ids.shape[1]), rules)
        for depth in range(aligned):
            self._add_aligned(rules, depth)
        for strip in both:
            strip.spread(self.budget.chunk)
        for depth in range(aligned, depths):
            self._add_segment(depth, depths)
        return self.F

    def _add_segment(self, depth: int, depths: int) -> None:
        """Add one segment's share Σ_modules <Ẇ_m, P Ẇ_l> to F, the kept side in as many parts as the budget's bytes require."""
        parts = list(parts_that_fit(self.kept, depth, self.budget.kept))
        for part in parts:
            reserved = reserve([layout(strips, depth) for strips in part], self._kept_memory, self.kept[0].traced.dtype)
            sequences = list(zip(part, reserved, strict=True))
            for strips, kept in sequences:
                pull_into(strips, depth, kept)
            for columns, group in groups(self.streamed, depth, self.budget.group, last=part is parts[-1]):
                for strips, kept in sequences:
                    rules = strips[0].traced.rules
                    self._add_inner_products(self.F[:, columns], kept, rules, group)
                    tied = self.plan.tied_lookup(rules)
                    if tied is not None and self.plan.lookup in kept:
                        self._add_tied(self.F[:, columns], strips, tied, group)
                if self.progress:
                    self.progress(int(STEPS * (depth + columns.stop / self.F.shape[1]) / depths), STEPS)
                del group  # before the next one is pulled
            del sequences, reserved, kept

    @torch.no_grad()
    def _add_aligned(self, rules: Rules, depth: int) -> None:
        """Add the share of a segment in which every token's cotangent is at its own position: (a_m·a_l) (δ_m·δ_l).

        Rules of one sequence serve all: outer products read no call but the one they are given. `aligned_depths` has ruled out
        modules called twice and outputs of another form than [b, 1, T, q].
        """
        sides: list[dict[str, list]] = []
        for strips, is_streamed in ((self.kept, False), (self.streamed, True)):
            products: dict[str, list] = {}
            for strip in strips:
                for name, (calls, delta) in strip.pull_aligned(depth).items():
                    found = rules[name].outer_products(calls[0], delta[0][0][0, 0], strip.positions, is_streamed)
                    products.setdefault(name, []).append(found)
            sides.append(products)
        for name, left in sides[0].items():
            for o, u in zip(zip(*left, strict=True), zip(*sides[1][name], strict=True), strict=True):
                (a1, d1), (a2, d2) = ([torch.cat(x).to(self.F.dtype) for x in zip(*side, strict=True)] for side in (o, u))
                ops.dual_gram(a1, a2, d1, d2, out=self.F)

    @torch.no_grad()
    def _add_inner_products(self, F: Float[Tensor, "M b"], kept: Kept, rules: Rules, group: Group) -> None:
        """Add a segment's share between the kept tokens of one sequence and a group of streamed ones."""
        for name, blocks in kept.items():
            rule = rules[name]
            if blocks[0].part is None:
                right = self._directions(name, rule, group, F.shape[1], blocks[0].values.dtype)
                F[blocks[0].where] += inner(blocks[0].values, right)
                continue
            E = self._tangents(name, rule, group, F.shape[1], blocks[0].values.dtype)
            for block in blocks:
                F[block.where] += inner(block.values, block.of(E).flatten(1))

    def _directions(self, name: str, rule: Rule, group: Group, columns: int, dtype: torch.dtype) -> Float[Tensor, "b K"]:
        """P Ẇ of a group's tokens, flat."""
        (right,) = self._scratch.arrays([(columns, rule.size)], dtype)
        for at, _, _, found in group:
            if name in found:
                flatten(preconditioned(rule.direction(*found[name]), self.plan.P.get(name)), right[at])
            else:
                right[at] = 0
        return right

    def _tangents(self, name: str, rule: Rule, group: Group, columns: int, dtype: torch.dtype) -> list[list[Tensor]]:
        """E of a group's tokens at each output of each observed call."""
        flat = self._scratch.arrays([(columns, shape.numel()) for call in rule.shapes for shape in call], dtype)
        E = [[next(flat).view(-1, *shape) for shape in call] for call in rule.shapes]
        for at, _, _, found in group:
            outs = [[e[at] for e in call] for call in E]
            if name in found:
                rule.tangent_into(*found[name], outs)
            else:
                for e in (e for call in outs for e in call):
                    e.zero_()
        tied = self.plan.tied_lookup({name: rule}) if name == self.plan.lookup else None
        if tied is not None:
            for at, strip, rows, _ in group:
                for ids, (e,) in zip(tied.o_ids, E, strict=True):
                    own = strip.traced
                    e[at] += tied.looked_up(own.residual_at(ids)[rows], own.h[rows], ids).view_as(e[at])
        return E

    @torch.no_grad()
    def _add_tied(self, F: Float[Tensor, "M b"], kept: list[Strip], rule: Lookup, group: Group) -> None:
        """Add what the lookup of streamed tokens does where the same tensor is the readout of kept ones."""
        assert self.plan.lookup is not None
        for at, _, _, found in group:
            ids, d = rule.rows(*found[self.plan.lookup])
            for strip in kept:
                own = strip.traced
                F[strip.where, at] += tied_force(own.h[strip.rows], own.residual_at(ids)[strip.rows], d).T


def groups(streamed: list[Strip], depth: int, size: int, last: bool) -> Iterator[tuple[slice, Group]]:
    """Pull streamed tokens through a segment, in groups: a matrix product of few columns does not run at full speed."""
    group: Group = []
    start = stop = 0
    for strip in streamed:
        for columns, found in strip.pull(depth, last):
            start = start if group else columns.start
            shift = strip.rows.start - strip.where.start
            rows = slice(columns.start + shift, columns.stop + shift)
            group.append((slice(columns.start - start, columns.stop - start), strip, rows, found))
            stop = columns.stop
            if stop - start >= size:
                yield slice(start, stop), group
                group = []
    if group:
        yield slice(start, stop), group


@torch.no_grad()
def aligned_depths(strip: Strip, rules: Rules) -> int:
    """How many segments from the readout down leave a cotangent at its own position, seen on random ones at three positions.

    The strip is the longest there is: in a sequence of one token there is nowhere else to go.
    """
    whole, positions = strip.aligned, strip.positions
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
        if len(set(names)) < len(names) or not all(name in rules and rules[name].has_outer_products for name in names):
            return depth
        if not cotangent.numel():
            return depth
        if any(x.dim() != 4 or x.shape[1:3] != (1, elsewhere.shape[1]) or bool(x[:, 0][elsewhere].any()) for x in seen):
            return depth
    return len(strip.cuts)


def inner(left: Float[Tensor, "m K"], right: Float[Tensor, "b K"]) -> Float[Tensor, "m b"]:
    """left rightᵀ, in float32 at least."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return left.to(wide) @ right.to(wide).T
