"""A study on disk, and several of them as one page: `tokdyn study`.

A folder holds result.json (claims, verdicts, settings, versions), curves/*.parquet, <figure>.svg, section.html (its part of a
page) and page.html, the same as a page of its own. The gallery is put together from such folders alone.
"""

from __future__ import annotations

import datetime
import hashlib
import inspect
import json
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from ..runs.folder import require_place
from . import figures, load, names
from .parts import kept_in, spent
from .result import Result

FORMAT = "tokdyn study 2"
EARLIER = "tokdyn study 1"  # verdicts yes and no alone
SAID = {"holds": "HOLDS", "no": "DOES NOT HOLD", "undecided": "UNDECIDED"}
HTML = {"holds": "holds", "no": '<strong class="miss">no</strong>', "undecided": "<em>undecided</em>"}
SHARED = ("documents", "figures", "gallery", "parts", "result")  # what no number of a study depends on
OWN = re.compile(r"result\.json|(section|page)\.html|[\w.-]+\.svg|curves/[\w.-]+\.parquet")  # the files of a study's folder
PACKAGES = ("torch", "transformers", "numpy", "matplotlib", "scikit-learn")


@dataclass(frozen=True)
class Settings:
    """What a study is run with, as it stands in result.json.

    Attributes:
        quick, seed: the form, and the first seed.
        model, data: a user's own instead of the demo model and the shipped texts; for studies that take one.
        runs: how many, each with a seed of its own, where a study takes several; its own number when absent.
    """

    quick: bool = False
    seed: int = 0
    model: str | None = None
    data: str | None = None
    runs: int | None = None

    def given(self, module: ModuleType) -> dict[str, Any]:
        """The arguments of a study's `run` among these; the others it does not take."""
        takes = inspect.signature(module.run).parameters
        return {key: value for key, value in vars(self).items() if key in takes and value is not None}


