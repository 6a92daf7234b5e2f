"""What one real optimizer step does to a probe: predicted token by token, then measured, and which update token did it.

With Δθ the step the optimizer took, momentum, clipping, preconditioner and weight decay included,

    predicted_m = <∇ log pi(y_m), Δθ>        actual_m = log pi(y_m; θ + Δθ) - log pi(y_m; θ)

and the share of Δθ that this step's own gradient made, -eta a P ⊙ g with the optimizer's diagonal P and gain a, splits over the
update's tokens: F_l = eta a clip <Σ_m w_m ∇ log pi(y_m), P J_lᵀ Γ_l>. The rest of Δθ is carried over: momentum, weight decay.

On a model that is whole on every rank all of it comes from one tangent pass each, at θ, which is kept as a copy; for a sharded
one see probe_sharded.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.overrides import TorchFunctionMode

from .. import exact
from ..exact import products
from ..exact.sides import row_table
from ..kernels.readout_forces.reference import logit_force
from ..model.optimizer import steps_of
from ..model.trace import Tracer, trace
from ..model.unwrap import local
from ..objective import GTerm
from ..ops import TokenStats, token_stats
from ..ops.rows import blocks, log_probs
from ..sequences import Batch, Chi, token_texts
from . import distributed as ranks
from . import probe_sharded as sharded
from .capture import Capture
from .forward import Forward
from .observation import Seen, through_readout
from .steps import Step

TOKENS = 768  # padded positions looked at together: several [TOKENS, V] at a time


class Probe:
    """Sequences watched through training.

    Args:
        probe: sequences, or several named groups of them.
        blame: the group that update tokens are asked about, or several; the first when absent.
        tokenizer: for the token texts of sequences that lack them.

    Raises:
        ValueError: nothing to watch, or no group of that name.
    """

    def __init__(self, probe: Sequence[Chi] | Mapping[str, Sequence[Chi]], blame: str | Sequence[str] | None = None,
                 tokenizer: Any = None):  # fmt: skip
        named = probe if isinstance(probe, Mapping) else {"probe": probe}
        self.groups = {name: [_spelled(chi, tokenizer) for chi in chis] for name, chis in named.items()}
        if not self.groups or not all(self.groups.values()):
            raise ValueError("the probe is empty: give at least one sequence for each of its groups")
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
        self.names = [f"{name}/{what}" for name in self.groups for what in ("n", "log_prob", "actual", "predicted")]
        self.names += ["probe/square", "probe/product"]
        self.forget()

    def forget(self) -> None:
        """Let go of every tensor of the model."""
        self._saved: dict[str, Tensor] = {}
        self._start: sharded.Read | None = None
        self._seen: Seen | None = None

    # ---------------------------------------------------------------- around the step

    def before(self, model: nn.Module, capture: Capture) -> None:
        """θ is about to move."""
        self.forget()
        named = dict(capture.lm.named_parameters())
        if any(hasattr(p, "ds_id") for p in named.values()):
            raise ValueError("a probe cannot run while DeepSpeed ZeRO-3 keeps the weights elsewhere: use ZeRO-2 or FSDP2")
        self._saved = {name: p.detach().clone() for name, p in named.items() if p.requires_grad}
        if sharded.any_sharded(capture.lm):
            self._start = sharded.read(model, capture, self.chis)

    def after(self, model: nn.Module, capture: Capture, optimizer: torch.optim.Optimizer, scale: float) -> None:
        """θ has moved. `scale` brings c to the units of the optimizer step. Every rank must call this.

        Raises:
            ValueError: θ has not moved, though the optimizer had gradients and a learning rate.
        """
        try:
            self._look_for_a_step(capture.lm, optimizer)
            if self._saved and self._start is not None:
                blamed = {name: torch.tensor([group == name for group in self.group]) for name in self.blamed}
                self._seen = sharded.mirrored(model, capture, optimizer, scale, self.chis, blamed, self._saved, self._start)
            elif self._saved:
                self._seen = self._tangent(capture, optimizer, scale)
        finally:
            self._saved, self._start = {}, None
            if capture.head.weight.device.type == "cpu":
                _trim()
            total = ranks.total(torch.tensor(0.0 if self._seen is None else self._seen.total, dtype=torch.float64))
            if self._seen is not None:
                self._seen.total = float(total)

    def _look_for_a_step(self, lm: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        named = {name: p for name, p in lm.named_parameters() if name in self._saved}
        moved = any(not torch.equal(local(p), local(self._saved[name])) for name, p in named.items())
        stuck = bool(named) and not moved and _drives(optimizer)
        anywhere = ranks.total(torch.tensor([moved, stuck], dtype=torch.float64))
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

    def into(self, step: Step, clip: float) -> dict[str, float]:
        """Write what was found into the record, and give the sums of its figures."""
        import pyarrow as pa

        seen, self._seen = self._seen, None
        if seen is None:
            return {}
        actual = seen.after - seen.before
        table = seen.table
        for name, values in (
            ("before", seen.before), ("after", seen.after), ("actual", actual), ("predicted", seen.predicted),
            ("predicted_readout", seen.readout),
        ):  # fmt: skip
            table = table.append_column(
                name, pa.array([None] * len(actual) if values is None else values.tolist(), pa.float64())
            )
        table = table.add_column(0, "probe", pa.array(self.group))
        step.observed = table.add_column(0, "step", pa.array([step.step] * len(actual)))
        step.predicted, step.actual = seen.predicted, actual
        square, product = float(seen.predicted @ seen.predicted), float(seen.predicted @ actual)
        step.linearity = product / square if square else float("nan")
        step.carried = seen.carried
        if seen.forces:
            if isinstance(step._tokens, dict):
                step._tokens |= {f"on {name}": clip * forces for name, forces in seen.forces.items()}
            step.forces = clip * seen.forces[self.blamed[0]]
            if seen.own:
                step.accounted = clip * seen.total / seen.own
                if abs(step.accounted - 1) > 0.05:
                    step.notes.append(
                        f"the forces of all tokens make {step.accounted:.2f} of what the step's gradient does: it was clipped "
                        "(give step_end the factor), or dropout was on, or part of the loss goes past the logits"
                    )
        if seen.problem:
            step.notes.append(seen.problem)
        found = {"probe/square": square, "probe/product": product}
        for name in self.groups:
            own = torch.tensor([g == name for g in self.group])
            found[f"{name}/n"] = float(own.sum())
            for what, of in (("log_prob", seen.after), ("actual", actual), ("predicted", seen.predicted)):
                found[f"{name}/{what}"] = float(of[own].sum())
        return found

    def metrics(self, of: Mapping[str, float]) -> dict[str, float]:
        """Per group the mean log-prob, and its mean change in a step, real and predicted; the linearity of them all."""
        found: dict[str, float] = {}
        for name in self.groups:
            if n := of[f"{name}/n"]:
                found |= {f"{name}/{what}": of[f"{name}/{what}"] / n for what in ("log_prob", "actual", "predicted")}
        if of["probe/square"]:
            found["probe/linearity"] = of["probe/product"] / of["probe/square"]
        return found

    # ---------------------------------------------------------------- a model that is whole

    def _tangent(self, capture: Capture, optimizer: torch.optim.Optimizer, scale: float) -> Seen:
        lm, forwards = capture.lm, capture.take()
        with _without_autocast(lm), _NoRequiresGrad(), trace(lm) as tracer:
            batches = tracer.batches(self.chis, TOKENS)
            with torch.no_grad():
                after = torch.cat([log_probs(tracer.logits(batch), batch.targets) for batch in batches])
            direction = {name: tracer.params[name] - old for name, old in self._saved.items()}
            for use, tensor in tracer.owner.items():
                tracer.params[use] = self._saved.get(tensor, tracer.params[use])  # from here on the model is θ
            uses, before, predicted, readout, stats = exact.select(tracer, "full"), [], [], [], []
            head = tracer.readout
            moved = direction.get(tracer.owner[head.weight_name])
            old = replace(head, weight=tracer.params[head.weight_name])
            for batch in batches:
                z, velocity, h = _pushed(tracer, capture.head, batch, direction, uses)
                y = batch.targets.to(z.device)
                before.append(log_probs(z, y))
                stats.append(token_stats(z, y))
                shift = None if head.bias_name is None else direction.get(tracer.owner[head.bias_name])
                for rows in blocks(z):
                    force = logit_force(z[rows], y[rows], torch.ones_like(z[rows, 0]))
                    predicted.append((force * velocity[rows].to(force.dtype)).double().sum(1))
                    if moved is not None:
                        readout.append(through_readout(old, h[rows], z[rows], force, moved, shift))
            table = row_table(batches, TokenStats.joined(stats), self.chis)
            seen = Seen(
                table, torch.cat(before).cpu(), after.cpu(), torch.cat(predicted).cpu(),
                torch.cat(readout).cpu() if readout else None,
            )  # fmt: skip
            direction.clear()  # of the model's size
            try:
                self._blame(tracer, optimizer, forwards, scale, uses, seen)
            except ValueError as error:
                seen.problem = f"no forces of single update tokens: {error}"
        return seen

    def _blame(
        self, tracer: Tracer, optimizer: torch.optim.Optimizer, forwards: Sequence[Forward], scale: float,
        uses: dict[str, str], seen: Seen,
    ) -> None:  # fmt: skip
        """Σ over each blamed group, pulled back once, pushed over the update: one backward and one tangent pass a group."""
        P, update = steps_of(optimizer, tracer), [self._update(tracer, f, scale) for f in forwards]
        grads = {name: p.grad for name, p in tracer.model.named_parameters() if p.grad is not None}
        for group in self.blamed:
            batches = tracer.batches(self.groups[group], TOKENS)
            ones = [torch.ones(len(b.targets), dtype=tracer.precision, device=tracer.device) for b in batches]
            terms = [GTerm(b.targets.to(tracer.device), one) for b, one in zip(batches, ones, strict=True)]
            D = products.vjp(tracer, exact.Side(batches, terms), uses)
            if group == self.blamed[0]:
                seen.own = sum(float(-(P[name] * grads[name] * x).double().sum()) for name, x in D.items() if name in grads)
                moved = {name: p.detach() for name, p in tracer.model.named_parameters()}
                along = sum(float(((moved[name] - self._saved[name]) * x).double().sum()) for name, x in D.items())
                seen.carried = along - seen.own
            for name, x in D.items():
                x *= P[name]
            parts = [products.jvp(tracer, side, D, uses) for side in update]
            seen.forces[group] = torch.cat(parts).cpu() if parts else torch.zeros(0)
            if group == self.blamed[0]:
                seen.total = float(seen.forces[group].double().sum())

    @staticmethod
    def _update(tracer: Tracer, f: Forward, scale: float) -> exact.Side:
        """The scored tokens of a forward pass with their c."""
        batches = tracer.batches([chi for chi in f.chis() if len(chi)], TOKENS)
        term, start, terms = f.gterm(scale), 0, []
        for batch in batches:
            terms.append(term.rows(slice(start, start + len(batch.targets))))
            start += len(batch.targets)
        return exact.Side(batches, terms)


@torch.no_grad()
def _pushed(
    tracer: Tracer, head: nn.Module, batch: Batch, direction: exact.Direction, uses: Mapping[str, str]
) -> tuple[Tensor, Tensor, Tensor]:
    """`products.jvp_logits`, and the inputs of the readout [N, d] that the pass comes by."""
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


def _drives(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has finite gradients that are not zero and a learning rate for them."""
    driven = [p.grad for group in optimizer.param_groups if group.get("lr") != 0 for p in group["params"]]
    return 0 < math.hypot(*(float(local(g).norm(dtype=torch.float32)) for g in driven if g is not None)) < math.inf


def _trim() -> None:
    """Give freed memory back to the system where the C library keeps it in pieces: the next step's would come on top of it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)


def _spelled(chi: Chi, tokenizer: Any) -> Chi:
    return chi if chi.tokens or tokenizer is None else chi.with_(tokens=token_texts(tokenizer, chi.ids.tolist()))


class _NoRequiresGrad(TorchFunctionMode):
    """Gradient checkpointing of adapters hooks requires_grad_() onto the embedding's output, which a tangent pass refuses."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.requires_grad_ and torch._C._functorch.peek_interpreter_stack() is not None:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _without_autocast(lm: nn.Module) -> Iterator[None]:
    """accelerate wraps `forward` in autocast; a change of 1e-3 nats does not survive bfloat16."""
    wrapped, plain = vars(lm).get("forward"), vars(lm).get("_original_forward")
    if wrapped is None or plain is None:
        yield
        return
    try:
        lm.forward = plain
        yield
    finally:
        lm.forward = wrapped
