"""What earlier traces of a model found (checks.py), as long as the same code would run: a check costs more than a short pass.

Remembered weakly, by the model. Its weights may change, in place or for others of their shape and dtype; whatever else a
forward pass may depend on is compared: the modules and their classes, functions put in place of a forward, hooks, numbers and
names among the attributes of modules and configurations, functions of the files that define the modules, dtype, autocast.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .checks import Found

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
FRAMES = ("_parameters", "_buffers", "_modules")  # of nn.Module: their tensors and modules are looked at one by one
LARGE, DEEP = 256, 6  # containers among attributes that are looked through: numbers held, containers within one another

_found: weakref.WeakKeyDictionary[nn.Module, tuple[Hashable, Found]] = weakref.WeakKeyDictionary()


def found_before(model: nn.Module) -> Found:
    """What earlier traces of this model found, to be added to; nothing where the model has become another since."""
    now = signature(model)
    before = _found.get(model)
    if before is None or before[0] != now:
        _found[model] = before = (now, Found())
    return before[1]


def signature(model: nn.Module) -> Hashable:
    """What a forward pass depends on beside ids and the values of weights and buffers; equal if nothing of it has changed.

    It holds no reference that would keep the model alive.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    files = sorted({type(module).__module__ for _, module in modules})
    device = next((p.device.type for _, p in tensors), "cpu")
    return (
        tuple((name, _Identity(module), *_attributes(module)) for name, module in modules),
        tuple((name, type(p), p.shape, p.dtype, p.device) for name, p in tensors),
        tuple(key for name in files if name in sys.modules for key in _functions(vars(sys.modules[name]))),
        tuple(_key(hook) for hook in _global_hooks()),
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.backends.cuda.matmul.allow_tf32),
    )


def _attributes(module: nn.Module) -> Iterator[Any]:
    """The module's class and forward, and each of its attributes; those of its configuration too."""
    yield type(module)
    yield _key(type(module).forward)
    for name, value in vars(module).items():
        if name in FRAMES:
            continue
        yield name
        if "hooks" in name and isinstance(value, dict):
            yield tuple(map(_key, value.values()))
        elif name == "config" and hasattr(value, "__dict__"):
            yield tuple((key, _key(x)) for key, x in vars(value).items())
        else:
            yield _key(value)


def _functions(names: dict[str, Any]) -> Iterator[Hashable]:
    """The functions of a file, which models call by name."""
    return ((name, _key(value)) for name, value in list(names.items()) if callable(value))


def _global_hooks() -> list[Any]:
    kept = vars(nn.modules.module)
    return [hook for name in ("_global_forward_pre_hooks", "_global_forward_hooks") for hook in kept[name].values()]


class _Identity:
    """An object as itself and no other, without keeping it alive."""

    def __init__(self, of: Any) -> None:
        self.of = weakref.ref(of)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.of() is not None and self.of() is other.of()

    def __hash__(self) -> int:
        return id(self.of)


def _key(value: Any, depth: int = 0) -> Hashable:
    """What tells a value from another that is put in its place; of a large or deep container that it is this one."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, value.device)
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        if len(value) > LARGE or depth > DEEP:
            return (type(value), len(value), id(value))
        items = value.items() if isinstance(value, dict) else value
        return (type(value), *(_key(x, depth + 1) for x in items))
    if hasattr(value, "__func__") and hasattr(value, "__self__"):
        return (_key(value.__func__), id(value.__self__))
    try:
        return _Identity(value)
    except TypeError:
        return (type(value), id(value))
