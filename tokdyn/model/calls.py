"""Calls of modules as data, and the floating-point tensors in what they are given and return."""

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
        """The floating-point tensors that came out: what a parameter can move."""
        return floats(self.output)

    def detached(self) -> Call:
        """The same call outside the graph it was recorded in."""
        return Call(self.name, self.module, *map_floats(Tensor.detach, (self.args, self.kwargs, self.output)))


@dataclass(frozen=True)
class FusedCall(Call):
    """The calls of several modules whose outputs y_i meet in one elementwise product w, as one call that returns w.

    parts: the calls with their slopes A_i = ∂w/∂y_i, each of the shape of w: a cotangent δ at w is A_i ⊙ δ at y_i.
    """

    parts: tuple[tuple[Call, Tensor], ...] = ()

    def detached(self) -> FusedCall:
        """The same calls outside the graph they were recorded in."""
        return replace(self, output=self.output.detach(), parts=tuple((call.detached(), A) for call, A in self.parts))


def floats(tree: Any) -> list[Tensor]:
    """The floating-point tensors of a nested structure."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]


def map_floats(f: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same structure with f applied to each of its floating-point tensors."""
    return tree_map(lambda x: f(x) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)
