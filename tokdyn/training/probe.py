"""What one real optimizer step does to a probe: predicted token by token, then measured, and which update token did it.

With Δθ the step the optimizer took, momentum, clipping, preconditioner and weight decay included,

    predicted_m = <∇ log pi(y_m), Δθ>        actual_m = log pi(y_m; θ + Δθ) - log pi(y_m; θ)

and the share of Δθ that this step's own gradient made, -eta a P ⊙ g with the optimizer's diagonal P and gain a, splits over the
update's tokens: F_l = eta a clip <Σ_m w_m ∇ log pi(y_m), P J_lᵀ Γ_l>. The rest of Δθ is carried over: momentum, weight decay.

On a model that is whole on every rank all of it comes from one tangent pass each, at θ, which is kept as a copy; for a sharded
one see probe_sharded.py.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jvp

from .. import exact, observables
from ..exact import products
from ..exact.sides import row_table
from ..model.checks import Found
from ..model.optimizer import steps_of, without_buffer
from ..model.trace import Tracer, trace
from ..model.unwrap import local
from ..objective import GTerm
from ..observables import Function, LogProb, Observable
from ..ops import TokenStats, token_stats
from ..ops.rows import blocks
from ..sequences import Batch, Chi, prefix_keys, token_texts
from . import distributed
from . import probe_sharded as sharded
from .capture import Capture
from .columns import of_the_policy
from .fallen import FALLEN, fallen_answers, told
from .forward import Forward
from .observation import Blame, Observation, Update, through_readout
from .own_passes import own_passes
from .steps import Step

LAST_DIGITS = 20  # eps of a log-probability by which a change of it, a difference of two, may be off
TOKENS = 768  # padded positions looked at together: several [TOKENS, V] at a time


class Probe:
    """Sequences watched through training.

    Args:
        probe: sequences, or several named groups of them.
        blame: the group that update tokens are asked about, or several; the first when absent.
        tokenizer: for the token texts of sequences that lack them.
        observable: what is watched at their tokens; a margin's rival is that before the step.

    Raises:
        ValueError: nothing to watch, or no group of that name.
    """

    def __init__(self, probe: Sequence[Chi] | Mapping[str, Sequence[Chi]], blame: str | Sequence[str] | None = None,
                 tokenizer: Any = None, observable: Observable | Function | str = "log-prob"):  # fmt: skip
        self.observable = observables.observable(observable)
        self.level = "log_prob" if isinstance(self.observable, LogProb) else "value"
        named = probe if isinstance(probe, Mapping) else {"probe": probe}
        self.groups = {name: [_with_texts(chi, tokenizer) for chi in chis] for name, chis in named.items()}
        if not self.groups or not all(self.groups.values()):
            raise ValueError("the probe is empty: give at least one sequence for each of its groups")
        if FALLEN in self.groups:
            raise ValueError(
                f"a group of the probe cannot be named {FALLEN!r}: it is the name of the update's own answers that fell"
            )
        if any(not len(chi) for chis in self.groups.values() for chi in chis):
            raise ValueError("a sequence of the probe has no scored token: leave it out")
        self.blamed = [next(iter(self.groups))] if blame is None else [blame] if isinstance(blame, str) else list(blame)
        for name in self.blamed:
            if name not in self.groups:
                raise ValueError(f"blame must name a group of the probe, {', '.join(self.groups)}; got {name!r}")
        if not self.blamed:
            raise ValueError("blame must name a group of the probe at least; leave it out for the first")
        self.chis = [chi for chis in self.groups.values() for chi in chis]
        self.group = [name for name, chis in self.groups.items() for chi in chis for _ in range(len(chi))]
        self.names = [f"{name}/{what}" for name in self.groups for what in ("n", self.level, "actual", "predicted")]
        self.names += ["probe/square", "probe/product"]
        self._checked = Found()
        self.forget()

    def forget(self) -> None:
        """Let go of every tensor of the model."""
        self._saved: dict[str, Tensor] = {}
        self._start: sharded.Reading | None = None
        self._found: Observation | None = None
        self._first = frozenset[int]()

    # ---------------------------------------------------------------- around the step

    def before(self, model: nn.Module, capture: Capture, optimizer: torch.optim.Optimizer) -> None:
        """θ is about to move: keep a copy of it, and note for which parameters this is the first step."""
        self.forget()
        named = dict(capture.lm.named_parameters())
        if any(hasattr(p, "ds_id") for p in named.values()):
            raise ValueError("a probe cannot run while DeepSpeed ZeRO-3 keeps the weights elsewhere: use ZeRO-2 or FSDP2")
        self._saved = {name: p.detach().clone() for name, p in named.items() if p.requires_grad}
        self._first = without_buffer(optimizer)
        if sharded.any_sharded(capture.lm):
            if not isinstance(self.observable, LogProb):
                raise ValueError(f"on a sharded model a probe watches log-probabilities alone, not {self.observable.label}")
            self._start = sharded.read(model, capture, self.chis)

    def after(self, model: nn.Module, capture: Capture, optimizer: torch.optim.Optimizer, scale: float) -> None:
        """θ has moved. `scale` brings c to the units of the optimizer step. Every rank must call this.

        Raises:
            ValueError: θ has not moved, though the optimizer had gradients and a learning rate.
        """
        found = None
        try:
            self._require_a_step(capture.lm, optimizer)
            if self._saved:
                update = Update(capture.take(), optimizer, scale, self._first)
                if self._start is not None:
                    found = sharded.observe(model, capture, self.watched(), update, sharded.Start(self._saved, self._start))
                else:
                    found = self._observe(capture, update)
        finally:
            self._saved, self._start = {}, None
            if capture.head.weight.device.type == "cpu":
                _release_memory()
            blame = Blame({}) if found is None or found.blame is None else found.blame
            sums = distributed.total(torch.tensor([blame.total, blame.rounding], dtype=torch.float64)).tolist()
            if found is not None and found.blame is not None:
                found = replace(found, blame=replace(found.blame, total=sums[0], rounding=sums[1]))
            self._found = found

    def watched(self) -> sharded.Watched:
        """The sequences, and which of their tokens [M] each blamed group holds."""
        return sharded.Watched(self.chis, {name: self._tokens_of(name) for name in self.blamed})

    def _tokens_of(self, group: str) -> Tensor:
        return torch.tensor([name == group for name in self.group])

    def _require_a_step(self, lm: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Raise if no weight moved on any rank, though one should have."""
        named = {name: p for name, p in lm.named_parameters() if name in self._saved}
        moved = any(not torch.equal(local(p), local(self._saved[name])) for name, p in named.items())
        stuck = bool(named) and not moved and _should_move(optimizer)
        anywhere = distributed.total(torch.tensor([moved, stuck], dtype=torch.float64))
        if anywhere[0] or not anywhere[1]:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in held for p in named.values()):
            dtypes = ", ".join(sorted({str(p.dtype) for p in named.values()}))
            cause = f"it is lost in the rounding of {dtypes}. Raise the learning rate, or keep the weights in float32"
        else:
            cause = (
                f"{type(optimizer).__name__} holds copies that are written back later (DeepSpeed ZeRO-1 and 2, master weights)"
                ". A probe needs an optimizer of the model's own parameters, as in plain torch or FSDP2; leave it out here"
            )
        raise ValueError(f"the weights did not move inside optimizer.step() though their gradients are not zero: {cause}")

    # ---------------------------------------------------------------- what is told of it

    def write_into(self, step: Step, clip: float) -> dict[str, float]:
        """Write what was found into the record, and give the sums of its figures.

        clip: the factor by which the step's gradients were clipped.
        """
        found, self._found = self._found, None
        if found is None:
            return {}
        actual = found.after - found.before
        step.observed = self._table(step.step, found)
        step.predicted, step.actual = found.predicted, actual
        square, product = float(found.predicted @ found.predicted), float(found.predicted @ actual)
        noise = LAST_DIGITS * torch.finfo(torch.float32).eps * float(found.before.norm())
        step.linearity = product / square if square > noise**2 else float("nan")
        if found.blame is not None:
            self._blame_into(step, found.blame, clip)
            if FALLEN in found.blame.forces:
                step.notes.append(f"lazy likelihood displacement: {told(step.tokens.to_pylist())}")
        if found.problem:
            step.notes.append(found.problem)
        sums = {"probe/square": square, "probe/product": product}
        for name in self.groups:
            own = self._tokens_of(name)
            sums[f"{name}/n"] = float(own.sum())
            for what, of in ((self.level, found.after), ("actual", actual), ("predicted", found.predicted)):
                sums[f"{name}/{what}"] = float(of[own].sum())
        return sums

    def _table(self, number: int, found: Observation) -> Any:
        import pyarrow as pa

        table, M = found.table, len(self.group)
        for name, values in (
            ("before", found.before), ("after", found.after), ("actual", found.after - found.before),
            ("predicted", found.predicted), ("predicted_readout", found.readout),
        ):  # fmt: skip
            table = table.append_column(name, pa.array([None] * M if values is None else values.tolist(), pa.float64()))
        keys = [prefix_keys(chi.ids.tolist())[t] for chi in self.chis for t in chi.scored.nonzero().flatten().tolist()]
        table = table.append_column("context", pa.array(keys, pa.int64()))
        table = table.add_column(0, "probe", pa.array(self.group))
        return table.add_column(0, "step", pa.array([number] * M))

    def _blame_into(self, step: Step, blame: Blame, clip: float) -> None:
        step.carried = blame.carried
        step.add_columns({f"on {name}": clip * forces for name, forces in blame.forces.items()})
        step.forces = clip * blame.forces[self.blamed[0]]
        if blame.own is not None and abs(blame.own) <= clip * blame.rounding:
            if blame.rounding:
                step.notes.append("the pushes of this step on the probe cancel to rounding: its gradient moves nothing there")
        elif blame.own:
            step.accounted = clip * blame.total / blame.own
            if abs(step.accounted - 1) > 0.05:
                step.notes.append(
                    f"the forces of all tokens make {step.accounted:.2f} of what the step's gradient does: it was clipped "
                    "(give step_end the factor), or dropout was on, or part of the loss goes past the logits"
                )

    def metrics(self, of: Mapping[str, float]) -> dict[str, float]:
        """Per group the mean log-prob (or value), and its mean change in a step, real and predicted; the linearity of all."""
        found: dict[str, float] = {}
        for name in self.groups:
            if n := of[f"{name}/n"]:
                found |= {f"{name}/{what}": of[f"{name}/{what}"] / n for what in (self.level, "actual", "predicted")}
        if of["probe/square"]:
            found["probe/linearity"] = of["probe/product"] / of["probe/square"]
        return found

    # ---------------------------------------------------------------- a model that is whole

    def _observe(self, capture: Capture, update: Update) -> Observation:
        """One pass at θ + Δθ, then a tangent pass along Δθ at θ."""
        lm = capture.lm
        with own_passes(lm), trace(lm, self._checked) as tracer:
            batches = tracer.batches(self.chis, TOKENS)
            direction = {name: tracer.params[name] - old for name, old in self._saved.items()}
            for use, tensor in tracer.owner.items():
                tracer.params[use] = self._saved.get(tensor, tracer.params[use])  # from here on the traced model is θ
            terms = _terms(tracer, batches, self.observable, self.chis)
            watched = _Watched(batches, terms, self.observable)
            stats, before, predicted, readout = _along(tracer, capture.head, watched, direction)
            direction.clear()  # of the model's size
            with torch.no_grad():  # without parameters, a pass of the model itself: θ + Δθ
                after = torch.cat([watched.values(b, tracer.logits(batch)) for b, batch in enumerate(batches)])
            found = Observation(row_table(batches, stats, self.chis), before, after.cpu(), predicted, readout)
            try:
                return replace(found, blame=self._blame(tracer, update))
            except ValueError as error:
                return replace(found, problem=f"no forces of single update tokens: {error}")

    def _blame(self, tracer: Tracer, update: Update) -> Blame:
        """A vjp of each blamed group's sum and a jvp over the update, at the step's own diagonal.

        Where log-probs are watched, answers of this rank's update that have fallen against their advantage are such a group.
        """
        P = steps_of(update.optimizer, tracer.trained, update.first)
        scope = exact.Scope(tracer, exact.select(tracer, "full"), P)
        sides = [updated_side(tracer, f, update.scale) for f in update.forwards]
        named = dict(tracer.model.named_parameters())
        grads = {name: p.grad for name, p in named.items() if p.grad is not None}
        forces, own, carried = dict[str, Tensor](), 0.0, 0.0
        groups = {group: self.groups[group] for group in self.blamed}
        if self.level == "log_prob":
            fallen = [chi for f in update.forwards for chi in fallen_answers(f, of_the_policy(f))]
            groups |= {FALLEN: fallen} if fallen else {}
        for group, chis in groups.items():
            D = scope.vjp(observed_side(tracer, chis, self.observable))
            if group == self.blamed[0]:
                own = sum(float(-(P[name] * grads[name] * x).double().sum()) for name, x in D.items() if name in grads)
                moved = sum(float(((named[name].detach() - self._saved[name]) * x).double().sum()) for name, x in D.items())
                carried = moved - own
            for name, x in D.items():
                x *= P[name]  # in place: a direction is of the model's size
            parts = [scope.jvp(side, D) for side in sides]
            forces[group] = torch.cat(parts).cpu() if parts else torch.zeros(0)
        first = forces[self.blamed[0]].double()
        n_params = sum(tracer.params[name].numel() for name in P)
        rounding = n_params**0.5 * torch.finfo(tracer.precision).eps * float(first.abs().sum())
        return Blame(forces, float(first.sum()), rounding, own, carried)


