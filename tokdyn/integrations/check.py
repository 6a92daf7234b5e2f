"""td.check: one step of a trainer's loss, forward and backward, looked at by every check; nothing steps and nothing stays."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..checks.finding import Report
from ..checks.seen import Seen
from ..checks.step import check_step
from ..training.capture import Capture, unwatched
from .first_look import notes_on, seen_of
from .left_alone import left_as_it_was
from .trainer import loss_temperature, require_trainer, wrap
from .trl import about_batch

MOST = 4  # accumulated batches that are looked at


def check(trainer: Any, *, batches: Sequence[Any] | None = None) -> Report:
    """What is silently wrong in a training: its masks, ends, log-probs, scales, packing, reference, readout and gradients.

    The batches of one optimizer step (four accumulated ones at most) go forward and backward through the trainer's own
    `training_step`. Nothing steps: weights, buffers, gradients, optimizer, random states, the trainer's counters and metrics
    and the order of its data are afterwards what they were, bit for bit. A GRPOTrainer generates and calls its reward
    functions. On several ranks all must call it, since the trainer counts the tokens of all; each reports of its own rows.

    Args:
        trainer: a transformers.Trainer or one of TRL's, before or between its trainings.
        batches: of one step, as the trainer's data loader gives them; drawn from it when absent.

    Returns:
        The findings, the worst first; docs/check.md says of each its cause, its symptom and its cure. `report.silent` tells
        whether there are none, and `print(report)` shows them.

    Raises:
        ValueError: this is no Trainer, its data can be read only once, or an optimizer steps inside the backward pass.

    Cost: three forward and backward passes of a step, and one forward pass for each of eight rows.
    """
    require_trainer(trainer, "td.check")
    model = trainer.model
    stepping = [name for name, p in model.named_parameters() if getattr(p, "_post_accumulate_grad_hooks", None)]
    if stepping:
        raise ValueError(f"an optimizer steps inside the backward pass ({stepping[0]} …): td.check would train")
    if batches is None:
        _require_rereadable(trainer)
    with left_as_it_was(trainer):
        seen = _seen(trainer, model, batches)
        return check_step(seen)


def _require_rereadable(trainer: Any) -> None:
    """Raise where a batch that is drawn to be looked at is lost to the training."""
    data = trainer.train_dataset
    if isinstance(data, torch.utils.data.IterableDataset) and not hasattr(data, "_ex_iterable") and iter(data) is data:  # type: ignore[comparison-overlap]
        raise ValueError("the training data can be read only once: give td.check(trainer, batches=[...]) some of it")


def _seen(trainer: Any, model: nn.Module, batches: Sequence[Any] | None) -> Seen:
    """One step's batches through the trainer's own training step, captured."""
    optimizer = _optimizer(trainer, model)
    trainer.optimizer = None  # one with a mode of its own would change the weights
    if getattr(trainer.accelerator, "scaler", None) is not None:
        trainer.accelerator.scaler = None
    capture = Capture(model, loss_temperature(trainer))
    capture.start(keep_hidden=True)
    notes = notes_on(capture)

    def compute_loss(original: Any, on: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        known = about_batch(trainer, inputs) | {"batch": copy.copy(inputs), "items": kwargs.get("num_items_in_batch")}
        with capture.step.one_micro_batch(known):
            return original(on, inputs, *args, **kwargs)

    undo = wrap(trainer, "compute_loss", compute_loss)
    capture.install()
    try:
        samples, items = _drawn(trainer, batches)
        trainer.current_gradient_accumulation_steps = len(samples)
        with unwatched(), trainer.accelerator.autocast():
            capture.recording = True
            for sample in samples:
                trainer.training_step(model, sample, items)
            capture.recording = False
        return seen_of(trainer, capture, notes.calls, optimizer=optimizer)
    finally:
        undo()
        notes.remove()
        capture.remove()


def _drawn(trainer: Any, batches: Sequence[Any] | None) -> tuple[Sequence[Any], Any]:
    """The batches of a step and how many tokens the trainer counts in them."""
    n = min(int(trainer.args.gradient_accumulation_steps), MOST)
    source = iter(trainer.get_train_dataloader() if batches is None else batches)
    samples, items = trainer.get_batch_samples(source, n if batches is None else len(batches), trainer.args.device)
    if not samples:
        raise ValueError("the trainer's data loader gives no batch")
    return samples, items


def _optimizer(trainer: Any, model: nn.Module) -> Any:
    """The trainer's optimizer, or one of the kind that it will make, on the same parameters; None where that cannot be told."""
    if trainer.optimizer is not None:
        return getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    with contextlib.suppress(Exception):  # an optimizer of another package that needs more than this
        kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
        return kind([p for p in model.parameters() if p.requires_grad], **options)
    return None
