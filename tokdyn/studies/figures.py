"""Figures that are read without the paper: colours that everyone can tell apart, few lines, and SVG that follows the page.

The title of a figure states its finding, its axes name quantity and unit. Colours are Okabe and Ito's. In the SVG every
colour is a CSS variable, so that one file is right on light and on dark paper.
"""

from __future__ import annotations

import io
import re
from typing import Any

INK, GRID, PAPER = "#1b1d20", "#dcdedf", "#fefefe"
BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
SKY, PURPLE, YELLOW, GREY = "#56b4e9", "#cc79a7", "#f0e442", "#7a8087"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY, GREY, YELLOW)
DARK = {INK: "#e7e8ea", GRID: "#383c41", PAPER: "#16181a", BLUE: "#4ba3e3", GREEN: "#2fc79b", VERMILION: "#f0803c",
        GREY: "#9aa1a8", PURPLE: "#dd8cc4"}  # fmt: skip
FONTS = "DejaVu Sans, Verdana, sans-serif"


def figure(rows: int = 1, columns: int = 1, *, width: float = 9.0, height: float = 3.6, title: str = "", **options: Any) -> Any:
    """A matplotlib figure and its axes [rows, columns] (one Axes for 1 x 1), made without pyplot: nothing is kept open.

    Args:
        rows, columns: panels.
        width, height: inches; height is that of one row.
        title: the finding, above all panels.
        options: further arguments of Figure.subplots, e.g. sharey=True.
    """
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    style = {
        "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "axes.titlelocation": "left",
        "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.grid": True, "grid.color": GRID,
        "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.facecolor": "none", "legend.frameon": False, "legend.fontsize": 8,
        "lines.linewidth": 1.6, "axes.prop_cycle": cycler(color=COLOURS), "mathtext.fontset": "dejavusans",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        made = Figure(figsize=(width, height * rows), layout="constrained", facecolor=PAPER)
        axes = made.subplots(rows, columns, **options)
        if title:
            made.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return made, axes


def band(axes: Any, x: Any, runs: Any, colour: str, label: str | None = None, **options: Any) -> None:
    """Mean over runs [n, len(x)] as a line, and its pointwise 95% interval (Student's t) as a band of the same colour."""
    import numpy as np
    from scipy.stats import t

    runs = np.asarray(runs, dtype=float)
    mean, n = runs.mean(0), len(runs)
    axes.plot(x, mean, color=colour, label=label, **options)
    if n > 1:
        half = t.ppf(0.975, n - 1) * runs.std(0, ddof=1) / n**0.5
        axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)


def svg(figure: Any, name: str, *, inline: bool) -> str:
    """The figure as SVG text: a part of a page (inline), or a file of its own, with colours for light and for dark paper.

    Args:
        figure: a matplotlib Figure.
        name: what its ids begin with, so that several figures share a page; also the seed of the ids, which makes the text
            the same each time.
        inline: leave the definition of the colours to the page (`style`).
    """
    import matplotlib

    for axes in figure.axes:  # titles and legends made outside the rc_context of `figure`
        text, legend = axes.get_title(), axes.get_legend()
        if text:
            axes.set_title("")
            axes.set_title(text, loc="left", fontsize=9)
        if legend is not None:
            legend.set_frame_on(False)
            for each in [*legend.get_texts(), legend.get_title()]:
                each.set_fontsize(8)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", buffer.getvalue()[buffer.getvalue().index("<svg") :], flags=re.S)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour in DARK:
        text = re.sub(re.escape(colour), f"var(--f{colour[1:]})", text, flags=re.I)
    text = re.sub(r"'DejaVu Sans'(, sans-serif)?", FONTS, text)
    title = figure.get_suptitle() or name
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;").replace("\n", " ")
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}"'
    size = "" if inline else f' width="{width}pt" height="{height}pt"'
    own = "" if inline else f"<style>{style(':root')}</style>\n"
    return f'{head}{size} role="img" aria-label="{label}">\n{own}{text[text.index(">") + 1 :]}'


def style(root: str) -> str:
    """The CSS variables of all figures for light and for dark, set on one selector."""
    light = "".join(f"--f{colour[1:]}:{colour};" for colour in DARK)
    dark = "".join(f"--f{colour[1:]}:{other};" for colour, other in DARK.items())
    text = f"svg text{{fill:var(--f{INK[1:]})}}"  # legends and labels that name no colour of their own
    return f"{root}{{{light}}}@media(prefers-color-scheme:dark){{{root}{{{dark}}}}}{text}"