@dataclass(frozen=True)
class _Watched(exact.Side):
    """A side of observed tokens with what is watched there."""

    observable: Observable

    def values(self, b: int, logits: Tensor) -> Float[Tensor, " N"]:
        """The observable of the tokens of batch b, in float64."""
        return observables.values(self.observable, logits, self.terms[b].targets)


def _along(
    tracer: Tracer, head: nn.Module, watched: _Watched, direction: exact.Direction
) -> tuple[TokenStats, Tensor, Tensor, Tensor | None]:
    """Statistics and observables [M] at the traced weights; their first-order change along a direction, and the readout's."""
    uses, readout = exact.select(tracer, "full"), tracer.readout
    moved = direction.get(tracer.owner[readout.weight_name])
    shift = None if readout.bias_name is None else direction.get(tracer.owner[readout.bias_name])
    old = replace(readout, weight=tracer.params[readout.weight_name])
    before, predicted, through, stats = [], [], list[Tensor](), []
    for b, (batch, term) in enumerate(zip(watched.batches, watched.terms, strict=True)):
        z, velocity, h = _pushed(tracer, head, batch, direction, uses)
        before.append(watched.values(b, z))
        stats.append(token_stats(z, batch.targets.to(z.device)))
        for rows in blocks(z):
            force = term.rows(rows).logit_force(z[rows])
            predicted.append((force * velocity[rows].to(force.dtype)).double().sum(1))
            if moved is not None:
                through.append(through_readout(old, h[rows], z[rows], force, moved, shift))
    part = torch.cat(through).cpu() if through else None
    return TokenStats.joined(stats), torch.cat(before).cpu(), torch.cat(predicted).cpu(), part


