"""Rows of a data file as sequences: every form that TRL's trainers take, plain or conversational, JSON, CSV or parquet.

    prompt, completion                  an answer; with label (true, false) one that is wanted or not (KTO)
    prompt, chosen, rejected            a pair; without prompt, what the two begin with is the prompt
    prompt, completions, rewards        sampled answers
    messages (or conversations)         a conversation: its last message, the assistant's, answers what is before it

A message has role and content, or from and value as in ShareGPT's files. Beside messages, the template is told the row's
`tools` (a list, or its JSON) and `chat_template_kwargs`.

Only what the assistant wrote as the answer is scored. An answer that repeats the prompt's conversation is taken from where
that ends; one with a message of anybody else behind it is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import _rows
from ._encoding import as_answer, as_messages, as_sentence, message_text, without_nulls
from .objective import Objective
from .objectives import KTO, DrGRPO
from .sequences import Chi, encode, preference, rollouts

FORMS = (("prompt", "chosen", "rejected"), ("prompt", "completions", "rewards"), ("prompt", "completion"))
ANSWERS = ("chosen", "rejected", "completion")


class Row(dict[str, Any]):
    """A row that knows its place for error messages, as in "pairs.jsonl line 3"."""

    where = ""


def read(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a file, checked and with an explicit prompt.

    Args:
        path: .jsonl, .ndjson or .json (one object a line, or an array), .csv with a header, or .parquet; the first four may
            be compressed (.gz). The forms of rows are in this module's first lines.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is empty or cannot be read, or a row is not what it should be (file and line are named).
    """
    return [checked_row(row, where) for where, row in objects(path)]


def read_part(path: str | Path, start: int, stop: int) -> tuple[list[dict[str, Any]], int]:
    """The rows start to stop - 1 of a file, from 0, as `read` has them, and how many the file has; only these are looked at.

    Raises:
        FileNotFoundError, ValueError: as `read`.

    Cost: a file of lines is gone through once, none but the rows asked for parsed; of a parquet file the rest is not read.
    """
    found, total = _rows.part(path, start, stop)
    return [checked_row(row, where) for where, row in found], total


def objects(path: str | Path) -> list[tuple[str, Any]]:
    """The objects in a file as `read` takes it, unchecked, each with its place for error messages ("pairs.jsonl line 3").

    Raises:
        FileNotFoundError: no such file. ValueError: it is empty or cannot be read (file and line are named).
    """
    return list(_rows.objects(path))


# ---------------------------------------------------------------- one form for every row


