"""What a run keeps of its strongest pairs of tokens: their force by layer and kind, and the numbers of their kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .contexts import Contexts
from .explain import Part

LEAST, SHARE = 2000, 0.1  # pairs that are kept: so many, or this share of all, whichever is more
BYTES = 64 << 20  # of their parts at most


@dataclass(frozen=True)
class Pairs:
    """Some pairs (m, l) of a matrix, with the parts of each.

    Attributes:
        index: m and l of each, [K, 2].
        parts: their force by part, [K, N] nats per unit learning rate.
        kernel: h_m·h_l, the cosine of h_m and h_l, and <g_m, γ_l> of the forces at the readout, [K, 3].
        names: layer and kind of each part.
    """

    index: Int[Tensor, "K 2"]
    parts: Float[Tensor, "K N"]
    kernel: Float[Tensor, "K 3"]
    names: list[tuple[str, str]]

    @cached_property
    def place(self) -> dict[tuple[int, int], int]:
        """Where a pair is kept."""
        return {(m, l): k for k, (m, l) in enumerate(self.index.tolist())}  # noqa: E741

    def of(self, m: int, members: Sequence[int]) -> tuple[list[Part], dict[str, float]] | None:
        """The parts of the update tokens' force together, and their kernel; None where one of them is not kept."""
        at = [self.place.get((m, l)) for l in members]  # noqa: E741
        if not at or any(k is None for k in at):
            return None
        rows = torch.tensor(at)
        by_token = self.parts[rows].double()
        parts = by_token.sum(0).tolist()
        readout, cosine, _ = self.kernel[rows[by_token.sum(1).abs().argmax()]].tolist()  # of one context, one hidden state
        product = float(self.kernel[rows, 2].double().sum())
        found = [(layer, kind, force) for (layer, kind), force in zip(self.names, parts, strict=True)]
        return found, {"readout": readout, "cosine": cosine, "product": product}

    def tensors(self) -> dict[str, Tensor]:
        """What is written to disk."""
        return {"pairs": self.index, "pairs.parts": self.parts, "pairs.kernel": self.kernel}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Pairs | None:
        """From a run's tensors and record; None where it kept none."""
        if "pairs" not in tensors:
            return None
        names = [(str(layer), str(kind)) for layer, kind in about["pairs"]["parts"]]
        return cls(tensors["pairs"], tensors["pairs.parts"], tensors["pairs.kernel"], names)


def strongest(contexts: Contexts, parts: int, count: int | None = None) -> Int[Tensor, "K 2"]:
    """Which pairs to keep: the tokens of the strongest net forces from elsewhere first, then the strongest single ones.

    Among the first are those of rejected tokens that push a chosen one down, which are asked for by name (Cards.strongest).

    Args:
        contexts: of the run's matrix.
        parts: how many numbers each takes.
        count: how many; LEAST or SHARE of all, within BYTES, when absent.
    """
    F = contexts.run.matrix
    assert F is not None
    M, L = F.shape
    wanted = max(LEAST, int(SHARE * M * L)) if count is None else count
    wanted = min(M * L, max(1, BYTES // (4 * max(1, parts))), wanted)
    found: dict[tuple[int, int], None] = {}
    joined = contexts.alike_joined
    for of, forces, share in (
        (joined, joined.others, wanted // 4),
        (joined, joined.pushed_down, wanted * 3 // 8),
        (contexts, contexts.others, wanted // 2),
    ):
        nets = forces.abs().flatten()
        for cell in nets.topk(min(len(nets), wanted)).indices.tolist():
            m, x = divmod(cell, forces.shape[1])
            new = [(m, l) for l in of.members[x] if (m, l) not in found]  # noqa: E741
            if not nets[cell] or found and len(found) + len(new) > share:
                break
            found |= dict.fromkeys(new)
    for cell in F.abs().flatten().nan_to_num(0).topk(wanted).indices.tolist():
        if len(found) >= wanted:
            break
        found.setdefault(divmod(cell, L))
    return torch.tensor(list(found))