def save(result: Result, module: ModuleType, out: Path, settings: Settings, *, seconds: float) -> dict[str, Any]:
    """Write the folder of a finished study, in place of an earlier one, and return what result.json holds.

    Raises:
        FileExistsError, ValueError: see `check_free`.
    """
    from .. import __version__

    check_free(out)
    name = study_name(module)
    told = dict(
        format=FORMAT, study=name, title=result.title, about=inspect.getdoc(module) or "", notes=result.notes,
        claims=[dict(claim=c.claim, oracle=c.oracle, measured=c.measured, verdict=str(c.verdict)) for c in result.claims],
        figures=list(result.figures), curves=list(result.curves), **vars(settings), seconds=round(seconds, 1),
        date=datetime.date.today().isoformat(), source=source_digest(name), commit=_commit(),
        versions={"tokdyn": __version__, **_versions()},
    )  # fmt: skip
    part = _beside(out, "part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "curves").mkdir(parents=True)
    import pyarrow.parquet as parquet

    for key, table in result.curves.items():
        parquet.write_table(table, part / "curves" / f"{key}.parquet")
    drawn = {}
    for key, figure in result.figures.items():
        drawn[key] = figures.svg(figure, f"{name}-{key}", inline=True)
        (part / f"{key}.svg").write_text(figures.svg(figure, f"{name}-{key}", inline=False), "utf-8")
    (part / "result.json").write_text(as_json(told), "utf-8")
    (part / "section.html").write_text(section(told, drawn), "utf-8")
    (part / "page.html").write_text(page([part]), "utf-8")
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    return told


def run_study(name: str, out: Path, settings: Settings = Settings(), *, resume: bool = True) -> dict[str, Any]:
    """Run a study and save it in the folder `out`; returns what result.json holds.

    Long studies keep their finished parts beside `out`, in OUT.parts, until they are done, and go on from them.

    Args:
        name: as in `names`.
        out: the folder, new or of an earlier run.
        settings: form, seed, model and data; what the study does not take is not used.
        resume: use parts that an interrupted run with the same code and settings left.

    Raises:
        ValueError: there is no such study. FileExistsError, ValueError: see `check_free`.
    """
    module = load(name)
    check_free(out)
    start = time.perf_counter()
    given = settings.given(module)
    folder = _beside(out, "parts")
    key = f"{source_digest(study_name(module))} {replace(settings, runs=None)}"  # more runs leave those that are done alone
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    if "keep" in inspect.signature(module.run).parameters:
        given["keep"] = kept_in(folder, key)
    before = spent(folder, key)
    result = module.run(**given)
    told = save(result, module, out, settings, seconds=time.perf_counter() - start + before)
    shutil.rmtree(folder, ignore_errors=True)
    return told


def finished(name: str, out: Path, settings: Settings) -> bool:
    """Whether `out` holds this study, run by today's code with these settings."""
    try:
        told = read(out)
    except ValueError:
        return False
    return all(told.get(key) == value for key, value in vars(settings).items()) and told.get("source") == source_digest(name)


def check_takes(name: str, settings: Settings) -> None:
    """Refuse a model or texts for a study that has its own.

    Raises:
        ValueError: the study does not take what was given; those that do are named.
    """
    for key in ("model", "data", "runs"):
        if getattr(settings, key) is not None and key not in inspect.signature(load(name).run).parameters:
            takes = [each for each in names() if f" {key}: " in (inspect.getsource(load(each).run).partition(") -> ")[0])]
            raise ValueError(f"the study {name!r} takes no --{key}; these do: {', '.join(takes)}")


def outlook(waiting: Sequence[str], folders: dict[str, Path], settings: Settings) -> str:
    """One sentence: which studies are to be run, and how long each took when it was last run here in this form."""
    if not waiting:
        return f"All {len(folders)} studies are finished."
    took = {name: told["seconds"] for name in waiting for told in [last(name, folders[name])]
            if told is not None and told["quick"] == settings.quick}  # fmt: skip
    unknown = [name for name in waiting if name not in took]
    said = f"{len(waiting)} of {len(folders)} studies to run"
    if settings.quick:
        return f"{said}, about {20 * len(waiting) / 60:.0f} minutes in the quick form."
    minutes = f"{sum(took.values()) / 60:.0f} minutes when they were last run" if took else "for how long is not known"
    return f"{said}, {minutes}{' without ' + ', '.join(unknown) if took and unknown else ''}. Interrupted, they go on."


def last(name: str, folder: Path) -> dict[str, Any] | None:
    """The last result of a study: in its folder, or as the documents of a checkout hold it."""
    try:
        return read(folder)
    except ValueError:
        kept = Path(__file__).resolve().parents[2] / "docs" / "gallery" / f"{name}.json"
        return current(json.loads(kept.read_text("utf-8")), kept) if kept.is_file() else None


def study_name(module: ModuleType) -> str:
    """The name of a study as the command line spells it."""
    return module.__name__.rpartition(".")[2].replace("_", "-")


def source_digest(name: str) -> str:
    """A digest of a study's module and of the modules of this folder that it imports: what its numbers were made by."""
    room = files(__package__)
    seen: list[str] = []
    waiting = [name.replace("-", "_")]
    while waiting:
        each = waiting.pop()
        if each in seen or each in SHARED:
            continue
        seen.append(each)
        text = room.joinpath(f"{each}.py").read_text("utf-8")
        waiting += re.findall(r"^from \.(\w+) import", text, re.M)
        waiting += [one.strip() for line in re.findall(r"^from \. import (.+)$", text, re.M) for one in line.split(",")]
    return hashlib.sha256(
        "".join(room.joinpath(f"{each}.py").read_text("utf-8") for each in sorted(seen)).encode()
    ).hexdigest()[:12]


def check_free(out: Path) -> None:
    """Refuse a folder that holds anything but an earlier run of a study, and such an OUT.part and OUT.parts, which go too.

    Raises:
        FileExistsError: `out` cannot be a folder that is written to. ValueError: one of them has other contents.
    """
    require_place(out)
    for folder, ours in (
        (out, OWN),
        (_beside(out, "part"), OWN),
        (_beside(out, "parts"), re.compile(r"\.?[\w.-]+\.json(\.part)?")),
    ):
        if not folder.exists():
            continue
        inside = [
            path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()
        ]
        foreign = [name for name in inside if not ours.fullmatch(name) or (folder / name).is_symlink()]
        if foreign or (folder == out and inside and not _is_study(out)):
            held = f" but {', '.join(foreign[:3])}" if foreign else ""
            raise ValueError(f"{folder} exists already and holds no study{held}: give another folder with --out")


def _beside(out: Path, suffix: str) -> Path:
    """OUT.part, in which a folder is written; OUT.parts, where a long study keeps what is finished."""
    return out.with_name(f"{out.name}.{suffix}")


def _is_study(folder: Path) -> bool:
    """Whether result.json is one that `save` wrote, of any version."""
    try:
        return str(json.loads((folder / "result.json").read_bytes())["format"]).startswith("tokdyn study ")
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def read(folder: Path) -> dict[str, Any]:
    """result.json of a study.

    Raises:
        ValueError: `folder` has no result.json, or one of another version.
    """
    if not (folder / "result.json").is_file():
        raise ValueError(f"{folder} holds no study: it has no result.json")
    told: dict[str, Any] = json.loads((folder / "result.json").read_text("utf-8"))
    return current(told, folder)


def current(told: dict[str, Any], where: Path) -> dict[str, Any]:
    """A result in today's format; in the earlier one a claim held or did not."""
    if told.get("format") == EARLIER:
        claims = [{"verdict": "holds" if claim["holds"] else "no"} | claim for claim in told["claims"]]
        return {"model": None, "data": None, "source": None, "commit": None} | told | {"format": FORMAT, "claims": claims}
    if told.get("format") != FORMAT:
        raise ValueError(f"{where} holds {told.get('format')!r}, this version reads {FORMAT!r}: run the study again")
    return told


def verdicts(told: dict[str, Any]) -> list[str]:
    """One line of text for each claim: its verdict, what was measured, and the oracle."""
    return [
        f"{SAID[claim['verdict']]}: {claim['claim']} Measured: {claim['measured']}. Oracle: {claim['oracle']}."
        for claim in told["claims"]
    ]


def section(told: dict[str, Any], drawn: dict[str, str]) -> str:
    """A study as one <section> of a page: finding, settings, figures (`drawn`, SVG), claims, docstring and notes."""
    figures = "\n".join(f'<figure class="study">{text}</figure>' for text in drawn.values())
    about, _, rest = told["about"].partition("\n\n")
    text = "".join(f"<p>{_prose(p)}</p>" for p in f"{rest}\n\n{told['notes']}".split("\n\n") if p.strip())
    return (
        f'<section id="{told["study"]}">\n<h2>{escape(told["title"])}</h2>\n'
        f'<p class="lead">{_prose(about)} <span class="sub">{escape(settings_text(told))}</span></p>\n'
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
        f'<header class="top"><p class="eyebrow">tokdyn {escape(found[0]["versions"]["tokdyn"])} · {score(found)}</p>'
        f"<h1>{escape(title)}</h1></header>\n{top or '<main>'}\n{sections}\n</main>\n</body>\n</html>\n"
    )


def saved(root: Path) -> list[Path]:
    """The folders of studies that lie directly under a folder, in order of their names."""
    return sorted(path.parent for path in root.glob("*/result.json"))


def _table(found: Sequence[dict[str, Any]], *, named: bool) -> str:
    head = "".join(f"<th>{x}</th>" for x in (["study"] if named else []) + ["claim", "oracle", "measured", "verdict"])
    rows = []
    for told in found:
        for i, claim in enumerate(told["claims"]):
            link = f'<a href="#{told["study"]}">{told["study"]}</a>' if i == 0 else ""
            cells = ([link] if named else []) + [escape(claim[key]) for key in ("claim", "oracle", "measured")]
            verdict = HTML[claim["verdict"]]
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in [*cells, verdict]) + "</tr>")
    return f'<table class="claims"><thead><tr>{head}</tr></thead><tbody>\n{chr(10).join(rows)}\n</tbody></table>'


