"""What a notebook shows of a result: a sentence, a compact matrix or coloured tokens, a short table. No script, no style sheet.

Blue lifts, orange lowers, on white in every theme, as on the pages. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..sequences import visible
from .watched import is_log_prob, watched

SIDE = 64  # rows and columns of a drawn matrix; a larger one is drawn as sums of blocks
STRONGEST = 5


def _rate(about: Mapping[str, Any]) -> str:
    """The unit of forces, and on what they are where that is no log-probability."""
    of = "" if is_log_prob(about) else f" of the {watched(about)['label']}"
    return f"{watched(about)['unit']}{of} per unit learning rate"


def forces_html(forces: Any) -> str:
    """Of `Forces`: the matrix and the strongest pairs, or the tokens of a reduction."""
    what = f"Forces, scope {forces.scope}, {_rate({'observable': forces.observable})}"
    if forces.reduce == "both":
        parts = [(name, f"{float(part):+.4g}") for name, part in (forces.parts or {}).items()]
        return page(f"{what}: the whole step on all that is observed, {float(forces.vector):+.4g}.",
                    rows_html(("part", "force"), parts) if parts else "")  # fmt: skip
    if forces.vector is not None:
        table = forces.observed if forces.reduce == "update" else forces.updated
        told = "the whole step on each observed token" if forces.reduce == "update" else "each update token on what is observed"
        return page(f"{what}: {told}.", coloured(table["token"].to_pylist(), forces.vector))
    if forces.matrix is None:
        return page(f"{what}: a matrix in {forces.shards.path}, read by .shards.")
    return page(
        f"{what}: {sized(forces.matrix)}. Rows are observed tokens, columns update tokens.",
        drawn(forces.matrix, forces.observed["token"].to_pylist(), forces.updated["token"].to_pylist()),
        strongest(forces.matrix, forces.observed["token"].to_pylist(), forces.updated["token"].to_pylist()),
    )


def verification_html(found: Any) -> str:
    """Of `Verification`: whether the prediction held."""
    held = "The prediction holds" if abs(found.linearity - 1) < 0.1 else "The step is too large for the prediction"
    rows = [(f"{eta:.3g}", f"{residual:.3g}") for eta, residual in zip(found.etas, found.residuals, strict=True)]
    return page(
        f"{held}: slope {found.linearity:.3f} of actual against predicted change at eta = {found.eta:.3g}; the difference "
        f"shrinks with order {found.order:.2f} (2 where first order is right).",
        rows_html(("eta", "‖actual - predicted‖, nats"), rows),
    )


def kernel_html(kernel: Any) -> str:
    """Of `Kernel`: the norms of its blocks."""
    observed, updated = kernel.observed["token"].to_pylist(), kernel.updated["token"].to_pylist()
    how = "exact" if kernel.samples is None else f"{kernel.samples} probes"
    return page(
        f"‖K‖ of {sized(kernel.norm)} blocks, scope {kernel.scope}, {how}, per unit learning rate.",
        drawn(kernel.norm, observed, updated),
        strongest(kernel.norm, observed, updated, "‖K‖"),
    )


def run_html(run: Any) -> str:
    """Of `Run`: the observed answers coloured by their change, what was found, and where the page is."""
    about, rows = run.about, [row for row in run.tokens.to_pylist() if row["side"] == "observed"]
    eta = about["settings"].get("eta")
    title = f"{about['objective']['name']} on {about['model']['name']}" + (f", eta = {eta:.3g}" if eta else ", no step")
    changes = [row["force"] if row["actual"] is None else row["actual"] for row in rows]
    unit = _rate(about) if eta is None else _rate(about).replace("per unit learning rate", "after the step")
    findings = "".join(f"<li><b>{escape(each['title'])}.</b> {escape(each['text'])}</li>" for each in about["findings"])
    place = [f"<p>Page: {escape(str(run.path))}/report.html</p>"] if run.path else []
    of = [row["sequence"] for row in rows]
    return page(f"{title}. Observed tokens by their change, {unit}.", coloured([row["token"] for row in rows], changes, of),
                f"<ul>{findings}</ul>", *place)  # fmt: skip


def step_html(step: Any) -> str:
    """Of a recorded training step: its figures, and its notes."""
    rows = [(name, f"{value:.4g}") for name, value in step.metrics.items()]
    notes = "".join(f"<li>{escape(note)}</li>" for note in step.notes)
    return page(
        f"Step {step.step}: {len(step.c)} scored tokens, self-check {step.residual:.1e}.",
        rows_html(("figure", "value"), rows),
        f"<ul>{notes}</ul>" if notes else "",
    )


def scan_html(scan: Any) -> str:
    """Of a scan: what all rows together do to each group, how many of them hurt it, and which most."""
    forces: dict[str, list[float]] = {name: [] for name in scan.groups}
    numbers, tokens = list[int](), 0
    for table in scan.each("rows.parquet", ["row", "problem", "tokens", *(f"force_{name}" for name in forces)]):
        kept = [row for row in table.to_pylist() if row["problem"] is None]
        numbers += [row["row"] for row in kept]
        tokens += sum(row["tokens"] for row in kept)
        for name, of in forces.items():
            of += [row[f"force_{name}"] for row in kept]
    rows = []
    for name, of in forces.items():
        values = torch.tensor(of, dtype=torch.float64) / max(1, scan.tokens_of[name])
        hurting, worst = f"{float((values < 0).double().mean()):.0%}" if of else "", values.argsort()[:STRONGEST].tolist()
        named = ", ".join(f"{numbers[i] + 1} ({float(values[i]):+.3g})" for i in worst if values[i] < 0)
        rows.append((name, f"{float(values.mean()):+.4g}" if of else "", hurting, named))
    whole = "" if scan.size is None else f" of {scan.size:,}"
    return page(
        f"{scan.about['objective']['name']} on {scan.about['model']['name']}: {len(numbers):,}{whole} rows, {tokens:,} update "
        f"tokens. Force of a row on the mean {scan.watched['label']} of a group, {_rate(scan.about)}.",
        rows_html(("group", "mean", "rows that lower it", "lower it most"), rows),
    )


def page(sentence: str, *parts: str) -> str:
    """The parts below a sentence."""
    return f'<div style="max-width:60em"><p>{escape(sentence)}</p>{"".join(parts)}</div>'


def sized(matrix: Tensor) -> str:
    """The size of a matrix in words: 26 × 51."""
    return " × ".join(map(str, matrix.shape))


def rows_html(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text cells."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def strongest(matrix: Float[Tensor, "M L"], observed: Sequence[str], updated: Sequence[str], name: str = "force") -> str:
    """The entries of largest magnitude, as a table."""
    L = matrix.shape[1]
    flat = matrix.detach().nan_to_num().flatten()
    order = flat.abs().topk(min(STRONGEST, len(flat))).indices.tolist()
    rows = [(visible(observed[i // L]), visible(updated[i % L]), f"{float(flat[i]):+.4g}") for i in order]
    return rows_html(("observed", "update", name), rows)


def drawn(matrix: Float[Tensor, "M L"], observed: Sequence[str], updated: Sequence[str]) -> str:
    """A matrix as a picture of at most SIDE × SIDE cells; hovering one says its tokens and its value."""
    (rows, of_row), (columns, of_column) = (_blocks(n) for n in matrix.shape)
    sums = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    wide = matrix.detach().cpu().double()
    sums.index_put_((of_row[:, None].expand(wide.shape), of_column.expand(wide.shape)), wide, accumulate=True)
    largest = float(sums.nan_to_num().abs().quantile(0.98)) or float(sums.nan_to_num().abs().max()) or 1.0
    cells = []
    for m, row in enumerate(sums.tolist()):
        for l, value in enumerate(row):  # noqa: E741
            said = f"{_span(observed, rows[m])} ← {_span(updated, columns[l])}: {value:+.4g}"
            cells.append(f'<rect x="{l}" y="{m}" width="1" height="1" fill="{colour(value / largest)}"><title>'
                         f"{escape(said)}</title></rect>")  # fmt: skip
    width = max(160, min(640, 10 * len(columns)))
    return (f'<svg viewBox="0 0 {len(columns)} {len(rows)}" width="{width}" shape-rendering="crispEdges" role="img" '
            f'aria-label="matrix of {sized(matrix)}" style="background:#fff">{"".join(cells)}</svg>')  # fmt: skip


def coloured(tokens: Sequence[str], values: Sequence[float] | Tensor, of: Sequence[int | str] | None = None) -> str:
    """Tokens as text, each on its colour; one paragraph for each sequence of `of`, which it begins with if that is a name."""
    numbers = [float(x) for x in values]
    sizes = sorted(abs(x) for x in numbers if math.isfinite(x))
    largest = (sizes[math.ceil(0.98 * len(sizes)) - 1] if sizes else 0.0) or 1.0
    parts, last = list[str](), None
    for i, (token, value) in enumerate(zip(tokens, numbers, strict=True)):
        if of is not None and of[i] != last:
            parts.append(("</p>" if parts else "") + '<p style="line-height:1.9">')
            last = of[i]
            if isinstance(last, str):
                parts.append(f'<span style="opacity:0.65;font-size:0.85em">{escape(last)}</span> ')
        parts.append(f'<span title="{value:+.4g}" style="background:{colour(value / largest)};color:{_ink(value / largest)};'
                     f'white-space:pre-wrap;border-radius:2px">{escape(token)}</span>')  # fmt: skip
    return "".join(parts) + ("</p>" if of is not None and parts else "")


RAMP = ((0xA8, 0x4E, 0x04), (0xFB, 0xB4, 0x5C), (0xF7, 0xF7, 0xF5), (0x93, 0xC4, 0xDF), (0x1D, 0x5F, 0xA6))


def colour(x: float) -> str:
    """Orange at -1, near white at 0, blue at 1; grey where there is no number."""
    if not math.isfinite(x):
        return "#9a9a9a"
    place = (min(1.0, max(-1.0, x)) + 1) / 2 * (len(RAMP) - 1)
    i = min(int(place), len(RAMP) - 2)
    low, high = RAMP[i], RAMP[i + 1]
    return "#" + "".join(f"{round(a + (place - i) * (b - a)):02x}" for a, b in zip(low, high, strict=True))


def _ink(x: float) -> str:
    """Black or white, whichever stands out more on the colour of x: WCAG's contrast of relative luminances."""
    parts = [int(colour(x)[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#fff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000"


def _blocks(n: int) -> tuple[list[tuple[int, int]], Tensor]:
    """The first and last of each block of rows that is drawn as one, and the block of each row."""
    height = math.ceil(n / SIDE) or 1
    spans = [(a, min(n, a + height) - 1) for a in range(0, n, height)]
    return spans, torch.arange(n) // height


def _span(tokens: Sequence[str], span: tuple[int, int]) -> str:
    """A token in quotes, or the first and last of several."""
    first, last = (f"“{visible(tokens[i])}”" for i in span)
    return first if span[0] == span[1] else f"{first} to {last}"
