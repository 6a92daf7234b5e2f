"""The training loop as a monitor knows it: its model and its optimizer, neither kept alive, and who else takes steps."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .hooks import Hooks

PATIENCE = 2  # steps of other optimizers while the loop's own takes none


class Loop:
    """Weak references to a model and its optimizer, and the names of other optimizers that step.

    Args:
        model: what the loop calls, None where it is not known yet.
        optimizer: its optimizer, or accelerate's wrapper of one.
    """

    def __init__(self, model: nn.Module | None, optimizer: Any) -> None:
        self._model = None if model is None else weakref.ref(model)
        inner = getattr(optimizer, "optimizer", None)
        optimizer = inner if isinstance(inner, torch.optim.Optimizer) else optimizer
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._others: list[str] = []

    @property
    def model(self) -> nn.Module | None:
        """The model, as long as somebody else holds it."""
        return None if self._model is None else self._model()

    @property
    def optimizer(self) -> Any:
        """The optimizer, as long as somebody else holds it."""
        return None if self._optimizer is None else self._optimizer()

    @property
    def says_when_it_steps(self) -> bool:
        """Whether the optimizer is one of torch's, whose steps hooks are told of."""
        return hasattr(self.optimizer, "register_step_pre_hook")

    def listen(self, hooks: Hooks, before: Callable[..., None], after: Callable[..., None]) -> None:
        """Have hooks told before and after each step of the optimizer, and note the steps of others."""
        if self.says_when_it_steps:
            hooks.add(self.optimizer.register_step_pre_hook, before)
            hooks.add(self.optimizer.register_step_post_hook, after)
            hooks.add(register_optimizer_step_post_hook, _noting(weakref.ref(self)))

    def has_stepped(self) -> None:
        """The loop's own optimizer takes a step; that others do too, for the rest of the weights, is as it should be."""
        self._others = []

    def why_no_step(self) -> str:
        """Which optimizers have stepped while the loop's own has not, a sentence; "" before the second step; said once."""
        if len(self._others) < PATIENCE:
            return ""
        names, self._others = ", ".join(sorted(set(self._others))), []
        return (
            f"the optimizer that the monitor was given has not stepped, and another has ({names}): give the monitor the model "
            "and the optimizer that train, monitor.start(model, optimizer)"
        )

    def note(self, optimizer: Any) -> None:
        """An optimizer of this process has stepped."""
        if optimizer is not self.optimizer and len(self._others) < PATIENCE:
            self._others.append(type(optimizer).__name__)


def _noting(loop: weakref.ref[Loop]) -> Callable[..., None]:
    """A hook on the steps of all optimizers, which torch keeps: it does not hold on to the loop."""

    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        with contextlib.suppress(Exception):  # in a step that may be anybody's: nothing of ours may end it
            if (own := loop()) is not None:
                own.note(optimizer)

    return hook