def canonical(row: Mapping[str, Any], where: str, answers: Sequence[str] = ANSWERS) -> Row:
    """A row with its prompt spelled out and none of it left in its answers (the columns `answers`).

    As TRL does (`extract_prompt`, `maybe_extract_prompt`): without a prompt, and where answers are conversations beside a
    plain prompt, it is what chosen and rejected begin with. A label becomes true or false.

    Raises:
        ValueError: no prompt can be found (`where` opens the message).
    """
    row = _conversational(row, where, answers)
    made = Row(row)
    made.where = where
    have = {key for key, value in row.items() if value is not None}
    if "messages" in have and not have & {"prompt", *ANSWERS, "completions"}:
        check_text(row["messages"], "messages", where)
        if not isinstance(row["messages"], list) or len(row["messages"]) < 2:
            raise ValueError(f"{where}: messages must be a list that ends in a question and the assistant's answer")
        made |= {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        del made["messages"]
    elif {"messages", "chosen", "rejected"} <= have and "prompt" not in have:
        made["prompt"] = made.pop("messages")
    elif "prompt" not in have and {"chosen", "rejected"} <= have:
        made["prompt"] = _shared(row["chosen"], row["rejected"], where)
        made |= {key: row[key][len(made["prompt"]) :] for key in ("chosen", "rejected")}
    elif isinstance(row.get("prompt"), str) and (told := [key for key in answers if _conversation(row.get(key))]):
        key = told[0]
        pair = {"chosen", "rejected"} <= set(told)
        history = _shared(row["chosen"], row["rejected"], where) if pair else row[key][:-1]
        if not any(isinstance(m, Mapping) and m.get("content") == row["prompt"] for m in history):
            raise ValueError(f"{where}: {key} is a conversation in which the prompt is no message: give the prompt as messages")
        made["prompt"] = history
    if isinstance(made.get("prompt"), list):
        made |= {key: _behind(made["prompt"], made[key]) for key in answers if key in made}
        if isinstance(made.get("completions"), list):
            made["completions"] = [_behind(made["prompt"], answer) for answer in made["completions"]]
    if made.get("label") is not None and "completion" in made and "chosen" not in have:
        made["label"] = _label(made["label"], where)
    return made


def _conversational(row: Mapping[str, Any], where: str, answers: Sequence[str]) -> dict[str, Any]:
    """A copy of a row whose messages have role and content, whose conversation is `messages` and whose tools are a list."""
    made = dict(row)
    with as_sentence(where):
        if made.get("conversations") is not None and made.get("messages") is None:
            made["messages"] = as_messages(made.pop("conversations"))
            system, first = made.get("system"), made["messages"][:1]
            if isinstance(system, str) and system and isinstance(first, list) and [m.get("role") for m in first] != ["system"]:
                made["messages"] = [{"role": "system", "content": system}, *made["messages"]]
        for key in ("prompt", "messages", *answers):
            if key in made:
                made[key] = as_messages(made[key])
        if isinstance(made.get("completions"), list):
            made["completions"] = [as_messages(answer) for answer in made["completions"]]
    if made.get("tools") is not None:
        made["tools"] = _tools(made["tools"], where)
    return made


def _tools(tools: Any, where: str) -> list[Any]:
    """The tools of a row, each what a template is told of a function."""
    try:
        found = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or []
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: tools is not JSON ({error.msg})") from None
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise ValueError(f"{where}: tools must be a list of objects, or its JSON, got {type(found).__name__}")
    return without_nulls(found)


def template_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the chat template is told of a row besides its messages, as the option of `encode`; nothing for a plain prompt."""
    if isinstance(row["prompt"], str):
        return {}
    told = ({"tools": row["tools"]} if row.get("tools") else {}) | without_nulls(dict(row.get("chat_template_kwargs") or {}))
    return {"template": told} if told else {}


def _conversation(answer: Any) -> bool:
    """Whether an answer is a list of more than one message."""
    return isinstance(answer, list) and len(answer) > 1


def _behind(prompt: list[Any], answer: Any) -> Any:
    """An answer without the conversation that it repeats."""
    repeats = isinstance(answer, list) and len(answer) > len(prompt) > 0 and answer[: len(prompt)] == prompt
    return answer[len(prompt) :] if repeats else answer


def _shared(chosen: Any, rejected: Any, where: str) -> Any:
    """What both begin with: messages, or characters without the space that opens an answer."""
    alike = isinstance(chosen, (str, list)) and type(chosen) is type(rejected)
    n = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None) if alike else None
    if n is not None and n > 0 and chosen[n - 1] == " ":
        n -= 1
    if not n:
        raise ValueError(f"{where}: without a prompt, chosen and rejected must begin alike and then differ: give the prompt")
    return chosen[:n]


def _label(value: Any, where: str) -> bool:
    """A label as true or false."""
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if str(value).lower() not in known:
        raise ValueError(f"{where}: label must be true or false (1 or 0), got {value!r}")
    return known[str(value).lower()]


def _form(row: dict[str, Any]) -> tuple[str, ...]:
    """Which of FORMS a row has, () if none; a null counts as absent (parquet fills columns with them)."""
    return next((form for form in FORMS if all(row.get(key) is not None for key in form)), ())


def checked_row(row: Any, where: str) -> Row:
    """A row as `canonical` makes it, if it has one of FORMS with values of the right types; `where` opens the message."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} must be an object, got {type(row).__name__}")
    row = canonical(row, where)
    form = _form(row)
    if not form:
        wanted = " or ".join(f"({', '.join(keys)})" for keys in FORMS)
        have = ", ".join(key for key, value in row.items() if value is not None) or "nothing"
        raise ValueError(f"{where} must have {wanted}, or messages; it has {have}")
    if "rewards" in form:
        texts, rewards = row["completions"], row["rewards"]
        if not isinstance(texts, list) or not isinstance(rewards, list) or len(texts) != len(rewards) or not texts:
            raise ValueError(f"{where}: completions and rewards must be two lists of one length")
        if not all(type(r) in (bool, int, float) and math.isfinite(r) for r in rewards):
            raise ValueError(f"{where}: rewards must be finite numbers, got {rewards}")
    for key in form:
        for value in row[key] if key == "completions" else [] if key == "rewards" else [row[key]]:
            check_text(value, key, where)
    return row