@torch.no_grad()
def _pushed(
    tracer: Tracer, head: nn.Module, batch: Batch, direction: exact.Direction, uses: Mapping[str, str]
) -> tuple[Tensor, Tensor, Tensor]:
    """`products.jvp_logits`, and the inputs of the readout [N, d] that the pass comes by."""
    if tracer.why_not_tangents(uses):  # what stands in for them keeps no states
        z, velocity = products.jvp_logits(tracer, batch, direction, uses)
        return z, velocity, tracer.hidden(batch, {use: tracer.params[use] for use in uses})
    kept: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: kept.append(args[0]))

    def run(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        z = tracer.logits(batch, params)
        return z, kept.pop().flatten(0, -2)[batch.rows.to(z.device)]

    primal = {use: tracer.params[use] for use in uses}
    tangent = {use: direction[name] for use, name in uses.items()}
    try:
        z, velocity, h = jvp(run, (primal,), (tangent,), has_aux=True)  # type: ignore[misc]
        return z, velocity, h
    finally:
        handle.remove()


def observed_side(tracer: Tracer, chis: Sequence[Chi], observable: Observable = LogProb()) -> exact.Side:  # noqa: B008
    """The scored tokens of some sequences with the force that raises their log-probs, or what else is watched."""
    batches = tracer.batches(chis, TOKENS)
    return exact.Side(batches, _terms(tracer, batches, observable, chis))


@torch.no_grad()
def _terms(tracer: Tracer, batches: Sequence[Batch], observable: Observable, chis: Sequence[Chi]) -> list[GTerm]:
    """The observable's cotangents at the traced weights; those of a log-probability need no pass."""
    terms, traced = [], {use: tracer.params[use] for use in exact.select(tracer, "full")}
    every = observable.tokens(chis).to(tracer.device)
    for batch, tokens in zip(batches, every.split([len(batch.targets) for batch in batches]), strict=True):
        if isinstance(observable, LogProb):
            terms.append(GTerm(tokens, torch.ones(len(tokens), dtype=tracer.precision, device=tracer.device)))
        else:
            terms.append(observable.term(tracer.logits(batch, traced), tokens))
    return terms


def updated_side(tracer: Tracer, forward: Forward, scale: float = 1.0) -> exact.Side:
    """The scored tokens of a captured pass with the force of its loss, times `scale`."""
    batches = tracer.batches([chi for chi in forward.chis() if len(chi)], TOKENS)
    return exact.Side(batches, forward.gterm(scale).split([len(batch.targets) for batch in batches]))


def _should_move(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has finite gradients that are not zero and a learning rate for them."""
    driven = [p.grad for group in optimizer.param_groups if group.get("lr") != 0 for p in group["params"]]
    return 0 < math.hypot(*(float(local(g).norm(dtype=torch.float32)) for g in driven if g is not None)) < math.inf


def _release_memory() -> None:
    """Give freed memory back to the system where the C library keeps it in pieces: the next step's would come on top of it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)


def _with_texts(chi: Chi, tokenizer: Any) -> Chi:
    return chi if chi.tokens or tokenizer is None else chi.with_(tokens=token_texts(tokenizer, chi.ids.tolist()))
