"""Two runs as one page, the difference first: no script, so that it reads anywhere."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from .._arguments import UNITS
from ..runs.difference import Difference
from ..runs.notebook import coloured, drawn
from ..sequences import visible
from .text import signed


def render(found: Difference, names: tuple[str, str]) -> str:
    """The page of two runs: what was asked differently, what each answer's change became, and what changed most.

    Args:
        found: their difference.
        names: what they are called, their folders.
    """
    import jinja2
    from markupsafe import Markup

    rows = [
        {"place": found.a.place(pair.a), "token": visible(pair.a["token"]), "log_prob": _three(pair, "log_prob"),
         "force": _three(pair, "force")}
        for pair in found.observed
    ]  # fmt: skip
    tokens = [pair.a["token"] for pair in found.observed]
    texts = {
        column: Markup(coloured(tokens, [pair.change(column) or 0.0 for pair in found.observed], found.names))  # escaped there
        for column in ("log_prob", "force")
    }
    picture = None
    if found.matrix is not None:
        picture = Markup(drawn(found.matrix, tokens, found.places[1]))
    folder = files(__package__)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(folder.joinpath("diff.html.jinja").read_text("utf-8")).render(
        style=Markup(folder.joinpath("static", "page.css").read_text("utf-8")),
        names=names,
        found=found,
        answers={name: {key: signed(x) for key, x in sums.items()} | {
            "log_prob": signed(sums["log_prob_b"] - sums["log_prob_a"]), "force": signed(sums["force_b"] - sums["force_a"]),
            "tokens": f"{sums['tokens']:.0f}"} for name, sums in found.answers().items()},
        most={column: [rows[i] for i in found.most(column)] for column in ("log_prob", "force")},
        pushes=[(rows[m], by, signed(change)) for m, by, change in found.pushes()],
        texts=texts,
        picture=picture,
        unit=UNITS[found.unit],
        same=not any(pair.change("log_prob") for pair in found.observed),
    )  # fmt: skip


def _three(pair: Any, column: str) -> tuple[str, str, str]:
    """A column in a, in b, and its change."""
    return signed(pair.a[column]), signed(pair.b[column]), signed(pair.change(column) or 0.0)
