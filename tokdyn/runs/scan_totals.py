"""What a scan found: who hurts and helps each group most, where, and how much of it cancels. One block is held at a time."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from .scans import ROWS, SEPARATOR, Scan

BEST = 20  # rows, tokens and vocabulary entries that are named of each end
BEFORE, BEHIND = 16, 4  # tokens of a named token's context that are shown
EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # places in an answer, from its first scored token
PREFIX = ("shared with the other answer", "point of divergence", "own text")

Entry = dict[str, Any]


@dataclass
class Share:
    """Some tokens' forces added up.

    Attributes:
        tokens: how many.
        force: Σ F, nats per unit learning rate.
        size: Σ |F|.
    """

    tokens: int = 0
    force: float = 0.0
    size: float = 0.0

    def add(self, f: np.ndarray) -> None:
        """Add tokens."""
        self.tokens += len(f)
        self.force += float(f.sum())
        self.size += float(np.abs(f).sum())


@dataclass
class Ends:
    """The entries with the least and the largest force, in that order of extremity.

    Entries of equal texts (the same `text`) are one, and `times` says how many they are: the same row drawn several times.
    """

    worst: list[Entry] = field(default_factory=list)
    best: list[Entry] = field(default_factory=list)

    def add(self, entries: list[Entry]) -> None:
        """Keep the most extreme of what is there and these."""
        self.worst = _joined(sorted((e for e in [*self.worst, *entries] if e["force"] < 0), key=lambda e: e["force"]))
        self.best = _joined(sorted((e for e in [*self.best, *entries] if e["force"] > 0), key=lambda e: -e["force"]))


def _joined(entries: list[Entry]) -> list[Entry]:
    """The first `BEST` of them, those of equal texts as one, under the number of the first of them in the data."""
    found: dict[Any, Entry] = {}
    for n, entry in enumerate(entries):
        key = entry.get("text", n)
        if key in found:
            first, times = min(found[key], entry, key=lambda e: int(e["row"])), found[key]["times"] + entry["times"]
            found[key] = first | {"times": times}
        else:
            found[key] = entry
    return list(found.values())[:BEST]


@dataclass
class Totals:
    """What all rows do to one group, on the sum of its log-probabilities.

    Attributes:
        whole: all tokens.
        roles, prefix, places: by the objective's name of the sequence, by PREFIX, by place in the answer (EDGES).
        parts: by what moves, where the scan was divided (`by=`).
        rows, tokens, vocabulary: the ends of each; a vocabulary entry counts with all its tokens.
        row_forces: Σ F of each row.
        row_size, net: Σ over rows of |Σ F|, and of Σ over contexts |Σ F|.
    """

    whole: Share = field(default_factory=Share)
    roles: dict[str, Share] = field(default_factory=dict)
    prefix: dict[str, Share] = field(default_factory=dict)
    places: dict[int, Share] = field(default_factory=dict)
    parts: dict[str, Share] = field(default_factory=dict)
    rows: Ends = field(default_factory=Ends)
    tokens: Ends = field(default_factory=Ends)
    vocabulary: Ends = field(default_factory=Ends)
    row_forces: np.ndarray = field(default_factory=lambda: np.zeros(0))
    row_size: float = 0.0
    net: float = 0.0

    @property
    def hurting(self) -> float:
        """The share of rows that lower the group."""
        return float((self.row_forces < 0).mean()) if len(self.row_forces) else 0.0


def totals(scan: Scan) -> dict[str, Totals]:
    """The totals of every group; reads the folder's tables once."""
    found = {name: Totals() for name in scan.groups}
    words = {name: _Words() for name in found}
    forces: dict[str, list[np.ndarray]] = {name: [] for name in found}
    for tokens, rows in zip(scan.each(), scan.each(ROWS), strict=True):
        block = _Block(tokens, rows)
        for name, of in found.items():
            f = block.tokens[f"force_{name}"].astype(np.float64)
            of.whole.add(f)
            block.shares(of, f)
            for part in scan.parts:
                of.parts.setdefault(part, Share()).add(block.tokens[f"force_{name}{SEPARATOR}{part}"].astype(np.float64))
            of.tokens.add(block.extreme(f))
            lines = block.row_entries(name)
            of.rows.add(lines)
            forces[name].append(np.array([line["force"] for line in lines]))
            of.net += sum(line["net"] for line in lines)
            words[name].add(block, f)
    for name, of in found.items():
        of.row_forces = np.concatenate(forces[name]) if forces[name] else of.row_forces
        of.row_size = float(np.abs(of.row_forces).sum())
        of.vocabulary.add(words[name].entries())
    return found


class _Words:
    """Forces by vocabulary entry."""

    def __init__(self) -> None:
        self.force, self.count, self.text = np.zeros(0), np.zeros(0, int), dict[int, str]()

    def add(self, block: _Block, f: np.ndarray) -> None:
        ids = block.tokens["token_id"]
        if not len(ids):
            return
        size = max(len(self.force), int(ids.max()) + 1)
        self.force = np.pad(self.force, (0, size - len(self.force))) + np.bincount(ids, f, size)
        self.count = np.pad(self.count, (0, size - len(self.count))) + np.bincount(ids, minlength=size)
        where = np.unique(ids, return_index=True)
        self.text.update({int(i): block.text[n] for i, n in zip(*where, strict=True) if int(i) not in self.text})

    def entries(self) -> list[Entry]:
        return [
            {"token": self.text[int(i)], "force": float(self.force[i]), "count": int(self.count[i])}
            for i in self.count.nonzero()[0]
        ]


