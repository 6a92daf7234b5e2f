"""What is kept of a segment for the tokens of one batch: their directions, or their cotangents where those are less work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from ...model.calls import Call
from ..errors import Unsupported
from ..modules.base import Outputs, cat
from .buffer import ScratchBuffer
from .segments import DIFFERENT_MODULES
from .strips import Found, Strip
from .traced import require_beginning


@dataclass(frozen=True)
class Block:
    """One buffer of a module for a batch's cells from `first` on: their directions, or their cotangents at a part of an output.

    Attributes:
        first: the first cell on the tile's axis.
        slots, sequences: a cell is one of each.
        size: numbers of a cell.
        part: which call, which of its outputs, which part of it the cotangents are of; None for directions.
        values: the numbers, [slots · sequences, size] of directions, [sequences, slots, size] of cotangents.
    """

    first: int
    slots: int
    sequences: int
    size: int
    part: tuple[int, int, tuple[slice, ...]] | None = None
    values: Tensor = torch.empty(0)

    @property
    def shape(self) -> tuple[int, int]:
        """Cells, numbers of each."""
        return self.slots * self.sequences, self.size

    @property
    def where(self) -> slice:
        """Its cells on the tile's axis."""
        return slice(self.first, self.first + self.slots * self.sequences)

    def of(self, outputs: Outputs) -> Float[Tensor, "b B size"]:
        """The part of a module's outputs [b, *output] that the block is about, by sequence."""
        assert self.part is not None
        call, output, part = self.part
        found = outputs[call][output][(slice(None), *part)]
        return found.flatten(2) if self.sequences > 1 else found.flatten(1)[:, None]

    def rows(self, F: Float[Tensor, "M b"]) -> Float[Tensor, "slots B b"]:
        """Its rows of a matrix."""
        return F[self.where].view(self.slots, self.sequences, -1)

    def with_values(self, values: Float[Tensor, "C size"]) -> Block:
        """The same block with memory for its numbers."""
        return replace(self, values=values if self.part is None else values.view(self.sequences, self.slots, self.size))

    def cotangents(self, where: slice) -> Tensor:
        """Those of some cells, [b, *part]."""
        assert self.part is not None
        start, stop = ((at - self.first) // self.sequences for at in (where.start, where.stop))
        found, shape = self.values[:, start:stop].transpose(0, 1), [of.stop - of.start for of in self.part[2]]
        return found.unflatten(-1, shape[1:]) if self.sequences > 1 else found[:, 0].unflatten(-1, shape)

    def cells(self, where: slice) -> Float[Tensor, "c size"]:
        """The directions of some cells."""
        return self.values[where.start - self.first : where.stop - self.first]

    def write(self, where: slice, values: Float[Tensor, "b B size"]) -> None:
        """Put a chunk's cotangents into its cells."""
        start, stop = where.start - self.first, where.stop - self.first
        self.values[:, start // self.sequences : stop // self.sequences] = values.transpose(0, 1)


Kept = dict[str, list[Block]]  # by module
CallsOf = dict[str, list[Call]]  # by module


def parts_that_fit(kept: list[Strip], depth: int, memory: int, narrow: float) -> Iterator[list[list[Strip]]]:
    """Kept strips, by batch, in parts whose share of a segment fits in memory (one strip at least)."""
    part: list[list[Strip]] = []
    left = memory
    for strip in kept:
        rules, item, size = strip.traced.rules, strip.traced.dtype.itemsize, 0
        cells, slots = strip.where.stop - strip.where.start, strip.slots.stop - strip.slots.start
        for name, outputs in strip.shapes(depth):
            if name not in rules:
                raise Unsupported(DIFFERENT_MODULES)
            if rules[name].prefers_direction(narrow):
                size += cells * item * rules[name].size
            else:
                size += slots * item * sum(x.numel() for x in outputs)
        if part and size > left:
            yield part
            part, left = [], memory
        left -= size
        if part and part[-1][0].traced is strip.traced:
            part[-1].append(strip)
        else:
            part.append([strip])
    yield part


def layout(strips: list[Strip], depth: int, narrow: float) -> Kept:
    """What is to be kept of a segment's modules for the strips of one batch, still without values."""
    rules = strips[0].traced.rules
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
        if rules[name].prefers_direction(narrow):
            kept[name] = [_block(strips, 0, rules[name].size)]
            continue
        kept[name] = []
        for c, i in enumerate(inside):
            for k in range(len(shapes[0][i][1])):
                before = None
                for n, shape in enumerate(shapes):
                    for part in _new_positions(before, shape[i][1][k]):
                        size = prod(x.stop - x.start for x in part)
                        kept[name].append(_block(strips, n, size // strips[0].sequences, (c, k, part)))
                    before = shape[i][1][k]
    return kept


def _block(strips: list[Strip], n: int, size: int, part: tuple[int, int, tuple[slice, ...]] | None = None) -> Block:
    """A block for the cells of a batch's strips from the n-th on."""
    return Block(strips[n].where.start, strips[-1].slots.stop - strips[n].slots.start, strips[n].sequences, size, part)


def reserve(layouts: list[Kept], buffer: ScratchBuffer, dtype: torch.dtype) -> list[Kept]:
    """The same layouts with memory for the values."""
    arrays = buffer.arrays([block.shape for kept in layouts for blocks in kept.values() for block in blocks], dtype)
    return [{name: [block.with_values(next(arrays)) for block in blocks] for name, blocks in kept.items()} for kept in layouts]


@torch.no_grad()
def pull_into(strips: list[Strip], depth: int, kept: Kept) -> dict[Strip, CallsOf]:
    """Pull the kept tokens of one batch through a segment and write what is to be kept; returns the modules' calls."""
    seen: dict[Strip, CallsOf] = {strip: {} for strip in strips}  # empty where nothing of the segment moves
    for strip in strips:
        require_same_prefix(strip, depth)
        for where, found in strip.pull(depth):
            for name, (calls, delta) in found.items():
                seen[strip][name] = calls
                rule = strip.traced.rules[name]
                for block in kept[name]:
                    if block.part is None:
                        rule.direction_into(calls, delta, block.cells(where))
                    elif block.first <= where.start:
                        block.write(where, block.of(delta))
    return seen


def recalled(strip: Strip, kept: Kept, calls: CallsOf, chunk: int) -> Iterator[tuple[slice, Found]]:
    """What `Strip.pull` gives, from what was kept of it: the cotangents at the modules of which those were kept."""
    step = max(1, chunk // strip.sequences) * strip.sequences
    for start in range(strip.where.start, strip.where.stop, step):
        where, found = slice(start, min(start + step, strip.where.stop)), Found()
        for name, blocks in kept.items():
            if blocks[0].part is None:
                continue
            pieces: dict[tuple[int, int], list[Block]] = {}
            for block in blocks:
                if block.part is not None and block.first <= start:
                    pieces.setdefault(block.part[:2], []).append(block)
            delta: Outputs = [[] for _ in calls[name]]
            for (call, _), parts in sorted(pieces.items(), key=lambda of: of[0]):
                delta[call].append(cat([block.cotangents(where) for block in parts], _growing([x.part for x in parts])))
            found[name] = calls[name], delta
        yield where, found


def _growing(parts: list) -> int:
    """The axis of [b, *output] along which the later parts of an output lie behind the earlier ones."""
    return next((i + 1 for _, _, part in parts[1:] for i, of in enumerate(part) if of.start > 0), 1)


def require_same_prefix(strip: Strip, depth: int) -> None:
    """Raise unless the truncated sequence gives the same module outputs as the prefix of the whole one.

    Tangents are made on the whole sequence, a strip's cotangents on the truncated one.

    Raises:
        Unsupported: they do not (the rows of a module may be in another order).
    """
    if strip.batch.ids.shape == strip.traced.batch.ids.shape:
        return
    whole: dict[str, Iterator[Tensor]] = {}
    for call, _ in strip.segment(depth).inside:
        if call.name not in whole:
            whole[call.name] = iter([x for of in strip.traced.calls if of.name == call.name for x in of.outputs])
        for x in call.outputs:
            begin = next(whole[call.name], x.new_empty(0))
            require_beginning(call.name, begin, x, "the beginning of a sequence than for all of it")


def _new_positions(before: torch.Size | None, shape: torch.Size) -> list[tuple[slice, ...]]:
    """Slices of an output that the longer sequence adds to the shorter one's; the whole output if there is none."""
    if before is None:
        return [tuple(slice(0, n) for n in shape)]
    longer = [i for i, (a, b) in enumerate(zip(before, shape, strict=True)) if a != b]
    if len(longer) > 1:
        raise Unsupported(f"an output of shape {list(before)} becomes {list(shape)} for a longer sequence")
    return [tuple(slice(before[i] if i in longer else 0, n) for i, n in enumerate(shape))] if longer else []
