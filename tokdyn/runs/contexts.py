"""The columns of a run's matrix net of what cancels: update tokens behind the same ids add up.

The matrix on disk is by token. Which tokens share a context is the column `context` of the token table; a run that was
written without it has it derived from the texts of the prompts and the token ids.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..sequences import visible
from .by_sequence import CHUNK, BySequence, Row, block_sums

NAMED = 3  # sequences of a context that are named one by one


def context_keys(rows: Iterable[Row], sequences: Iterable[Mapping[str, Any]]) -> list[int]:
    """The context of each row of a token table, one numbering for both sides: its column `context`, or derived.

    Derived, tokens share a context where the prompt's text, the position and the scored tokens before it are the same. A token
    behind a gap in the scored ones, or of a sequence without a recorded prompt, has a context of its own text.

    Args:
        rows: with side, sequence, position and token_id; in order of position within a sequence.
        sequences: those of run.json, with side, sequence, prompt and response.
    """
    texts = {(item.get("side"), item.get("sequence")): item for item in sequences}
    number = dict[Any, int]()
    before, found = dict[Any, Any](), list[int]()
    for row in rows:
        if row.get("context") is not None:
            found.append(row["context"])
            continue
        place = row["side"], row["sequence"]
        position: Any = row.get("position")
        text = texts.get(place, {})
        known = bool(text.get("prompt")) and position is not None and row.get("token_id") is not None
        if not known:
            key: Any = (*place, len(found))
        elif place not in before:
            key = ("first", text["prompt"], position)
        elif before[place][1] + 1 == position:
            key = ("next", before[place][0], before[place][2])
        else:
            key = ("gap", text["prompt"], text.get("response"), position)
        found.append(number.setdefault(key, len(number)))
        if known:
            before[place] = (found[-1], position, row["token_id"])
    return found


@dataclass(frozen=True)
class Contexts:
    """The update tokens of a run by context, numbered in the order of their first tokens.

    Attributes:
        run: tables and matrix by token.
        members: the update tokens of each context, C lists.
        column: the context of each update token, [L].
        own: the context that an observed token itself stands in, [M]; -1 where no update token does.
    """

    run: BySequence
    members: list[list[int]]
    column: Int[Tensor, " L"]
    own: Int[Tensor, " M"]

    @classmethod
    def of(cls, run: BySequence, sequences: Iterable[Mapping[str, Any]]) -> Contexts:
        """Group a run's update tokens; `sequences` are those of run.json."""
        keys = context_keys([*run.updated, *run.observed], sequences)
        number = dict[int, int]()
        column = [number.setdefault(key, len(number)) for key in keys[: len(run.updated)]]
        members: list[list[int]] = [[] for _ in number]
        for l, x in enumerate(column):  # noqa: E741
            members[x].append(l)
        own = [number.get(key, -1) for key in keys[len(run.updated) :]]
        return cls(run, members, torch.tensor(column, dtype=torch.long), torch.tensor(own, dtype=torch.long))

    @cached_property
    def matrix(self) -> Float[Tensor, "M C"]:
        """Net force of each context on each observed token, summed in float64, nats per unit learning rate.

        Raises:
            ValueError: the matrix is not there or not complete.
        """
        if self.run.matrix is None:
            raise ValueError("the run has no complete force matrix")
        return net(self.run.matrix, self.column, len(self.members))

    @cached_property
    def others(self) -> Float[Tensor, "M C"]:
        """The same without an observed token's own context, whose entry is 0."""
        rows = (self.own >= 0).nonzero().flatten()
        apart = self.matrix.clone()
        apart[rows, self.own[rows]] = 0
        return apart

    @cached_property
    def pushed_down(self) -> Float[Tensor, "M C"]:
        """`others` where tokens of rejected answers alone lower a token of a chosen one; 0 elsewhere."""
        rejecting = [all(self.run.updated[l]["role"] == "rejected" for l in of) for of in self.members]  # noqa: E741
        chosen = [row["role"] == "chosen" for row in self.run.observed]
        asked = torch.tensor(chosen, dtype=torch.bool)[:, None] & torch.tensor(rejecting, dtype=torch.bool)
        return self.others.clamp(max=0).where(asked, 0.0)

    @cached_property
    def alike_joined(self) -> Contexts:
        """The contexts with those joined in which the two answers of a pair say alike, place by place (`alike`).

        Behind the token in which they first differ their contexts do too, but c is opposite and the Jacobians are near: what
        one does, the other mostly takes back. The sum is what both do.
        """
        new = torch.tensor(join_alike(self.run.updated, self.column.tolist(), len(self.members)), dtype=torch.long)
        members: list[list[int]] = [[] for _ in range(int(new.max()) + 1 if len(new) else 0)]
        for x, of in enumerate(self.members):
            members[int(new[x])] += of
        own = torch.where(self.own >= 0, new[self.own.clamp(min=0)], self.own) if len(new) else self.own
        return Contexts(self.run, members, new[self.column], own)

    def itself(self, m: int) -> float:
        """Net force of an observed token's own context on it, 0 where no update token stands there."""
        return float(self.matrix[m, self.own[m]]) if self.own[m] >= 0 else 0.0

    def tokens(self, x: int) -> list[str]:
        """The different tokens of a context, in order of appearance."""
        rows = [self.run.updated[l] for l in self.members[x]]  # noqa: E741
        return list({row.get("token_id", row["token"]): row["token"] for row in rows}.values())

    def name(self, x: int) -> str:
        """A context in a sentence: “␣S/␣Can” chosen 1, rejected 1 @14."""
        first = self.run.updated[self.members[x][0]]
        return f"“{'/'.join(map(visible, self.tokens(x)))}” {listed(self.sequences(x))} @{first['position']}"

    def sequences(self, x: int) -> list[str]:
        """The names of the sequences whose tokens stand in a context."""
        return list(dict.fromkeys(self.run.name(self.run.updated[l]) for l in self.members[x]))  # noqa: E741

    @cached_property
    def bands(self) -> dict[str, list[int]]:
        """Contexts by the sequences that they are shared by, in order of appearance: "chosen 1, rejected 1", "chosen 1", ..."""
        found: dict[tuple[str, ...], list[int]] = {}
        for x in range(len(self.members)):
            found.setdefault(tuple(self.sequences(x)), []).append(x)
        names: dict[str, list[int]] = {}
        for sequences, contexts in found.items():
            names.setdefault(listed(sequences), []).extend(contexts)
        return names

    def forces(self) -> dict[str, dict[str, float]]:
        """Net force on each observed sequence of each band of contexts, nats per unit learning rate.

        Raises:
            ValueError: the matrix is not there or not complete.
        """
        band = torch.empty(len(self.members), dtype=torch.long)
        for b, contexts in enumerate(self.bands.values()):
            band[contexts] = b
        names, of_row = self.run.numbered(self.run.observed)
        sums = block_sums(self.matrix, of_row, band).tolist()
        return {name: dict(zip(self.bands, row, strict=True)) for name, row in zip(names, sums, strict=True)}


