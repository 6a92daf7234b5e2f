"""Interventions in transformers.Trainer and everything built on it (TRL's trainers); each wraps one trainer object.

    undo = reweight(trainer, nthr)                     # weights of a function of (model, sequences)
    undo = protect(trainer, probe, share=0.1)          # spare the tokens whose exact force on the probe is worst
    undo = train_with(trainer, td.objectives.SimKO())  # another loss

Call them before td.attach, which then records what is really done. `undo()` restores the trainer.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import exact, interventions
from ..exact.sides import with_reference
from ..model.optimizer import preconditioner
from ..model.trace import trace
from ..model.unwrap import require_no_prefix, unwrap
from ..objective import Objective
from ..sequences import Chi
from ..training import diagnosis
from ..training.capture import Capture, unwatched
from ..training.forward import Forward
from ..training.layout import IGNORED, Layout
from ..training.own_passes import own_passes
from ..training.probe import Probe, observed_side, updated_side
from .trainer import loss_temperature, wrap
from .trl import about_batch

Undo = Callable[[], None]


def reweight(trainer: Any, weights: Callable[[nn.Module, list[Chi]], Tensor]) -> Undo:
    """Weigh the tokens of every training batch: G_l -> w_l G_l in whatever loss the trainer has.

    Args:
        trainer: a transformers.Trainer or one of TRL's.
        weights: given the model and the sequences of a batch, one weight for each of their scored tokens [L]; for instance
            td.interventions.nthr in a GRPOTrainer.

    Returns:
        A function that restores the trainer.

    Raises:
        ValueError: this is no Trainer; while training, a batch of another form than SFT's, DPO's or GRPO's.
    """

    def compute_loss(original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        chis, grid, places = sequences_of(trainer, inputs)
        with at_rest(model) as lm:
            w = weights(lm, chis)
        L = sum(len(chi) for chi in chis)
        if w.shape != (L,):
            raise ValueError(
                f"weights(model, sequences) must return [L]=({L},), one for each scored token, got {list(w.shape)}"
            )
        grid[places] = w.to(grid)
        with interventions.weighted(model, grid):
            return original(model, inputs, *args, **kwargs)

    return wrap(_require_trainer(trainer), "compute_loss", compute_loss)


def protect(
    trainer: Any, probe: Sequence[Chi] | Mapping[str, Sequence[Chi]], *, share: float = 0.1, scale: float = 0.0
) -> Undo:
    """Spare the tokens of every training batch whose exact force on the probe is worst, in whatever loss the trainer has.

    Each batch's loss is computed twice. The first time its gradient is captured, at the logits (c, v and u) and at the
    parameters, which gives the exact force of each token on the probe in the optimizer's coming step: with the second moment v'
    that this gradient, what was accumulated before it and clipping by max_grad_norm make; in its first step along the plain
    gradient (Adam's P is then 1/|g|, and no response to a change of g). The second time trains, with the
    tokens of the most negative forces scaled: see `interventions.force_weights`. Under accumulation batches that are still to
    come, and under DDP those of other ranks, are not in that v'.

    Args:
        trainer: a transformers.Trainer or one of TRL's.
        probe: the sequences to protect, or named groups of them, all together.
        share: at most so much of the tokens of a batch is spared.
        scale: what is left of their gradient.

    Returns:
        A function that restores the trainer.

    Raises:
        ValueError: this is no Trainer, or an empty probe; while training, a loss of which nothing can be captured.

    Cost: per batch one more forward and backward pass, one backward over the probe, one tangent pass over the batch.
    """
    chis = Probe(probe).chis
    interventions.spare(torch.zeros(0), share=share, scale=scale)  # share and scale are checked before anything runs

    def compute_loss(original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # of a copy: a Trainer with compute_loss_func or label smoothing takes the labels out of its batch
        forward, gradients = _rehearsed(trainer, original, model, copy.copy(inputs), *args, **kwargs)
        whole = _divided(trainer, kwargs.get("num_items_in_batch"))
        with at_rest(model) as lm:
            divisor = 1 if whole else trainer.current_gradient_accumulation_steps
            coming = _coming_gradient(lm, gradients, divisor, float(trainer.args.max_grad_norm or 0))
            F = _forces_on(lm, forward, chis, trainer.optimizer, coming)
        grid = torch.ones(forward.layout.real.shape, device=F.device)
        grid[forward.batch, forward.column] = interventions.spare(F, share=share, scale=scale)
        with interventions.weighted(model, grid):
            return original(model, inputs, *args, **kwargs)

    return wrap(_require_trainer(trainer), "compute_loss", compute_loss)


def train_with(trainer: Any, objective: Objective) -> Undo:
    """Train on one of td.objectives instead of the trainer's own loss: SimKO or LLDS in a GRPOTrainer, IPO in a DPOTrainer.

    The loss is the objective's mean: over tokens for supervised objectives, over pairs for preferences; the rollouts of a batch
    count as one group, whatever their prompts (trainers shuffle them; advantages are already relative to their own prompt's).
    Objectives with a reference need the trainer's ref_model or precomputed log-probs.

    Returns:
        A function that restores the trainer.

    Raises:
        ValueError: this is no Trainer; while training, a batch that the objective cannot read.
    """

    def compute_loss(original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        chis, _, _ = sequences_of(trainer, inputs)
        if objective.reads == "preference" and any(chi.reference_log_probs is None for chi in chis):
            if getattr(trainer, "ref_model", None) is None:
                raise ValueError(
                    f"{type(objective).__name__} compares with a reference, and the trainer has no ref_model: train with "
                    "precompute_ref_log_probs=True"
                )
            with at_rest(trainer.ref_model) as reference:
                chis = with_reference(chis, reference)
        if objective.reads == "rollouts":
            chis = [chi.with_(group=0) for chi in chis]
        temperature = loss_temperature(trainer)
        value = interventions.loss(model, chis, objective, temperature=temperature)
        value = (
            value / {"completion": sum(len(chi) for chi in chis), "preference": len(chis) / 2, "rollouts": 1}[objective.reads]
        )
        if _divided(trainer, kwargs.get("num_items_in_batch")):
            value = value / trainer.current_gradient_accumulation_steps
        returned = args[0] if args else kwargs.get("return_outputs", False)
        return (value, {}) if returned else value

    return wrap(_require_trainer(trainer), "compute_loss", compute_loss)


def _divided(trainer: Any, items: Any) -> bool:
    """Whether a trainer expects `compute_loss` to divide by the number of accumulated batches; if not, it does so itself.

    As transformers.Trainer.training_step decides it. TRL up to 1.14 sets compute_loss_func to something that nobody calls.
    """
    said = getattr(trainer, "loss_is_scaled_for_ga", None)
    if said is not None:
        return bool(said)
    return bool(trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None


# ---------------------------------------------------------------- a batch as sequences


def sequences_of(trainer: Any, inputs: Any) -> tuple[list[Chi], Tensor, tuple[Tensor, Tensor]]:
    """The sequences of a trainer's batch, padding and packing undone, and where their scored tokens stand in it.

    Returns:
        The sequences with roles, groups, advantages, old and reference log-probs as far as the trainer gives them; a grid of
        ones [B, T] as the model's ids stand; rows and columns of all scored tokens in it, in the order of the sequences.

    Raises:
        ValueError: the batch has neither labels nor a completion mask.
    """
    ids, mask, scored = _ids_of(inputs)
    layout = Layout.of((ids.shape[0], ids.shape[1]), ids, mask, inputs.get("position_ids"))
    about = about_batch(trainer, inputs)
    chis, rows, columns = [], list[Tensor](), list[Tensor]()
    for s in range(layout.sequences):
        own = (layout.sequence == s) & layout.real
        own_scored = scored[own].cpu()
        own_scored[:1] = False
        if not bool(own_scored.any()):
            continue
        b, t = own.nonzero(as_tuple=True)
        kept = own_scored.to(b.device)
        rows.append(b[kept])
        columns.append(t[kept])
        row, n = int(b[0]), int(own_scored.sum())
        facts: dict[str, Any] = dict(group=s, padding=layout.padding_of(s))
        if "roles" in about:
            facts |= dict(role=about["roles"][s], group=about["groups"][s])
            if isinstance(inputs.get("ref_chosen_logps"), Tensor):  # only the sum over a response is known, and only it counts
                sums = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
                facts["reference_log_probs"] = (sums[row].float() / n).expand(n).cpu()
        if "advantages" in about and about["advantages"].dim() == 1:
            prompt = ids[row, (layout.real[row]) & ~scored[row]].tolist()
            facts |= dict(advantage=float(about["advantages"][row]), group=hash(tuple(prompt)))
            for name, given in (("old_log_probs", "old_per_token_logps"), ("reference_log_probs", "ref_per_token_logps")):
                if isinstance(inputs.get(given), Tensor):
                    right = inputs[given].detach()
                    facts[name] = right[row, t[kept] - (ids.shape[1] - right.shape[1])].float().cpu()
        chis.append(Chi(ids[own].cpu(), own_scored, **facts))
    return chis, torch.ones(ids.shape, device=ids.device), (torch.cat(rows), torch.cat(columns))


def _ids_of(inputs: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """Ids, attention mask and which tokens are scored, each [B, T] as the model receives them."""
    if isinstance(inputs.get("completion_ids"), Tensor):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        return ids, mask, torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], 1).bool()
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if isinstance(ids, Tensor) and isinstance(inputs.get("completion_mask"), Tensor):
        return ids, mask, inputs["completion_mask"].bool()
    if isinstance(ids, Tensor) and isinstance(inputs.get("labels"), Tensor):
        return ids, mask, inputs["labels"] != IGNORED
    raise ValueError(f"which tokens of this batch are scored is unknown: it has {', '.join(map(str, inputs))}")


# ---------------------------------------------------------------- what a batch's loss does to a probe


Gradients = dict[int, Tensor]  # of a loss, by the id of the parameter


def _rehearsed(
    trainer: Any, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
) -> tuple[Forward, Gradients]:
    """A batch's loss run once to capture its gradients, at the logits and at the parameters.

    .grad, random state and monitors stay as they are.
    """
    devices = [p.device.index for p in model.parameters() if p.device.type == "cuda"][:1]
    with unwatched(), torch.random.fork_rng(devices):
        capture = Capture(model, loss_temperature(trainer))
        capture.install()
        try:
            capture.recording = True
            value = original(model, inputs, *args, **kwargs)
            value = value[0] if isinstance(value, tuple) else value
            trained = [p for p in model.parameters() if p.requires_grad]
            found = torch.autograd.grad(value, trained, allow_unused=True)
            capture.recording = False
            forwards = capture.take()
            diagnosis.require_forwards(forwards, capture.summary())
        finally:
            capture.remove()
    if len(forwards) > 1:
        raise ValueError(f"the loss runs {len(forwards)} forward passes a batch: protect() needs one")
    return forwards[0], {id(p): g for p, g in zip(trained, found, strict=True) if g is not None}


def _coming_gradient(lm: nn.Module, gradients: Gradients, divisor: int, max_norm: float) -> dict[str, Tensor]:
    """The gradient of the coming step by parameter: what is in .grad plus this batch's, divided by `divisor`, and clipped."""
    total = dict[str, Tensor]()
    for name, p in lm.named_parameters():
        parts = [p.grad] if p.grad is not None else []
        parts += [gradients[id(p)] / divisor] if id(p) in gradients else []
        if parts:
            total[name] = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    norm = float(torch.stack([g.norm() for g in total.values()]).norm()) if total else 0.0
    scale = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0  # as torch.nn.utils.clip_grad_norm_ does it
    return total if scale == 1 else {name: scale * g for name, g in total.items()}


def _forces_on(lm: nn.Module, forward: Forward, probe: Sequence[Chi], optimizer: Any, gradient: Mapping[str, Tensor]) -> Tensor:
    """F_l = Σ_m F[m,l] of every scored token of a pass on a probe, in the order of the pass.

    The kernel is that of the optimizer's coming step on this gradient, or the plain one before the first.
    """
    with trace(lm) as tracer:
        inner = getattr(optimizer, "optimizer", optimizer)
        P = preconditioner(inner, tracer.trained, gradient) if inner is not None and inner.state else None
        sides = observed_side(tracer, probe), updated_side(tracer, forward)
        problem = exact.Problem(tracer, exact.select(tracer, "full"), P, *sides)
        return problem.jvp(problem.updated, problem.preconditioned(problem.vjp(problem.observed)))


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[nn.Module]:
    """The causal LM inside a model, for passes of our own (see `own_passes`) that no monitor records."""
    lm, outer, _ = unwrap(model)
    require_no_prefix(outer)
    with unwatched(), own_passes(lm):
        yield lm


def _require_trainer(trainer: Any) -> Any:
    for name in ("train", "compute_loss", "accelerator"):
        if not hasattr(trainer, name):
            raise ValueError(
                f"this needs a transformers.Trainer, got {type(trainer).__name__} without {name}: see td.interventions"
            )
    return trainer
