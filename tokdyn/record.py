"""What a record says of itself: which versions wrote it, of which model, about which sequences."""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from ._version import __version__
from .model.trace import Tracer
from .runs.folder import FORMAT
from .sequences import Chi


def run_head(kind: str) -> dict[str, Any]:
    """The first entries of run.json: what wrote it, with which versions, and when."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    found = {"format": FORMAT, "kind": kind, "tokdyn": __version__, "created": created}
    return found | {"versions": _versions()}


def sequence_facts(side: str, chis: Sequence[Chi]) -> list[dict[str, Any]]:
    """What run.json says of the sequences of a side."""
    return [
        dict(side=side, sequence=i, group=chi.group, role=chi.role, prompt=chi.prompt, response=chi.response, tokens=len(chi),
             truncated=chi.truncated)
        for i, chi in enumerate(chis)
    ]  # fmt: skip


def model_facts(tracer: Tracer) -> dict[str, Any]:
    """What run.json says of a model: its name, size, shape, precision and device."""
    config = getattr(tracer.model, "config", None)
    unique = {owner: tracer.params[owner] for owner in tracer.owner.values()}
    return {
        "name": type(tracer.model).__name__,
        "parameters": sum(p.numel() for p in unique.values()),
        "vocabulary": tracer.readout.weight.shape[0],
        "layers": getattr(config, "num_hidden_layers", None),
        "width": tracer.readout.weight.shape[1],
        "tied": bool(tracer.readout.tied),
        "dtype": str(tracer.dtype).removeprefix("torch."),
        "device": str(tracer.device),
    }


def _versions() -> dict[str, str]:
    return {
        "tokdyn": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
    }
