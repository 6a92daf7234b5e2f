"""td.attach: one line for transformers.Trainer and everything built on it (TRL's trainers)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..model.unwrap import is_sharded
from ..monitor import Monitor
from ..observables import Function, Observable
from ..sequences import Chi
from ..training import distributed
from ..training.step_folder import check_free
from .first_look import FirstLook, tokenizer_of
from .trl import about_batch


def attach(
    trainer: Any,
    *,
    probe: Sequence[Chi] | Mapping[str, Sequence[Chi]] | None = None,
    every: int = 1,
    probe_every: int | None = None,
    blame: str | Sequence[str] | None = None,
    observable: Observable | Function | str = "log-prob",
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    on_error: str = "warn",
    check: bool = True,
) -> Monitor:
    """Record the forces of the coming `trainer.train()`; figures go to the trainer's own reporter as tokdyn/….

    A callback is put before all others (reporters come later and see its figures), and `train`, `compute_loss` and the clipping
    of gradients are wrapped on this one object; all of it is undone when `train` returns or raises. Loss and gradients stay
    as they are, bit for bit.

    Args:
        trainer: a transformers.Trainer or one of TRL's.
        probe, every, probe_every, blame, observable, out, overwrite, resume, on_error: as in `Monitor`; out defaults to writing
            nothing.
        check: look at the first recorded step as `td.check` does, before its weights move. What is wrong or suspicious is one
            warning; `monitor.report` holds all findings. Costs one backward and one tangent pass over that step's answers, and
            a forward pass for each of eight rows.

    Returns:
        The monitor; its `steps` fill while `train` runs.

    Raises:
        ValueError: this is no Trainer, or it is attached already.
        FileExistsError: `out` is taken, also by an earlier training where it is neither to be replaced nor resumed.

    Example:
        >>> monitor = td.attach(trainer, probe=chis, every=10)
        >>> trainer.train()
        >>> monitor.steps[-1].metrics
    """
    require_trainer(trainer, "td.attach", "use td.Monitor")
    if any(type(callback).__name__ == "TokdynCallback" for callback in trainer.callback_handler.callbacks):
        raise ValueError("this trainer is attached already; the monitor returned then is at work until train() ends")
    if out is not None and distributed.rank() == 0:  # before hours of training that would record nothing
        check_free(Path(out), overwrite, resume)
    temperature = loss_temperature(trainer)
    monitor = Monitor(
        None, probe=probe, every=every, probe_every=probe_every, blame=blame, observable=observable, temperature=temperature,
        out=out, overwrite=overwrite, resume=resume, on_error=on_error, tokenizer=tokenizer_of(trainer),
    )  # fmt: skip
    looking = FirstLook(trainer, monitor) if check else None
    _wrap_methods(trainer, monitor, _callback(trainer, monitor, looking), looking)
    return monitor


def loss_temperature(trainer: Any) -> float:
    """What a trainer's loss divides the logits by: its `temperature`, which TRL's OnlineDPO and its heirs sample with alone."""
    samples_alone = any(kind.__name__ == "OnlineDPOTrainer" for kind in type(trainer).__mro__)
    return 1.0 if samples_alone else float(getattr(trainer, "temperature", None) or 1.0)


def require_trainer(trainer: Any, what: str, instead: str = "see docs/check.md") -> None:
    """Raise unless this has what a transformers.Trainer has.

    Raises:
        ValueError: see above.
    """
    for name in ("train", "compute_loss", "callback_handler", "accelerator"):
        if not hasattr(trainer, name):
            raise ValueError(f"{what} needs a transformers.Trainer, got {type(trainer).__name__} without {name}: {instead}")


def _wrap_methods(trainer: Any, monitor: Monitor, callback: Any, looking: FirstLook | None) -> None:
    """Have the monitor told of losses, clipping and the end of a training, which takes the wrapping off again."""

    def train(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        status = "interrupted"
        try:
            result = original(*args, **kwargs)
            status = "complete"
            return result
        finally:
            monitor.close(status)
            if looking is not None:
                looking.end()
            trainer.callback_handler.callbacks[:] = [c for c in trainer.callback_handler.callbacks if c is not callback]
            for undo in undos:
                undo()

    def compute_loss(original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        known: dict[str, Any] = {}
        batch = copy.copy(inputs)  # Trainer takes the labels out of it where it has a loss function or smooths
        with monitor.guarded("the trainer's batch could not be read"):
            known = about_batch(trainer, inputs)
        with monitor.micro_batch(**known):
            loss = original(model, inputs, *args, **kwargs)
            if looking is not None:
                looking.note(batch, kwargs.get("num_items_in_batch"))
            return loss

    def clip(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        norm = original(*args, **kwargs)
        monitor.clipped_to(trainer.args.max_grad_norm, norm)
        return norm

    undos = [wrap(trainer, "train", train), wrap(trainer, "compute_loss", compute_loss)]
    if hasattr(trainer, "_clip_grad_norm"):
        undos.append(wrap(trainer, "_clip_grad_norm", clip))
    trainer.callback_handler.callbacks.insert(0, callback)


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Put `around(original, *args, **kwargs)` in the place of a method of one object; returns a function that undoes it."""
    own, original = vars(owner).get(name), getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    def undo() -> None:
        if own is not None:
            setattr(owner, name, own)
        elif vars(owner).get(name) is wrapped:
            delattr(owner, name)

    setattr(owner, name, wrapped)
    return undo


def _callback(trainer: Any, monitor: Monitor, looking: FirstLook | None) -> Any:
    from transformers import TrainerCallback

    class TokdynCallback(TrainerCallback):
        """Tells the monitor when steps begin and end, and adds its figures to what is logged."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with monitor.guarded("tokdyn is not attached"):
                monitor.scaler = getattr(trainer.accelerator, "scaler", None)
                monitor.averaged_over(trainer.accelerator.num_processes // _ranks_per_replica(trainer))
                monitor.start(trainer.model_wrapped, trainer.optimizer)
                if looking is not None:
                    looking.begin(monitor.capture)
                with monitor.guarded("fsdp does nothing here"):
                    _require_shards(trainer)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            monitor.step_begin(state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            monitor.step_end(force=True)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            if logs is None or "loss" not in logs:
                return
            with monitor.guarded("figures could not be logged"):
                found = {f"tokdyn/{name}": value for name, value in monitor.metrics().items()}
                logs.update(found)
                if state.log_history and state.log_history[-1].get("step") == state.global_step:
                    state.log_history[-1].update(found)

    return TokdynCallback()


def _require_shards(trainer: Any) -> None:
    """Raise if the trainer was asked for FSDP and no parameter is sharded.

    Raises:
        ValueError: see above.
    """
    model = trainer.model_wrapped
    if getattr(trainer.args, "fsdp", None) and not any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            f"args.fsdp is set and no parameter of the {type(model).__name__} that trains is sharded, so every rank holds all "
            "of it (accelerate shards on GPUs and other accelerators, not on a CPU): train there, or leave fsdp out"
        )


def _ranks_per_replica(trainer: Any) -> int:
    """How many processes share one replica's gradients without averaging (tensor and context parallel)."""
    config = getattr(trainer.accelerator, "parallelism_config", None)
    sizes = [getattr(config, name, 1) or 1 for name in ("tp_size", "cp_size", "sp_size")] if config is not None else [1]
    n = 1
    for size in sizes:
        n *= size
    return n
