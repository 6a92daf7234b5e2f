"""Net forces on the page: update tokens behind the same ids as one column, and each token's strongest partners at any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..runs.by_sequence import CHUNK, block_sums
from ..runs.contexts import context_keys, join_alike, listed, net
from .text import plain

HEADLINE = 6  # strongest pushes of a run
PARTNERS = 8  # kept of each token where the matrix is too large for a page


def contexts_of(sides: Mapping[str, Any]) -> dict[str, Any]:
    """The contexts of the update tokens, for the page.

    Returns {"updated": the context of each update token, "observed": that of each observed token's own place or -1, "list":
    position, tokens, members and sequences of each, "bands": runs [start, stop) of contexts that the same sequences share,
    "joined": a number for each context, one for those in which a pair's answers say alike}.
    """
    rows = [
        {"side": side, "sequence": s} | {name: _at(sides[side], name, i) for name in ("position", "token_id", "context")}
        for side in ("updated", "observed")
        for s, sequence in enumerate(sides[side]["sequences"])
        for i in range(sequence["start"], sequence["stop"])
    ]
    texts = [
        dict(side=side, sequence=s, prompt=sequence["prompt"], response=sequence.pop("response"))  # the page needs it no more
        for side in ("updated", "observed")
        for s, sequence in enumerate(sides[side]["sequences"])
    ]
    updated = sides["updated"]
    L = len(updated["columns"]["token"])
    keys, number = context_keys(rows, texts), dict[int, int]()
    column = [number.setdefault(key, len(number)) for key in keys[:L]]
    found: list[dict[str, Any]] = [{"members": []} for _ in number]
    for l, x in enumerate(column):  # noqa: E741
        found[x]["members"].append(l)
    owner = [sequence["name"] for sequence in updated["sequences"] for _ in range(sequence["start"], sequence["stop"])]
    bands: list[dict[str, Any]] = []
    for x, context in enumerate(found):
        of = context["members"]
        context["tokens"] = list(dict.fromkeys(updated["columns"]["token"][l] for l in of))  # noqa: E741
        context["position"] = _at(updated, "position", of[0])
        name = listed(list(dict.fromkeys(owner[l] for l in of)))  # noqa: E741
        if not bands or bands[-1]["name"] != name:
            bands.append({"name": name, "start": x, "stop": x})
        bands[-1]["stop"] = x + 1
    groups = [sequence for sequence in updated["sequences"] for _ in range(sequence["start"], sequence["stop"])]
    for row, text, of in zip(rows, updated["columns"]["token"], groups, strict=False):  # the rows of the update come first
        row |= {"token": text, "group": of["group"], "role": of["role"]}
        if row["token_id"] is None:
            del row["token_id"]
    return {
        "updated": column,
        "observed": [number.get(key, -1) for key in keys[L:]],
        "list": found,
        "bands": bands,
        "joined": join_alike(rows[:L], column, len(found)),
    }


def net_sums(matrix: np.ndarray, contexts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Sums of F over (observed sequence, band of contexts); None where a block holds a NaN."""
    of_band, of_row = (
        torch.repeat_interleave(torch.tensor([item["stop"] - item["start"] for item in runs], dtype=torch.long))
        for runs in (contexts["bands"], rows)
    )
    of_column = of_band[torch.tensor(contexts["updated"], dtype=torch.long)]
    return plain(block_sums(torch.from_numpy(matrix), of_row, of_column).tolist())


def strongest(matrix: np.ndarray, contexts: Mapping[str, Any]) -> dict[str, Any]:
    """The strongest net partners of each observed token and of each context, what stands in the same place apart.

    Returns {"observed": [[context, force], …] each, "own": force of its own context or None, "size": Σ|net| of the others,
    "reach": for each context [[observed, force], …]}, the largest first; entries that are NaN are left out.

    Cost: reads the matrix once, in rows; keeps PARTNERS numbers of each row and column.
    """
    F, C = torch.from_numpy(matrix), len(contexts["list"])
    column, own = (torch.tensor(contexts[side], dtype=torch.long) for side in ("updated", "observed"))
    found: dict[str, list[Any]] = {"observed": [], "own": [], "size": []}
    best = torch.zeros(C, 0), torch.zeros(C, 0, dtype=torch.long)
    height = max(1, 16 * CHUNK // max(1, F.shape[1]))
    for start in range(0, len(F), height):
        part = net(F[start : start + height], column, C).float()
        mine = own[start : start + len(part)]
        rows = (mine >= 0).nonzero().flatten()
        kept: list[Any] = [None] * len(part)
        for m in rows.tolist():
            kept[m] = plain(float(part[m, mine[m]]))
        part[rows, mine[rows]] = 0
        part.nan_to_num_(0)
        top = part.abs().topk(min(PARTNERS, C), 1).indices
        found["observed"] += _pairs(top, part.gather(1, top))
        found["own"] += kept
        found["size"] += plain(part.abs().sum(1).tolist())
        values = torch.cat([best[0], part.T], 1)
        places = torch.cat([best[1], (start + torch.arange(len(part))).expand(C, -1)], 1)
        top = values.abs().topk(min(PARTNERS, values.shape[1]), 1).indices
        best = values.gather(1, top), places.gather(1, top)
    return found | {"reach": _pairs(best[1], best[0])}


def headline(matrix: np.ndarray, contexts: Mapping[str, Any]) -> list[Any]:
    """The strongest net forces of a run, update tokens that a pair's answers say alike summed: [m, contexts, force] of each.

    What stands in an observed token's own place is left out, as in `strongest`.
    """
    joined = [*contexts["joined"], -1]  # -1: no update token stands there
    members: dict[int, list[int]] = {}
    for x, new in enumerate(contexts["joined"]):
        members.setdefault(new, []).append(x)
    sides = {side: [joined[x] for x in contexts[side]] for side in ("updated", "observed")}
    rows = strongest(matrix, sides | {"list": members})["observed"]
    cells = [[m, members[x], force] for m, row in enumerate(rows) for x, force in row]
    return sorted(cells, key=lambda cell: -abs(cell[2]))[:HEADLINE]


def _pairs(places: torch.Tensor, values: torch.Tensor) -> list[list[list[Any]]]:
    rows = zip(places.tolist(), values.tolist(), strict=True)
    return [[[i, plain(x)] for i, x in zip(*row, strict=True) if x] for row in rows]


def _at(side: Mapping[str, Any], name: str, i: int) -> Any:
    """A value of a side's column, None where the run has no such column."""
    return side["columns"][name][i] if name in side["columns"] else None
