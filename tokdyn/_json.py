"""JSON that somebody else wrote: texts that can be encoded, numbers that can be computed with, and one row held at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from typing import Any

DIGITS = 40  # of a whole number: more is no figure of a data set
LONGEST = 1 << 26  # bytes of one row: a compressed file of some kilobytes can hold gigabytes in one
PIECE = 1 << 16  # bytes that are read together, or as many as an item has had so far
SPACE = " \t\n\r"
BEHIND = {*SPACE, ",", "]"}  # an item of an array


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise json.JSONDecodeError(f"a number of {len(digits)} digits", "", 0)
    return int(digits)


_decoder = json.JSONDecoder(parse_int=_whole)


def _require_encodable(value: Any) -> Any:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise json.JSONDecodeError("a text with half of a surrogate pair", "", 0) from None
    return value


def loads(text: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError, UnicodeDecodeError: it is none, or holds what no data set does.
    """
    try:
        found = json.loads(text, parse_int=_whole)
        return _require_encodable(found) if b"\\ud" in text.lower() else found
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None


def array(read: Callable[[int], bytes]) -> Iterator[Any]:
    """The items of a JSON array, one after the other; what is held is one of them and the piece that it ends in.

    Args:
        read: the next bytes of the text, at most so many, and none at its end.

    Raises:
        json.JSONDecodeError: it is none, and where; an item has more than LONGEST bytes. UnicodeDecodeError: it is not UTF-8.
    """
    text = _Window(read)
    text.take("[")
    if text.next() == "]":
        text.take("]")
    else:
        while True:
            yield text.value()
            if text.next() == "]":
                text.take("]")
                break
            text.take(",")
    if text.next():
        raise text.error("Extra data")


class _Window:
    """The piece of a text that is held, and the place in it that has been read to."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self.read, self.decode = read, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def grow(self) -> None:
        """Let go of what has been read, and hold twice as much of the rest."""
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :], 0
        piece = self.read(max(PIECE, len(self.text)))
        self.text, self.ended = self.text + self.decode.decode(piece, final=not piece), not piece

    def next(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in SPACE:
                    return self.text[self.at]
                self.at += 1
            if self.ended:
                return ""
            self.grow()

    def take(self, character: str) -> None:
        """Go past a character that must come next."""
        if self.next() != character:
            raise self.error(f"Expecting {character!r} delimiter")
        self.at += 1

    def value(self) -> Any:
        """Go past a value that must come next: it ends where something behind it is held, or the file ends."""
        self.next()
        while True:
            try:
                found, end = _decoder.raw_decode(self.text, self.at)
                whole = self.ended or self.text[end : end + 1] in BEHIND  # a number may go on
                error = None if whole else self.error("Expecting ',' delimiter", end)
            except json.JSONDecodeError as raised:
                error = self.error(raised.msg, raised.pos)
            except RecursionError:
                raise self.error("nested too deeply") from None
            if error is None:
                found = _require_encodable(found) if "\\ud" in self.text[self.at : end].lower() else found
                self.at = end
                return found
            if self.ended:
                raise error
            if len(self.text) - self.at > LONGEST:
                raise self.error(f"an item of more than {LONGEST >> 20} MiB, or {error.msg}")
            self.grow()

    def error(self, message: str, at: int | None = None) -> json.JSONDecodeError:
        """An error that knows its line in the file."""
        raised = json.JSONDecodeError(message, self.text, self.at if at is None else at)
        raised.lineno += self.line - 1
        return raised