def score(found: Sequence[dict[str, Any]]) -> str:
    """'41 of 43 claims hold, 1 does not, 1 is undecided, in 7 studies (2 in quick form)'."""
    verdicts = [claim["verdict"] for told in found for claim in told["claims"]]
    quick = sum(told["quick"] for told in found)
    form = "" if not quick else " (quick form)" if quick == len(found) else f" ({quick} in quick form)"
    studies = f"in {len(found)} studies" if len(found) > 1 else f"in the study {found[0]['study']}" if found else "in no study"
    no, open_ = (verdicts.count(verdict) for verdict in ("no", "undecided"))
    others = f", {no} {'does' if no == 1 else 'do'} not" + (
        f", {open_} {'is' if open_ == 1 else 'are'} undecided" if open_ else ""
    )
    return f"{verdicts.count('holds')} of {len(verdicts)} claims hold{others if no or open_ else ''}, {studies}{form}"


def settings_text(told: dict[str, Any]) -> str:
    """Form, seed, duration, date and commit of a result, as a sentence."""
    form = "Quick" if told["quick"] else "Full"
    own = "".join(f", {key} {Path(told[key]).name}" for key in ("model", "data") if told.get(key))
    own += f", {told['runs']} run{'s' * (told['runs'] > 1)}" if told.get("runs") else ""
    commit = f", at commit {told['commit']}" if told.get("commit") else ""
    return (
        f"{form} form, first seed {told['seed']}{own}, {told['seconds']:.0f} s, {told['date']}{commit}, "
        f"torch {told['versions']['torch']}."
    )


def _prose(text: str) -> str:
    """A paragraph as HTML; *this* is a title of a work."""
    return re.sub(r"(?<![\w*])\*(\S[^*]*)\*(?!\w)", r"<i>\1</i>", escape(" ".join(text.split())))


def as_json(told: dict[str, Any]) -> str:
    """A result as the text of a file."""
    return json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _commit() -> str | None:
    """The commit of the source that runs, "…+" where files were changed since; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head, changed = (
            subprocess.run(
                ["git", "-C", str(root), *what], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for what in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no", "tokdyn"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
