"""A run sequence by sequence: what its sequences are called, and what the tokens of one do together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

Row = dict[str, Any]
CHUNK = 2**19  # entries of a matrix that are widened to float64 at a time: 4 MB, which stay in a core's cache


def sequence_names(sequences: Iterable[tuple[str | None, int | None]]) -> list[str]:
    """What the sequences of one side are called, in their order: role and group, counted from 1, as in "chosen 1".

    A sequence that shares both with an earlier one is numbered, as in "response 1 #2".

    Args:
        sequences: (role, group) of each. Without a role it is a "response", without a group its place in the list counts.
    """
    names, seen = [], Counter[str]()
    for index, (role, group) in enumerate(sequences):
        name = f"{role or 'response'} {(index if group is None else group) + 1}"
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return names


def block_sums(
    matrix: Float[Tensor, "M L"], observed: Int[Tensor, " M"], updated: Int[Tensor, " L"]
) -> Float[Tensor, "sequences_o sequences_u"]:
    """Sum of a matrix over each pair of an observed and an updated sequence, in float64; NaN where an entry of it is NaN.

    Args:
        matrix: F [M, L].
        observed, updated: number of the sequence that each row and each column belongs to, from 0, none left out.

    Cost: reads the matrix once. Memory: [sequences, L] in float64 and CHUNK entries.
    """
    M, L = matrix.shape
    observed, updated = observed.to(matrix.device), updated.to(matrix.device)
    rows, columns = (int(of.max()) + 1 if len(of) else 0 for of in (observed, updated))
    of_rows = torch.zeros(rows, L, dtype=torch.float64, device=matrix.device)
    height = max(1, CHUNK // max(1, L))
    for own, part in zip(observed.split(height), matrix.split(height), strict=True) if M else ():
        of_rows.index_add_(0, own, part.double())
    sums = torch.zeros(columns, rows, dtype=torch.float64, device=matrix.device)
    return sums.index_add_(0, updated, of_rows.T.contiguous()).T


@dataclass(frozen=True)
class BySequence:
    """The token table and the matrix of a run, with sums over sequences by name.

    Attributes:
        updated, observed: the rows of the token table, in the order of the matrix axes.
        matrix: F [M, L]; None where it was not asked for or is not complete.
        names: (side, sequence) -> name.
    """

    updated: list[Row]
    observed: list[Row]
    matrix: Float[Tensor, "M L"] | None
    names: dict[tuple[str, int], str]

    @classmethod
    def of(cls, tokens: Any, matrix: Tensor | None) -> BySequence:
        """Read a run's token table (pyarrow) and matrix [M, L]."""
        rows = tokens.to_pylist()
        sides = {side: [row for row in rows if row["side"] == side] for side in ("updated", "observed")}
        names: dict[tuple[str, int], str] = {}
        for side, of_side in sides.items():
            first: dict[int, Row] = {}
            for row in of_side:
                first.setdefault(row["sequence"], row)
            named = sequence_names((row["role"], row["group"]) for row in first.values())
            names |= {(side, sequence): name for sequence, name in zip(first, named, strict=True)}
        complete = matrix is not None and not bool(matrix.isnan().any())
        return cls(sides["updated"], sides["observed"], matrix if complete else None, names)

    def name(self, row: Row) -> str:
        """What the sequence of a token is called."""
        return self.names[row["side"], row["sequence"]]

    def place(self, row: Row) -> str:
        """Where a token stands: "chosen 1 @14", its position in the whole sequence, prompt included, from 0."""
        return f"{self.name(row)} @{row['position']}"

    def rows_of(self, side: str, what: int | str) -> list[int]:
        """The tokens that words name: a row, a place ("chosen 1 @14", as `place` writes it), an answer ("chosen 1") or a role.

        Raises:
            ValueError: none is called so, and what the answers are called; a row out of range.
        """
        rows, letter = (self.observed, "M") if side == "observed" else (self.updated, "L")
        if isinstance(what, int) or what.isdecimal():
            if not 0 <= int(what) < len(rows):
                raise ValueError(f"{letter} must lie in [0, {len(rows)}), got {what}")
            return [int(what)]
        name, at, position = what.partition("@")
        found = [
            row["row"]
            for row in rows
            if name.strip() in (self.name(row), row["role"] or "response") and position.strip() in ("", str(row["position"]))
        ]
        if not found:
            names = ", ".join(repr(name) for name in dict.fromkeys(map(self.name, rows)))
            raise ValueError(
                f"no {side} token is called {what!r}: give a place as in {self.place(rows[0])!r}, an answer ({names}), a "
                "role as in 'chosen', or a row of the token table"
            )
        return found

    def changes(self) -> dict[str, dict[str, float]]:
        """Predicted and actual change of each observed sequence, the sum over its tokens in nats, and how many they are."""
        sums: dict[str, dict[str, float]] = {}
        for row in self.observed:
            entry = sums.setdefault(self.name(row), dict(predicted=0.0, actual=0.0, tokens=0))
            entry["predicted"] += row["predicted"]
            entry["actual"] += row["actual"]
            entry["tokens"] += 1
        return sums

    def forces(self) -> dict[str, dict[str, float]]:
        """Force on each observed sequence of each updated one, summed over the tokens of both, nats per unit learning rate.

        Raises:
            ValueError: the matrix is not there or not complete.
        """
        if self.matrix is None:
            raise ValueError("the run has no complete force matrix")
        (rows, of_row), (columns, of_column) = self.numbered(self.observed), self.numbered(self.updated)
        sums = block_sums(self.matrix, of_row, of_column).tolist()
        return {row: dict(zip(columns, values, strict=True)) for row, values in zip(rows, sums, strict=True)}

    def numbered(self, rows: list[Row]) -> tuple[list[str], Tensor]:
        """The names of a side's sequences, and the number of each token's sequence among them."""
        number: dict[str, int] = {}
        numbers = [number.setdefault(self.name(row), len(number)) for row in rows]
        return list(number), torch.tensor(numbers, dtype=torch.long)
