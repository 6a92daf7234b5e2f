"""Rows of a data file as sequences: prompt/completion or prompt/chosen/rejected, plain or conversational, JSONL or parquet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .objectives import Objective
from .sequences import Chi, encode, preference, rollouts

SHAPES = (("prompt", "chosen", "rejected"), ("prompt", "completions", "rewards"), ("prompt", "completion"))


def read(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a .jsonl (.json, one object a line) or .parquet file, checked.

    A row has prompt and completion; prompt, chosen and rejected; or prompt, completions and rewards (sampled groups). Texts
    are strings, or lists of chat messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is empty, or a row is not what it should be (file and line are named).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no data file {path}: give a .jsonl or .parquet file")
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        numbered = list(enumerate(pq.read_table(path).to_pylist(), 1))
        unit = "row"
    elif path.suffix in (".jsonl", ".json"):
        numbered, unit = [], "line"
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                numbered.append((n, json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {n} is not JSON ({error.msg} at column {error.colno}): {line[:60]!r}") from None
    else:
        raise ValueError(f"{path} must end in .jsonl or .parquet")
    if not numbered:
        raise ValueError(f"{path} holds no rows")
    for n, row in numbered:
        _check(row, f"{path} {unit} {n}")
    return [row for _, row in numbered]


def _check(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, got {type(row).__name__}")
    shape = next((shape for shape in SHAPES if all(row.get(key) is not None for key in shape)), None)
    if shape is None:
        have = ", ".join(row) or "nothing"
        raise ValueError(f"{where} must have prompt and completion, or prompt, chosen and rejected; it has {have}")
    for key in shape:
        value = row[key]
        if not isinstance(value, (str, list)):
            raise ValueError(f"{where}: {key} must be text or a list of messages, got {type(value).__name__}")
        if key not in ("prompt", "rewards") and not (value.strip() if isinstance(value, str) else value):
            raise ValueError(f"{where}: {key} is empty, so there is nothing to score")
        if key not in ("completions", "rewards") and isinstance(value, list):
            for message in value:
                if not isinstance(message, dict) or not {"role", "content"} <= set(message):
                    raise ValueError(f"{where}: every message of {key} must have a role and a content")


def sequences(tokenizer: Any, rows: Sequence[dict[str, Any]], objective: Objective, **options: Any) -> list[Chi]:
    """The sequences an objective trains on, row by row (group = number of the row).

    A preference row serves every objective: supervised ones learn the chosen answer, policy gradients take the two answers
    as a group with rewards 1 and 0. Options as in `encode`.

    Raises:
        ValueError: the objective needs pairs or groups and a row has one completion only.
    """
    chis: list[Chi] = []
    for i, row in enumerate(rows):
        pair = "chosen" in row
        if objective.reads == "completion":
            texts = [row["chosen"]] if pair else row["completions"] if "completions" in row else [row["completion"]]
            chis += [encode(tokenizer, row["prompt"], text, group=i, **options) for text in texts]
        elif objective.reads == "preference" and pair:
            chis += preference(tokenizer, row["prompt"], row["chosen"], row["rejected"], group=i, **options)
        elif objective.reads == "rollouts" and (pair or "completions" in row):
            texts = [row["chosen"], row["rejected"]] if pair else row["completions"]
            rewards = [1.0, 0.0] if pair else row["rewards"]
            made = rollouts(tokenizer, row["prompt"], texts, rewards, group=i, **options)
            roles = ("chosen", "rejected") if pair else ["response"] * len(made)
            chis += [chi.with_(role=role) for chi, role in zip(made, roles, strict=True)]
        else:
            wanted = "chosen and rejected" if objective.reads == "preference" else "chosen and rejected, or completions and rewards"
            raise ValueError(f"{type(objective).__name__} needs {wanted} in every row; row {i} has {', '.join(row)}")
    return chis


def watched(tokenizer: Any, rows: Sequence[dict[str, Any]], first_group: int = 0, **options: Any) -> list[Chi]:
    """Every answer of the rows, for the observed side, under its role."""
    chis: list[Chi] = []
    for i, row in enumerate(rows, first_group):
        if "chosen" in row:
            chis += preference(tokenizer, row["prompt"], row["chosen"], row["rejected"], group=i, **options)
        else:
            for text in row["completions"] if "completions" in row else [row["completion"]]:
                chis.append(encode(tokenizer, row["prompt"], text, group=i, **options))
    return chis
