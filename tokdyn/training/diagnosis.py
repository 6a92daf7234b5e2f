"""Explain an empty or failed capture: why nothing was captured, what a record leaves out, what does not add up."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .forward import Forward
from .step_log import StepSummary


class Problem(ValueError):
    """What went wrong in a step, raised where `on_error="raise"`."""


def require_forwards(forwards: Sequence[Forward], seen: StepSummary) -> None:
    """Raise where a step left no trustworthy record.

    Raises:
        ValueError: a hook failed, or nothing was captured; with the likely cause.
    """
    if seen.failure is not None:
        raise ValueError(f"the capture failed: {seen.failure}") from seen.failure
    if not forwards:
        raise ValueError(f"nothing was captured: {explain_empty(seen)}")


def explain_empty(seen: StepSummary) -> str:
    """The likely cause when a step left no capture."""
    if seen.seen and seen.seen == seen.excluded:
        return f"all {seen.seen} forward passes ran without gradients (generation, reference or evaluation)"
    if seen.thrown_away:
        return f"{_thrown_away(seen)} and no further pass came"
    if seen.compiled_in_place:
        return (
            "the model was compiled in place (model.compile()), where hooks see no gradients: use torch.compile(model) instead"
        )
    if not seen.seen:
        return (
            f"no forward pass of {seen.model} was seen: the loss is computed with another copy or a wrapper "
            "compiled earlier (hooks added later do not fire inside); give tokdyn the module that the loop calls"
        )
    if not seen.captured and not seen.compiled:
        return seen.why_blind
    if seen.compiled:
        return (
            "the loss is computed inside the compiled model, where no hook sees it: compute it outside (Trainer's "
            "compute_loss_func, or logits without labels), or compile the layers only"
        )
    if seen.retry_next_step:
        return (
            "the loss is made inside the model and the weights of its readout are sharded: c is fitted to the gradient at the "
            "hidden states, from the next recorded step on"
        )
    return (
        f"{seen.captured} forward passes were captured but no gradient came back to them: backward() was not called "
        "before the step ended, or the loss does not read this output (log-probs of your own go through td.tap)"
    )


def _thrown_away(seen: StepSummary) -> str:
    passes = "the gradients of one pass" if seen.thrown_away == 1 else f"the gradients of {seen.thrown_away} passes"
    return f"{passes} were thrown away (zero_grad without a step)"


def known_gaps(forwards: Sequence[Forward], seen: StepSummary) -> list[str]:
    """What the records of a step are known to leave out."""
    notes = [f"{_thrown_away(seen)}: they are no part of this step"] if seen.thrown_away else []
    if seen.router_loss:
        notes.append("a loss of the router goes past the logits: the forces are incomplete by that term")
    if any(f.v is not None for f in forwards if f.route == "least squares"):
        notes.append(
            "c alone does not explain the gradient; entropy and label smoothing terms (v, u) were fitted to it. If the "
            "loss has none, the temperature is not the loss's"
        )
    if any(f.touched is not None and "clip" in f.metadata for f in forwards):
        notes.append(
            "clipped tokens cannot be told from unscored ones, as nobody said which tokens the loss scores: give micro_batch a "
            "mask, or pass the loss's log-probs through td.tap with labels or a mask"
        )
    return notes


def failed_self_check(forwards: Sequence[Forward]) -> tuple[str, str] | None:
    """A sentence on the pass whose self-check fails worst, and the likely cause alone; None where all hold.

    The bound is √eps of the pass: rounding stays far below it, and a wrong temperature, mask or readout far above.
    """
    if any(not math.isfinite(f.check.total) for f in forwards if f.check.sampled or f.check.unscored):
        return ("the gradient at the hidden states is not finite: the loss overflowed or holds NaN", "not finite")
    for f in forwards:
        if f.readout_error > max(f.eps**0.5, 1e-6):
            cause = f"the model's logits differ by {f.readout_error:.2g} from softcap(scale (W h + b)) of its hidden states"
            return f"c rests on a readout that is not the model's: {cause}", cause
    bad = [f for f in forwards if f.residual > max(f.eps**0.5, 1e-6)]
    if not bad:
        return None
    worst = max(bad, key=lambda f: f.residual)
    if worst.check.past_readout > 0.5 * worst.residual:
        cause = (
            "it reaches the backbone's output without coming through the logits (a term on hidden_states[-1], a value head), "
            "and the forces are incomplete by that term"
        )
    elif worst.outside > 0.5 * worst.residual:
        cause = "it falls on tokens taken for unscored: labels or mask are not the loss's, or the loss reads hidden states"
    elif worst.log_prob_error > 10 * worst.eps**0.5:
        cause = (
            f"the output's log-probs differ by {worst.log_prob_error:.2g} nats from those of its hidden states at "
            f"temperature={worst.temperature:g}: is that what the loss divides by?"
        )
    elif worst.route == "least squares":
        cause = (
            f"the loss is not one of log-probs, entropies and mean log-probs at temperature={worst.temperature:g}: is "
            "that what it divides the logits by?"
        )
    else:
        cause = "a further term of the loss reaches the hidden states, or the temperature is not the loss's"
    bound = max(worst.eps**0.5, 1e-6)
    return f"c explains the gradient at the hidden states only to {worst.residual:.2g} (bound {bound:.2g}): {cause}", cause