def join_alike(rows: Iterable[Row], column: Sequence[int], size: int) -> list[int]:
    """A new number for each of `size` contexts: one for all that the two answers of a pair say alike, place by place.

    Args:
        rows: update tokens with group, role, sequence and token_id or token, in order of position within a sequence.
        column: the context of each.
    """
    rows, joined = list(rows), list(range(size))
    for plus, minus in _pairs(rows):
        texts = ([rows[l].get("token_id", rows[l]["token"]) for l in of] for of in (plus, minus))  # noqa: E741
        for a, b in alike(*texts):
            low, high = sorted((joined[column[plus[a]]], joined[column[minus[b]]]))
            joined = joined if low == high else [low if of == high else of for of in joined]
    number = dict[int, int]()
    return [number.setdefault(of, len(number)) for of in joined]


def _pairs(rows: Iterable[Row]) -> list[tuple[list[int], list[int]]]:
    """The update tokens of the chosen and the rejected answer of each pair, in order."""
    found: dict[tuple[Any, Any], dict[Any, list[int]]] = {}
    for l, row in enumerate(rows):  # noqa: E741
        found.setdefault((row.get("group"), row.get("role")), {}).setdefault(row["sequence"], []).append(l)
    return [
        (next(iter(of.values())), next(iter(found[group, "rejected"].values())))
        for (group, role), of in found.items()
        if role == "chosen" and (group, "rejected") in found
    ]


def alike(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Places of two answers that say alike: runs of the same tokens, and what differs between them token for token.

    A run has two tokens at least, unless both answers begin or end with it: single tokens recur in any text. What differs is no
    longer than the runs around it.
    """
    steps = SequenceMatcher(None, a, b, autojunk=False).get_opcodes()

    def run(k: int) -> int:
        kind, i, end, j, stop = steps[k] if 0 <= k < len(steps) else ("", 0, 0, 0, 0)
        outer = i == j == 0 or (end == len(a) and stop == len(b))
        return end - i if kind == "equal" and (end - i > 1 or outer) else 0

    found: list[tuple[int, int]] = []
    for k, (kind, i, end, j, stop) in enumerate(steps):
        if run(k) or (kind == "replace" and end - i == stop - j <= run(k - 1) + run(k + 1)):
            found += zip(range(i, end), range(j, stop), strict=True)
    return found


def net(matrix: Float[Tensor, "M L"], column: Int[Tensor, " L"], C: int) -> Float[Tensor, "M C"]:
    """The columns of a matrix added up by their labels, in float64; NaN where a term is."""
    out = torch.empty(len(matrix), C, dtype=matrix.dtype)
    column = column.to(matrix.device)
    height, start = max(1, CHUNK // max(1, matrix.shape[1])), 0
    for part in matrix.split(height) if len(matrix) else ():
        sums = torch.zeros(len(part), C, dtype=torch.float64, device=matrix.device)
        out[start : start + len(part)] = sums.index_add_(1, column, part.double()).cpu()
        start += len(part)
    return out


def listed(names: Sequence[str]) -> str:
    """Names in a row, the first few of many."""
    return ", ".join(names) if len(names) <= NAMED else f"{', '.join(names[: NAMED - 1])} and {len(names) - NAMED + 1} more"
