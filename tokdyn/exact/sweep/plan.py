"""Which modules move and by which rule, and the sequences of a side as the engines take them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...model.calls import Call, Joined
from ...model.trace import Tracer
from ...model.unroll import Place
from ...objective import GTerm
from ...sequences import Batch
from ..modules.fused import Joint, joints
from ..modules.norms import Norm
from ..modules.rotary import turned
from ..modules.rules import Embedding, Linear, NotAlone, Rule, Scale, Together, Unsupported, rule_for
from ..products import Direction, Side

BLOCK = 1 << 26  # elements of logits held at a time


@dataclass(frozen=True)
class Plan:
    """Which modules move and how the readout takes part."""

    moves: dict[str, set[str]]  # module -> its moving parameters, in the backbone, named from there
    module: dict[str, str]  # use of a tensor -> the module that moves it
    head: bool  # the readout weight moves as readout
    head_bias: bool
    lookup: str | None  # the module whose lookup shares the readout's weight, when both move
    P: dict[str, Direction]  # module -> the preconditioner of its moving parameters, named from there; empty without one
    norms: dict[str, Norm]  # moving modules whose cotangent has a closed form
    joints: tuple[Joint, ...] = ()  # moving modules that go as one

    @property
    def names(self) -> list[str]:
        """The modules that move."""
        return list(self.moves)

    def numbers(self, tracer: Tracer) -> dict[str, int]:
        """How many numbers move, by module and by joint."""
        found = {
            name: sum(tracer.model.get_submodule(name).get_parameter(x).numel() for x in own)
            for name, own in self.moves.items()
        }
        return found | {of.name: sum(found[name] for name in of.modules) for of in self.joints}

    def rules(self, calls: Sequence[Call]) -> dict[str, Rule]:
        """A rule for each module that is called.

        Raises:
            Unsupported: the readout's weight is tied to something other than a lookup.
            NotAlone: a module cannot be called by itself.
        """
        of: dict[str, list[Call]] = {}
        for call in calls:
            of.setdefault(call.name, []).append(call)
        rules = {name: self._rule(mine) for name, mine in of.items()}
        if self.lookup is not None and not isinstance(rules.get(self.lookup), Embedding):
            raise Unsupported(f"the readout's weight is tied to {self.lookup}, which is no plain lookup")
        return rules

    def _rule(self, calls: list[Call]) -> Rule:
        if isinstance(calls[0], Joined):
            return Together(calls[0], [Linear([of], self.moves[of.name]) for of, _ in calls[0].parts])
        return rule_for(calls, self.moves[calls[0].name], self.P.get(calls[0].name))

    def joined(self, tracer: Tracer, batch: Batch) -> Plan:
        """The same with the modules as one that have a joint, of those whose directions are longer than their cotangents."""
        h, calls, given = self.unroll(tracer, batch)
        rules = self.rules([call.detached() for call in calls])
        half = batch.ids.shape[1] // 2
        fit = [name for name, rule in rules.items() if isinstance(rule, Linear) and not rule.is_short(half)]
        return replace(self, joints=tuple(joints(h, calls, given, fit)))

    def record(self, tracer: Tracer, batch: Batch) -> tuple[Tensor, list[Call]]:
        """Tracer.record at the moving modules."""
        if not self.joints:
            return tracer.record(batch, self.names)
        h, calls, _ = self.unroll(tracer, batch)
        return h.detach(), [call.detached() for call in calls]

    def unroll(
        self,
        tracer: Tracer,
        batch: Batch,
        places: Sequence[Place] | None = None,
        bottom: Place | None = None,
        top: Place | None = None,
    ) -> tuple[Tensor, list[Call], dict[Place, Tensor]]:
        """Tracer.unroll at the moving modules, with the derivatives of norms, rotary embeddings and joints in closed form."""
        with turned(tracer.model):
            return tracer.unroll(
                batch,
                self.names,
                replace_outputs=self.norms,
                replace_inputs={of.place: of for of in self.joints},
                places=places,
                start_at=bottom,
                stop_at=top,
            )

    def is_unseen(self, tracer: Tracer, use: str) -> bool:
        """Whether no module was seen to use this tensor, nor the readout."""
        return use not in self.module and use not in (tracer.readout.weight_name, tracer.readout.bias_name)

    def labels(self, tracer: Tracer, uses: dict[str, str], rules: dict[str, str]) -> dict[str, str]:
        """The rule of every moving parameter."""
        head = (tracer.readout.weight_name, tracer.readout.bias_name)
        return {
            use: "readout in closed form"
            if use in head
            else rules.get(self.module.get(use, ""), "not used in the forward pass")
            for use in uses
        }


def plan(tracer: Tracer, uses: dict[str, str], P: Direction | None, batches: Sequence[Batch]) -> Plan:
    """Sort the uses by the innermost module that was seen to use them (Tracer.usage) and that can be moved by itself.

    A module that does not repeat its output when called alone is moved as part of the one around it.

    Raises:
        Unsupported: a tensor that two modules share, other than a lookup tied to the readout; a readout that is not
            softcap(scale (W h + b)); a model that does not repeat its output.
    """
    error = tracer.readout_residual(batches[0])
    if error > tracer.readout_bound:
        raise Unsupported(f"the logits differ by {error:.0e} from softcap(scale (W h + b)), the readout's formula")
    seen, passed = tracer.usage(batches), set[str]()
    while True:
        found = _sorted(tracer, uses, P, seen, passed)
        try:
            calls = tracer.record(batches[0], found.names)[1]
            rules = found.rules(calls)
            norms = {call.name: Norm.of(call) for call in calls if isinstance(rules[call.name], Scale)}
            return replace(found, norms={name: norm for name, norm in norms.items() if norm is not None})
        except NotAlone as error:
            if not error.name:
                raise Unsupported("the model does not repeat its output") from error
            passed.add(error.name)


def _sorted(
    tracer: Tracer,
    uses: dict[str, str],
    P: Direction | None,
    seen: dict[str, set[tuple[str, ...]]],
    passed: Collection[str],
) -> Plan:
    head = tracer.readout
    before = {use: tensor for use, tensor in uses.items() if use not in (head.weight_name, head.bias_name)}
    moves: dict[str, set[str]] = {}
    scaled: dict[str, Direction] = {}
    module_of: dict[str, str] = {}
    for tensor in dict.fromkeys(before.values()):
        modules = {next((m for m in reversed(chain) if m not in passed), "") for chain in seen.get(tensor, ())}
        outermost = [m for m in modules if not any(n != m and _within(m, n) for n in modules)]
        if len(outermost) > 1:
            raise Unsupported(f"{tensor} is one tensor in two modules, {' and '.join(sorted(outermost))}")
        for module in outermost:
            names = [name for name, owner in tracer.owner.items() if owner == tensor and _within(name, module)]
            own = names[0][len(module) + 1 if module else 0 :]
            moves.setdefault(module, set()).add(own)
            if P is not None:
                scaled.setdefault(module, {})[own] = P[tensor]
            module_of |= {use: module for use, other in before.items() if other == tensor}
    tied = tracer.owner[head.weight_name]
    lookup = next((module_of[use] for use, tensor in before.items() if tensor == tied and use in module_of), None)
    moving = head.weight_name in uses
    return Plan(moves, module_of, moving, head.bias_name in uses, lookup if moving else None, scaled, {})


def _within(name: str, module: str) -> bool:
    return not module or name.startswith(module + ".")


@dataclass(frozen=True)
class Watched:
    """A batch of a side's tokens: the input of the readout, the force there, and the calls of the moving modules."""

    batch: Batch
    h: Float[Tensor, "N d"]
    u: Float[Tensor, "N d"]  # Wᵀ Γ, Γ pulled back through softcap and scale
    ids: Int[Tensor, " I"]  # the ids, in order, whose Γ is kept: those that the other side looks up, where that is tied
    residual: Float[Tensor, "N I"]
    calls: list[Call]
    columns: slice  # its tokens on the axis of F
    dtype: torch.dtype  # of the backbone

    def residual_at(self, ids: Int[Tensor, " S"]) -> Float[Tensor, "N S"]:
        """Γ at the logits of these ids."""
        return self.residual[:, torch.searchsorted(self.ids, ids)]


