"""What the tests of pages read out of their HTML."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any


class Tags(HTMLParser):
    """Collects the start tags of a page, and the text of each <script> and <style>."""

    def __init__(self, html: str) -> None:
        """Parse `html`."""
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the tag; scripts and styles wait for their text."""
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        """Keep text, with the script or style it belongs to."""
        if self.cdata_elem:
            tag, attrs, text = self.raw.pop()
            self.raw.append((tag, attrs, text + data))
        else:
            self.text.append(data)

    @property
    def words(self) -> str:
        """The visible text, white space collapsed."""
        return " ".join(" ".join(self.text).split())


def payload_of(html: str) -> dict[str, Any]:
    """Return the data embedded in a page."""
    (text,) = [text for _, attrs, text in Tags(html).raw if attrs.get("id") == "payload"]
    return json.loads(text)
