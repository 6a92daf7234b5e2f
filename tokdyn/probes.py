"""Probe sets: a few prompts, each with many kinds of response, watched while a model is trained.

A training moves more than what it trains on. The learning-dynamics paper (Ren & Sutherland, arXiv 2407.10490, section 4)
follows twelve kinds of response to the same prompts; each tells another effect apart:

    chosen, rejected                            what the training pulls up and pushes down
    chosen_initial                              what the model said before it was trained
    chosen_gptsemantic, reject_gptsemantic      the same said otherwise
    chosen_gptformat, reject_gptformat          something else said in the same form
    irr_train, irr_test                         the answer to another prompt, of the training set and of a held-out one
    irr_hum                                     a sentence that answers nothing
    random_permute                              the words of the chosen answer in random order (`permute`)
    random_nonhum                               words of other answers in random order

A file of one JSON object a line with `prompt` and some of these fields is a probe set; the paper's own files are.

    build("pairs.jsonl", rows=8)        makes the kinds that need no writer: chosen, rejected, irr_*, random_*
    load(tokenizer, "probe.jsonl")      kind -> sequences, as td.attach(probe=...) and td.Monitor(probe=...) take it
"""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ._encoding import Text, as_sentence, message_text
from .data import Row, canonical, check_text, objects, template_of
from .sequences import Chi, encode

TYPES = ("chosen", "chosen_initial", "chosen_gptsemantic", "chosen_gptformat", "rejected", "reject_gptsemantic",
         "reject_gptformat", "irr_train", "irr_test", "irr_hum", "random_permute", "random_nonhum")  # fmt: skip

TOLD = ("tools", "chat_template_kwargs")  # what a row tells the chat template

Source = str | Path | Sequence[Mapping[str, Any]]


def build(
    data: Source,
    *,
    held_out: Source | None = None,
    rows: int | None = None,
    seed: int = 0,
    types: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """A probe set from preference data: every kind of response that the rows have, and those that can be made of them.

    Kinds that a row brings (rephrasings, or all twelve of the paper's files) are kept as they are. Made where absent:

        irr_train        a chosen answer to another prompt of `data`
        irr_test         a chosen answer to another prompt of `held_out`
        random_permute   the words of this row's chosen answer in another order
        random_nonhum    as many words as the chosen answer has, each drawn from an answer to another prompt

    A made response never comes from a row with the same prompt, nor repeats an answer of its own row. An answer whose words
    have one order only (a single word) has no random_permute.

    Args:
        data: a .jsonl or .parquet file, or its rows: prompt and chosen (or completion), with rejected and any of TYPES;
            texts or lists of chat messages; every form that `tokdyn.data.read` takes with chosen or one completion.
        held_out: the same, for prompts that are not trained on; no irr_test is made without it.
        rows: how many rows to draw at random; all of them when absent. The drawn rows keep their order.
        seed: the same seed gives the same probe set; a row's responses do not depend on which other rows are drawn.
        types: the kinds wanted; all that are there or can be made when absent.

    Returns:
        Rows with `prompt` and their kinds, in the order of TYPES, ready for `write` and `load`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row lacks what it must have (file and line are named), there are fewer rows than asked for, only one
            prompt to take other answers from, or a kind of `types` that is unknown or that no row has.
    """
    wanted = _requested(types)
    table = _rows(data)
    other = _rows(held_out) if held_out is not None else []
    drawn = list(range(len(table)))
    if rows is not None:
        if not 1 <= rows <= len(table):
            raise ValueError(f"rows must lie between 1 and the {len(table)} rows of {_source_name(data)}, got {rows}")
        drawn = sorted(random.Random(f"{seed} rows").sample(drawn, rows))
    train, test = _AnswerPool(table, _source_name(data)), _AnswerPool(other, _source_name(held_out))
    made = []
    for n in drawn:
        row = table[n]
        responses: dict[str, Text | None] = {}
        for kind in wanted:
            own = random.Random(f"{seed} {n} {kind}")  # of this row and kind alone, whatever else is made
            responses[kind] = row[kind] if row.get(kind) is not None else _make(kind, row, train, test, own)
        told = {key: row[key] for key in TOLD if row.get(key)}
        made.append(
            {"prompt": row["prompt"]} | told | {kind: responses[kind] for kind in TYPES if responses.get(kind) is not None}
        )
    hint = "" if held_out else "; irr_test can be made with held_out="
    _require_present(types, made, f"no row of {_source_name(data)} has it{hint}")
    return made


def _make(kind: str, row: Mapping[str, Any], train: _AnswerPool, test: _AnswerPool, rng: random.Random) -> Text | None:
    """A response of a kind that needs no writer; None where it cannot be made."""
    if kind == "irr_train":
        return train.draw(row, rng)[0]
    if kind == "irr_test" and test.rows:
        return test.draw(row, rng)[0]
    if kind == "random_permute":
        return permute(text_of(row["chosen"]), rng)
    if kind == "random_nonhum":
        return train.words(row, rng)
    return None


def permute(text: str, rng: random.Random) -> str | None:
    """The words of a text in another order; its leading white space stays.

    White space separates words and is one space afterwards. In scripts that are written without it (Chinese, Japanese, Thai,
    …) every character is a word, with the marks and the punctuation behind it.

    None where every order gives the same text.
    """
    words = split_words(text)
    if len(set(words)) < 2:
        return None
    mixed = list(words)
    while mixed == words:
        rng.shuffle(mixed)
    return _leading_space(text) + "".join(mixed).lstrip()


# scripts without spaces between words: Thai, Lao, Burmese, Khmer; kana, ideographs and their extensions
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3031-\u30ff\u31f0-\u31ff\u3400-\u9fff"
                       "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]")  # fmt: skip


