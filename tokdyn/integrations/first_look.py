"""The checks of a step that a training makes: td.attach looks at the first recorded one, before its weights move."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

from ..checks.finding import Report
from ..checks.seen import Seen
from ..checks.step import check_step
from ..model.unwrap import is_sharded
from ..monitor import Monitor
from ..training import distributed
from ..training.capture import Capture
from ..training.isolation import Call, CallNotes


def notes_on(capture: Capture) -> CallNotes:
    """The calls of what a loop calls, noted from now on."""
    called = capture.lm if capture.compiled is None else capture.compiled
    return CallNotes(capture.outer[0] if capture.outer else called)


def tokenizer_of(trainer: Any) -> Any:
    """A trainer's tokenizer, also inside a processor; None where it has none."""
    found = getattr(trainer, "processing_class", None)
    found = getattr(found, "tokenizer", found)
    return found if hasattr(found, "convert_ids_to_tokens") else None


def seen_of(trainer: Any, capture: Capture, calls: Sequence[Call], *, scale: float = 1.0, optimizer: Any = None) -> Seen:
    """What a step showed, its gradients in `.grad` and its weights not moved yet."""
    forwards, summary, lm = capture.take(), capture.summary(), capture.lm
    readout = None
    if not any(is_sharded(p) for p in lm.parameters()):  # gathering is for all ranks, and this may be one of them
        with contextlib.suppress(ValueError):
            readout = capture.readout()
    grads = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
    first = int(getattr(trainer.state, "global_step", 0)) == 0
    tokenizer = tokenizer_of(trainer)
    return Seen(trainer, lm, capture.outer, tokenizer, forwards, calls, grads, readout, summary, scale, first, optimizer)


class FirstLook:
    """Checks a training's first recorded step, once, on one rank; what it finds is a warning and `monitor.report`."""

    def __init__(self, trainer: Any, monitor: Monitor) -> None:
        self.trainer, self.monitor = trainer, monitor
        self._notes: CallNotes | None = None
        monitor.first_look = self.look

    def begin(self, capture: Capture | None) -> None:
        """The training begins: note the calls of its model."""
        if capture is not None and distributed.rank() == 0:
            self._notes = notes_on(capture)

    def note(self, inputs: Any, items: Any) -> None:
        """The batch of the pass that has just run, and how many tokens the trainer counts in its step, where it does."""
        if self._notes is not None and self.monitor.due:
            self.monitor.about(batch=inputs, items=items)

    def look(self, capture: Capture) -> None:
        """Run every check, before the step."""
        if self._notes is None:
            return
        calls = self._notes.calls
        self.end()
        seen = seen_of(self.trainer, capture, calls, scale=self.monitor.c_scale, optimizer=self.monitor.optimizer)
        self.monitor.report = report = check_step(seen)
        if not report.silent:
            warnings.warn(_told(report), stacklevel=2)

    def end(self) -> None:
        """Take the hook off."""
        if self._notes is not None:
            self._notes.remove()
            self._notes = None


def _told(report: Report) -> str:
    found = "\n".join(str(finding) for finding in (*report.wrong, *report.suspicious))
    return f"tokdyn's checks of the first step (monitor.report; docs/check.md): {report.verdict}\n{found}"
