"""What a scan will take on this machine: one block is done and timed, the rest is arithmetic (docs/scale.md)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._rows import source
from ..exact.memory import pass_bytes
from ..exact.scanning import Row, directions_at_once, packed
from ..objective import Objective
from ..objectives import DPO
from ..prediction import duration
from ..sequences import Chi
from .scanner import Scanner, opened


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a scan, predicted.

    Attributes:
        rows: of the data, None where that is not known; `sample` of them were done.
        sample, positions: rows that were timed, and their positions without padding.
        setup: seconds that were spent before the first row: checks of the model, one backward pass a group.
        each: seconds a row.
        memory: bytes by what holds them: the model's parameters, the groups' directions, what a step under an optimizer
            doubles, and at most the logits and tangents of a batch.
    """

    rows: int | None
    sample: int
    positions: int
    setup: float
    each: float
    memory: dict[str, int]

    @property
    def seconds(self) -> float | None:
        """Setup and all rows, by one process."""
        return None if self.rows is None else self.setup + self.rows * self.each

    def lines(self) -> list[str]:
        """The estimate in words."""
        total = sum(self.memory.values())
        parts = ", ".join(f"{what} {amount / 2**20:,.0f} MiB" for what, amount in self.memory.items())
        found = [f"{self.each:.3g} s a row, setup {self.setup:.3g} s ({self.sample} rows, {self.positions:,} positions timed)"]
        if self.seconds is not None:
            found.append(f"{self.rows:,} rows: {duration(self.seconds)} by one process; of n, each takes an n-th of the rows")
        return [*found, f"Memory {total / 2**20:,.0f} MiB beside what Python and its libraries take: {parts}"]


def estimate(
    model: nn.Module,
    rows: Any,
    observe: Mapping[str, Sequence[Chi]] | Sequence[Chi],
    objective: Objective = DPO(),  # noqa: B008
    *,
    sample: int = 16,
    limit: int | None = None,
    **options: Any,
) -> Estimate:
    """Time and memory that td.scan of the same arguments will take, by doing its first rows.

    Args:
        model, rows, observe, objective, limit: as in `scan`.
        sample: how many rows are done.
        options: of `scan`: tokenizer, scope, optimizer, step_rows, reference, memory, observable, by, max_length, truncate.

    Raises:
        ValueError: as `scan`; none of the sampled rows can be used.
    """
    groups = dict(observe) if isinstance(observe, Mapping) else {"observed": observe}
    table = source(rows, limit)
    begun = time.perf_counter()
    with opened(model, groups, objective, **options) as of_rows:
        setup = time.perf_counter() - begun
        places = table.read(0, sample)
        usable = [row for row, _ in (of_rows.encoded(where, raw) for where, raw in places) if row is not None]
        if not usable:
            raise ValueError(f"none of the first {len(places)} rows can be used: {of_rows.encoded(*places[0])[1]['problem']}")
        begun = time.perf_counter()
        of_rows.tables(places)
        each = (time.perf_counter() - begun) / len(places)
        positions = sum(chi.ids.numel() for row in usable for chi in row.chis)
        return Estimate(table.size, len(places), positions, setup, each, _memory(of_rows, usable))


def _memory(of_rows: Scanner, rows: Sequence[Row]) -> dict[str, int]:
    """Bytes by what holds them."""
    pulled, tracer = of_rows.pulled, of_rows.pulled.tracer
    own = {name: tracer.params[name] for name, owner in tracer.owner.items() if name == owner}
    directions = _bytes(pulled.directions)
    batches = packed(tracer, rows, of_rows.objective).batches
    G = len(pulled.names)
    each = (pass_bytes(tracer, batch, directions_at_once(tracer, batch, G, of_rows.memory)) for batch in batches)
    found = {"parameters": _bytes(own), "directions": directions}
    if of_rows.optimizer is not None:
        found["the step's directions and its P"] = directions + _bytes(own)
    return found | {"logits and tangents": max(each)}


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors.values())
