"""Rows of a batch beside the same rows alone: whether padding, packing or neighbours change what a model computes for them.

Passes here are our own: without gradients, dropout or autocast, unseen by monitors, random state left as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model.calls import floats
from ..model.unwrap import backbone
from .capture import unwatched
from .layout import Layout
from .own_passes import own_passes

# what a trainer's call holds besides the inputs of the model's body
BESIDE = ("labels", "shift_labels", "num_items_in_batch", "fused_lm_head", "use_cache", "logits_to_keep", 
          "output_router_logits", "return_dict", "temperature", "return_entropy", "compute_entropy", "loss_kwargs")  # fmt: skip
Call = Mapping[str, Any]


class CallNotes:
    """The calls of a model with gradients, in order, as keyword arguments; a hook that only looks.

    module: what the loop calls. calls: filled until `remove`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.calls: list[Call] = []
        self._handle = module.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self.calls.append(({"input_ids": args[0]} if args else {}) | dict(kwargs))

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()


@contextlib.contextmanager
def quiet(lm: nn.Module) -> Iterator[nn.Module]:
    """For passes of our own: evaluation mode, no gradients, nothing left behind."""
    training = [(module, module.training) for module in lm.modules()]
    devices = [p.device.index for p in lm.parameters() if p.device.type == "cuda"][:1]
    try:
        lm.eval()
        with torch.no_grad(), unwatched(), own_passes(lm), torch.random.fork_rng(devices):
            yield lm
    finally:
        for module, was in training:
            module.training = was


def body_inputs(call: Call) -> dict[str, Any]:
    """The inputs of a model's body in a trainer's call."""
    return {name: value for name, value in call.items() if name not in BESIDE and value is not None}


def last_hidden(lm: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The last hidden states of a pass, [B, T, d].

    Raises:
        ValueError: the model names no body of its own.
    """
    body = backbone(lm)
    if body is None:
        raise ValueError(f"{type(lm).__name__} names no body whose hidden states could be asked for")
    output = body(**inputs, use_cache=False)
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


@dataclass(frozen=True)
class Alone:
    """A sequence of a batch by itself.

    Args:
        inputs: of the model's body. places: where its tokens stand in the batch flattened, [n].
    """

    inputs: dict[str, Any]
    places: Tensor


def alone(layout: Layout, sequence: int) -> Alone:
    """A sequence of a batch with padding and packing undone: the model counts its positions from 0."""
    assert layout.ids is not None
    own = (layout.sequence == sequence) & layout.real
    return Alone(dict(input_ids=layout.ids[own][None]), own.reshape(-1).nonzero().squeeze(1))


@dataclass(frozen=True)
class Leak:
    """The module in which a row first differs from itself alone: its inputs agree, and its output does not."""

    name: str
    kind: str
    difference: float


def first_leak(lm: nn.Module, call: Call, row: Alone, bound: float) -> Leak | None:
    """Where a row of a batch comes to differ from the row alone by more than `bound`, relative; None where nowhere."""
    together, by_itself = _traced(lm, body_inputs(call)), _traced(lm, row.inputs)
    for (name, module, inputs, outputs), (other, _, inputs_alone, outputs_alone) in zip(together, by_itself, strict=False):
        if name != other:
            return None
        moved = _difference(outputs, outputs_alone, row.places)
        if moved > bound and _difference(inputs, inputs_alone, row.places) <= bound:
            return Leak(name, _kind(name, module), moved)
    return None


Seen = tuple[str, nn.Module, list[Tensor], list[Tensor]]


def _traced(lm: nn.Module, inputs: Mapping[str, Any]) -> list[Seen]:
    """Every call of a module in one pass in the order in which they return: the innermost first."""
    seen: list[Seen] = []

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.append((name, module, floats((args, kwargs)), floats(output)))

        return note

    handles = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in lm.named_modules()]
    try:
        last_hidden(lm, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _difference(batch: list[Tensor], own: list[Tensor], places: Tensor) -> float:
    """The largest relative difference of one row's states in a batch from the row's own; 0 where nothing compares."""
    worst = 0.0
    for x, y in zip(batch, own, strict=False):
        found = _row(x, y, places)
        if found is not None:
            a, b = found
            worst = max(worst, float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30))
    return worst


def _row(x: Tensor, y: Tensor, places: Tensor) -> tuple[Tensor, Tensor] | None:
    """States of a row in a batch and alone, [n, d] each: of [B, T, d], or of a convolution's [B, d, T]."""
    n = len(places)
    if x.dim() == 3 == y.dim() and len(y) == 1:
        if y.shape[1] == n and x.shape[2] == y.shape[2] and x.shape[0] * x.shape[1] > int(places.max()):
            return x.reshape(-1, x.shape[2])[places].float(), y[0].float()
        width = x.shape[2] - (y.shape[2] - n)
        if x.shape[1] == y.shape[1] and y.shape[2] >= n and width > 0 and len(x) * width > int(places.max()):
            return x[:, :, :width].transpose(1, 2).reshape(-1, x.shape[1])[places].float(), y[0, :, :n].T.float()
    return None


def _kind(name: str, module: nn.Module) -> str:
    """What mixes tokens in a module: attention, a convolution, a recurrence, or its class where that is not told."""
    text = f"{name.rsplit('.', 1)[-1]} {type(module).__name__}".lower()
    for kind, words in (("attention", ("attn", "attention")), ("convolution", ("conv",)),
                        ("recurrence", ("mamba", "ssm", "rnn", "lstm", "gru", "delta", "mixer", "recurr"))):  # fmt: skip
        if any(word in text for word in words):
            return kind
    return type(module).__name__
