"""Folders on disk that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

ABOUT, TOKENS, FORCES, PAGE = "run.json", "tokens.parquet", "forces.safetensors", "report.html"


def check_free(path: Path, overwrite: bool) -> None:
    """Refuse a place that is taken.

    Raises:
        FileExistsError: the path exists and overwrite is False, or it is not a run that could be overwritten.
    """
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists already: choose another place or pass --overwrite (overwrite=True)")
    if not path.is_dir() or (any(path.iterdir()) and not (path / ABOUT).exists()):
        raise FileExistsError(f"{path} is not a tokdyn run, so it is not overwritten: choose another place")


def write_folder(
    path: Path, about: str, tokens: Any, tensors: Mapping[str, Tensor], page: str | None = None, overwrite: bool = False
) -> None:
    """Write a run as run.json, tokens.parquet, forces.safetensors and report.html, all or nothing.

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
        (part / ABOUT).write_text(about, encoding="utf-8")
        pq.write_table(tokens, part / TOKENS)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part / FORCES)
        if page is not None:
            (part / PAGE).write_text(page, encoding="utf-8")
        if path.exists():
            old = part.with_name(part.name + ".old")
            os.replace(path, old)
            os.replace(part, path)
            shutil.rmtree(old)
        else:
            os.replace(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
