"""What every answer of `tokdyn serve` has: its headers, a plain page around a body, and names that stay inside the folder."""

from __future__ import annotations

from html import escape
from pathlib import Path
from urllib.parse import quote

POLICY = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
          "Cross-Origin-Resource-Policy": "same-origin", "X-Frame-Options": "DENY"}  # fmt: skip
STYLE = """:root{color-scheme:light dark;font:15px/1.5 system-ui,sans-serif}body{max-width:70em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;width:100%}td,th{padding:3px 12px 3px 0;text-align:left;border-top:1px solid #8884}
textarea{display:block;width:100%;box-sizing:border-box;font:inherit}fieldset{margin:1em 0;border:1px solid #8884}
label{display:block;margin:.4em 0}pre{white-space:pre-wrap}"""


def within(root: Path, name: str) -> Path | None:
    """The folder of that name below the root, None where it is none or lies elsewhere, links followed."""
    try:
        path = (root / name).resolve()
    except (OSError, ValueError):
        return None
    return path if path.is_relative_to(root) and path.is_dir() else None


def document(title: str, body: str, head: str = "") -> str:
    """A page with a title, which it escapes, and a body, which is HTML."""
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)} · tokdyn</title>{head}'
            f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>{STYLE}</style></head>'
            f'<body><h1>{escape(title)}</h1>{body}</body></html>')  # fmt: skip


def quoted(name: str) -> str:
    """A name as it stands in an address."""
    return quote(name)
