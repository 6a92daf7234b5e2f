"""Monitor: the forces of a training while it runs, recorded at every k-th optimizer step and checked on the spot.

    with td.Monitor(model, optimizer, probe=chis, every=10) as monitor:
        for batch in loader:
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            monitor.step_end()
            optimizer.zero_grad()
    monitor.steps[-1].metrics

Training is left as it is: the hooks only look, probes run on copies or are undone bit by bit, and whatever goes wrong is a
warning (`on_error="warn"`) that names the likely cause. Captures are local to a rank, figures merge when they are asked for.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .model.unwrap import require_no_prefix
from .observables import Function, Observable
from .sequences import Chi
from .training import distributed
from .training.capture import Capture
from .training.diagnosis import Problem
from .training.facts import facts_of
from .training.forward import Forward
from .training.heartbeat import Heartbeat
from .training.hooks import Hooks
from .training.loop import Loop
from .training.probe import Probe
from .training.record import Texts, make_record, merged
from .training.step_folder import Folder, prepare
from .training.steps import Records, Step

KEPT = 100  # records that stay in memory with their tables


class Monitor:
    """Record c, ‖G‖ and the statistics of every scored token of a step, and what the step does to a probe.

    It has more attributes than a class should: the options stay readable under the names they are given by.

    Args:
        model: the module that the loop calls: a causal LM (FSDP2 as is), or PEFT's, DDP's or torch.compile's wrapper of one.
        optimizer: its optimizer (accelerate's wrapper too). Needed for probes, and to know when accumulation ends.
        probe: sequences watched through training, or several named groups of them.
        every: steps from one record to the next; the first step is always recorded.
        probe_every: the same for the probe; as `every` when absent. A multiple of it.
        temperature: what the loss divides the logits by.
        ranks: over how many data-parallel ranks gradients are averaged; found from DDP or the device mesh when absent.
        scaler: the GradScaler of fp16 training.
        blame: the group of the probe that update tokens are asked about (Step.forces), or several: one more backward and
            tangent pass each, all in the token table as "on …". The first group when absent.
        tokenizer: for token texts in the tables.
        observable: what is watched at the probe's tokens (td.observables); all figures of the probe are in its unit.
        out: a new folder to write to (see training/step_folder.py).
        overwrite: replace the records of an earlier training that lie there.
        resume: go on with the records that lie there; of a step that was recorded twice the later record counts.
        on_error: "warn", or "raise" at the end of the step.

    Attributes:
        steps: the records. The last 100 are in memory; earlier ones are read from `out`, without it their tables are lost.
        problems: what went wrong, as (step, text).
        first_look: called once, before the weights move in the first recorded step. report: what it found (`td.check`).
        number, due: the present step, and whether it is recorded. clip, c_scale: factors of its clipping, and of its c.

    Raises:
        ValueError: an option that does not exist, or a model without readout (when it starts).

    Cost: per recorded step one pass over the logits of the scored tokens (one matrix product [N, d] x [d, V] where a fused head
    hides them), and 32 tokens' worth of checks. A probe step adds two forward passes, a backward and a tangent pass over the
    probe, and a tangent pass over the update.
    """

    def __init__(
        self,
        model: nn.Module | None,
        optimizer: Any = None,
        *,
        probe: Sequence[Chi] | Mapping[str, Sequence[Chi]] | None = None,
        every: int = 1,
        probe_every: int | None = None,
        temperature: float = 1.0,
        ranks: int | None = None,
        scaler: Any = None,
        blame: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        observable: Observable | Function | str = "log-prob",
        out: str | Path | None = None,
        overwrite: bool = False,
        resume: bool = False,
        on_error: str = "warn",
    ) -> None:
        if every < 1 or (probe_every or every) % every:
            raise ValueError(f"every must be at least 1 and probe_every a multiple of it, got {every} and {probe_every}")
        if on_error not in ("warn", "raise"):
            raise ValueError(f'on_error must be "warn" or "raise", got {on_error!r}')
        if probe is not None and optimizer is None and model is not None:
            raise ValueError("a probe needs the optimizer: td.Monitor(model, optimizer, probe=...)")
        self._loop, self.every, self.probe_every = Loop(model, optimizer), every, probe_every or every
        self.temperature, self.scaler, self.tokenizer, self.on_error = temperature, scaler, tokenizer, on_error
        self.probe = None if probe is None else Probe(probe, blame, tokenizer, observable)
        self.steps = Records(KEPT)
        self.problems: list[tuple[int, str]] = []
        self._warned: set[str] = set()
        self.number, self.clip, self.c_scale = 0, 1.0, 1.0
        self._ranks, self._out, self._overwrite, self._resume = ranks, out, overwrite, resume
        self._capture: Capture | None = None
        self.first_look: Callable[[Capture], None] | None = None
        self.report: Any = None
        self._folder: Folder | None = None
        self._heartbeat: Heartbeat | None = None
        self._hooks = Hooks(self._hook_failed)
        self._texts = None if tokenizer is None else Texts(tokenizer)
        self.due = self._stepped = False
        self._sums: dict[str, float] = {}

    # ---------------------------------------------------------------- life

    @property
    def model(self) -> nn.Module | None:
        """What the loop calls, as long as somebody else holds it: a monitor keeps no model alive."""
        return self._loop.model

    @property
    def optimizer(self) -> Any:
        """The loop's optimizer, as long as somebody else holds it."""
        return self._loop.optimizer

    def __enter__(self) -> Monitor:
        self.start()
        self.step_begin()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.close("complete" if kind is None else "interrupted")

    def start(self, model: nn.Module | None = None, optimizer: Any = None) -> None:
        """Set the hooks on a model and its optimizer; those given at construction when absent. Every rank must call it.

        Raises:
            ValueError: the model has no readout, or virtual tokens and a probe. FileExistsError: `out` is taken.
        """
        self.close()
        self._loop = Loop(self.model if model is None else model, self.optimizer if optimizer is None else optimizer)
        if (model := self.model) is None:
            raise ValueError("td.Monitor needs the model, which the caller holds: td.Monitor(model, optimizer)")
        failure: Exception | None = None
        try:
            capture = self._capture = Capture(model, self.temperature)
            if self.probe is not None:
                require_no_prefix(capture.outer)
            self.ranks = self._ranks if self._ranks is not None else distributed.averaging(model)
            settings = dict(every=self.every, probe_every=self.probe_every, temperature=self.temperature, ranks=self.ranks)
            facts = facts_of(capture.lm, settings, self.probe)
            if self._out is not None and distributed.rank() == 0:
                prepare(Path(self._out), facts, self._overwrite, self._resume)
        except Exception as error:
            failure = error
        self._all_or_none(failure)
        try:
            if self._out is not None:
                self._folder = Folder(Path(self._out), distributed.rank(), facts, self._resume)
                self.number = max(self.number, self._folder.last)
                self._heartbeat = Heartbeat(self._folder.path) if distributed.rank() == 0 else None
            capture.install()
            self._loop.listen(self._hooks, self._before_step, self._after_step)
        except Exception as error:
            failure = error
        self._all_or_none(failure)

    def _all_or_none(self, failure: Exception | None) -> None:
        """Start on all ranks or on none: later on they meet in collectives."""
        if not distributed.agree(failure is None):
            self.close("interrupted")
            raise failure or ValueError("tokdyn could not start on another rank")

    def averaged_over(self, ranks: int) -> None:
        """Set over how many ranks gradients are averaged, from the next `start` on."""
        self._ranks = ranks

    def clipped_to(self, limit: Any, norm: Any) -> None:
        """Note that this step's gradients, of that norm, were clipped as `clip_grad_norm_` does; no limit is None or 0."""
        with self.guarded("the gradient's norm could not be read"):
            if self.due and limit:
                norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                self.clip = min(1.0, float(limit) / (float(norm) + 1e-6))

    def close(self, status: str = "complete") -> None:
        """Take every hook off and write what is left. Safe to call twice."""
        self._hooks.remove()
        capture, folder, heartbeat = self._capture, self._folder, self._heartbeat
        self._capture = self._folder = self._heartbeat = None
        with self.guarded("the hooks could not be taken off"):
            if capture is not None:
                capture.remove()
            if self.probe is not None:
                self.probe.forget()
        with self.guarded("the records could not be written"):
            if folder is not None:
                folder.close(status, steps=self.number, problems=[f"step {n}: {text}" for n, text in self.problems])
        with self.guarded("the sign of life could not be taken away"):
            if heartbeat is not None:
                heartbeat.stop()

    def step_begin(self, number: int | None = None) -> None:
        """A new optimizer step begins. Plain loops need not call it: `step_end` begins the next."""
        self.number = self.number + 1 if number is None else number
        self.due = self.number % self.every == 0 or self.number == 1
        self._stepped, self.clip = False, 1.0
        with self.guarded("the step could not be begun"):
            self._forget_passes()

    def _forget_passes(self) -> None:
        if (capture := self._capture) is not None:
            capture.recording = False
            self.c_scale = 1 / self.ranks / self._loss_scale()
            capture.start(keep_hidden=self.due and (self._probing or self.first_look is not None))
            capture.recording = self.due

    def pause(self) -> None:
        """Undo `step_begin`: record nothing until the next one."""
        if self._capture is not None:
            self._capture.recording = False
            with self.guarded("the step could not be taken back"):
                self._capture.start()
        self.number -= 1

    @contextlib.contextmanager
    def micro_batch(
        self,
        *,
        advantages: Any = None,
        old_log_probs: Tensor | None = None,
        clip: tuple[float, float] | None = None,
        level: str | None = None,
        mask: Tensor | None = None,
        roles: Sequence[str] | None = None,
        groups: Sequence[int] | None = None,
    ) -> Iterator[None]:
        """What the loop knows about the passes whose forward or backward runs inside.

        Args:
            advantages: A of every sequence of the batch [B], or of its last k tokens [B, k].
            old_log_probs: log pi_old of the last k tokens [B, k]; the policy itself when absent.
            clip: (low, high) of the objective's clip, for the share of clipped tokens.
            level: "token", or "sequence" where the ratio that is clipped is exp of the mean log-ratio of a sequence (GSPO).
            mask: which of the last k tokens the loss scores [B, k]; needed without labels, where a scored one may be clipped.
            roles: "chosen", "rejected" or "response" for every sequence.
            groups: which sequences belong together (a pair, a prompt's rollouts).
        """
        given: dict[str, Any] = dict(
            advantages=advantages, old_log_probs=old_log_probs, clip=clip, level=level, mask=mask, roles=roles, groups=groups
        )
        given = {name: value for name, value in given.items() if value is not None}
        step, before = None if self._capture is None else self._capture.step, None
        with self.guarded("a batch could not be told from the next"):
            before = None if step is None else step.micro_batch_begins(given)
        try:
            yield
        finally:
            with self.guarded("a batch could not be told from the next"):
                if step is not None and before is not None:
                    step.micro_batch_ends(before)

    def about(self, **metadata: Any) -> None:
        """Add metadata of `micro_batch` to the latest pass; for code that sees a loss being made but not the loop around it."""
        if (forward := self.latest()) is not None:
            forward.metadata |= {name: value for name, value in metadata.items() if value is not None}

    def latest(self) -> Forward | None:
        """The latest pass that was captured in this step."""
        forwards = self._capture.step.forwards if self._capture is not None else []
        return forwards[-1] if forwards else None

    def step_end(self, *, clip: float = 1.0, force: bool = False) -> Step | None:
        """The optimizer step is done: record it if it is due, and begin the next.

        The record is None where it is not due, nothing was captured (see `problems`), or gradients are being accumulated.

        Args:
            clip: the factor by which gradients were clipped, min(1, max_norm / norm), for Step.forces.
            force: end the step although the optimizer was not seen to step.
        """
        if self._capture is None:
            return None
        if self._loop.says_when_it_steps and not self._stepped and not force:
            if why := self._loop.why_no_step():  # passes would pile up, and never be a record
                with self.guarded("the step could not be begun"):
                    self._forget_passes()
                self._report(f"nothing is recorded: {why}")
            return None
        self.clip *= clip
        step, self._capture.recording = None, False
        if self.due:
            try:
                step = self._record()
            except Problem:
                raise
            except Exception as error:
                self._report(str(error) or repr(error), error)
        if not force:
            self.step_begin()
        return step

    def metrics(self, reset: bool = True) -> dict[str, float]:
        """Figures since the last call, over all ranks (one reduction, so every rank must call it).

        Names are those of `steps.metrics`, those of the probe begin with its group's name: chosen/log_prob, chosen/actual, …
        """
        found = merged(self._sums, self.probe)
        if reset:
            self._sums = {}
        return found

    @property
    def capture(self) -> Capture | None:
        """The hooks at work, None before `start`."""
        return self._capture

    @property
    def _probing(self) -> bool:
        return self.probe is not None and (self.number % self.probe_every == 0 or self.number == 1)

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """θ is about to move: gradients are final, weights still those of the update."""
        self._loop.has_stepped()
        if self._capture is None:
            return
        recording, self._capture.recording = self._capture.recording, False
        self._capture.before_step()
        self.c_scale = 1 / self.ranks / self._loss_scale()  # a GradScaler changes its scale when the step is over
        if self.due and self.first_look is not None and not self._stepped:
            look, self.first_look = self.first_look, None
            with self.guarded("the step could not be checked"):
                look(self._capture)
        if self.due and self._probing and not self._stepped and self.probe is not None and self.model is not None:
            with self.guarded("the probe could not be read before the step"):
                self.probe.before(self.model, self._capture, optimizer)
        self._capture.recording = recording

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._stepped = True
        if self._capture is None:
            return
        self._capture.recording = False
        if self.due and self._probing and self.probe is not None and self.model is not None:
            with self.guarded("the probe could not be read after the step"):
                self.probe.after(self.model, self._capture, optimizer, self.c_scale)

    def _hook_failed(self, error: Exception) -> None:
        """What the guard of the hooks on the optimizer does with an exception."""
        if isinstance(error, Problem):
            raise error
        self._report(f"a hook on the optimizer failed: {error}", error)

    def _loss_scale(self) -> float:
        return float(self.scaler.get_scale()) if self.scaler is not None and self.scaler.is_enabled() else 1.0

    def _record(self) -> Step:
        assert self._capture is not None
        skipped = self.scaler is not None and self.scaler.is_enabled() and not self._stepped
        step, wrong = make_record(self._capture, self.number, self.c_scale, skipped=skipped, texts=self._texts)
        if wrong:
            self._report(wrong[0], kind=wrong[1])
        if self._probing and self.probe is not None:
            step.sums |= self.probe.write_into(step, self.clip)
        for name, value in step.sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self.steps.append(step, self._folder is not None)
        if self._folder is not None:
            self._folder.add(step)
        return step

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Report an exception inside as a problem that begins with `what`; unless `on_error="raise"`, training goes on."""
        try:
            yield
        except Problem:
            raise
        except Exception as error:
            self._report(f"{what}: {error}", error)

    def _report(self, text: str, error: Exception | None = None, kind: str = "") -> None:
        """Raise, or note it and warn once of each kind."""
        if self.on_error == "raise":
            raise Problem(f"step {self.number}: {text}") from error
        new = (kind or text) not in self._warned
        self._warned.add(kind or text)
        if new:
            warnings.warn(f"tokdyn, step {self.number}: {text}", stacklevel=3)
        self.problems.append((self.number, text))
