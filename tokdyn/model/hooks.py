"""Forward hooks for the length of a block: removed at its end, also after an error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

PreHook = Callable[[nn.Module, Any, Any], Any]  # (module, args, kwargs) -> (args, kwargs) to call it with, or None
Hook = Callable[[nn.Module, Any, Any, Any], Any]  # (module, args, kwargs, output) -> what it returns instead, or None


@contextlib.contextmanager
def hooked(
    model: nn.Module, *, before: Mapping[str, PreHook] | None = None, after: Mapping[str, Hook] | None = None
) -> Iterator[None]:
    """Run hooks before and after the calls of named submodules inside the block.

    Raises:
        AttributeError: the model has no such submodule.
    """
    with contextlib.ExitStack() as handles:
        for name, pre_hook in (before or {}).items():
            module = model.get_submodule(name)
            handles.callback(module.register_forward_pre_hook(pre_hook, with_kwargs=True).remove)
        for name, hook in (after or {}).items():
            handles.callback(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True).remove)
        yield
