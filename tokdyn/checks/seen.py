"""What one step of a training showed: its batches, captured passes and gradients, before the weights move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..model.readout import Readout
from ..model.unwrap import is_sharded
from ..sequences import token_texts
from ..training.forward import Forward
from ..training.isolation import Call
from ..training.step_log import StepSummary
from .finding import around


@dataclass(frozen=True)
class SeenRow:
    """One sequence of a batch as the model saw it, padding and packing undone.

    Args:
        where: for messages.
        ids: its tokens. scored: which of them the loss scores, as long. padding: scored places outside of it.
        role, group, advantage: what the trainer says of it, where it does.
        tokens: their texts.
    """

    where: str
    ids: list[int]
    scored: list[bool]
    padding: int
    role: str
    group: int
    advantage: float | None
    tokens: Sequence[str]

    def around(self, t: int, width: int = 4) -> str:
        """A token with the text around it, the token in «»."""
        return around(self.where, self.tokens, t, width)


@dataclass
class Seen:
    """All that the checks of a step look at.

    Args:
        trainer: it; checks read its options, by what it has and not by what it is called.
        lm: the causal LM inside. outer: PEFT's wrappers.
        tokenizer: None where the trainer has none.
        forwards: the captured passes. calls: those of the model with gradients.
        gradients: ∂L/∂θ by name, of the parameters that have one.
        readout: as the last pass used it; None where it cannot be read.
        summary: what the capture saw, for an empty one.
        scale: brings c to the units of the optimizer step.
        first: no step has been made: policy and reference, new and old log-probs are one.
        optimizer: that will step; None before there is one.
    """

    trainer: Any
    lm: nn.Module
    outer: Sequence[nn.Module]
    tokenizer: Any
    forwards: Sequence[Forward]
    calls: Sequence[Call]
    gradients: Mapping[str, Tensor]
    readout: Readout | None
    summary: StepSummary
    scale: float = 1.0
    first: bool = True
    optimizer: Any = None
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> Any:
        """The trainer's options."""
        return getattr(self.trainer, "args", None)

    def option(self, name: str, default: Any = None) -> Any:
        """An option of the trainer, wherever it keeps it."""
        own = getattr(self.trainer, name, None)
        return own if own is not None else getattr(self.args, name, default)

    @cached_property
    def sharded(self) -> bool:
        """Whether weights are spread over ranks, where no pass of our own is made."""
        return any(is_sharded(p) or hasattr(p, "ds_id") for p in self.lm.parameters())

    @property
    def pushed(self) -> bool:
        """Whether the loss pushes any token."""
        return any(f.c is None or any(x is not None and bool(x.any()) for x in (f.c, f.v, f.u)) for f in self.forwards)

    def call_of(self, forward: Forward) -> Call | None:
        """The call that made a pass."""
        ids = forward.layout.ids
        return next((call for call in self.calls if call.get("input_ids") is ids), None)

    @cached_property
    def rows(self) -> list[SeenRow]:
        """The sequences of all passes."""
        return [row for n, forward in enumerate(self.forwards, 1) for row in self._rows_of(forward, n)]

    def _rows_of(self, f: Forward, number: int) -> Iterator[SeenRow]:
        layout = f.layout
        if layout.ids is None:
            return
        inside = layout.real[f.batch, f.column] & (layout.sequence[f.batch, f.column] == f.sequence)
        advantages = f.metadata.get("advantages")
        A = None if advantages is None or advantages.dim() != 1 else advantages.tolist()
        roles, groups = f.metadata.get("roles"), f.metadata.get("groups")
        for s in range(layout.sequences):
            own = (layout.sequence == s) & layout.real
            ids, mine = layout.ids[own].tolist(), f.sequence == s
            scored = torch.zeros(len(ids), dtype=torch.bool)
            scored[f.position[mine & inside].cpu()] = True
            texts = token_texts(self.tokenizer, ids) if self.tokenizer is not None else [f" {i}" for i in ids]
            yield SeenRow(
                f"batch {number} sequence {s + 1}", ids, scored.tolist(), int((mine & ~inside).sum()),
                roles[s] if roles else "response", groups[s] if groups else s, A[s] if A and s < len(A) else None, texts,
            )  # fmt: skip


def bound_of(forwards: Sequence[Forward]) -> float:
    """Nats by which two ways of computing one log-prob may differ: √ of the coarsest unit roundoff, as in the self-check."""
    return float(max((f.eps for f in forwards), default=0.0) ** 0.5) or 1e-6
