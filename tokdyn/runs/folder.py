"""Run folders: written whole into a folder beside the target, which then takes its place.

    runs/profile                    the run: run.json, its tables and tensors, manifest-0.json, the page
    runs/.profile.ab12cd34.new      one that is being written, or that a kill left: whole once its manifest is there
    runs/.profile.ab12cd34.old      the run that is being replaced
    runs/.profile.lock              held meanwhile

Whoever writes or reads `runs/profile` next puts a run that was caught between the two renames in its place again, and a writer
removes what else was left.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import manifest
from .lock import lock

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
FILES = ABOUT, TOKENS, FORCES, PAGE = "run.json", "tokens.parquet", "forces.safetensors", "report.html"
RECIPE = "run.yaml"  # the options that make the run again
BESIDE = (RECIPE, "diff.html")  # what commands lay beside these four
PATIENCE = 2.0  # seconds that a reader waits for a run between two renames


def check_free(path: Path, overwrite: bool) -> None:
    """Raise unless a run can be written to a path.

    Raises:
        FileExistsError: the path exists and overwrite is False, it holds anything but a run, or its place cannot be written to.
    """
    require_place(path)
    if (unlock := lock(_lock_of(path))) is not None:
        try:
            _recover(path, sweep=True)
        finally:
            unlock()
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists already: choose another place or pass --overwrite (overwrite=True)")
    require_own(path, ("profile", "forces"), _own_file)


def check_scan(path: Path, joining: bool) -> None:
    """Raise unless a scan can be written to a path.

    Args:
        path: its folder.
        joining: go on with a scan that was begun there, or that other processes write to.

    Raises:
        FileExistsError: see `require_place`; the folder holds something else, or a scan that is not to be joined.
    """
    require_place(path)
    if not path.exists() or not any(path.iterdir()):
        return
    if about_of(path).get("kind", "scan") != "scan" or not (manifest.manifests(path) or list(path.glob(".lock-*"))):
        raise FileExistsError(f"{path} is not empty and holds no scan: choose another place")
    if not joining:
        raise FileExistsError(f"{path} exists already: go on with --resume (resume=True), or choose another place")


def require_place(path: Path) -> None:
    """Raise unless a folder of this name can be made, or is there and not more than a folder.

    Raises:
        FileExistsError: a symbolic link, the folder one is in or one around it, a file, or a place that cannot be written to.
    """
    if path.is_symlink():
        raise FileExistsError(f"{path} is a symbolic link: name the folder that it points to")
    if Path.cwd().is_relative_to(path.resolve()):
        raise FileExistsError(f"{path} is the folder you are in, or one around it: name a folder inside")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: choose another place")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))  # permissions alone do not say it
    except OSError as error:
        why = error.strerror or error
        raise FileExistsError(f"{path} cannot be made: {parent} is not a folder that can be written to ({why})") from None


def require_own(path: Path, kinds: Collection[str], own_file: Callable[[str], bool]) -> None:
    """Raise unless a folder may be replaced: run.json says a kind and a format of ours, and nothing but our files is there.

    Args:
        path: the folder.
        kinds: that may be replaced.
        own_file: whether a name is one that we give.

    Raises:
        FileExistsError: it holds something else, or somebody writes to it.
    """
    foreign = sorted(entry.name for entry in os.scandir(path) if not own_file(entry.name) or not _plain_file(entry))
    about = about_of(path)
    why = ""
    if foreign:
        why = f"it holds {', '.join(foreign[:3])}"
    elif about.get("kind") not in kinds or not isinstance(about.get("format"), int):
        why = f"its {ABOUT} is not one that tokdyn wrote for {' or '.join(kinds)}" if about else "it is not a tokdyn run"
    elif writers := manifest.busy(path):
        why = f"a process still writes to it ({', '.join(writers)})"
    if why and any(os.scandir(path)):
        raise FileExistsError(f"{path} is not overwritten, {why}: choose another place")


def require_finite(**tensors: Tensor | None) -> None:
    """Raise unless forces that are about to be saved are numbers.

    Raises:
        ValueError: which are not.
    """
    for name, tensor in tensors.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise ValueError(f"the forces are not finite: they are not saved ({name} holds inf or NaN; look at c and the loss)")


def finite(value: Any) -> Any:
    """A copy with NaN and infinities as None: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(about: Mapping[str, Any]) -> bytes:
    """run.json's text."""
    return json.dumps(finite(dict(about)), indent=1, ensure_ascii=False, allow_nan=False).encode()


