"""verl: records of the actor's updates, from a module that every worker imports.

Write a module of your own and name it in the job, `actor_rollout_ref.model.external_lib=my_tokdyn`:

    from tokdyn.integrations.verl import install
    install(every=10, out="runs/grpo")

Two generations of verl's FSDP workers are known: `FSDPEngine`, whose own code in verl 0.9.1 the tests drive on a CPU under
FSDP2, and before it `DataParallelPPOActor`, of which they drive a stand-in with its call protocol. Log-probs go through
`td.tap` where they match the model's input one to one; elsewhere (padded rows of the engine, entropy bonus of the older actor)
c is captured at the logits. Ulysses sequence parallelism, Megatron and fused kernels are not covered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor

from ..monitor import Monitor
from ..training.capture import tap

Monitors = Mapping[Any, Monitor]


def install(**options: Any) -> None:
    """Make every verl actor of this process record its updates; options are those of `Monitor`.

    Raises:
        ImportError: verl is not installed, or has neither kind of FSDP worker. ValueError: an option that does not fit.
    """
    try:
        from verl.workers.engine.fsdp import transformer_impl  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("verl.workers"):
            raise
        from verl.workers.actor import dp_actor  # type: ignore[import-not-found]

        instrument(dp_actor, **options)
    else:
        instrument_engine(transformer_impl, **options)


def instrument_engine(engines: Any, **options: Any) -> tuple[Monitors, Callable[[], None]]:
    """Wrap FSDPEngineWithLMHead.forward_step and FSDPEngine.optimizer_step of that module.

    Returns:
        The monitors by engine, filled as engines first train, and a function that takes the wrapping off.

    Raises:
        ValueError: an option that does not fit.
    """
    monitors: WeakKeyDictionary[Any, Monitor] = WeakKeyDictionary()
    Monitor(None, **options)  # an option that does not fit raises here, before training
    base, head = engines.FSDPEngine, engines.FSDPEngineWithLMHead
    forward, step = head.forward_step, base.optimizer_step

    def forward_step(self: Any, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        if forward_only or loss_function is None:
            return forward(self, micro_batch, loss_function, forward_only)
        monitor = monitors.get(self)
        if monitor is None:
            monitor = monitors[self] = _attached(self, self.module, self.optimizer, micro_batch, options)
            monitor.step_begin()

        def watched(**given: Any) -> Any:
            if "model_output" in given:
                with monitor.guarded("the log-probs could not be read"):
                    config = getattr(loss_function, "keywords", {}).get("config")  # of functools.partial
                    known = {} if config is None else _clipping(config, config.policy_loss.get("loss_mode", "vanilla"))
                    temperature = _one_temperature(micro_batch)
                    given["model_output"] = _tapped(given["model_output"], given["data"], temperature, monitor, known)
            return loss_function(**given)

        return forward(self, micro_batch, watched, forward_only)

    def optimizer_step(self: Any) -> Any:
        norm = step(self)
        monitor = monitors.get(self)
        if monitor is not None:
            _end_step(monitor, self.optimizer_config.clip_grad, norm)
        return norm

    def undo() -> None:
        head.forward_step, base.optimizer_step = forward, step

    head.forward_step, base.optimizer_step = forward_step, optimizer_step
    return monitors, undo


def _attached(worker: Any, model: Any, optimizer: Any, about: Any, options: Mapping[str, Any]) -> Monitor:
    """A monitor on a worker's model, closed when the worker is collected; where it cannot start, one that does nothing."""
    monitor = Monitor(None, **{"scaler": getattr(worker, "scaler", None), **options})
    with monitor.guarded("tokdyn is not attached"):
        monitor.temperature = options.get("temperature") or _one_temperature(about)
        monitor.start(model, optimizer)
    finalize(worker, monitor.close)  # at the end of the process at the latest
    return monitor


def _mean_advantages(advantages: Any, mask: Any) -> Tensor:
    """A of each sequence, which is all that is known of documents in a row."""
    return torch.as_tensor((advantages * mask).sum(1) / mask.sum(1).clamp(min=1)).detach()


def _end_step(monitor: Monitor, limit: Any, norm: Any) -> None:
    """The optimizer has stepped, with gradients of that norm clipped to a limit."""
    monitor.clipped_to(limit, norm)
    monitor.step_end(force=True)
    monitor.step_begin()


def _one_temperature(about: Any) -> float:
    values = torch.as_tensor(about["temperature"], dtype=torch.float32).flatten().unique()
    return float(values[0]) if len(values) == 1 else float("nan")  # several in a batch: the self-check will say so


