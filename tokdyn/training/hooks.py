"""Hooks of ours on the user's modules, tensors and optimizers: each goes through one guard, and none is set anywhere else."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

Caught = Callable[[Exception], None]


def harmless(hook: Callable[..., Any], caught: Caught) -> Callable[..., None]:
    """A hook that changes nothing and raises nothing: an exception inside is given to `caught`."""

    @functools.wraps(hook)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            hook(*args, **kwargs)
        except Exception as error:
            caught(error)

    return run


class Hooks:
    """The hooks that one object of ours has set; `remove` takes all of them off.

    Args:
        caught: a method of that object, told what goes wrong inside. It is held weakly: torch keeps some hooks for good.
    """

    def __init__(self, caught: Caught) -> None:
        self._caught = weakref.WeakMethod(caught)
        self._handles: list[Any] = []

    def _tell(self, error: Exception) -> None:
        if (caught := self._caught()) is not None:
            caught(error)

    def add(self, register: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> None:
        """Set a hook by torch's own function for it, `module.register_forward_hook` and so on."""
        self._handles.append(register(harmless(hook, self._tell), **options))

    def remove(self) -> None:
        """Take all off. Safe to call twice."""
        while self._handles:
            self._handles.pop().remove()