def check_text(value: Any, key: str, where: str) -> None:
    """Raise unless a value is text, or a list of chat messages, with something in it; `where` opens the message.

    Everything but a prompt and messages is an answer, whose messages are the assistant's.
    """
    if not isinstance(value, (str, list)):
        raise ValueError(f"{where}: {key} must be text or a list of messages, got {type(value).__name__}")
    answer = key not in ("prompt", "messages")
    texts = [value] if isinstance(value, str) else []
    if isinstance(value, list):
        for message in value:
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise ValueError(f"{where}: every message of {key} must have a role and a content")
        with as_sentence(f"{where}: {key} cannot be taken"):
            texts = [message_text(message) for message in value]
            if answer and value:
                as_answer(value)
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: {key} holds half a character at place {error.start} (a surrogate without its other half)"
            ) from None
    calls = isinstance(value, list) and any(message.get("tool_calls") for message in value)
    if not ("".join(texts).strip() or calls) and (answer or value == []):
        raise ValueError(f"{where}: {key} is empty, so there is nothing to {'score' if answer else 'answer'}")


def sequences(tokenizer: Any, rows: Sequence[Mapping[str, Any]], objective: Objective, **options: Any) -> list[Chi]:
    """The sequences an objective trains on, row by row (group = number of the row).

    A preference row serves every objective: supervised ones learn the chosen answer, policy gradients take the two answers
    as a group with rewards 1 and 0 (Dr. GRPO's advantages are not divided by their spread). A labelled completion is chosen
    or rejected, for KTO. Options as in `encode`.

    Raises:
        ValueError: the objective needs pairs or groups and a row has one completion only, or a row's template or tokenizer
            fails (the row is named).
    """
    chis: list[Chi] = []
    for i, (where, row) in enumerate(_named(rows)):
        with as_sentence(where):
            chis += _trained(tokenizer, row, objective, where, template_of(row) | options | {"group": i})
    return chis


def row_sequences(tokenizer: Any, row: Any, objective: Objective, where: str, **options: Any) -> list[Chi]:
    """The sequences an objective trains on of one row as it stands in a file; `where` opens every message.

    Raises:
        ValueError: see `read` and `sequences`.
    """
    checked = checked_row(row, where)
    with as_sentence(where):
        return _trained(tokenizer, checked, objective, where, template_of(checked) | options | {"group": 0})


def _trained(tokenizer: Any, row: Row, objective: Objective, where: str, options: dict[str, Any]) -> list[Chi]:
    """What an objective trains on of one row."""
    pair, group, prompt = "chosen" in _form(row), "completions" in _form(row), row["prompt"]
    if objective.reads == "completion":
        texts = [row["chosen"]] if pair else row["completions"] if group else [row["completion"]]
        role = "chosen" if pair else _role(row)
        return [encode(tokenizer, prompt, text, role=role, **options) for text in texts]
    if objective.reads == "preference" and pair:
        return preference(tokenizer, prompt, row["chosen"], row["rejected"], **options)
    if isinstance(objective, KTO) and row.get("label") is not None and not group:
        return [encode(tokenizer, prompt, row["completion"], role=_role(row), **options)]
    if objective.reads == "rollouts" and (pair or group):
        texts = [row["chosen"], row["rejected"]] if pair else row["completions"]
        rewards = [1.0, 0.0] if pair else [float(r) for r in row["rewards"]]
        scaled = {"scale": not isinstance(objective, DrGRPO)} | options
        made = rollouts(tokenizer, prompt, texts, rewards, **scaled)
        roles = ("chosen", "rejected") if pair else ["response"] * len(made)
        return [chi.with_(role=role) for chi, role in zip(made, roles, strict=True)]
    more = {"rollouts": ", or completions and rewards"}.get(objective.reads, "")
    more = ", or completion and label" if isinstance(objective, KTO) else more
    have = ", ".join(key for key, value in row.items() if value is not None)
    raise ValueError(f"{where}: {type(objective).__name__} needs chosen and rejected{more} in every row; this one has {have}")


def watched(tokenizer: Any, rows: Sequence[Mapping[str, Any]], first_group: int = 0, **options: Any) -> list[Chi]:
    """Every answer of the rows as a sequence to observe, whatever the objective trains on; arguments as in `sequences`."""
    chis: list[Chi] = []
    for i, (where, row) in enumerate(_named(rows), first_group):
        given = template_of(row) | options | {"group": i}
        with as_sentence(where):
            if "chosen" in _form(row):
                chis += preference(tokenizer, row["prompt"], row["chosen"], row["rejected"], **given)
            else:
                for text in row["completions"] if "completions" in _form(row) else [row["completion"]]:
                    chis.append(encode(tokenizer, row["prompt"], text, role=_role(row), **given))
    return chis


def _named(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Row]]:
    """Rows with their places; those that `read` did not make are checked here."""
    return [
        (row.where, row) if isinstance(row, Row) else (f"row {n}", checked_row(row, f"row {n}"))
        for n, row in enumerate(rows, 1)
    ]


def _role(row: Row) -> str:
    """The role of a row's completion: its label, where it has one."""
    return "response" if row.get("label") is None else "chosen" if row["label"] else "rejected"
