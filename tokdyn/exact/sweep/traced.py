"""A batch of a side as the structured engines take it: the readout's input, the cotangent there, the moving modules' calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...model.calls import Call
from ...model.trace import Tracer
from ...sequences import Batch
from ..readout import forces_at_readout
from ..sides import Side
from .plan import Plan, Rules


@dataclass(frozen=True)
class TracedBatch:
    """A batch of a side's tokens.

    Attributes:
        batch: its sequences.
        h: the readout's input, [N, d].
        cotangent: Wᵀ Γ, Γ at the logits pulled back through softcap and scale, [N, d].
        ids, gamma_at_ids: columns of Γ for the token ids that occur on the other side, sorted; empty unless the readout is
            tied to a trained lookup.
        where: its tokens on the side's axis of F.
        dtype: of the backbone.
        calls: of the moving modules; empty where they were not asked for.
        rules: of the moving modules, from these calls as the observed side's.
    """

    batch: Batch
    h: Float[Tensor, "N d"]
    cotangent: Float[Tensor, "N d"]
    ids: Int[Tensor, " I"]
    gamma_at_ids: Float[Tensor, "N I"]
    where: slice
    dtype: torch.dtype
    calls: Sequence[Call]
    rules: Rules

    def residual_at(self, ids: Int[Tensor, " S"]) -> Float[Tensor, "N S"]:
        """Γ at the logits of these ids."""
        return self.gamma_at_ids[:, torch.searchsorted(self.ids, ids)]


@dataclass(frozen=True)
class SideTracer:
    """Makes the traced batches of one side, each by a forward pass.

    Attributes:
        tracer, plan: the model and what moves of it.
        side: the side.
        ids: all ids of the other side, in order.
        used: leave out calls on which the readout's input does not depend, as a graph does.
    """

    tracer: Tracer
    plan: Plan
    side: Side
    ids: Int[Tensor, " I"]
    used: bool = False

    @cached_property
    def starts(self) -> list[int]:
        """Where each batch begins on the side's axis of F."""
        return self.side.starts

    @torch.no_grad()
    def __call__(self, b: int, with_calls: bool) -> TracedBatch:
        """Batch b; the logits exist for some rows at a time."""
        batch, term, start = self.side.batches[b], self.side.terms[b], self.starts[b]
        h, calls = self.plan.record(self.tracer, batch) if with_calls else (self.tracer.hidden(batch), [])
        calls = self.plan.used(calls) if self.used else calls
        weight = self.tracer.readout.weight.to(self.tracer.precision)
        ids, parts = self.ids if self.plan.lookup is not None else self.ids[:0], []
        for part in forces_at_readout(self.tracer, h, term):
            parts.append((part.pulled @ weight, part.pulled[:, ids]))
        cotangent, residual = (torch.cat(of) for of in zip(*parts, strict=True))
        where, rules = slice(start, start + len(h)), self.plan.rules(calls) if with_calls else {}
        return TracedBatch(batch, h.to(cotangent.dtype), cotangent, ids, residual, where, h.dtype, calls, rules)
