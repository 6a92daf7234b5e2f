"""Calls of modules as data, and the floating-point tensors in what they are given and return."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..sequences import Batch

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)  # what holds no tensors


@dataclass(frozen=True)
class Call:
    """One call of a module: what went in and what came out, for so many sequences side by side.

    Attributes:
        sequences, length: of the batch, B sequences of T positions each.
        memo: what was worked out of it, made once.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    sequences: int = 1
    length: int = 0
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False, kw_only=True)

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that went in, by position and then by keyword."""
        return list(tensors((self.args, self.kwargs)))

    @property
    def outputs(self) -> list[Tensor]:
        """The floating-point tensors that came out: what a parameter can move."""
        return floats(self.output)

    def detached(self) -> Call:
        """The same call outside the graph it was recorded in."""
        args, kwargs, output = map_floats(Tensor.detach, (self.args, self.kwargs, self.output))
        return replace(self, args=args, kwargs=kwargs, output=output)

    def for_each(self) -> Call:
        """The same call with a row for each sequence, where it was made once for all of them (a lookup of positions)."""
        if self.sequences == 1 or not self.outputs or any(x.shape[:1] != (1,) for x in self.outputs):
            return self

        def expanded(x: Any) -> Any:
            once = isinstance(x, Tensor) and x.dim() > 1 and len(x) == 1
            return x.expand(self.sequences, *x.shape[1:]) if once else x

        args, kwargs, output = tree_map(expanded, (self.args, self.kwargs, self.output))
        return replace(self, args=args, kwargs=kwargs, output=output)

    def in_rows(self, x: Tensor) -> Tensor:
        """A tensor of all positions one after the other, [B T, ...], as [B, T, ...]; others as they are."""
        B, T = self.sequences, self.length
        is_flat = B > 1 and x.dim() > 1 and len(x) == B * T and (T > 1 or x.dim() == 2)
        return x.unflatten(0, (B, T)) if is_flat else x

    def for_each_of(self, x: Tensor, like: Tensor) -> Tensor:
        """What the module returned when it was called again, with the rows of its recorded output `like`."""
        once = x.dim() == like.dim() and len(x) == 1 < len(like) == self.sequences  # a lookup of positions
        return x.expand(self.sequences, *x.shape[1:]) if once else self.in_rows(x)

    def returned(self, output: Any) -> Call:
        """The same call with another output, in which what has a row for each position has one for each sequence."""
        return replace(self, output=map_floats(self.in_rows, output))

    @property
    def is_by_sequence(self) -> bool:
        """Whether what went in and what came out has a row for each sequence, or for each of its positions."""
        return all(x.dim() > 1 and len(self.in_rows(x)) == self.sequences for x in [*self.inputs[:1], *self.outputs])

    def by_sequence(self, x: Tensor) -> Tensor:
        """One of its tensors as [sequences, positions, width], the positions of a sequence one after the other."""
        return x.reshape(self.sequences, -1, x.shape[-1])


@dataclass(frozen=True)
class FusedCall(Call):
    """The calls of several modules whose outputs y_i meet in one elementwise product w, as one call that returns w.

    parts: the calls with their slopes A_i = ∂w/∂y_i, each of the shape of w: a cotangent δ at w is A_i ⊙ δ at y_i.
    """

    parts: tuple[tuple[Call, Tensor], ...] = ()

    @property
    def is_by_sequence(self) -> bool:
        """See Call."""
        return all(call.is_by_sequence for call, _ in self.parts)

    def detached(self) -> FusedCall:
        """The same calls outside the graph they were recorded in."""
        return replace(self, output=self.output.detach(), parts=tuple((call.detached(), A) for call, A in self.parts))


def floats(tree: Any) -> list[Tensor]:
    """The floating-point tensors of a nested structure."""
    return [x for x in tensors(tree) if x.is_floating_point()]


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of a nested structure: `tree_leaves`, at a tenth of its time where there is little more than tensors."""
    if isinstance(tree, Tensor):
        yield tree
    elif type(tree) in (tuple, list, dict):
        for x in tree.values() if type(tree) is dict else tree:
            yield from tensors(x)
    elif not isinstance(tree, PLAIN):
        yield from (x for x in tree_leaves(tree) if isinstance(x, Tensor))


def shaped_like(tree: Any, other: Any) -> Any:
    """A nested structure with its tensors in the shapes that they have in another one, where they hold as many numbers."""
    shapes = iter([x.shape for x in floats(other)])

    def shaped(x: Tensor) -> Tensor:
        shape = next(shapes)
        if x.shape == shape or x.numel() != shape.numel():
            return x  # itself: a view of the same shape would be one more node of the graph
        return x.reshape(shape)

    return map_floats(shaped, tree)


def map_floats(f: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same structure with f applied to each of its floating-point tensors."""
    return tree_map(lambda x: f(x) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def require_every_position(batch: Batch, h: Tensor) -> None:
    """Raise unless the readout is given one hidden state for each position of the batch, [B, T, d] or [B·T, d].

    Raises:
        ValueError: it is given others: which of them scores which token is then unknown.
    """
    B, T = batch.ids.shape
    if h.shape[:-1].numel() != B * T:
        raise ValueError(
            f"the readout is given hidden states {list(h.shape)} for sequences of [B, T]={[B, T]}: a model that returns "
            "the last place's logits alone, or whose prompt tuning puts virtual tokens in front, cannot be traced"
        )