@torch.no_grad()
def watch(tracer: Tracer, p: Plan, side: Side, b: int, start: int, ids: Int[Tensor, " I"], calls: bool = True) -> Watched:
    """Look at one batch of a side, with the calls or without. The logits are made and left again in blocks of rows."""
    batch, term, head = side.batches[b], side.terms[b], tracer.readout
    h, made = p.record(tracer, batch) if calls else (tracer.hidden(batch), [])
    weight = head.weight.to(tracer.precision)
    kept, parts = ids if p.lookup is not None else ids[:0], []
    for rows in torch.arange(len(h), device=h.device).split(max(1, BLOCK // len(weight))):
        residual = residual_of(tracer, h[rows], term, rows)
        parts.append((residual @ weight, residual[:, kept]))
    u, residual = (torch.cat(part) for part in zip(*parts, strict=True))
    return Watched(batch, h.to(u.dtype), u, kept, residual, made, slice(start, start + len(h)), h.dtype)


def residual_of(tracer: Tracer, h: Float[Tensor, "n d"], term: GTerm, rows: Tensor) -> Float[Tensor, "n V"]:
    """Γ of some rows of a batch as a force at W h + b."""
    z = tracer.readout.logits(h)
    return tracer.readout.pull_back(z, term.rows(rows).force(z))


def one_by_one(side: Side) -> Side:
    """The same tokens in the same order with every sequence in a batch of its own, cut behind its last scored token."""
    batches, terms = [], []
    for batch, term in zip(side.batches, side.terms, strict=True):
        T = batch.ids.shape[1]
        for s in batch.sequence.unique().tolist():
            mine = (batch.sequence == s).nonzero().flatten()
            b = int(batch.rows[mine[0]]) // T
            rows = batch.rows[mine] - b * T
            ids = batch.ids[b : b + 1, : int(rows.max()) + 1]
            batches.append(Batch(ids, rows, batch.targets[mine], batch.sequence[mine], batch.position[mine]))
            terms.append(term.rows(mine.to(term.c.device)))
    return Side(batches, terms)


def ids_of(side: Side, tracer: Tracer) -> Int[Tensor, " I"]:
    """All ids that a side's sequences hold, each once and in order."""
    return torch.cat([batch.ids.flatten() for batch in side.batches]).unique().to(tracer.device)
