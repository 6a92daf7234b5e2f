"""What run.json says of a training: its model, settings, probe, and the versions it ran with."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..model.unwrap import is_sharded
from .probe import Probe


def facts_of(lm: nn.Module, settings: Mapping[str, Any], probe: Probe | None) -> dict[str, Any]:
    """A record of a training's circumstances, of what JSON can hold."""
    return dict(
        model=dict(name=type(lm).__name__, parameters=sum(p.numel() for p in lm.parameters())),
        settings=dict(settings, sharded=any(is_sharded(p) for p in lm.parameters())),
        probe={} if probe is None else {name: len(chis) for name, chis in probe.groups.items()},
        observable=None if probe is None else probe.observable.describe(),
        versions={
            "tokdyn": __version__, "torch": torch.__version__, "transformers": version("transformers"),
            "python": platform.python_version(),
        },
    )  # fmt: skip
