"""From messages and texts to token ids: templates, tokenizers, and which tokens hold a character of the answer."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Text = str | Sequence[Message]
MARKER = "tokdyn-marks-the-answer"


@contextlib.contextmanager
def as_sentence(what: str) -> Iterator[None]:
    """Turn what a user's template, tokenizer or row raises inside into a ValueError that begins with `what`."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, ValueError) and text.startswith(what):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{text}") from error


# who speaks in ShareGPT's form of a message, {"from": ..., "value": ...}, by the role that templates know
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool",
            **{role: role for role in ("user", "assistant", "system", "tool")}}  # fmt: skip


def as_messages(value: Any) -> Any:
    """Messages of ShareGPT's form (from, value) as (role, content), a single message as a list of it; all else as it is.

    Fields that are null, as parquet fills in, are left out: templates ask whether a field is there.

    Raises:
        ValueError: somebody else speaks than SPEAKERS names.
    """
    if isinstance(value, Mapping) and ({"from", "value"} <= set(value) or {"role", "content"} <= set(value)):
        value = [value]
    if not isinstance(value, list):
        return value
    return [_as_message(message) if isinstance(message, Mapping) else message for message in value]


def _as_message(message: Message) -> dict[str, Any]:
    """One of them."""
    made = without_nulls(message)
    if "role" not in made and {"from", "value"} <= set(made):
        speaker = made.pop("from")
        if speaker not in SPEAKERS:
            raise ValueError(f"no template knows who {speaker!r} is: a message is from one of {', '.join(SPEAKERS)}")
        made = {"role": SPEAKERS[speaker], "content": made.pop("value")} | made
    if made.get("tool_calls"):
        made.setdefault("content", "")
    return made


def without_nulls(value: Any) -> Any:
    """A copy without the fields that are None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def message_text(message: Message) -> str:
    """The content of a chat message as one text; parts of type "text" are joined.

    Raises:
        ValueError: it is neither text nor a list of such parts.
    """
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"every content must be text or a list of parts, got {type(content).__name__}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            shown = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f'every part of a content must have type "text" and a text, got {shown!r}')
    return "".join(part["text"] for part in content)


def plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Chat messages whose contents are texts, as templates for text expect them."""
    return [{**message, "content": message_text(message)} for message in messages]


def as_answer(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages of a response, contents as texts.

    Raises:
        ValueError: there is none, or one is not the assistant's: what nobody wrote as an answer is not scored.
    """
    for message in messages:
        if message.get("role") != "assistant":
            raise ValueError(f"a response must hold messages of the assistant alone, got one of {message.get('role')!r}")
    if not messages:
        raise ValueError("a response must hold a message of the assistant, got none")
    return plain(messages)


def render(tokenizer: Any, prompt: Sequence[Message], answer: Sequence[Message], told: Mapping[str, Any]) -> tuple[str, str]:
    """Render a conversation with the chat template: the text of the prompt, a prefix of the whole text, and the whole text.

    `told` is what the template is told besides the messages: tools, enable_thinking and the like.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the data is conversational but the tokenizer has no chat template: give plain text instead")

    def made(messages: Sequence[Message], **options: Any) -> str:
        with as_sentence("the chat template failed"):
            return tokenizer.apply_chat_template(list(messages), tokenize=False, **told, **options)

    whole, before = made([*prompt, *answer]), made(prompt, add_generation_prompt=True)
    if before == made(prompt) or not whole.startswith(before):
        # no generation prompt, or one that the whole text does not repeat: a marker in the answer's place says where it starts
        before, found, _ = made([*prompt, {**answer[0], "content": MARKER}, *answer[1:]]).rpartition(MARKER)
        if not found or not whole.startswith(before):
            raise ValueError("the chat template does not reproduce the response, so its tokens cannot be found")
    return before, whole


def tokenise(tokenizer: Any, before: str, whole: str, *, specials: bool) -> tuple[list[int], list[bool]]:
    """Token ids of the whole text, and which of them hold a character behind `before`, the prompt."""
    if getattr(tokenizer, "is_fast", False):
        with as_sentence("the tokenizer failed"):
            encoding = _exact_offsets(tokenizer).encode(whole, add_special_tokens=specials)
        scored, inside = [], False
        for (_, end), special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
            inside = inside or end > len(before)
            scored.append(inside if special else end > len(before))  # a special token scores when it closes the response
        return list(encoding.ids), scored
    with as_sentence("the tokenizer failed"):
        ids, head = (tokenizer(text, add_special_tokens=specials).input_ids for text in (whole, before))
    while head and ids[: len(head)] != head and head[-1] in tokenizer.all_special_ids:
        head = head[:-1]  # the end-of-sequence token that this tokenizer puts behind every text
    if ids[: len(head)] != head:
        raise ValueError("this tokenizer gives no offsets and merges prompt and response into one token: use its fast version")
    return list(ids), [t >= len(head) for t in range(len(ids))]


_untrimmed_cores: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def _exact_offsets(tokenizer: Any) -> Any:
    """A copy of the tokenizer's Rust core without `trim_offsets`, so that offsets cover the space a token begins with."""
    from tokenizers import Tokenizer

    own = tokenizer.backend_tokenizer
    state = (len(tokenizer), *(part.__getstate__() for part in (own.normalizer, own.pre_tokenizer, own.post_processor)))
    known = _untrimmed_cores.get(tokenizer)
    if known is not None and known[0] == state:
        return known[1]

    def untrimmed(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: False if k == "trim_offsets" else untrimmed(v) for k, v in node.items()}
        return [untrimmed(v) for v in node] if isinstance(node, list) else node

    description = json.loads(own.to_str())
    for part in ("pre_tokenizer", "post_processor"):
        description[part] = untrimmed(description[part])
    core = Tokenizer.from_str(json.dumps(description))
    core.no_padding()
    core.no_truncation()
    _untrimmed_cores[tokenizer] = (state, core)
    return core