def read_about(path: Path) -> dict[str, Any]:
    """run.json of a folder.

    Raises:
        FileNotFoundError: there is none. ValueError: it cannot be read, or is no run's.
    """
    file = path / ABOUT
    if not file.exists():
        raise FileNotFoundError(f"{path} holds no run: {ABOUT} is missing")
    try:
        about = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from error
    version = about.get("format") if isinstance(about, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{file} is not a run's record: it has no format")
    return about


def read_folder(path: Path) -> tuple[dict[str, Any], Any, dict[str, Tensor]]:
    """run.json, the token table (pyarrow) and the tensors of a run.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: it was written by a later format, a file of it cannot be read (which, and why) or is not what was written.
    """
    _find(path)
    about = read_about(path)
    if about["format"] > FORMAT:
        raise ValueError(f"{path} was written in format {about['format']}, this version reads up to {FORMAT}: update tokdyn")
    manifest.committed(path)
    return about, read_table(path / TOKENS), read_tensors(path / FORCES)


def read_table(file: Path, **options: Any) -> Any:
    """A parquet file as a table (pyarrow); options are pyarrow's.

    Raises:
        ValueError: it cannot be read, and why.
    """
    import pyarrow.parquet as pq

    return _read(file, lambda file: pq.read_table(file, **options))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A safetensors file.

    Raises:
        ValueError: it cannot be read, and why.
    """
    from safetensors.torch import load_file

    return _read(file, load_file)


def _read(file: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(file)
    except Exception as error:  # of many kinds, some of several lines
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from error


def about_of(path: Path) -> dict[str, Any]:
    """run.json of a folder, {} where there is none that can be read."""
    try:
        return read_about(path)
    except (OSError, ValueError):
        return {}


def kind_of(path: Path) -> str:
    """The kind of a run, as its run.json says: "profile", "forces", "training", …, or "" where there is none."""
    _find(path)
    return str(about_of(path).get("kind", ""))


def write_folder(
    path: Path,
    about: Mapping[str, Any],
    tokens: Any,
    tensors: Mapping[str, Tensor],
    page: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a run as run.json, tokens.parquet, forces.safetensors and report.html, all or nothing.

    Six parameters: the four files, where they go, and whether a run that lies there is replaced.

    Raises:
        FileExistsError: see `check_free`.
    """
    import pyarrow.parquet as pq
    from safetensors.torch import save_file

    def save(file: Path) -> None:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
        file.chmod(0o644)

    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    unlock = lock(_lock_of(path), patience=PATIENCE)
    if unlock is None:
        raise FileExistsError(f"another process writes a run to {path}: choose another place")
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent))
    try:
        part.chmod(0o755)
        for name, text in ((ABOUT, as_json(about)), (PAGE, None if page is None else page.encode())):
            if text is not None:
                manifest.replace(part / name, text)
        manifest.fill(part, {TOKENS: lambda file: pq.write_table(tokens, file), FORCES: save})
        _swap(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        unlock()


def _swap(part: Path, path: Path) -> None:
    """Put a finished run in its place, and the one that lies there out of the way."""
    old = part.with_suffix(".old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(part, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    manifest.sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------- what kills left


def _own_file(name: str) -> bool:
    return name in (*FILES, *BESIDE) or manifest.is_ours(name) or name in {f".{each}.part" for each in (*FILES, *BESIDE)}


def _plain_file(entry: os.DirEntry[str] | Path) -> bool:
    return not entry.is_symlink() and entry.is_file()


def _lock_of(path: Path) -> Path:
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    return parent / f".{path.name}.lock"


def _left(path: Path) -> list[Path]:
    """The folders beside a run that a kill left, those that are whole first and the newer before the older."""
    form = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.(new|old)")
    parent = path.absolute().parent
    names = [entry.name for entry in os.scandir(parent) if form.fullmatch(entry.name)] if parent.is_dir() else []
    found = [parent / name for name in sorted(names) if (parent / name).is_dir() and not (parent / name).is_symlink()]
    found = [left for left in found if all(_own_file(entry.name) and _plain_file(entry) for entry in os.scandir(left))]
    return sorted(found, key=lambda left: (left.suffix == ".new", left.stat().st_mtime), reverse=True)


def _recover(path: Path, sweep: bool = False) -> None:
    """Put a run that was caught between two renames in its place; sweep: remove what else is left. The lock is held."""
    for left in _left(path):
        if not path.exists() and (left.suffix == ".old" or manifest.manifests(left)):
            os.replace(left, path)
        elif sweep:
            shutil.rmtree(left, ignore_errors=True)


def _find(path: Path) -> None:
    """Before a run is read: have one that was caught between two renames in its place, or a live writer come to its end."""
    if path.exists() or not _left(path):
        return
    with contextlib.suppress(PermissionError):
        if (unlock := lock(_lock_of(path), patience=PATIENCE)) is not None:
            try:
                _recover(path)
            finally:
                unlock()
