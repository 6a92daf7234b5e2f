"""Whether the gradients of passes that were captured are still there when the next ones come, or the step does."""

from __future__ import annotations

import torch
from torch import nn

from ..model.unwrap import is_sharded
from .hooks import Caught, harmless


class Gradients:
    """The gradients in a model's parameters, as backward passes leave them and zero_grad() takes them away.

    A backward pass whose gradients are thrown away before the optimizer steps (a batch tried again, a loss that was NaN) is no
    part of the step. Where gradients are kept elsewhere (sharded parameters, DeepSpeed) that cannot be seen, and every
    pass counts.
    """

    def __init__(self, lm: nn.Module) -> None:
        self._lm = lm
        self._kept_elsewhere = any(is_sharded(p) for p in lm.parameters())  # between passes; within one they are whole
        self._running = self._held = False

    def backward_begins(self, caught: Caught) -> bool:
        """To be called inside a backward pass, any number of times: whether what earlier ones left has been thrown away.

        caught: is told what goes wrong at the end of the pass.
        """
        if self._running:
            return False
        self._running = True
        gone = self.thrown_away()
        torch.autograd.Variable._execution_engine.queue_callback(harmless(self._backward_ended, caught))
        return gone

    def thrown_away(self) -> bool:
        """Whether there were gradients and there are none now; said once."""
        gone = self._held and not self._any()
        self._held = self._held and not gone
        return gone

    def forget(self) -> None:
        """A step begins, or the optimizer steps: from here on zero_grad() throws nothing away that counts."""
        self._running = self._held = False

    def _backward_ended(self) -> None:
        self._running, self._held = False, self._any()

    def _any(self) -> bool:
        """Whether a parameter has a gradient that is not zero; asks the smallest first."""
        own = [] if self._kept_elsewhere else [p for p in self._lm.parameters() if p.requires_grad]
        held = sorted((p.grad for p in own if p.grad is not None), key=lambda grad: grad.numel())
        return any(bool(grad.any()) for grad in held)
