"""Which modules use which parameter, seen in a forward pass and not guessed from names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from .calls import floats, tensors
from .hooks import hooked

Chain = tuple[str, ...]  # names of modules that run inside one another, the model first


def parameter_uses(model: nn.Module, owner: Mapping[str, str], forward: Callable[[], Any]) -> dict[str, set[Chain]]:
    """For each parameter that `forward` computes with: the chains of running modules that contain it, one for each use.

    Args:
        model: the model that `forward` runs.
        owner: for every name of a parameter the first name of the same tensor; parameters are reported under that one.
        forward: one or more forward passes of the model.
    """
    uses = _Uses(model, owner)
    names = [name for name, _ in model.named_modules()]
    before = {name: partial(uses.enter, name) for name in names}
    with hooked(model, before=before, after=dict.fromkeys(names, uses.leave)), uses:
        forward()
    return uses.found


class _Uses(TorchFunctionMode):
    """Notes at every torch function which parameters it is given and which modules are running."""

    def __init__(self, model: nn.Module, owner: Mapping[str, str]) -> None:
        super().__init__()
        self.first_name = {id(p): owner[name] for name, p in model.named_parameters(remove_duplicate=False) if name in owner}
        self.inside = {name: {id(p) for p in module.parameters()} for name, module in model.named_modules()}
        self.running: list[str] = []
        self.found: dict[str, set[Chain]] = {}

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.running.append(name)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        parameters = {id(x) for x in tensors((args, kwargs)) if isinstance(x, nn.Parameter)}
        for p in parameters & self.first_name.keys():
            if floats(result):  # not a look at its dtype or shape
                chain = tuple(name for name in self.running if p in self.inside[name])
                self.found.setdefault(self.first_name[p], set()).add(chain)
        return result
