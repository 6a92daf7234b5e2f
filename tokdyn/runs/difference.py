"""Two runs beside each other: their tokens aligned, what changed between them, and which pushes changed most."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .by_sequence import BySequence, Row
from .contexts import Contexts, net
from .findings import ROUNDING

MOST = 8  # tokens and pushes that are listed


@dataclass(frozen=True)
class Aligned:
    """A token that both runs have: its rows of the two token tables."""

    a: Row
    b: Row

    def change(self, name: str) -> float | None:
        """b less a of one column, None where either has no number there."""
        x, y = self.a.get(name), self.b.get(name)
        return None if x is None or y is None else float(y) - float(x)


@dataclass(frozen=True, eq=False)
class Difference:
    """What differs between two runs, b less a.

    Attributes:
        settings: (what, in a, in b) of what was asked differently.
        a, b: the runs by sequence.
        observed, updated: the tokens of each side that both have, in the order of a.
        names: of each observed token, the name of its sequence in a.
        missing: scored tokens without a partner, by "a" and "b", of both sides.
        sequences: those of each run.json.
        unit: of every force: "step", nats after each run's own step, or "rate", nats per unit learning rate.
    """

    settings: list[tuple[str, str, str]]
    a: BySequence
    b: BySequence
    observed: list[Aligned]
    updated: list[Aligned]
    names: list[str]
    missing: dict[str, int]
    sequences: tuple[list[dict[str, Any]], ...]
    unit: str

    @classmethod
    def of(cls, a: Any, b: Any, unit: str | None = None) -> Difference:
        """Align two runs (about, tokens, matrix): sequences by role, prompt and group, their tokens by their ids.

        Args:
            unit: "step" (default where both runs know the size of their step) or "rate". The gradients of two losses differ
                in scale, and their steps make up for it; with the same loss on two checkpoints "rate" compares the gradients.

        Raises:
            ValueError: they have no observed token in common; another unit, or "step" where a run took none.
        """
        etas = [run.about["settings"].get("eta") for run in (a, b)]
        unit = unit or ("rate" if None in etas else "step")
        if unit not in ("step", "rate") or (unit == "step" and None in etas):
            raise ValueError(f'unit must be "rate", or "step" where both runs have a step size, got {unit!r} and {etas}')
        scales = etas if unit == "step" else (1.0, 1.0)
        first, second = (_scaled(BySequence.of(run.tokens, run.matrix), eta) for run, eta in zip((a, b), scales, strict=True))
        sides = {
            side: _aligned(getattr(first, side), getattr(second, side), _texts(a, side), _texts(b, side))
            for side in ("observed", "updated")
        }
        if not sides["observed"]:
            raise ValueError("the two runs observe no token in common: profile both with the same data")
        count = {name: len(run.observed) + len(run.updated) for name, run in (("a", first), ("b", second))}
        both = sum(map(len, sides.values()))
        names = [first.name(pair.a) for pair in sides["observed"]]
        missing = {name: n - both for name, n in count.items()}
        return cls(list(_settings(a.about, b.about)), first, second, sides["observed"], sides["updated"], names, missing,
                   tuple(run.about.get("sequences") or [] for run in (a, b)), unit)  # fmt: skip

    def answers(self) -> dict[str, dict[str, float]]:
        """Of each observed answer: tokens in common, log-prob in a and b, Σ F in a and b."""
        sums: dict[str, dict[str, float]] = {}
        for name, pair in zip(self.names, self.observed, strict=True):
            entry = sums.setdefault(name, dict.fromkeys(("tokens", "log_prob_a", "log_prob_b", "force_a", "force_b"), 0.0))
            entry["tokens"] += 1
            for run, row in (("a", pair.a), ("b", pair.b)):
                for column in ("log_prob", "force"):
                    entry[f"{column}_{run}"] += row[column]
        return sums

    def most(self, column: str) -> list[int]:
        """The observed tokens whose column changed most, by more than rounding, numbers into `observed`."""
        changes = [abs(pair.change(column) or 0.0) for pair in self.observed]
        least = ROUNDING * max((abs(row[column] or 0.0) for pair in self.observed for row in (pair.a, pair.b)), default=0.0)
        return sorted((i for i, change in enumerate(changes) if change > least), key=lambda i: -changes[i])[:MOST]

    @cached_property
    def places(self) -> tuple[list[str], list[str], Tensor, Tensor]:
        """Update tokens of both runs by place: its name and tokens, and the place of each token of a [L_a] and of b [L_b].

        A place is a context of a, what both answers of a pair say alike joined; a token of b stands in that of its partner, one
        without in that of its context's other tokens, or in a place of its own.
        """
        of_a, of_b = (Contexts.of(run, texts).alike_joined for run, texts in zip((self.a, self.b), self.sequences, strict=True))
        names = [of_a.name(x) for x in range(len(of_a.members))]
        tokens = ["/".join(of_a.tokens(x)) for x in range(len(of_a.members))]
        place = dict[int, int]()
        for pair in self.updated:
            place.setdefault(int(of_b.column[pair.b["row"]]), int(of_a.column[pair.a["row"]]))
        for x in range(len(of_b.members)):
            if place.setdefault(x, len(names)) == len(names):
                names.append(of_b.name(x))
                tokens.append("/".join(of_b.tokens(x)))
        b = [place[x] for x in of_b.column.tolist()]
        for pair in self.updated:
            b[pair.b["row"]] = int(of_a.column[pair.a["row"]])
        return names, tokens, of_a.column, torch.tensor(b, dtype=torch.long)

    @cached_property
    def matrix(self) -> Float[Tensor, "m places"] | None:
        """Net force of each place in b less that in a, on the observed tokens of both: 0 in a run that does not train it.

        None unless both matrices are there and complete.
        """
        if self.a.matrix is None or self.b.matrix is None:
            return None
        names, _, *columns = self.places
        rows = ([getattr(pair, side)["row"] for pair in self.observed] for side in "ab")
        a, b = (
            net(matrix[of], column, len(names))
            for matrix, of, column in zip((self.a.matrix, self.b.matrix), rows, columns, strict=True)
        )
        return b - a

    def pushes(self) -> list[tuple[int, str, float]]:
        """The net pushes that changed most, by more than rounding: (number of the observed token, which place, b - a)."""
        if self.matrix is None or self.a.matrix is None or self.b.matrix is None:
            return []
        least = ROUNDING * max(float(matrix.abs().max()) for matrix in (self.a.matrix, self.b.matrix))
        order = self.matrix.abs().flatten().topk(min(MOST, self.matrix.numel())).indices.tolist()
        C = self.matrix.shape[1]
        changes = [(i // C, self.places[0][i % C], float(self.matrix[i // C, i % C])) for i in order]
        return [each for each in changes if abs(each[2]) > least]

    def as_dict(self) -> dict[str, Any]:
        """Everything that is told, for JSON."""
        tokens = [
            {"of": name, "position": pair.a["position"], "token": pair.a["token"],
             **{f"{column}_{run}": row.get(column) for column in ("log_prob", "force", "predicted", "actual")
                for run, row in (("a", pair.a), ("b", pair.b))}}
            for name, pair in zip(self.names, self.observed, strict=True)
        ]  # fmt: skip
        pushes = [{"on": self.a.place(self.observed[m].a), "by": by, "change": change} for m, by, change in self.pushes()]
        settings = [{"what": what, "a": a, "b": b} for what, a, b in self.settings]
        return {
            "unit": self.unit,
            "settings": settings,
            "answers": self.answers(),
            "tokens": tokens,
            "pushes": pushes,
            "missing": self.missing,
        }


def _scaled(run: BySequence, eta: float) -> BySequence:
    """A run with every force times a step size."""

    def scaled(rows: list[Row]) -> list[Row]:
        return [row if row.get("force") is None else row | {"force": eta * row["force"]} for row in rows]

    matrix = None if run.matrix is None else eta * run.matrix.double()
    return BySequence(scaled(run.updated), scaled(run.observed), matrix, run.names)


def _settings(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """What was asked differently: entries of model, data, objective and settings of run.json."""
    for key in sorted({*a, *b}):
        if not prefix and key not in ("model", "data", "objective", "settings"):
            continue
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            yield from _settings(x, y, f"{prefix}{key} ")
        elif x != y:
            yield f"{prefix}{key}", _short(x), _short(y)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _texts(run: Any, side: str) -> dict[int, tuple[Any, ...]]:
    """What a sequence is recognised by, by its number."""
    listed = [item for item in run.about.get("sequences") or [] if item.get("side") == side]
    return {item["sequence"]: (item.get("role"), item.get("prompt"), item.get("group")) for item in listed}


def _aligned(a: list[Row], b: list[Row], of_a: dict[int, Any], of_b: dict[int, Any]) -> list[Aligned]:
    """The tokens that both sides have. Sequences with one key in several places are paired in their order."""
    waiting: dict[Any, list[list[Row]]] = {}
    for number, rows in _by_sequence(b).items():
        waiting.setdefault(_key(rows, of_b.get(number)), []).append(rows)
    found = list[Aligned]()
    for number, rows in _by_sequence(a).items():
        partners = waiting.get(_key(rows, of_a.get(number)))
        if partners:
            found += _pairs(rows, partners.pop(0))
    return found


def _key(rows: list[Row], text: Any) -> Any:
    return text if text is not None else (rows[0]["role"], None, rows[0]["group"])


def _by_sequence(rows: list[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row["sequence"], []).append(row)
    return found


def _pairs(a: list[Row], b: list[Row]) -> Iterator[Aligned]:
    """The longest common runs of token ids of two sequences."""
    ids_a, ids_b = ([row["token_id"] for row in rows] for rows in (a, b))
    for i, j, n in difflib.SequenceMatcher(None, ids_a, ids_b, autojunk=False).get_matching_blocks():
        yield from (Aligned(a[i + k], b[j + k]) for k in range(n))
