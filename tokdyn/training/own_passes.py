"""Forward passes of our own through a model that a training has wrapped: without autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def own_passes(lm: nn.Module) -> Iterator[None]:
    """Passes inside compute in the model's own dtype."""
    with _without_autocast(lm):
        yield


@contextlib.contextmanager
def _without_autocast(lm: nn.Module) -> Iterator[None]:
    """accelerate wraps `forward` in autocast; a change of 1e-3 nats does not survive bfloat16."""
    wrapped, plain = vars(lm).get("forward"), vars(lm).get("_original_forward")
    if wrapped is None or plain is None:
        yield
        return
    try:
        lm.forward = plain
        yield
    finally:
        lm.forward = wrapped
