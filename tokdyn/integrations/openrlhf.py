"""OpenRLHF: records of a policy trainer's updates.

    monitor = tokdyn.integrations.openrlhf.attach(trainer, every=10)     # trainer: its ray worker's PolicyTrainer
    ...
    monitor.close()

The actor's own forward divides the logits in place and rolls the labels; hooks see the head's output before that. ZeRO-3 is
refused by name.
"""

from __future__ import annotations

from typing import Any

from ..monitor import Monitor
from .trainer import wrap


def attach(trainer: Any, **options: Any) -> Monitor:
    """Record the updates of an OpenRLHF policy trainer; options are those of `Monitor`. `close` ends it.

    Wraps `training_step` and `strategy.optimizer_step` of this one object.

    Raises:
        ValueError: the object is no policy trainer.
    """
    for name in ("actor", "actor_optim", "strategy", "training_step"):
        if not hasattr(trainer, name):
            raise ValueError(f"this is no OpenRLHF policy trainer: {type(trainer).__name__} has no {name}")
    engine = trainer.actor.model
    monitor = Monitor(engine, trainer.actor_optim, temperature=float(getattr(trainer.actor, "temperature", 1.0)), **options)
    clip = tuple(float(x) for x in trainer.args.actor.eps_clip_low_high)

    def training_step(original: Any, experience: Any, *args: Any, **kwargs: Any) -> Any:
        known = dict(advantages=experience.advantages, old_log_probs=experience.action_log_probs, clip=clip)
        with monitor.micro_batch(**known):
            return original(experience, *args, **kwargs)

    def optimizer_step(original: Any, *args: Any, **kwargs: Any) -> Any:
        ends = getattr(engine, "is_gradient_accumulation_boundary", lambda: True)()
        result = original(*args, **kwargs)
        if ends:
            monitor.step_end(force=True)
            monitor.step_begin()
        return result

    undos = [wrap(trainer, "training_step", training_step), wrap(trainer.strategy, "optimizer_step", optimizer_step)]
    close = monitor.close

    def closing(status: str = "complete") -> None:
        close(status)
        while undos:
            undos.pop()()

    monitor.start()
    monitor.step_begin()
    monitor.close = closing  # type: ignore[method-assign]
    return monitor
