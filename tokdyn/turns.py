"""Whose turn of a conversation each token stands in: system, user, assistant, its thinking, tool; read from the template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from os.path import commonprefix
from typing import Any

MARKS = {role: f"tokdyn-{role}-turn" for role in ("system", "user", "assistant", "tool")}
MARKUP = "markup"  # the template's own words between turns
THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Turns:
    """What a chat template writes before each role's content.

    Args:
        openers: by role, the text that opens its turn, without white space around it.
    """

    openers: Mapping[str, str]

    @classmethod
    def of(cls, tokenizer: Any) -> Turns | None:
        """From a tokenizer's template; None where it has none, or one that does not tell its roles apart."""
        if not getattr(tokenizer, "chat_template", None):
            return None
        before: dict[str, list[str]] = {}
        for talk in (("user", "assistant"), ("user", "assistant", "user", "assistant"),
                     ("user", "assistant", "tool", "assistant"), ("system", "user", "assistant")):  # fmt: skip
            for role, text in _between(tokenizer, talk):
                if _shared_end([*before.get(role, []), text]) or role not in before:  # a system's text may lie inside a turn
                    before.setdefault(role, []).append(text)
        openers = {role: _shared_end(texts) for role, texts in before.items()}
        if generation := _generation_prompt(tokenizer):
            openers["assistant"] = generation
        for role in ("system", "tool"):  # what also stands before another turn opens none of its own
            others = [text for other, texts in before.items() if other != role for text in texts]
            if any(openers.get(role, "") in text for text in others):
                openers.pop(role, None)
        openers = {role: text for role, text in openers.items() if text}
        known = {"user", "assistant"} <= openers.keys() and len(set(openers.values())) == len(openers)
        return cls(openers) if known else None

    def regions(self, text: str) -> list[tuple[int, int, str]]:
        """Where turns lie in a conversation's text, (first, past the last character, role), in order; empty if it has none."""
        names = sorted(self.openers, key=lambda role: -len(self.openers[role]))
        pattern = "|".join(f"(?P<{role}>{re.escape(self.openers[role])})" for role in names)
        found = list(re.finditer(pattern, text))
        starts = [*(match.start() for match in found[1:]), len(text)]
        return [(match.end(), end, str(match.lastgroup)) for match, end in zip(found, starts, strict=True)]

    def roles(self, texts: Sequence[str]) -> list[str] | None:
        """The role of each token by its last character; None where no turn opens in the text.

        texts: of the tokens, joined they spell the conversation with its special tokens.
        """
        whole = "".join(texts)
        of = [MARKUP] * (len(whole) + 1)
        regions = self.regions(whole)
        for start, end, role in regions:
            of[start:end] = [role] * (end - start)
            if role == "assistant":
                for thought in THINKING.finditer(whole[start:end]):
                    of[start + thought.start() : start + thought.end()] = ["thinking"] * (thought.end() - thought.start())
        ends = accumulate(len(text) for text in texts)
        return [of[max(end - 1, 0)] for end in ends] if regions else None


def _made(tokenizer: Any, roles: Sequence[str], **options: Any) -> str | None:
    """A conversation of marked turns as the template renders it; None where it cannot or will not."""
    try:
        talk = [{"role": role, "content": f"{MARKS[role]}-{n}"} for n, role in enumerate(roles)]
        return str(tokenizer.apply_chat_template(talk, tokenize=False, **options))
    except Exception:  # whatever a template raises, it does not take these turns
        return None


def _between(tokenizer: Any, roles: Sequence[str]) -> list[tuple[str, str]]:
    """The role of each turn and what stands between it and the one before."""
    text = _made(tokenizer, roles)
    marks = [f"{MARKS[role]}-{n}" for n, role in enumerate(roles)]
    if text is None or any(mark not in text for mark in marks):
        return []
    places = [text.index(mark) for mark in marks]
    ends = [0, *(place + len(mark) for place, mark in zip(places, marks, strict=True))]
    return [(role, text[end:place]) for role, end, place in zip(roles, ends, places, strict=False)]


def _generation_prompt(tokenizer: Any) -> str:
    """What opens an answer that is to be generated, without an opened thought."""
    without, opened = _made(tokenizer, ("user",)), _made(tokenizer, ("user",), add_generation_prompt=True)
    if without is None or opened is None or not opened.startswith(without):
        return ""
    return opened[len(without) :].partition("<think>")[0].strip()


def _shared_end(texts: Sequence[str]) -> str:
    """What all of some texts end with, without white space around it."""
    return commonprefix([text[::-1] for text in texts])[::-1].strip().lstrip(">")  # what closes a tag opens nothing
