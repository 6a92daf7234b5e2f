"""A file's answers as template and tokenizer make them: what the checks of data look at."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._encoding import Text, message_text, plain, tokenise
from ..data import ANSWERS, Row, template_of
from ..sequences import encode, token_texts


@dataclass(frozen=True)
class Answer:
    """One answer of a row with its prompt, as text and as tokens.

    Args:
        where: the row and the column, for messages.
        row: the row. key: its column.
        before, whole: the prompt's text, and that of prompt and answer.
        ids, scored: tokens of the whole, and which of them hold a character of the answer.
        opened: the prompt with what opens the answer, as a trainer renders it that masks by its length. head: its tokens.
        answer: what the data say the answer is, as one text.
        chat: whether a template made it.
    """

    where: str
    row: Row
    key: str
    before: str
    whole: str
    ids: list[int]
    scored: list[bool]
    opened: str
    head: list[int]
    answer: str
    chat: bool


@dataclass
class Texts:
    """The rows of a file with a tokenizer.

    Args:
        tokenizer: of the model that will be trained.
        rows: rows as `data.read` makes them.
        max_length: longest sequence in tokens of the training, None where it does not cut.
        assistant_only: the trainer takes its mask from the template's generation marks (TRL's assistant_only_loss).
        vocabulary: rows of the model's embedding, None where that is not known.
        eos: ids at which the model's generation ends, besides the tokenizer's.
        bad: rows that cannot be read, with the reason.

    Attributes:
        answers: what could be encoded. failed: what could not, and why.
    """

    tokenizer: Any
    rows: Sequence[Row]
    max_length: int | None = None
    assistant_only: bool = False
    vocabulary: int | None = None
    eos: frozenset[int] = frozenset()
    bad: Sequence[str] = ()
    answers: list[Answer] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for row in self.rows:
            for key, text in answers_of(row):
                try:
                    self.answers.append(encoded(self.tokenizer, row, key, text))
                except ValueError as error:
                    self.failed.append(f"{row.where}, {key}: {error}")

    @property
    def ends(self) -> frozenset[int]:
        """The ids that end an answer."""
        own = getattr(self.tokenizer, "eos_token_id", None)
        return self.eos | ({own} if own is not None else set())

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The texts of some tokens."""
        return list(token_texts(self.tokenizer, list(ids)))


def answers_of(row: Row) -> Iterator[tuple[str, Text]]:
    """The answers that a row holds, with their columns."""
    for key in ANSWERS:
        if row.get(key) is not None:
            yield key, row[key]
    for n, text in enumerate(row.get("completions") or [], 1):
        yield f"completion {n}", text


def encoded(tokenizer: Any, row: Row, key: str, text: Text) -> Answer:
    """One answer as `encode` makes it, and its prompt alone.

    Raises:
        ValueError: template or tokenizer fail, or there is no text to encode.
    """
    prompt, chat = row["prompt"], not isinstance(row["prompt"], str)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is a finding here
        chi = encode(tokenizer, prompt, text, eos=False, **template_of(row))
    opened = _opened(tokenizer, row) if chat else prompt
    head = tokenise(tokenizer, opened, opened, specials=not chat)[0] if opened else []
    ids, specials = chi.ids.tolist(), set(tokenizer.all_special_ids)
    while head and ids[: len(head)] != head and not chat and head[-1] in specials:
        head = head[:-1]  # what this tokenizer puts behind every text
    own = text if isinstance(text, str) else "".join(map(message_text, text))
    whole = chi.prompt + chi.response
    where = f"{row.where}, {key}"
    return Answer(where, row, key, chi.prompt, whole, ids, chi.scored.tolist(), opened, head, own, chat)


def _opened(tokenizer: Any, row: Row) -> str:
    """The prompt with what opens the answer, as a trainer renders it that masks by its length."""
    told = template_of(row).get("template", {})
    return str(tokenizer.apply_chat_template(plain(row["prompt"]), tokenize=False, add_generation_prompt=True, **told))
