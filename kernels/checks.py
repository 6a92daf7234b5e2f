"""What an operator is given, checked once before any form of it computes: every form sees the same, and reads what is there."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Given = tuple[Tensor | None, str]  # a tensor, None where it is not there, and its shape by letters: "B Hk G T D"


def shapes(op: str, given: Mapping[str, Given], **known: int) -> dict[str, int]:
    """Raise unless the shapes of tensors agree letter by letter; returns the size behind each letter.

    A letter that begins with # may be 1 instead; one that begins with * stands for one dimension or none.

    Raises:
        ValueError: a tensor with another number of dimensions or size, or tensors on different devices.
    """
    sizes, first = dict(known), None
    for name, (tensor, form) in given.items():
        if tensor is None:
            continue
        letters = form.split()
        if letters and letters[-1].startswith("*"):
            letters = letters[:-1] if tensor.dim() == len(letters) - 1 else [*letters[:-1], letters[-1][1:]]
        fits = tensor.dim() == len(letters)
        for letter, size in zip(letters, tensor.shape, strict=True) if fits else ():
            plain = letter.lstrip("#")
            wanted = int(plain) if plain.isdigit() else sizes.setdefault(plain, size) if plain == letter else sizes[plain]
            fits = fits and (size == wanted or plain != letter and size == 1)
        if not fits:
            bound = ", ".join(
                f"{letter}={sizes[letter]}" for letter in dict.fromkeys(x.lstrip("#*") for x in letters) if letter in sizes
            )
            raise ValueError(
                f"{op}: {name} must be [{form.replace(' ', ', ')}]{f' with {bound}' * bool(bound)}, got {list(tensor.shape)}"
            )
        first = tensor if first is None else first
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} and what comes before on {first.device}: bring them together")
    return sizes


def floats(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor is of a floating dtype; None is an argument that is not there."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} must be of a floating dtype, got {tensor.dtype}")


def one_kind(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are of one floating dtype."""
    floats(op, **tensors)
    kinds = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"{op}: dtypes must be one, got {', '.join(f'{name} {kind}' for name, kind in kinds.items())}")


def ids(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor is int64."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.int64:
            raise ValueError(f"{op}: {name} must be int64, got {tensor.dtype}")


def within(op: str, V: int, **given: Tensor) -> None:
    """Raise ValueError unless every token lies in [0, V)."""
    for name, tokens in given.items():
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= V):
            raise ValueError(f"{op}: {name} must lie in [0, V)=[0, {V}), got {int(tokens.min())} to {int(tokens.max())}")


def above_zero(op: str, **numbers: float | None) -> None:
    """Raise ValueError unless every number is finite and above 0; None is an argument that is not there."""
    for name, x in numbers.items():
        if x is not None and not (x > 0 and math.isfinite(x)):
            raise ValueError(f"{op}: {name} must be above 0 and finite, got {x}")


def finite(op: str, **numbers: float) -> None:
    """Raise ValueError unless every number is finite."""
    for name, x in numbers.items():
        if not math.isfinite(x):
            raise ValueError(f"{op}: {name} must be finite, got {x}")


def some(op: str, sizes: Mapping[str, int], *letters: str) -> None:
    """Raise ValueError where a size is 0 that an operator has no answer for."""
    for letter in letters:
        if sizes[letter] == 0:
            raise ValueError(f"{op}: {letter} must be at least 1, got 0")
