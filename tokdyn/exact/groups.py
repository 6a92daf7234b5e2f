"""Groups of update tokens: a force is linear in the update, so the tokens of a response or a sentence can share one column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..sequences import Chi, context_numbers, visible

ENDS = (".", "!", "?", "…", "。", "！", "？", "\n")  # a sentence goes up to the token that holds one of these, spaces aside


def group_labels(groups: str | Sequence[int] | Tensor, chis: Sequence[Chi]) -> Int[Tensor, " L"]:
    """The column of every scored token, 0, 1, …; -1 leaves a token out.

    Args:
        groups: "sequence" (all scored tokens of a sequence), "response" (each unbroken run of scored tokens: an assistant's
            turn), "sentence" (runs cut behind . ! ? and line ends; the sequences need their `tokens`), "context" (tokens behind
            the same ids, in whichever sequences), or a label for each scored token [L], any whole numbers from 0 up.
        chis: the sequences of the update.

    Raises:
        ValueError: an unknown name, labels of another shape, a label that no token has, sequences without token texts.
    """
    if not isinstance(groups, str):
        given = torch.as_tensor(groups)
        L = sum(len(chi) for chi in chis)
        if given.shape != (L,) or given.is_floating_point():
            raise ValueError(f"groups must be whole numbers of shape [L]=({L},), got {given.dtype} {list(given.shape)}")
        used = given[given >= 0].unique()
        if not len(used) or int(used[-1]) != len(used) - 1:
            raise ValueError(f"groups must be numbered 0, 1, … without a gap, got {used.tolist()[:10]}")
        return given.long()
    if groups not in ("sequence", "response", "sentence", "context"):
        raise ValueError(f'groups must be "sequence", "response", "sentence", "context" or labels [L], got {groups!r}')
    if groups == "context":
        return context_numbers(chis)
    labels, group = list[int](), -1
    for s, chi in enumerate(chis):
        if groups == "sentence" and chi.tokens is None:
            raise ValueError(f"groups='sentence' needs the token texts of sequence {s}: make it with encode(), or give labels")
        before, ended = -2, True
        for t in chi.scored.nonzero().flatten().tolist():
            new_run = before < 0 if groups == "sequence" else t != before + 1
            group += new_run or (groups == "sentence" and ended)
            ended = chi.tokens is not None and chi.tokens[t].strip(" ").endswith(ENDS)
            before = t
            labels.append(group)
    return torch.tensor(labels)


def group_table(updated: Any, labels: Int[Tensor, " L"]) -> Any:
    """The row table of grouped columns: where each group begins, its tokens as one text, its size, Σ c and Σ log pi."""
    return _table(
        updated, labels, lambda rows, of: {"token": "".join(rows["token"][i] for i in of)} | _sums(rows, of, "log_prob")
    )


def context_table(updated: Any, labels: Int[Tensor, " L"]) -> Any:
    """The row table of contexts: position, the different tokens there with the net c of each, size, and the net c of all.

    `token` names a context by its tokens, "␣S/␣Can @14", white space at their ends made visible.
    """

    def named(rows: dict[str, list[Any]], of: list[int]) -> dict[str, Any]:
        net: dict[int, float] = {}
        texts: dict[int, str] = {}
        for i in of:
            y = rows["token_id"][i]
            net[y], texts[y] = net.get(y, 0.0) + rows["c"][i], rows["token"][i]
        label = f"{'/'.join(map(visible, texts.values()))} @{rows['position'][of[0]]}"
        return {"token": label, "tokens": list(texts.values()), "tokens_c": list(net.values())}

    return _table(updated, labels, named)


def _table(updated: Any, labels: Int[Tensor, " L"], more: Callable[[dict[str, list[Any]], list[int]], dict[str, Any]]) -> Any:
    """A row for each group: where its first token stands, what `more` says of all of its tokens, its size and Σ c."""
    import pyarrow as pa

    rows = updated.to_pydict()
    members: list[list[int]] = [[] for _ in range(int(labels.max()) + 1)]
    for i, label in enumerate(labels.tolist()):
        if label >= 0:
            members[label].append(i)
    columns: dict[str, list[Any]] = {}
    for of in members:
        first = {key: rows[key][of[0]] for key in ("sequence", "group", "role", "position", "token_id")}
        for key, value in {**first, **more(rows, of), "size": len(of), **_sums(rows, of, "c")}.items():
            columns.setdefault(key, []).append(value)
    return pa.table(columns)


def _sums(rows: dict[str, list[Any]], of: list[int], key: str) -> dict[str, float]:
    """The sum of a column over some rows, where the table has it."""
    return {key: sum(rows[key][i] for i in of)} if key in rows else {}