def _clipping(config: Any, loss: str) -> dict[str, Any]:
    """Bounds and level of the clip of verl's policy loss, where it clips the ratio as PPO or GSPO do; else nothing."""
    level = {"vanilla": "token", "gspo": "sequence"}.get(loss)
    if level is None:
        return {}
    both = config.get("clip_ratio", 0.2)
    low, high = (config.get(f"clip_ratio_{side}") or both for side in ("low", "high"))
    return dict(clip=(float(low), float(high)), level=level)


def _tapped(
    output: Mapping[str, Any], data: Any, temperature: float, monitor: Monitor, known: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The model's output with its log-probs (and entropies) passed through `tap`; both are flat, sequence after sequence."""
    lp, H, latest = output["log_probs"], output.get("entropy"), monitor.latest()
    if latest is None or "response_mask" not in data or not (lp.is_nested and data["response_mask"].is_nested):
        return output
    if latest.layout.real.shape != (1, len(lp.values())):
        return output
    row = torch.zeros(3, len(lp.values()), device=lp.device)  # mask, A and log pi_old at the places that score the tokens
    for i, name in enumerate(("response_mask", "advantages", "old_log_probs")):
        for end, values in zip(lp.offsets()[1:].tolist(), data[name].unbind(), strict=True):
            row[i, end - 1 - len(values) : end - 1] = values
    entropies = H.values() if isinstance(H, Tensor) and H.requires_grad else None
    flat = lp.values()
    flat = tap(flat, mask=row[0] > 0, temperature=temperature, entropy=entropies)
    shifted = row.roll(1, 1)[:, None]  # metadata stands at the token itself, not at the place that scores it
    monitor.about(advantages=shifted[1], old_log_probs=shifted[2], **known)
    found = dict(output, log_probs=torch.nested.nested_tensor_from_jagged(flat, lp.offsets()))
    if entropies is not None:
        found["entropy"] = torch.nested.nested_tensor_from_jagged(entropies, H.offsets())  # type: ignore[union-attr]
    return found


def instrument(dp_actor: Any, **options: Any) -> tuple[Monitors, Callable[[], None]]:
    """Wrap DataParallelPPOActor and the policy losses of that module (verl before its engines).

    Returns:
        The monitors by actor, filled as actors first train, and a function that takes the wrapping off.

    Raises:
        ValueError: an option that does not fit.
    """
    actors: WeakKeyDictionary[Any, Monitor] = WeakKeyDictionary()
    at_work: list[tuple[Any, Monitor, Any]] = []
    Monitor(None, **options)  # an option that does not fit raises here, before training
    kind = dp_actor.DataParallelPPOActor
    update, step, losses = kind.update_policy, kind._optimizer_step, dp_actor.get_policy_loss_fn

    def update_policy(self: Any, data: Any) -> Any:
        monitor = actors.get(self)
        if monitor is None:
            monitor = actors[self] = _attached(self, self.actor_module, self.actor_optimizer, data.meta_info, options)
        monitor.step_begin()
        at_work.append((self, monitor, data.meta_info))
        try:
            return update(self, data)
        finally:
            at_work.pop()
            monitor.pause()

    def optimizer_step(self: Any) -> Any:
        norm = step(self)
        monitor = actors.get(self)
        if monitor is not None and at_work:
            _end_step(monitor, self.config.grad_clip, norm)
        return norm

    def get_policy_loss_fn(name: str) -> Callable[..., Any]:
        loss = losses(name)

        def policy_loss(*, old_log_prob: Any, log_prob: Any, advantages: Any, response_mask: Any, **more: Any) -> Any:
            if at_work:
                actor, monitor, about = at_work[-1]
                with monitor.guarded("the log-probs could not be read"):
                    if actor.config.get("use_remove_padding", False) or actor.config.get("entropy_coeff", 0):
                        monitor.about(advantages=_mean_advantages(advantages, response_mask))
                    else:
                        known = _clipping(actor.config, name)
                        log_prob = tap(log_prob, mask=response_mask, temperature=_one_temperature(about))
                        monitor.about(advantages=advantages, old_log_probs=old_log_prob.detach(), **known)
            return loss(
                old_log_prob=old_log_prob, log_prob=log_prob, advantages=advantages, response_mask=response_mask, **more
            )

        return policy_loss

    def undo() -> None:
        kind.update_policy, kind._optimizer_step, dp_actor.get_policy_loss_fn = update, step, losses

    kind.update_policy, kind._optimizer_step = update_policy, optimizer_step
    dp_actor.get_policy_loss_fn = get_policy_loss_fn
    return actors, undo
