"""Forward passes of our own through a model that a training has wrapped: without autocast, and fit for a tangent pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def own_passes(lm: nn.Module) -> Iterator[None]:
    """Passes inside compute in the model's own dtype, and may be differentiated by torch.func."""
    with _without_autocast(lm), _IgnoreRequiresGrad():
        yield


class _IgnoreRequiresGrad(TorchFunctionMode):
    """Gradient checkpointing of adapters hooks requires_grad_() onto the embedding's output, which a tangent pass refuses."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.requires_grad_ and torch._C._functorch.peek_interpreter_stack() is not None:
            return args[0]
        return func(*args, **(kwargs or {}))


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
