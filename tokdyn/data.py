"""Rows of a data file as sequences: prompt/completion or prompt/chosen/rejected, plain or conversational, JSONL or parquet."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .objective import Objective
from .objectives import DrGRPO
from .sequences import Chi, encode, preference, rollouts

FORMS = (("prompt", "chosen", "rejected"), ("prompt", "completions", "rewards"), ("prompt", "completion"))


def read(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a .jsonl (.json, one object a line) or .parquet file, checked.

    A row has prompt and completion; prompt, chosen and rejected; or prompt, completions and rewards (sampled groups). Texts
    are strings, or lists of chat messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is empty, or a row is not what it should be (file and line are named).
    """
    numbered = objects(path)
    for where, row in numbered:
        _check(row, where)
    return [row for _, row in numbered]


def objects(path: str | Path) -> list[tuple[str, Any]]:
    """The objects in a .jsonl or .parquet file, unchecked, each with its place for error messages ("pairs.jsonl line 3").

    Raises:
        FileNotFoundError: no such file. ValueError: it is empty or cannot be read (file and line are named).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no data file {path}: give a .jsonl or .parquet file")
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            numbered, unit = list(enumerate(pq.read_table(path).to_pylist(), 1)), "row"
        except (ValueError, OSError) as error:  # pyarrow does not name the file
            raise ValueError(f"{path} is not a parquet file ({error})") from None
    elif path.suffix in (".jsonl", ".json"):
        numbered, unit = [], "line"
        for n, line in enumerate(path.read_bytes().splitlines(), 1):  # bytes, since str.splitlines would also split at U+2028
            if not line.strip():
                continue
            try:
                numbered.append((n, json.loads(line)))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} line {n} is not UTF-8 ({error.reason} at byte {error.start})") from None
            except json.JSONDecodeError as error:
                shown = line[:60].decode(errors="replace")
                raise ValueError(f"{path} line {n} is not JSON ({error.msg} at column {error.colno}): {shown!r}") from None
    else:
        raise ValueError(f"{path} must end in .jsonl or .parquet")
    if not numbered:
        raise ValueError(f"{path} holds no rows")
    return [(f"{path} {unit} {n}", row) for n, row in numbered]


def _form(row: dict[str, Any]) -> tuple[str, ...]:
    """Which of FORMS a row has, () if none; a null counts as absent (parquet fills columns with them)."""
    return next((form for form in FORMS if all(row.get(key) is not None for key in form)), ())


def _check(row: Any, where: str) -> None:
    """Raise unless a row has one of FORMS with values of the right types; `where` opens the message."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, got {type(row).__name__}")
    form = _form(row)
    if not form:
        wanted = " or ".join(f"({', '.join(keys)})" for keys in FORMS)
        have = ", ".join(key for key, value in row.items() if value is not None) or "nothing"
        raise ValueError(f"{where} must have {wanted}; it has {have}")
    if "rewards" in form:
        texts, rewards = row["completions"], row["rewards"]
        if not isinstance(texts, list) or not isinstance(rewards, list) or len(texts) != len(rewards) or not texts:
            raise ValueError(f"{where}: completions and rewards must be two lists of one length")
        if not all(type(r) in (bool, int, float) and math.isfinite(r) for r in rewards):
            raise ValueError(f"{where}: rewards must be finite numbers, got {rewards}")
    for key in form:
        for value in row[key] if key == "completions" else [] if key == "rewards" else [row[key]]:
            check_text(value, key, where)


def check_text(value: Any, key: str, where: str) -> None:
    """Raise unless a value is text, or a list of chat messages, with something in it; `where` opens the message."""
    if not isinstance(value, (str, list)):
        raise ValueError(f"{where}: {key} must be text or a list of messages, got {type(value).__name__}")
    if isinstance(value, list):
        for message in value:
            if not isinstance(message, dict) or not {"role", "content"} <= set(message):
                raise ValueError(f"{where}: every message of {key} must have a role and a content")
            if not isinstance(message["content"], str):
                raise ValueError(f"{where}: every content in {key} must be text, got {type(message['content']).__name__}")
    text = value if isinstance(value, str) else "".join(message["content"] for message in value)
    if not text.strip() and (key != "prompt" or value == []):
        raise ValueError(f"{where}: {key} is empty, so there is nothing to {'answer' if key == 'prompt' else 'score'}")


def sequences(tokenizer: Any, rows: Sequence[dict[str, Any]], objective: Objective, **options: Any) -> list[Chi]:
    """The sequences an objective trains on, row by row (group = number of the row).

    A preference row serves every objective: supervised ones learn the chosen answer, policy gradients take the two answers
    as a group with rewards 1 and 0 (Dr. GRPO's advantages are not divided by their spread). Options as in `encode`.

    Raises:
        ValueError: the objective needs pairs or groups and a row has one completion only.
    """
    chis: list[Chi] = []
    for i, row in enumerate(rows):
        pair, group = "chosen" in _form(row), "completions" in _form(row)
        if objective.reads == "completion":
            texts = [row["chosen"]] if pair else row["completions"] if group else [row["completion"]]
            role = "chosen" if pair else "response"
            chis += [encode(tokenizer, row["prompt"], text, role=role, group=i, **options) for text in texts]
        elif objective.reads == "preference" and pair:
            chis += preference(tokenizer, row["prompt"], row["chosen"], row["rejected"], group=i, **options)
        elif objective.reads == "rollouts" and (pair or group):
            texts = [row["chosen"], row["rejected"]] if pair else row["completions"]
            rewards = [1.0, 0.0] if pair else [float(r) for r in row["rewards"]]
            scaled = {"scale": not isinstance(objective, DrGRPO)} | options
            made = rollouts(tokenizer, row["prompt"], texts, rewards, group=i, **scaled)
            roles = ("chosen", "rejected") if pair else ["response"] * len(made)
            chis += [chi.with_(role=role) for chi, role in zip(made, roles, strict=True)]
        else:
            wanted = "chosen and rejected" + (", or completions and rewards" if objective.reads == "rollouts" else "")
            raise ValueError(f"{type(objective).__name__} needs {wanted} in every row; row {i + 1} has {', '.join(row)}")
    return chis


def watched(tokenizer: Any, rows: Sequence[dict[str, Any]], first_group: int = 0, **options: Any) -> list[Chi]:
    """Every answer of the rows as a sequence to observe, whatever the objective trains on; arguments as in `sequences`."""
    chis: list[Chi] = []
    for i, row in enumerate(rows, first_group):
        if "chosen" in _form(row):
            chis += preference(tokenizer, row["prompt"], row["chosen"], row["rejected"], group=i, **options)
        else:
            for text in row["completions"] if "completions" in _form(row) else [row["completion"]]:
                chis.append(encode(tokenizer, row["prompt"], text, group=i, **options))
    return chis
