"""Which modules of the backbone move and by which rule: a problem with its plan, as the structured engines take it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from ...model.calls import Call, FusedCall
from ...model.trace import Tracer
from ...model.unroll import Place, Unrolled
from ...sequences import Batch
from ..errors import NotReplayable, Unsupported
from ..graph import depth_of, depths
from ..modules.base import Rule
from ..modules.choose import Kind, kind_of
from ..modules.experts import Experts
from ..modules.fused import Fused, Fusion
from ..modules.gain import Gain
from ..modules.linear import Linear
from ..modules.lookup import Lookup
from ..modules.norms import Norm
from ..modules.rotary import turned
from ..modules.routes import Stack
from ..parts import Parts
from ..problem import Coverage, Problem
from ..products import Direction
from ..readout import LABEL as READOUT
from ..sides import Side
from .aligned import aligned_depths
from .fuse import fusions
from .segments import Cuts, Outline, require_beginnings

Rules = dict[str, Rule]  # by module, or by fusion


@dataclass(frozen=True)
class Plan:
    """The moving modules of a backbone.

    Attributes:
        moves: module -> its moving parameters, named from there.
        module: use of a tensor -> the module that moves it.
        lookup: the module whose lookup shares the readout's weight, when both move; else None.
        P: module -> the preconditioner of its moving parameters, named from there; empty without one.
        closed: the cotangent of moving modules that have a closed form.
        fusions: moving linear layers that go as one.
        copied: moving modules whose outputs the model writes to in place.
        unused: calls on which the readout's input does not depend, each a module and which of its calls (DoRA runs an identity
            matrix through its adapters for a norm that counts as a constant).
        part: module or fusion -> the part (Scope.parts) that its share counts in.
        tied_part: the part of what a tied embedding does from lookup to readout and back.
        n_parts: how many there are.
        kinds: of rules, by module; one that is not here is looked at when it is met.
    """

    moves: dict[str, set[str]]
    module: dict[str, str]
    lookup: str | None
    P: dict[str, Direction]
    closed: dict[str, Norm | Stack]
    fusions: tuple[Fusion, ...] = ()
    copied: frozenset[str] = frozenset()
    unused: frozenset[tuple[str, int]] = frozenset()
    part: Mapping[str, int] = field(default_factory=dict)
    tied_part: int = 0
    n_parts: int = 1
    kinds: Mapping[str, Kind] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The modules that move."""
        return list(self.moves)

    def divided(self, parts: Parts) -> Plan:
        """The plan with the part that each module's share counts in: no module holds more than one (Parts.rounds)."""
        part = {module: parts.of[use] for use, module in self.module.items()}
        return replace(self, part=part, tied_part=parts.tied or 0, n_parts=len(parts.names))

    def part_of(self, name: str) -> int:
        """The part of a module or fusion; 0 where F is not divided."""
        return self.part.get(name, 0)

    def sizes(self, tracer: Tracer) -> dict[str, int]:
        """How many numbers move, by module and by fusion."""
        found = {
            name: sum(tracer.model.get_submodule(name).get_parameter(x).numel() for x in own)
            for name, own in self.moves.items()
        }
        return found | {of.name: sum(found[name] for name in of.modules) for of in self.fusions}

    def rules(self, calls: Sequence[Call]) -> Rules:
        """A rule for each module that is called.

        Raises:
            Unsupported: the readout's weight is tied to something other than a lookup.
            NotReplayable: a module cannot be called by itself.
        """
        rules = {name: self._rule(mine) for name, mine in by_module(calls).items()}
        self.tied_lookup(rules)
        return rules

    def tied_lookup(self, rules: Rules) -> Lookup | None:
        """The rule of the lookup that shares the readout's weight, when both move.

        Raises:
            Unsupported: the weight is tied to something else.
        """
        if self.lookup is None:
            return None
        rule = rules.get(self.lookup)
        if not isinstance(rule, Lookup):
            raise Unsupported(f"the readout's weight is tied to {self.lookup}, which is no plain lookup")
        return rule

    @torch.no_grad()
    def _rule(self, calls: list[Call]) -> Rule:
        if isinstance(calls[0], FusedCall):
            return Fused(calls[0], [Linear([of], self.moves[of.name]) for of, _ in calls[0].parts])
        name = calls[0].name
        kind = self.kinds.get(name) or kind_of(calls, self.moves[name])
        return kind(calls, self.moves[name], self.P.get(name))

    def fused(self, tracer: Tracer, batch: Batch, narrow: float) -> Plan:
        """The plan with linear layers fused where one elementwise product takes them all in, seen on a batch.

        Layers with fewer inputs than `narrow`, of which directions are kept, stay by themselves, and so do those of different
        parts.
        """
        h, calls, given = self.unroll(tracer, batch)
        rules = self.rules([call.detached() for call in calls])
        fit = [name for name, rule in rules.items() if rule.can_fuse and not rule.prefers_direction(narrow)]
        found = [of for of in fusions(h, calls, given, fit) if len({self.part_of(name) for name in of.modules}) == 1]
        part = {**self.part, **{of.name: self.part_of(of.modules[0]) for of in found}}
        return replace(self, fusions=tuple(found), part=part)

    def record(self, tracer: Tracer, batch: Batch) -> tuple[Tensor, list[Call]]:
        """Tracer.record at the moving modules, with one call in place of fused layers."""
        if not self.fusions:
            return tracer.record(batch, self.names, self.copied)
        h, calls, _ = self.unroll(tracer, batch)
        return h.detach(), [call.detached() for call in calls]

    def used(self, calls: Sequence[Call]) -> list[Call]:
        """The calls of a whole pass that the readout's input depends on: the sweep, going by the graph, meets no others."""
        if not self.unused:
            return list(calls)
        times: Counter[str] = Counter()
        found = []
        for call in calls:
            if (call.name, times[call.name]) not in self.unused:
                found.append(call)
            times[call.name] += 1
        return found

    def unroll(
        self,
        tracer: Tracer,
        batch: Batch,
        places: Sequence[Place] | None = None,
        start_at: Place | None = None,
        stop_at: Place | None = None,
    ) -> Unrolled:
        """Tracer.unroll at the moving modules, with the derivatives of norms, rotary embeddings and fusions in closed form.

        Raises:
            Unsupported: the model writes into what a module returned.
        """
        with turned(tracer.model):
            try:
                return tracer.unroll(
                    batch,
                    self.names,
                    replace_outputs=self.closed,
                    replace_inputs={of.place: of for of in self.fusions},
                    places=places,
                    start_at=start_at,
                    stop_at=stop_at,
                    copied=self.copied,
                )
            except RuntimeError as error:
                if "in-place" not in str(error):
                    raise
                raise Unsupported("what a module returns is changed in place") from error

    def labels(self, problem: Problem, rules: Mapping[str, Rule]) -> Coverage:
        """The label of every moving use's rule."""
        modules = {of.name: of.modules for of in self.fusions}
        by_module = {module: rule.label for name, rule in rules.items() for module in modules.get(name, (name,))}
        head = (problem.tracer.readout.weight_name, problem.tracer.readout.bias_name)
        return {
            use: READOUT if use in head else by_module.get(self.module.get(use, ""), "not used in the forward pass")
            for use in problem.uses
        }