def split_words(text: str) -> list[str]:
    """The words of a text as `permute` takes them, each with the space that separates it from the one before."""
    words: list[str] = []
    for chunk in text.split():
        start = len(words)
        for character in chunk:
            goes_on = len(words) > start and (
                unicodedata.category(character)[0] in "MP"
                or not (_UNSPACED.match(character) or _UNSPACED.match(words[-1].lstrip()))
            )
            if goes_on:
                words[-1] += character
            else:
                spaced = len(words) == start and (start > 0 or not _UNSPACED.match(character))
                words.append(f" {character}" if spaced else character)
    return words


def text_of(answer: Text) -> str:
    """An answer as one text: messages one after the other."""
    return answer if isinstance(answer, str) else "\n".join(message_text(message) for message in answer)


def write(path: str | Path, rows: Sequence[Mapping[str, Any]], overwrite: bool = False) -> None:
    """Write a probe set, one JSON object a line; the file is whole or not there.

    Raises:
        FileExistsError: the path exists and overwrite is False, or its folder is not there.
    """
    path = Path(path)
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileExistsError(f"{path} exists already: choose another place or pass --overwrite (overwrite=True)")
    if not path.parent.is_dir():
        raise FileExistsError(f"{path} cannot be written: there is no folder {path.parent}")
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def load(
    tokenizer: Any, source: Source, *, types: Sequence[str] | None = None, rows: int | None = None, **options: Any
) -> dict[str, list[Chi]]:
    """A probe set as sequences, kind -> one for each row that has it: what td.attach and td.Monitor take as `probe`.

    Args:
        tokenizer: as in `encode`.
        source: a file that `build` made, one of the paper's, any preference file, or rows.
        types: which kinds, in this order; all that are there when absent. The first is the one update tokens are asked about
            (`blame`) unless another is named.
        rows: the first so many.
        options: of `encode`: max_length, truncate, eos.

    The role of each sequence is its kind, its group the number of its row.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row lacks prompt or answers (file and line are named), or a kind of `types` that is unknown or not there.
    """
    wanted, table = _requested(types), _rows(source)
    if rows is not None and not 1 <= rows <= len(table):
        raise ValueError(f"rows must lie between 1 and the {len(table)} rows of {_source_name(source)}, got {rows}")
    table = table[:rows]
    _require_present(types, table, f"{_source_name(source)} has none: build them with tokdyn probe build")
    found: dict[str, list[Chi]] = {}
    for kind in wanted:
        chis = []
        for n, row in enumerate(table):
            if row.get(kind) is not None:
                with as_sentence(f"{row.where}: {kind}"):
                    chis.append(encode(tokenizer, row["prompt"], row[kind], role=kind, group=n, **(template_of(row) | options)))
        if chis:
            found[kind] = chis
    return found