class _Block:
    """One block's tables with what is asked of its tokens again and again."""

    def __init__(self, tokens: Any, rows: Any) -> None:
        self.tokens = {n: tokens[n].to_numpy() for n in tokens.column_names if n not in ("role", "token")}
        self.role, self.text = np.array(tokens["role"].to_pylist(), object), tokens["token"].to_pylist()
        self.lines = {line["row"]: line for line in rows.to_pylist()}
        self.texts = self._texts()
        row, sequence, context = (self.tokens[name].astype(np.int64) for name in ("row", "sequence", "context"))
        N = len(row)
        starts = np.flatnonzero(np.r_[True, (row[1:] != row[:-1]) | (sequence[1:] != sequence[:-1])]) if N else np.zeros(0, int)
        ends = np.r_[starts[1:], N] if N else starts
        self.start, self.end = (np.repeat(x, ends - starts) for x in (starts, ends))
        self.place, self.sequence = np.arange(N) - self.start, sequence
        first = {text: n for n, text in reversed(self.texts.items())}
        self.times = Counter(self.texts.values())
        self.once = np.flatnonzero(np.isin(row, list(first.values())))  # the tokens of rows that are not there before
        key = row * (int(context.max()) + 1 if N else 1) + context
        _, of, count = np.unique(key, return_inverse=True, return_counts=True)
        different = np.unique(np.stack([key, self.tokens["token_id"].astype(np.int64)]), axis=1)[0]  # one a token of a context
        contexts, tokens_of = np.unique(different, return_counts=True)
        shared, diverges = count[of] > 1, np.isin(key, contexts[tokens_of > 1])
        self.prefix = np.where(diverges, 1, np.where(shared, 0, 2))

    def _texts(self) -> dict[int, str]:
        """What stands for the text of each row: prompt, where its tokens stand, their ids."""
        row = self.tokens["row"]
        edges = [*np.flatnonzero(np.r_[True, row[1:] != row[:-1]]).tolist(), len(row)] if len(row) else []
        found = {}
        for a, z in pairwise(edges):
            digest = hashlib.sha256((self.lines[int(row[a])]["prompt"] or "").encode())
            for name in ("sequence", "position", "token_id"):
                digest.update(self.tokens[name][a:z].tobytes())
            found[int(row[a])] = digest.hexdigest()
        return found

    def shares(self, of: Totals, f: np.ndarray) -> None:
        """Add the block's forces by role, shared prefix and place."""
        for role in dict.fromkeys(self.role):
            of.roles.setdefault(role, Share()).add(f[self.role == role])
        for n, name in enumerate(PREFIX):
            if (self.prefix == n).any():
                of.prefix.setdefault(name, Share()).add(f[self.prefix == n])
        bins = np.digitize(self.place, EDGES) - 1
        for b in np.unique(bins).tolist():
            of.places.setdefault(EDGES[b], Share()).add(f[bins == b])

    def extreme(self, f: np.ndarray) -> list[Entry]:
        """The tokens of both ends, with their surroundings."""
        order = self.once[np.argsort(f[self.once], kind="stable")]
        picked = dict.fromkeys([*order[:BEST].tolist(), *order[::-1][:BEST].tolist()])
        return [self._entry(n, float(f[n])) for n in picked]

    def _entry(self, n: int, force: float) -> Entry:
        start, end = int(self.start[n]), int(self.end[n])
        before, behind = self.text[max(start, n - BEFORE) : n], self.text[n + 1 : min(end, n + 1 + BEHIND)]
        row = int(self.tokens["row"][n])
        lead = "" if n - BEFORE > start else (self.lines[row]["prompt"] or "")[-60:]
        return {
            "row": row, "role": self.role[n], "position": int(self.tokens["position"][n]), "token": self.text[n],
            "before": lead + "".join(before), "behind": "".join(behind), "force": force, "c": float(self.tokens["c"][n]),
            "log_prob": float(self.tokens["log_prob"][n]), "where": self.lines[row]["where"],
            "text": (self.texts[row], int(self.sequence[n]), int(self.place[n])), "times": self.times[self.texts[row]],
        }  # fmt: skip

    def row_entries(self, group: str) -> list[Entry]:
        """Every row that has tokens, with its sums on a group."""
        names: Mapping[str, str] = {what: f"{what}_{group}" for what in ("force", "size", "net")}
        kept = ("row", "where", "prompt", "tokens")
        return [
            {key: line[key] for key in kept}
            | {what: line[column] for what, column in names.items()}
            | {"text": self.texts[line["row"]], "times": 1}
            for line in self.lines.values()
            if line["problem"] is None and line["tokens"]
        ]
