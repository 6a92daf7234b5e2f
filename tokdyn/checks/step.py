"""All checks of a step, in the order in which they are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .displacement import displacement
from .finding import Finding, Report
from .log_probs import log_probs, old_log_probs
from .rows import reference, rows_alone
from .run import run
from .scale import scale
from .seen import Seen
from .tokens import beginning, capture, ending, padding, pairs, scored_roles
from .weights import gradients, readout, rounding

CHECKS: tuple[Callable[[Seen], Sequence[Finding]], ...] = (
    capture, scored_roles, padding, beginning, ending, pairs, log_probs, old_log_probs, scale, rows_alone, reference, readout,
    gradients, rounding, displacement,
)  # fmt: skip


def check_step(seen: Seen) -> Report:
    """The report of all checks about one step; where nothing could be captured the first says why."""
    checks = CHECKS if seen.forwards else (capture, readout)
    return run(checks, seen)
