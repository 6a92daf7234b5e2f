"""Texts for the language studies: rows from a folder or a file of real data, or the pairs that ship with tokdyn.

A folder is read as hh_helpful_formal_prob_{train,test}.jsonl, the probe sets of Ren & Sutherland (arXiv 2407.10490): each row
has a prompt with chosen, rejected and further responses. A file is anything `tokdyn.data.read` takes with chosen and rejected.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tokdyn as td

from ..data import read
from ..demo.train import dialogue
from ..loading import DEMO_PAIRS, load_model
from .parts import Keep

Row = dict[str, str]


def pairs(
    data: str | Path | None = None, n: int | None = None, *, split: str = "train", tokenizer: Any = None, longest: int = 256
) -> list[Row]:
    """The first n rows with prompt, chosen and rejected, in the spelling of the demo model.

    Args:
        data: a folder with the probe sets, a data file, or None for the shipped pairs.
        n: how many; all when absent.
        split: "train" or "test", for a folder.
        tokenizer, longest: with a tokenizer, rows with an answer and prompt of more than `longest` tokens are left out.

    Raises:
        FileNotFoundError: the folder or file is not there.
        ValueError: no row is left.
    """
    if data is None:
        found: list[Any] = read(DEMO_PAIRS)
    elif Path(data).is_dir():
        path = Path(data) / f"hh_helpful_formal_prob_{split}.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"no {path.name} in the folder {data}: give the folder of the probe sets, or a data file")
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        found = read(data)
    kept: list[Row] = []
    for row in found:
        if n is not None and len(kept) == n:
            break
        texts = {key: value for key, value in row.items() if isinstance(value, str)}
        if not all(texts.get(key, "").strip() for key in ("prompt", "chosen", "rejected")):
            continue
        prompt = dialogue(texts.pop("prompt"))
        clean = {"prompt": prompt} | {key: " " + value.strip() for key, value in texts.items() if value.strip()}
        if clean["chosen"] == clean["rejected"]:
            continue
        if tokenizer is None or max(_length(tokenizer, clean, key) for key in ("chosen", "rejected")) <= longest:
            kept.append(clean)
    if not kept:
        raise ValueError(
            f"{data or DEMO_PAIRS} has no row whose prompt, chosen and rejected are plain texts of at most {longest} tokens"
        )
    return kept


def drawn(rows: Sequence[Row], n: int, seed: int) -> list[Row]:
    """n of the rows, drawn without repetition by the seed, so that every run of a study has texts of its own."""
    return random.Random(seed).sample(list(rows), min(n, len(rows)))


def chis(tokenizer: Any, rows: Sequence[Row], kind: str, *, role: str | None = None) -> list[td.Chi]:
    """The response under the key `kind` of each row, after the row's prompt; group is the number of the row."""
    return [td.encode(tokenizer, row["prompt"], row[kind], role=role or kind, group=i) for i, row in enumerate(rows)]


def preferences(tokenizer: Any, rows: Sequence[Row]) -> list[td.Chi]:
    """Chosen and rejected answer of each row, in turn; group is the number of the row."""
    return [
        chi for i, row in enumerate(rows)
        for chi in td.preference(tokenizer, row["prompt"], row["chosen"], row["rejected"], group=i)
    ]  # fmt: skip


def _length(tokenizer: Any, row: Row, key: str) -> int:
    """Tokens of prompt, answer and end token."""
    return len(tokenizer(row["prompt"] + row[key]).input_ids) + 1


def of_seeds(
    one: Callable[..., list[Any]], model: str, data: str | Path | None, quick: bool, seeds: Iterable[int], keep: Keep
) -> list[Any]:
    """The rows of `one`(model, tokenizer, rows, quick, seed) for each seed, one list; kept seed by seed."""
    start, tokenizer = load_model(model)
    rows = pairs(data, tokenizer=tokenizer, longest=128)
    return [row for s in seeds for row in keep(f"seed-{s}", partial(one, start, tokenizer, rows, quick, s))]
