"""What is noted of a step while it runs: its passes, what they showed of the loss, what went wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .forward import Forward
from .gradients import Gradients
from .hooks import harmless


@dataclass
class LossFacts:
    """What one pass showed of the loss, for those that follow.

    Attributes:
        fit_v_and_u: c alone does not explain the gradient (label smoothing), so that c, v and u are fitted to it.
        loss_ignores_output: the loss is made inside the model and does not read its output, so that c is fitted.
        retry_next_step: one of these was found in a backward pass, where sharded weights cannot be gathered.
    """

    fit_v_and_u: bool = False
    loss_ignores_output: bool = False
    retry_next_step: bool = False


@dataclass
class StepLog:
    """The passes of one training step, and what was noticed on the way.

    Attributes:
        device: type of the device that trains. keep_hidden: whether records keep h of their tokens.
        forwards: records of the passes with gradients. captured: how many there were.
        seen, excluded: how many passes ran, and how many of them without gradients (generation, reference, evaluation).
        known: metadata of the passes to come, while they belong to one micro-batch. micro_batch: the number of the next.
        router_loss: a loss of the router is among the outputs, which goes past the logits.
        why_blind: what the latest output lacked that nothing could be captured from.
        failure: the first exception inside a hook.
        thrown_away: passes whose gradients were, before the step.
    """

    device: str
    keep_hidden: bool = False
    gradients: Gradients | None = None
    forwards: list[Forward] = field(default_factory=list)
    captured: int = 0
    seen: int = 0
    excluded: int = 0
    known: dict[str, Any] | None = None
    micro_batch: int = 0
    router_loss: bool = False
    why_blind: str = ""
    failure: Exception | None = None
    thrown_away: int = 0

    def add(self, forward: Forward) -> None:
        """One more record; each is a micro-batch of its own unless `micro_batch_begins` holds several together."""
        forward.micro_batch = self.micro_batch
        forward.metadata |= self.known or {}
        self.micro_batch += self.known is None
        self.captured += 1
        self.forwards.append(forward)

    def micro_batch_begins(self, known: Mapping[str, Any]) -> list[Forward]:
        """Passes whose forward or backward runs from here to `micro_batch_ends` belong together; `known` is their metadata."""
        self.known = dict(known)
        return [f for f in self.forwards if f.c is not None]

    def micro_batch_ends(self, before: list[Forward]) -> None:
        """See `micro_batch_begins`, which gave `before`."""
        known, self.known = self.known or {}, None
        for forward in self.forwards:
            if forward.c is not None and not any(forward is f for f in before):
                forward.metadata |= known
        self.micro_batch += 1

    @contextlib.contextmanager
    def one_micro_batch(self, known: Mapping[str, Any]) -> Iterator[None]:
        """The same around a block, for a loop of our own."""
        before = self.micro_batch_begins(known)
        try:
            yield
        finally:
            self.micro_batch_ends(before)

    def listen(self, tensor: Tensor, on_grad: Callable[[Tensor], None]) -> None:
        """Have a function told of the gradient that comes to a tensor; the guard of all hooks on tensors."""

        def hook(grad: Tensor | None) -> None:
            if grad is None:  # a compiled graph passes on what was never asked for
                return
            with self.guarded():
                if self.gradients is not None and self.gradients.backward_begins(self.failed):
                    self.drop_backward()
                on_grad(grad)

        tensor.register_hook(harmless(hook, self.failed))

    def drop_backward(self) -> None:
        """The gradients that passes have left so far are gone: these passes are no part of the step."""
        gone = [f for f in self.forwards if f.c is not None]
        self.thrown_away += sum(not f.superseded for f in gone)
        self.forwards = [f for f in self.forwards if f.c is None]

    def failed(self, error: Exception) -> None:
        """Keep the first exception for the end of the step."""
        self.failure = self.failure or error

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """For arithmetic of our own: no graph, no autocast; an exception is kept, not raised."""
        try:
            with torch.no_grad(), torch.autocast(self.device, enabled=False):
                yield
        except Exception as error:
            self.failed(error)


@dataclass(frozen=True)
class StepSummary:
    """What a capture saw in a step, for diagnosis.py to explain.

    Args:
        model: the class of the causal LM.
        compiled: torch.compile wraps the whole model. compiled_in_place: model.compile() was called.
        seen, excluded, captured, router_loss, why_blind, failure, thrown_away: as in `StepLog`.
        retry_next_step: as in `LossFacts`.
    """

    model: str
    compiled: bool = False
    compiled_in_place: bool = False
    seen: int = 0
    excluded: int = 0
    captured: int = 0
    router_loss: bool = False
    why_blind: str = ""
    failure: Exception | None = None
    thrown_away: int = 0
    retry_next_step: bool = False
