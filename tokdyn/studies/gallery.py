"""A study on disk, and several of them as one page: `tokdyn study`.

A folder holds result.json (claims, verdicts, settings, versions), curves/*.parquet, <figure>.svg, section.html (its part of a
page) and page.html, the same as a page of its own. The gallery is put together from such folders alone.
"""

from __future__ import annotations

import datetime
import inspect
import json
import re
import shutil
import time
from collections.abc import Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from . import figures, load, names
from .result import Result

FORMAT = "tokdyn study 1"
PACKAGES = ("torch", "transformers", "numpy", "matplotlib", "scikit-learn")


def save(result: Result, module: ModuleType, out: Path, *, quick: bool, seed: int, seconds: float) -> dict[str, Any]:
    """Write the folder of a finished study, in place of an earlier one, and return what result.json holds.

    Raises:
        ValueError: `out` exists and is not the folder of a study.
    """
    from .. import __version__

    check_free(out)
    name = module.__name__.rpartition(".")[2].replace("_", "-")
    told = dict(
        format=FORMAT, study=name, title=result.title, about=inspect.getdoc(module) or "", notes=result.notes,
        claims=[dict(claim=c.claim, oracle=c.oracle, measured=c.measured, holds=bool(c.holds)) for c in result.claims],
        figures=list(result.figures), curves=list(result.curves), quick=quick, seed=seed, seconds=round(seconds, 1),
        date=datetime.date.today().isoformat(), versions={"tokdyn": __version__, **_versions()},
    )  # fmt: skip
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "curves").mkdir(parents=True)
    import pyarrow.parquet as parquet

    for key, table in result.curves.items():
        parquet.write_table(table, part / "curves" / f"{key}.parquet")
    drawn = {}
    for key, figure in result.figures.items():
        drawn[key] = figures.svg(figure, f"{name}-{key}", inline=True)
        (part / f"{key}.svg").write_text(figures.svg(figure, f"{name}-{key}", inline=False), "utf-8")
    (part / "result.json").write_text(json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    (part / "section.html").write_text(section(told, drawn), "utf-8")
    (part / "page.html").write_text(page([part]), "utf-8")
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    return told


def run_study(name: str, out: Path, *, quick: bool = False, seed: int = 0, data: Path | None = None) -> dict[str, Any]:
    """Run a study and save it in the folder `out`; returns what result.json holds.

    Args:
        name: as in `names`.
        out: the folder, new or of an earlier run.
        quick, seed: as for the study.
        data: handed to a study that takes a `data` folder.

    Raises:
        ValueError: there is no such study, or `out` holds something else.
    """
    module = load(name)
    check_free(out)
    start = time.perf_counter()
    given = {"data": data} if data is not None and "data" in inspect.signature(module.run).parameters else {}
    result = module.run(quick=quick, seed=seed, **given)
    return save(result, module, out, quick=quick, seed=seed, seconds=time.perf_counter() - start)


def check_free(out: Path) -> None:
    """Refuse a folder that holds anything but an earlier run of a study.

    Raises:
        ValueError: `out` is a file, or a folder with other contents.
    """
    if out.exists() and (not out.is_dir() or (not (out / "result.json").is_file() and any(out.iterdir()))):
        raise ValueError(f"{out} exists already and holds no study: give another folder with --out")


def read(folder: Path) -> dict[str, Any]:
    """result.json of a study.

    Raises:
        ValueError: `folder` has no result.json, or one of another version.
    """
    if not (folder / "result.json").is_file():
        raise ValueError(f"{folder} holds no study: it has no result.json")
    told: dict[str, Any] = json.loads((folder / "result.json").read_text("utf-8"))
    if told.get("format") != FORMAT:
        raise ValueError(f"{folder} holds {told.get('format')!r}, this version reads {FORMAT!r}: run the study again")
    return told


def verdicts(told: dict[str, Any]) -> list[str]:
    """One line of text for each claim: whether it holds, what was measured, and the oracle."""
    return [
        f"{'holds' if claim['holds'] else 'DOES NOT HOLD'}: {claim['claim']} Measured: {claim['measured']}. "
        f"Oracle: {claim['oracle']}."
        for claim in told["claims"]
    ]


def section(told: dict[str, Any], drawn: dict[str, str]) -> str:
    """A study as one <section> of a page: finding, settings, figures (`drawn`, SVG), claims, docstring and notes."""
    figures = "\n".join(f'<figure class="study">{text}</figure>' for text in drawn.values())
    about, _, rest = told["about"].partition("\n\n")
    text = "".join(f"<p>{_prose(p)}</p>" for p in f"{rest}\n\n{told['notes']}".split("\n\n") if p.strip())
    return (
        f'<section id="{told["study"]}">\n<h2>{escape(told["title"])}</h2>\n'
        f'<p class="lead">{_prose(about)} <span class="sub">{escape(_settings(told))}</span></p>\n'
        f'{figures}\n{_table([told], named=False)}\n<div class="prose">{text}</div>\n</section>\n'
    )


def page(folders: Sequence[Path]) -> str:
    """Saved studies as one HTML document that needs nothing but a browser: all claims first, then a section each."""
    found = [read(folder) for folder in folders]
    sections = "\n".join((folder / "section.html").read_text("utf-8") for folder in folders)
    if len(folders) == 1:  # its title is the page's
        sections = re.sub(r"<h2>.*?</h2>\n", "", sections, count=1)
    base = files("tokdyn.report").joinpath("static", "page.css").read_text("utf-8")
    own = files(__package__).joinpath("gallery.css").read_text("utf-8")
    one = found[0] if len(found) == 1 else None
    title = one["title"] if one else "The phenomena of the learning-dynamics papers, each with its number"
    links = "".join(f'<li><a href="#{t["study"]}">{t["study"]}</a></li>' for t in found)
    top = "" if one else (
        f'<nav class="topbar" aria-label="Studies"><ol>{links}</ol></nav>\n<main>\n'
        f'<section id="claims"><h2>Every claim, and whether it holds</h2>{_table(found, named=True)}</section>\n'
    )  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'\">\n"
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(one['study'] if one else 'Gallery')} · tokdyn</title>\n"
        f"<style>\n{base}\n{own}\n{figures.style(':root')}\n</style>\n</head>\n<body>\n"
        f'<header class="top"><p class="eyebrow">tokdyn {escape(found[0]["versions"]["tokdyn"])} · {_score(found)}</p>'
        f"<h1>{escape(title)}</h1></header>\n{top or '<main>'}\n{sections}\n</main>\n</body>\n</html>\n"
    )


