"""OpenRLHF: records of a policy trainer's updates.

    monitor = tokdyn.integrations.openrlhf.attach(trainer, every=10)     # trainer: the ActorPPOTrainer of a ray worker
    ...
    monitor.close()

Where the policy loss is all there is (no entropy bonus, no packing) its log-probs go through `td.tap`, with clipped tokens and
advantages; otherwise c is captured at the logits, which hooks see before the actor divides them in place. ZeRO-3 is refused by
name.
"""

from __future__ import annotations

from typing import Any

from ..monitor import Monitor
from ..training.capture import tap
from .trainer import wrap


def attach(trainer: Any, **options: Any) -> Monitor:
    """Record the updates of an OpenRLHF policy trainer; options are those of `Monitor`. `close` ends it.

    Wraps `training_step`, `actor_loss_fn` and `strategy.optimizer_step` of this one object.

    Raises:
        ValueError: the object is no policy trainer.
    """
    for name in ("actor", "actor_optim", "actor_loss_fn", "strategy", "training_step"):
        if not hasattr(trainer, name):
            raise ValueError(f"this is no OpenRLHF policy trainer: {type(trainer).__name__} has no {name}")
    engine = trainer.actor.model
    temperature = float(getattr(trainer.actor, "temperature", 1.0))
    monitor = Monitor(engine, trainer.actor_optim, temperature=temperature, **options)
    plain = not getattr(trainer.args.actor, "entropy_coef", None) and not _is_packed(trainer)

    def training_step(original: Any, experience: Any, *args: Any, **kwargs: Any) -> Any:
        known: dict[str, Any] = {}
        with monitor.guarded("the experience could not be read"):
            known = _about(trainer, experience)
        with monitor.micro_batch(**known):
            return original(experience, *args, **kwargs)

    def actor_loss_fn(original: Any, log_probs: Any, *args: Any, action_mask: Any = None, **kwargs: Any) -> Any:
        if plain:
            log_probs = tap(log_probs, mask=action_mask, temperature=temperature)
        return original(log_probs, *args, action_mask=action_mask, **kwargs)

    def optimizer_step(original: Any, *args: Any, **kwargs: Any) -> Any:
        ends = getattr(engine, "is_gradient_accumulation_boundary", lambda: True)()
        result = original(*args, **kwargs)
        if ends:
            with monitor.guarded("the clipping of the gradients could not be read"):
                monitor.clipped_to(trainer.args.actor.max_norm, trainer.strategy.get_grad_norm(trainer.actor))
            monitor.step_end(force=True)
            monitor.step_begin()
        return result

    with monitor.guarded("tokdyn is not attached"):
        monitor.start()
    monitor.step_begin()
    undos = [
        wrap(trainer, "training_step", training_step),
        wrap(trainer, "actor_loss_fn", actor_loss_fn),
        wrap(trainer.strategy, "optimizer_step", optimizer_step),
    ]
    close = monitor.close

    def close_and_undo(status: str = "complete") -> None:
        close(status)
        while undos:
            undos.pop()()

    monitor.close = close_and_undo  # type: ignore[method-assign]
    return monitor


def _is_packed(trainer: Any) -> bool:
    return bool(getattr(trainer.actor, "packing_samples", False))


def _about(trainer: Any, experience: Any) -> dict[str, Any]:
    """The arguments of `Monitor.micro_batch` for an experience."""
    A, mask, args = experience.advantages, experience.action_mask, trainer.args.actor
    if _is_packed(trainer):  # documents in a row: of each its mean advantage is known
        return dict(advantages=(A * mask).sum(1) / mask.sum(1).clamp(min=1))
    clip = tuple(float(x) for x in args.eps_clip_low_high)
    level = "sequence" if getattr(args, "policy_loss_type", "ppo") == "gspo" else "token"
    return dict(advantages=A, old_log_probs=experience.action_log_probs, clip=clip, level=level, mask=mask)
