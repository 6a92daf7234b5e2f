"""Run folders, written atomically: into a temporary folder beside the target, then moved into its place."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
FILES = ABOUT, TOKENS, FORCES, PAGE = "run.json", "tokens.parquet", "forces.safetensors", "report.html"
RECIPE = "run.yaml"  # the options that make the run again
BESIDE = (RECIPE, "diff.html")  # what commands lay beside these four


def check_free(path: Path, overwrite: bool) -> None:
    """Raise unless a run can be written to a path.

    Raises:
        FileExistsError: the path exists and overwrite is False, it holds anything but a run, or its place cannot be written to.
    """
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))  # permissions alone do not say it
    except OSError as error:
        why = error.strerror or error
        raise FileExistsError(f"{path} cannot be made: {parent} is not a folder that can be written to ({why})") from None
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists already: choose another place or pass --overwrite (overwrite=True)")
    foreign = [entry.name for entry in path.iterdir() if entry.name not in (*FILES, *BESIDE)] if path.is_dir() else [path.name]
    if foreign or not (path / ABOUT).exists() and any(path.iterdir()):
        what = f"it holds {', '.join(sorted(foreign)[:3])}" if foreign else "it is not a tokdyn run"
        raise FileExistsError(f"{path} is not overwritten, {what}: choose another place")


def finite(value: Any) -> Any:
    """A copy with NaN and infinities as None: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_folder(path: Path) -> tuple[dict[str, Any], Any, dict[str, Tensor]]:
    """run.json, the token table (pyarrow) and the tensors of a run.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: it was written by a later format, or a file of it cannot be read (which, and why).
    """
    import pyarrow.parquet as pq
    from safetensors.torch import load_file

    if not (path / ABOUT).exists():
        raise FileNotFoundError(f"{path} holds no run: {ABOUT} is missing")
    found: list[Any] = []
    for name, reader in (
        (ABOUT, lambda p: json.loads(p.read_text(encoding="utf-8"))),
        (TOKENS, pq.read_table),
        (FORCES, load_file),
    ):
        try:
            found.append(reader(path / name))
        except Exception as error:
            raise ValueError(f"{path / name} cannot be read: {' '.join(str(error).split())[:200]}") from error
        if name == ABOUT:
            version = found[0].get("format") if isinstance(found[0], dict) else None
            if not isinstance(version, int):
                raise ValueError(f"{path / name} is not a run's record: it has no format")
            if version > FORMAT:
                raise ValueError(f"{path} was written in format {version}, this version reads up to {FORMAT}: update tokdyn")
    return found[0], found[1], found[2]


def kind_of(path: Path) -> str:
    """The kind of a run, as its run.json says: "profile", "forces", "training", or "" where there is none."""
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(about.get("kind", "")) if isinstance(about, dict) else ""


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

    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        part.chmod(0o755)
        text = json.dumps(finite(about), indent=1, ensure_ascii=False, allow_nan=False)
        (part / ABOUT).write_text(text, encoding="utf-8")
        pq.write_table(tokens, part / TOKENS)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part / FORCES)
        (part / FORCES).chmod(0o644)
        if page is not None:
            (part / PAGE).write_text(page, encoding="utf-8")
        if path.exists():
            old = part.with_name(part.name + ".old")
            os.replace(path, old)
            try:
                os.replace(part, path)
            except BaseException:
                os.replace(old, path)
                raise
            shutil.rmtree(old)
        else:
            os.replace(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