def saved(root: Path) -> list[Path]:
    """The folders of studies that lie directly under a folder, in order of their names."""
    return sorted(path.parent for path in root.glob("*/result.json"))


def write_docs(root: Path, docs: Path) -> Path:
    """Write docs/gallery.md and docs/gallery/*.svg from the studies saved under `root`; returns the path of the former.

    Raises:
        ValueError: no study lies there.
    """
    folders = saved(root)
    if not folders:
        raise ValueError(f"no study lies under {root}: run `tokdyn study --all --out {root}` first")
    missing = [name for name in names() if name not in {folder.name for folder in folders}]
    pictures = docs / "gallery"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    found = [read(folder) for folder in folders]
    lines = [
        "# Gallery", "",
        "Every phenomenon of the learning-dynamics papers, with the number that decides it. `tokdyn study NAME` runs one and",
        "`make studies` all of them and this page, which is written by a program: `tokdyn study --docs docs`.", "",
        f"{_score(found)}. An interval is Student's t at 95% over seeds unless it says otherwise.", "",
        "| study | claim | oracle | measured | holds |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for told in found:
        for claim in told["claims"]:
            cells = [f"[{told['study']}](#{told['study']})", claim["claim"], claim["oracle"], claim["measured"]]
            lines.append("| " + " | ".join(_cell(x) for x in [*cells, "yes" if claim["holds"] else "**no**"]) + " |")
    if missing:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    for folder, told in zip(folders, found, strict=True):
        lines += ["", f"## {told['study']}", "", f"**{told['title']}**", "", told["about"], "", f"*{_settings(told)}*", ""]
        for key in told["figures"]:
            name = f"{told['study']}-{key}.svg"
            shutil.copy(folder / f"{key}.svg", pictures / name)
            lines.append(f"![{told['title']}](gallery/{name})")
        lines += ["", told["notes"].strip()] if told["notes"].strip() else []
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"
    (docs / "gallery.md").write_text(text, "utf-8")
    return docs / "gallery.md"


def _table(found: Sequence[dict[str, Any]], *, named: bool) -> str:
    head = "".join(f"<th>{x}</th>" for x in (["study"] if named else []) + ["claim", "oracle", "measured", "holds"])
    rows = []
    for told in found:
        for i, claim in enumerate(told["claims"]):
            link = f'<a href="#{told["study"]}">{told["study"]}</a>' if i == 0 else ""
            cells = ([link] if named else []) + [escape(claim[key]) for key in ("claim", "oracle", "measured")]
            verdict = "yes" if claim["holds"] else '<strong class="miss">no</strong>'
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in [*cells, verdict]) + "</tr>")
    return f'<table class="claims"><thead><tr>{head}</tr></thead><tbody>\n{chr(10).join(rows)}\n</tbody></table>'


def _score(found: Sequence[dict[str, Any]]) -> str:
    """'41 of 43 claims hold, in 7 studies (2 in quick form)'."""
    claims = [claim for told in found for claim in told["claims"]]
    quick = sum(told["quick"] for told in found)
    form = "" if not quick else " (quick form)" if quick == len(found) else f" ({quick} in quick form)"
    studies = f"in {len(found)} studies" if len(found) > 1 else f"in the study {found[0]['study']}" if found else "in no study"
    return f"{sum(claim['holds'] for claim in claims)} of {len(claims)} claims hold, {studies}{form}"


def _settings(told: dict[str, Any]) -> str:
    form = "Quick" if told["quick"] else "Full"
    return (
        f"{form} form, first seed {told['seed']}, {told['seconds']:.0f} s, {told['date']}, torch {told['versions']['torch']}."
    )


def _prose(text: str) -> str:
    """A paragraph as HTML; *this* is a title of a work."""
    return re.sub(r"(?<![\w*])\*(\S[^*]*)\*(?!\w)", r"<i>\1</i>", escape(" ".join(text.split())))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
