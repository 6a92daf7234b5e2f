"""verl: records of the actor's updates, from a module that every worker imports.

Write a module of your own and name it in the job, `actor_rollout_ref.model.external_lib=my_tokdyn`:

    from tokdyn.integrations.verl import install
    install(every=10, out="runs/grpo")

FSDP2 workers and their padded or unpadded batches are covered. c is captured from the logits, and by `td.tap` inside the policy
loss where that loss is all there is (no entropy bonus, padded batches), with clipped tokens and advantages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch

from ..capture import tap
from ..monitor import Monitor


def install(**options: Any) -> None:
    """Make every verl actor of this process record its updates; options are those of `Monitor`.

    Raises:
        ImportError: verl is not installed.
    """
    from verl.workers.actor import dp_actor  # type: ignore[import-not-found]

    instrument(dp_actor, **options)


def instrument(dp_actor: Any, **options: Any) -> tuple[Mapping[Any, Monitor], Callable[[], None]]:
    """Wrap DataParallelPPOActor and the policy losses of that module.

    Returns:
        The monitors by actor, as they come to be, and what takes the wrapping off.
    """
    actors: WeakKeyDictionary[Any, Monitor] = WeakKeyDictionary()
    at_work: list[tuple[Any, Monitor, float]] = []
    kind = dp_actor.DataParallelPPOActor
    update, step, losses = kind.update_policy, kind._optimizer_step, dp_actor.get_policy_loss_fn

    def update_policy(self: Any, data: Any) -> Any:
        temperature = float(data.meta_info["temperature"])
        monitor = actors.get(self)
        if monitor is None:
            about: dict[str, Any] = dict(temperature=temperature, scaler=getattr(self, "scaler", None)) | options
            monitor = actors[self] = Monitor(self.actor_module, self.actor_optimizer, **about)
            monitor.start()
            finalize(self, monitor.close)  # at the end of the process at the latest
        monitor.step_begin()
        at_work.append((self, monitor, temperature))
        try:
            return update(self, data)
        finally:
            at_work.pop()
            monitor.pause()

    def optimizer_step(self: Any) -> Any:
        norm = step(self)
        monitor = actors.get(self)
        if monitor is not None and at_work:
            limit = float(self.config.grad_clip)
            monitor.step_end(clip=min(1.0, limit / (float(norm) + 1e-6)), force=True)
            monitor.step_begin()
        return norm

    def get_policy_loss_fn(name: str) -> Callable[..., Any]:
        loss = losses(name)

        def policy_loss(*, old_log_prob: Any, log_prob: Any, advantages: Any, response_mask: Any, **more: Any) -> Any:
            if at_work:
                actor, monitor, temperature = at_work[-1]
                plain = not actor.config.get("use_remove_padding", False) and not actor.config.get("entropy_coeff", 0)
                if plain:
                    log_prob = tap(log_prob, mask=response_mask, temperature=temperature)
                    clip = actor.config.get("clip_ratio", 0.2)
                    low, high = (actor.config.get(f"clip_ratio_{side}") or clip for side in ("low", "high"))
                    monitor.about(advantages=advantages, old_log_probs=old_log_prob.detach(), clip=(low, high))
                else:  # documents in a row: what is known of each is its mean advantage
                    mean = (advantages * response_mask).sum(1) / response_mask.sum(1).clamp(min=1)
                    monitor.about(advantages=torch.as_tensor(mean).detach())
            return loss(
                old_log_prob=old_log_prob, log_prob=log_prob, advantages=advantages, response_mask=response_mask, **more
            )

        return policy_loss

    def undo() -> None:
        kind.update_policy, kind._optimizer_step, dp_actor.get_policy_loss_fn = update, step, losses

    kind.update_policy, kind._optimizer_step = update_policy, optimizer_step
    dp_actor.get_policy_loss_fn = get_policy_loss_fn
    return actors, undo
