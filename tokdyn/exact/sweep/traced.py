"""A batch of a side as the structured engines take it: the readout's input, the cotangent there, the moving modules' calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...model.calls import Call
from ...model.trace import Tracer
from ...model.unroll import Place, Unrolled
from ...sequences import Batch
from ..errors import Unsupported
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
        graph: its graph, if one was made on the way; whoever takes it empties the list.
    """

    batch: Batch
    h: Float[Tensor, "N d"]
    cotangent: Float[Tensor, "N d"]
    ids: Int[Tensor, " I"]
    gamma_at_ids: Float[Tensor, "N I"]
    where: Int[Tensor, " N"]
    dtype: torch.dtype
    calls: Sequence[Call]
    rules: Rules
    graph: list[Unrolled]

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

    @torch.no_grad()
    def __call__(self, b: int, with_calls: bool, places: Sequence[Place] | None = None) -> TracedBatch:
        """Batch b; the logits exist for some rows at a time. With places its graph is kept, which may be cut there."""
        batch, term = self.side.batches[b], self.side.terms[b]
        graph = [] if places is None else [self.plan.unroll(self.tracer, batch, places)]
        if graph:
            h, calls = graph[0].hidden.detach(), [call.detached() for call in graph[0].calls] if with_calls else []
        else:
            h, calls = self.plan.record(self.tracer, batch) if with_calls else (self.tracer.hidden(batch), [])
        calls = self.plan.used(calls) if self.used else calls
        weight = self.tracer.readout.weight.to(self.tracer.precision)
        ids, parts = self.ids if self.plan.lookup is not None else self.ids[:0], []
        for part in forces_at_readout(self.tracer, h, term):
            parts.append((part.pulled @ weight, part.pulled[:, ids]))
        cotangent, residual = (torch.cat(of) for of in zip(*parts, strict=True))
        where, rules = self.side.where[b].to(h.device), self.plan.rules(calls) if with_calls else {}
        if self.used and len(batch.ids) > 1:
            if not all(rule.tells_sequences for rule in rules.values()):
                raise Unsupported("a module does not tell the sequences of a batch apart")
            self._require_alone(batch, h, calls)
        return TracedBatch(batch, h.to(cotangent.dtype), cotangent, ids, residual, where, h.dtype, calls, rules, graph)

    def _require_alone(self, batch: Batch, h: Float[Tensor, "N d"], calls: Sequence[Call]) -> None:
        """Raise unless the sequence with the most padding gives alone what it gives in the batch.

        Raises:
            Unsupported: a module returns something else: sequences meet in it, or padding counts.
        """
        T, row = batch.ids.shape[1], batch.rows // batch.ids.shape[1]
        ends = (batch.rows % T)[row.diff(append=row.new_tensor([-1])) != 0]  # of each sequence, where its last token is scored
        k = int(ends.argmin())
        h_alone, own = self.plan.record(self.tracer, batch.alone(k)) if calls else (self.tracer.hidden(batch.alone(k)), [])
        own = self.plan.used(own)
        if [call.name for call in own] != [call.name for call in calls] or not all(call.is_by_sequence for call in calls):
            raise Unsupported("a module does not take the sequences of a batch one by one")
        require_beginning("the model", h[row.to(h.device) == k], h_alone, "a sequence in a batch than alone")
        for call, whole in zip(own, calls, strict=True):
            for x, y in zip(whole.outputs, call.outputs, strict=True):
                require_beginning(call.name, x[k] if y.dim() < x.dim() else x[k : k + 1], y, "a sequence in a batch than alone")


def require_beginning(name: str, whole: Tensor, part: Tensor, what: str) -> None:
    """Raise unless `part` is the beginning of `whole` along every axis.

    Raises:
        Unsupported: the module `name` returns something else for `what`.
    """
    near = max(1e-3, torch.finfo(part.dtype).eps ** 0.5)
    begin = whole[tuple(slice(0, n) for n in part.shape)] if whole.dim() == part.dim() else whole
    if begin.shape != part.shape or not bool((begin - part).norm() <= near * part.norm()):
        raise Unsupported(f"{name} returns something else for {what}")
