"""A call of a module as data: what went in and what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Call:
    """One call of a module: what went in and what came out."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that went in, by position and then by keyword."""
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors of real numbers that came out: what a parameter can move."""
        return floats(self.output)

    def detached(self) -> Call:
        """The same call outside the graph it was recorded in."""
        return Call(self.name, self.module, *map_floats(Tensor.detach, (self.args, self.kwargs, self.output)))


@dataclass(frozen=True)
class Joined(Call):
    """Calls of several modules as one, which returns a tensor w that each number of their outputs acts on by itself."""

    parts: tuple[tuple[Call, Tensor], ...] = ()  # each with the slope ∂w/∂output

    def detached(self) -> Joined:
        """The same calls outside the graph they were recorded in."""
        return replace(self, output=self.output.detach(), parts=tuple((call.detached(), A) for call, A in self.parts))


def floats(tree: Any) -> list[Tensor]:
    """The floating-point tensors of a nested structure."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]


def map_floats(f: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same structure with f of each of them."""
    return tree_map(lambda x: f(x) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)