# ---------------------------------------------------------------- rows


def _rows(source: Source) -> list[Row]:
    """Checked rows with prompt, chosen and what else they have of TYPES; blank responses count as absent."""
    if isinstance(source, (str, Path)):
        numbered = objects(source)
    else:
        numbered = [(f"row {n}", row) for n, row in enumerate(source, 1)]
    table = []
    for where, row in numbered:
        if not isinstance(row, Mapping):
            raise ValueError(f"{where} must be an object, got {type(row).__name__}")
        row = canonical(row, where, (*TYPES, "completion"))
        if row.get("chosen") is None and row.get("completion") is not None:
            row["chosen"] = row["completion"]
        missing = [key for key in ("prompt", "chosen") if row.get(key) is None]
        if missing:
            have = ", ".join(key for key, value in row.items() if value is not None) or "nothing"
            raise ValueError(f"{where} must have prompt and chosen (or completion); it has {have}")
        kept = Row({key: row[key] for key in ("prompt", *TOLD) if row.get(key)})
        kept.where = where
        for key in ("prompt", *TYPES):
            value = row.get(key)
            if value is None or (key not in ("prompt", "chosen") and isinstance(value, str) and not value.strip()):
                continue
            check_text(value, key, where)
            kept[key] = value
        table.append(kept)
    if not table:
        raise ValueError("the data holds no rows")
    return table


class _AnswerPool:
    """The chosen answers of a table, from which answers to other prompts are drawn."""

    def __init__(self, table: Sequence[Mapping[str, Any]], name: str) -> None:
        self.rows = [(_normalised(row["prompt"]), _normalised(row["chosen"]), row["chosen"]) for row in table]
        self.name = name

    def draw(self, row: Mapping[str, Any], rng: random.Random, n: int = 1) -> list[Text]:
        """n chosen answers to other prompts, each the first one at or after a random row."""
        prompt, own = (
            _normalised(row["prompt"]),
            {_normalised(row[key]) for key in ("chosen", "rejected") if row.get(key) is not None},
        )
        found: list[Text] = []
        for _ in range(n):
            start = rng.randrange(len(self.rows))
            for i in range(len(self.rows)):
                other, same, answer = self.rows[(start + i) % len(self.rows)]
                if other != prompt and same not in own:
                    found.append(answer)
                    break
            else:
                raise ValueError(
                    f"{self.name} holds no answer to another prompt than {prompt[:60]!r}: give data with more prompts, or name "
                    "the kinds wanted without irr_train, irr_test and random_nonhum (types=)"
                )
        return found

    def words(self, row: Mapping[str, Any], rng: random.Random) -> str:
        """As many words as the chosen answer has, each from an answer to another prompt."""
        own = text_of(row["chosen"])
        answers = self.draw(row, rng, len(split_words(own)))
        return _leading_space(own) + "".join(rng.choice(split_words(text_of(answer))) for answer in answers).lstrip()


def _normalised(text: Text) -> str:
    """A text with its white space collapsed, for comparison."""
    return " ".join(text_of(text).split())


def _leading_space(text: str) -> str:
    """The white space that opens a text."""
    return text[: len(text) - len(text.lstrip())]


def _requested(types: Sequence[str] | None) -> tuple[str, ...]:
    """The kinds asked for, all of TYPES when absent; raises for unknown ones."""
    unknown = [kind for kind in types or () if kind not in TYPES]
    if unknown or types is not None and not types:
        raise ValueError(f"types must be among {', '.join(TYPES)}; got {', '.join(unknown) or 'none'}")
    return TYPES if types is None else tuple(types)


def _require_present(types: Sequence[str] | None, table: Sequence[Mapping[str, Any]], hint: str) -> None:
    """Raise unless each kind that was asked for by name is in some row."""
    for kind in types or ():
        if all(row.get(kind) is None for row in table):
            raise ValueError(f"there is no {kind}: {hint}")


def _source_name(source: Source | None) -> str:
    """The source for error messages."""
    return str(source) if isinstance(source, (str, Path)) else "the data"
