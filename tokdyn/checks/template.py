"""The checks of a chat template: what it drops, cuts, and marks as generated."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .._encoding import message_text, plain
from .finding import FINE, SUSPICIOUS, WRONG, Finding, rows_of
from .texts import Texts

GENERATION = "{% generation"  # transformers' mark of what the model writes; also spelled {%- generation
CUT = "each turn becomes another text than was generated: split conversations so that each answer is the last message"
TALK = ("system", "user", "assistant", "tool", "user", "assistant")


def messages_in_the_text(texts: Texts) -> list[Finding]:
    """Whether every message stands in the text that the template makes: system roles dropped, thoughts cut."""
    rendered = [answer for answer in texts.answers if answer.chat]
    if not rendered:
        return []
    dropped: dict[str, list[tuple[str, str]]] = {}
    for answer in rendered:
        for message in answer.row["prompt"]:
            _note(dropped, answer.where, str(message.get("role")), message_text(message), answer.before)
        _note(dropped, answer.where, "the answer", answer.answer, answer.whole[len(answer.before) :])
    found = []
    for role, places in dropped.items():
        thought = all("<think>" in diff for _, diff in places)
        level = SUSPICIOUS if thought and role != "the answer" else WRONG
        what = f"the template {'cuts the thoughts of' if thought else 'drops'} {role}" + (" messages" * (role != "the answer"))
        where = f"{rows_of([place for place, _ in places])}; {places[0][1]}"
        do = CUT if thought else "use a template that writes them, or put their text into a role that it writes"
        found.append(Finding("template", level, what, where, len(places), "messages", do))
    n = len({answer.where for answer in rendered})
    return found or [Finding("template", FINE, "every message stands in the text that the template makes", "", n, "answers")]


def _note(dropped: dict[str, list[tuple[str, str]]], where: str, role: str, content: str, text: str) -> None:
    """Note a message whose words are not in the text, with what is missing of it."""
    if content.strip() and content.strip() not in text:
        dropped.setdefault(role, []).append((where, f"- {_missing(content, text)!r}"))


def _missing(content: str, text: str) -> str:
    """The words of a message that a text lacks."""
    a, b = content.split(), text.split()
    gone = [" ".join(a[i:j]) for kind, i, j, _, _ in difflib.SequenceMatcher(None, a, b, False).get_opcodes()
            if kind in ("delete", "replace")]  # fmt: skip
    shown = " … ".join(gone) or content
    return shown if len(shown) <= 120 else f"{shown[:100]}…"


def generation_marks(texts: Texts) -> list[Finding]:
    """Whether the template marks what the model writes, and marks the assistant's turns alone and whole."""
    template = getattr(texts.tokenizer, "chat_template", None)
    if not template or not any(answer.chat for answer in texts.answers):
        return []
    template = template if isinstance(template, str) else " ".join(map(str, template.values()))
    if GENERATION not in template.replace("{%-", "{%"):
        if not texts.assistant_only:
            return [Finding("marks", FINE, "the template has no generation marks: assistant_only_loss would need them")]
        what = "the template has no generation marks: a mask of assistant tokens is empty"
        do = "put {% generation %} … {% endgeneration %} around what the assistant writes (TRL patches some templates)"
        return [Finding("marks", WRONG, what, do=do)]
    masked, others = _marked_turns(texts)
    if masked is None:
        return []
    found = []
    if wrong := [role for role in ("system", "user", "tool") if any(mark in masked for mark in others[role])]:
        what = f"the template's generation marks take in the turn of {' and '.join(wrong)}, which is scored then"
        found.append(Finding("marks", WRONG, what, masked[:120], do="close {% endgeneration %} before the next turn"))
    if lost := [mark for mark in others["assistant"] if mark not in masked]:
        what = f"the template's generation marks leave out {len(lost)} of {len(others['assistant'])} turns of the assistant"
        found.append(Finding("marks", WRONG, what, masked[:120], len(lost), "turns", "mark every turn of the assistant"))
    closing = [token for token in texts.tokenizer.all_special_tokens if token in masked]
    if not found and not closing:
        what = "the template's generation marks end before the token that closes the turn: it is never scored"
        found.append(Finding("EOS", WRONG, what, masked[-60:], do="close {% endgeneration %} behind that token"))
    return found or [Finding("marks", FINE, "generation marks take in the assistant's turns and nothing else")]


def _marked_turns(texts: Texts) -> tuple[str | None, Mapping[str, list[str]]]:
    """The text that the template marks as generated in a conversation of marked turns, and the words of each role."""
    for roles in (TALK, tuple(r for r in TALK if r != "tool"), ("user", "assistant", "user", "assistant")):
        marks = [f"tokdynmark{n} {role}word{n}" for n, role in enumerate(roles)]
        talk = plain([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)])
        try:
            made: Any = texts.tokenizer.apply_chat_template(
                talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception:  # this template does not take such a conversation: try a plainer one
            continue
        ids, mask = made["input_ids"], made["assistant_masks"]
        masked = "".join(text for text, on in zip(texts.tokens(ids), mask, strict=True) if on)
        of: dict[str, list[str]] = {role: [] for role in ("system", "user", "assistant", "tool")}
        for n, role in enumerate(roles):
            of[role].append(f"{role}word{n}")
        return masked, of
    return None, {}


CHECKS: tuple[Callable[[Texts], Sequence[Finding]], ...] = (messages_in_the_text, generation_marks)