@dataclass(frozen=True)
class PlannedProblem(Problem):
    """A problem whose moving modules have been sorted; what is derived of it is made once, when it is asked for."""

    plan: Plan
    together: bool = True  # whether sequences may stand side by side in a batch
    seen: tuple[Tensor, Tensor] | None = None  # the readout's input on both sides, from the passes that made the plan

    def transposed(self) -> PlannedProblem:
        """The problem of Fᵀ, by the same plan."""
        return replace(self, observed=self.updated, updated=self.observed, seen=self.seen and self.seen[::-1])

    @property
    def hidden(self) -> tuple[Tensor, Tensor]:
        """See Problem."""
        return self.seen or super().hidden

    def apart(self) -> PlannedProblem:
        """The problem with one sequence at a time."""
        return replace(self, together=False)

    @cached_property
    def singles(self) -> tuple[Side, Side]:
        """Both sides with every sequence in a batch of its own."""
        return self.observed.one_by_one(), self.updated.one_by_one()

    @cached_property
    def longest(self) -> Batch:
        """The longest sequence, with three of its scored tokens."""
        whole = max(self._every, key=lambda batch: batch.ids.shape[1])
        N = len(whole.rows)
        return whole.only(torch.tensor(sorted({0, N // 2, N - 1})))

    @cached_property
    def _every(self) -> list[Batch]:
        return [batch for side in self.singles for batch in side.batches]

    @cached_property
    def narrow(self) -> float:
        """Modules with fewer inputs p than this keep directions: by the number of multiplications for each output and pair.

            cotangents   E and its inner products     t_l Σ T_o / M + t_m
            directions   both made, and theirs        p (t_l / M + t_m / L + 1)

        t positions has the sequence of a token, M and L are the tokens, Σ T_o the positions of the observed side.
        """
        (M, L), (o, u) = self.shape, self.singles
        t_m, t_l = (sum(len(b.rows) * b.ids.shape[1] for b in side.batches) / len(side) for side in (o, u))
        return (t_l * sum(b.ids.shape[1] for b in o.batches) / M + t_m) / (t_l / M + t_m / L + 1)

    @cached_property
    def fused_plan(self) -> Plan:
        """The plan with fused layers, as the sweep takes them."""
        return self.plan.fused(self.tracer, self.longest, self.narrow)

    @property
    def rules(self) -> Rules:
        """The rules of the fused plan, on the longest sequence."""
        return self._looked_at[0]

    @property
    def cuts(self) -> Cuts:
        """Where the backbone is cut: of all sequences alike, or of the longest, which the others are then compared with."""
        return self._looked_at[1]

    @property
    def aligned(self) -> int:
        """How many segments keep a token's cotangent at its own position."""
        return self._looked_at[2]

    @cached_property
    def _looked_at(self) -> tuple[Rules, Cuts, int]:
        """Rules, cuts and aligned segments, of one graph of the longest sequence."""
        unroll = partial(self.fused_plan.unroll, self.tracer)
        graph = unroll(self.longest)
        rules = self.fused_plan.rules(self.fused_plan.used([call.detached() for call in graph.calls]))
        shortest = min(self._every, key=lambda batch: batch.ids.shape[1])
        outlines = {self.longest.ids.shape: Outline.of(*graph)}
        cuts = Cuts.of(unroll, [self.longest] if self.together else self._every, shortest, outlines)
        return rules, cuts, aligned_depths(cuts.divided(graph), self.longest, rules)


def by_module(calls: Sequence[Call]) -> dict[str, list[Call]]:
    """The calls of each module."""
    found: dict[str, list[Call]] = {}
    for call in calls:
        found.setdefault(call.name, []).append(call)
    return found


def planned(problem: Problem) -> PlannedProblem:
    """Assign every trained tensor to the innermost module whose call reads it (Tracer.usage) and that can be replayed alone.

    A module that cannot be replayed is covered by the module that contains it.

    Raises:
        Unsupported: a tensor that two modules share, other than a lookup tied to the readout; a readout that is not
            softcap(scale (W h + b)); a model that does not repeat its output; a parameter with a gradient that no module
            was seen to use.
    """
    if isinstance(problem, PlannedProblem):
        return problem
    tracer, batches = problem.tracer, [*problem.observed.batches, *problem.updated.batches]
    one = batches[0].alone(int(batches[0].rows[0]) // batches[0].ids.shape[1])
    error = tracer.readout_residual(one)
    if error > tracer.readout_bound:
        raise Unsupported(f"the logits differ by {error:.0e} from softcap(scale (W h + b)), the readout's formula")
    if tracer.found.selects:
        require_beginnings(tracer, batches)
    (seen, hidden), not_replayable = tracer.usage(batches), set[str]()
    while True:
        plan = _assign_modules(problem, seen, not_replayable)
        try:
            plan = replace(plan, copied=tracer.overwritten(one, plan.names))
            calls = tracer.record(one, plan.names, plan.copied)[1]
            plan = replace(plan, kinds={name: kind_of(of, plan.moves[name]) for name, of in by_module(calls).items()})
            rules = plan.rules(calls)
            closed = {call.name: _closed_form(rules[call.name], call) for call in calls}
            break
        except NotReplayable as stuck:
            if not stuck.name:
                raise Unsupported("the model does not repeat its output") from stuck
            not_replayable.add(stuck.name)
    require_covered(problem, plan)
    plan = replace(plan, closed={name: form for name, form in closed.items() if form is not None})
    plan = replace(plan, unused=_unused(tracer, plan, calls, one))
    if problem.parts is not None:
        plan = plan.divided(problem.parts)
    together = all(rule.tells_sequences for rule in rules.values())
    n, wide = len(problem.observed.batches), tracer.precision
    h = torch.cat(hidden[:n]).to(wide), torch.cat(hidden[n:]).to(wide)
    sides = problem.observed, problem.updated
    return PlannedProblem(tracer, problem.uses, problem.P, *sides, plan, together, h, parts=problem.parts, tiles=problem.tiles)


def _closed_form(rule: Rule, call: Call) -> Norm | Stack | None:
    """The cotangent of a module's call in closed form, where there is one."""
    return Norm.of(call) if isinstance(rule, Gain) else rule.stack if isinstance(rule, Experts) else None


def _unused(tracer: Tracer, plan: Plan, calls: Sequence[Call], batch: Batch) -> frozenset[tuple[str, int]]:
    """See Plan.unused; a module that is called once needs no looking at."""
    if max(Counter(call.name for call in calls).values(), default=1) == 1:
        return frozenset()
    h, calls, _ = plan.unroll(tracer, batch, [])
    if not h.requires_grad:
        return frozenset()
    depth, _ = depths(h, [x for call in calls for x in call.outputs if x.is_leaf])
    times: Counter[str] = Counter()
    found = set()
    for call in calls:
        if all(depth_of(depth, x) is None for x in call.outputs):
            found.add((call.name, times[call.name]))
        times[call.name] += 1
    return frozenset(found)


def require_covered(problem: Problem, plan: Plan) -> None:
    """Raise if a parameter that no module was seen to use has a gradient.

    Raises:
        Unsupported: it has; a kernel of somebody's own may take its weights out of sight.
    """
    head = (problem.tracer.readout.weight_name, problem.tracer.readout.bias_name)
    unseen = {use: tensor for use, tensor in problem.uses.items() if use not in plan.module and use not in head}
    if not unseen:
        return
    direction = replace(problem, uses=unseen).vjp(problem.observed)
    moved = {tensor for tensor, step in direction.items() if bool(step.any())}
    if moved:
        raise Unsupported(f"no module was seen to use {' and '.join(use for use in unseen if unseen[use] in moved)}")


def _assign_modules(problem: Problem, seen: dict[str, set[tuple[str, ...]]], not_replayable: Collection[str]) -> Plan:
    """The plan for this assignment of tensors to modules; raises Unsupported if one tensor belongs to two."""
    tracer, P, head = problem.tracer, problem.P, problem.tracer.readout
    uses_below_readout = {use: tensor for use, tensor in problem.uses.items() if use not in (head.weight_name, head.bias_name)}
    moves: dict[str, set[str]] = {}
    preconditioners: dict[str, Direction] = {}
    module_of: dict[str, str] = {}
    for tensor in dict.fromkeys(uses_below_readout.values()):
        modules = {next((m for m in reversed(chain) if m not in not_replayable), "") for chain in seen.get(tensor, ())}
        outermost = [m for m in modules if not any(n != m and _within(m, n) for n in modules)]
        if len(outermost) > 1:
            raise Unsupported(f"{tensor} is one tensor in two modules, {' and '.join(sorted(outermost))}")
        for module in outermost:
            names = [name for name, owner in tracer.owner.items() if owner == tensor and _within(name, module)]
            own = names[0][len(module) + 1 if module else 0 :]
            moves.setdefault(module, set()).add(own)
            if P is not None:
                preconditioners.setdefault(module, {})[own] = P[tensor]
            module_of |= {use: module for use, other in uses_below_readout.items() if other == tensor}
    tied = tracer.owner[head.weight_name]
    lookup = next((module_of[use] for use, tensor in uses_below_readout.items() if tensor == tied and use in module_of), None)
    return Plan(moves, module_of, lookup if head.weight_name in problem.uses else None, preconditioners, {})


def _within(name: str, module: str) -> bool:
    return not module or name.startswith(module + ".")
