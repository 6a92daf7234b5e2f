"""What is kept of a segment for tokens of one sequence: their directions, or their cotangents where those are smaller."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from ...model.calls import Call
from ..errors import Unsupported
from ..modules.base import Outputs, Rule
from ..products import Direction
from .buffer import ScratchBuffer
from .segments import DIFFERENT_MODULES
from .strips import Strip


@dataclass(frozen=True)
class Block:
    """One buffer [tokens, elements] of a module for the tile's tokens from `first` on: directions, or cotangents of a slice.

    Attributes:
        first: the first token on the tile's axis.
        shape: tokens, numbers of each.
        part: which call, which of its outputs, which part of it the cotangents are of; None for directions.
        values: the numbers.
    """

    first: int
    shape: tuple[int, int]
    part: tuple[int, int, tuple[slice, ...]] | None = None
    values: Tensor = torch.empty(0)

    @property
    def where(self) -> slice:
        """Its tokens on the tile's axis."""
        return slice(self.first, self.first + self.shape[0])

    def of(self, outputs: Outputs) -> Tensor:
        """The part of a module's outputs that the block is about, [b, *part]."""
        assert self.part is not None
        call, output, part = self.part
        return outputs[call][output][(slice(None), *part)]


Kept = dict[str, list[Block]]  # by module


def parts_that_fit(kept: list[Strip], depth: int, memory: int) -> Iterator[list[list[Strip]]]:
    """Kept strips, by sequence, in parts whose share of a segment fits in memory (one strip at least)."""
    part: list[list[Strip]] = []
    left = memory
    for strip in kept:
        rules, item = strip.traced.rules, strip.traced.dtype.itemsize
        size = 0
        for name, outputs in strip.shapes(depth):
            if name not in rules:
                raise Unsupported(DIFFERENT_MODULES)
            rule, values = rules[name], sum(x.numel() for x in outputs)
            size += len(strip.positions) * item * (rule.size if rule.prefers_direction(strip.half) else values)
        if part and size > left:
            yield part
            part, left = [], memory
        left -= size
        if part and part[-1][0].traced is strip.traced:
            part[-1].append(strip)
        else:
            part.append([strip])
    yield part


def layout(strips: list[Strip], depth: int) -> Kept:
    """What is to be kept of a segment's modules for the strips of one sequence, still without values."""
    first, last, rules = strips[0].where.start, strips[-1].where.stop, strips[0].traced.rules
    shapes = [strip.shapes(depth) for strip in strips]
    if any([name for name, _ in of] != [name for name, _ in shapes[0]] for of in shapes):
        raise Unsupported(DIFFERENT_MODULES)
    calls_of: dict[str, list[int]] = {}
    for i, (name, _) in enumerate(shapes[0]):
        calls_of.setdefault(name, []).append(i)
    kept: Kept = {}
    for name, inside in calls_of.items():
        if len(rules[name].shapes) != len(inside):
            raise Unsupported(DIFFERENT_MODULES)
        if rules[name].prefers_direction(strips[0].half):
            kept[name] = [Block(first, (last - first, rules[name].size))]
            continue
        blocks = []
        for c, i in enumerate(inside):
            for k in range(len(shapes[0][i][1])):
                before = None
                for strip, shape in zip(strips, shapes, strict=True):
                    for part in _new_positions(before, shape[i][1][k]):
                        size = prod(x.stop - x.start for x in part)
                        blocks.append(Block(strip.where.start, (last - strip.where.start, size), (c, k, part)))
                    before = shape[i][1][k]
        kept[name] = blocks
    return kept


def reserve(layouts: list[Kept], buffer: ScratchBuffer, dtype: torch.dtype) -> list[Kept]:
    """The same layouts with memory for the values."""
    arrays = buffer.arrays([block.shape for kept in layouts for blocks in kept.values() for block in blocks], dtype)
    return [
        {name: [replace(block, values=next(arrays)) for block in blocks] for name, blocks in kept.items()} for kept in layouts
    ]


@torch.no_grad()
def pull_into(strips: list[Strip], depth: int, kept: Kept) -> None:
    """Pull the kept tokens of one sequence through a segment and write what is to be kept."""
    for strip in strips:
        require_same_prefix(strip, depth)
        for where, found in strip.pull(depth):
            for name, (calls, delta) in found.items():
                _write(kept[name], strip.traced.rules[name], calls, delta, where)


def require_same_prefix(strip: Strip, depth: int) -> None:
    """Raise unless the truncated sequence gives the same module outputs as the prefix of the whole one.

    Tangents are made on the whole sequence, a strip's cotangents on the truncated one.

    Raises:
        Unsupported: they do not (the rows of a module may be in another order).
    """
    if strip.batch.ids.shape == strip.traced.batch.ids.shape:
        return
    near = max(1e-3, torch.finfo(strip.traced.dtype).eps ** 0.5)
    whole: dict[str, Iterator[Tensor]] = {}
    for call, _ in strip.segment(depth).inside:
        if call.name not in whole:
            whole[call.name] = iter([x for of in strip.traced.calls if of.name == call.name for x in of.outputs])
        for x in call.outputs:
            begin = next(whole[call.name], x.new_empty(0))
            begin = begin[tuple(slice(0, n) for n in x.shape)] if begin.dim() == x.dim() else begin
            if begin.shape != x.shape or not bool((begin - x).norm() <= near * x.norm()):
                raise Unsupported(f"{call.name} returns something else for the beginning of a sequence than for all of it")


def _write(blocks: list[Block], rule: Rule, calls: list[Call], delta: Outputs, where: slice) -> None:
    """Put a chunk's directions, or its cotangents, where they are kept."""
    for block in blocks:
        if block.first <= where.start:
            rows = block.values[where.start - block.first : where.stop - block.first]
            if block.part is None:
                flatten(rule.direction(calls, delta), rows)
            else:
                found = block.of(delta)
                rows.view(found.shape).copy_(found)


def flatten(direction: Direction, out: Float[Tensor, "n K"]) -> None:
    """The numbers of a batch of directions, parameters side by side in alphabetic order, into out."""
    torch.cat([direction[name].flatten(1) for name in sorted(direction)], 1, out=out)


def _new_positions(before: torch.Size | None, shape: torch.Size) -> list[tuple[slice, ...]]:
    """Slices of an output that the longer sequence adds to the shorter one's; the whole output if there is none."""
    if before is None:
        return [tuple(slice(0, n) for n in shape)]
    longer = [i for i, (a, b) in enumerate(zip(before, shape, strict=True)) if a != b]
    if len(longer) > 1:
        raise Unsupported(f"an output of shape {list(before)} becomes {list(shape)} for a longer sequence")
    return [tuple(slice(before[i] if i in longer else 0, n) for i, n in enumerate(shape))] if longer else []
