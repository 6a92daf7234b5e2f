"""The objective that a trainer names by its options, as one of td.objectives with the factor that the trainer puts to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import objectives as of
from ..objective import Objective
from ..training.forward import Forward
from .seen import Seen


@dataclass(frozen=True)
class Named:
    """What a trainer says its loss is: Σ weight · objective over the batch as one group, times `factor`."""

    name: str
    terms: Sequence[tuple[float, Objective]]
    factor: float


def named_objective(seen: Seen, f: Forward) -> Named | None:
    """The objective of a pass as the trainer's options have it; None where they name none that is known here."""
    share = 1 / max(int(getattr(seen.trainer, "current_gradient_accumulation_steps", None) or 1), 1)
    if "roles" in f.metadata:
        return _preference(seen, f, share)
    if f.metadata.get("advantages") is not None:
        return _rollouts(seen, f, share)
    return _supervised(seen, f)


def _supervised(seen: Seen, f: Forward) -> Named | None:
    batch = f.metadata.get("batch") or {}
    known = any(cls.__name__ in ("Trainer", "SFTTrainer") for cls in type(seen.trainer).__mro__)
    if not known or "labels" not in batch or "advantages" in batch or seen.option("label_smoothing_factor", 0):
        return None
    if seen.option("compute_loss_func") or seen.option("loss_type", "nll") not in ("nll", "chunked_nll"):
        return None
    ranks, tokens = world(seen), float(max(sum(map(len, seen.forwards)), 1))
    if ranks > 1 and seen.option("average_tokens_across_devices", False):  # c is of a loss that is averaged over ranks later
        if (items := f.metadata.get("items")) is None:
            return None
        tokens = float(items) / ranks
    return Named("a mean over the tokens of the step", [(1.0, of.SFT())], 1 / tokens)


def _preference(seen: Seen, f: Forward, share: float) -> Named | None:
    kinds, beta = seen.option("loss_types") or seen.option("loss_type", ()), float(seen.option("beta", 0) or 0)
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if not hasattr(seen.trainer, "ref_model") or seen.option("f_divergence_type", "reverse_kl") not in ("reverse_kl", None):
        return None
    if seen.option("ld_alpha") is not None or seen.option("use_weighting", False) or seen.option("aux_loss_enabled", False):
        return None
    eps = float(seen.option("label_smoothing", 0) or 0)
    terms = [_pair_loss(kind, beta, eps, float(seen.option("discopop_tau", 0.05) or 0.05)) for kind in kinds]
    if not terms or any(term is None for term in terms):
        return None
    weights = seen.option("loss_weights") or [1.0] * len(terms)
    known = [(float(w), term) for w, term in zip(weights, terms, strict=True) if term is not None]
    return Named(f"{' + '.join(kinds)} (beta {beta:g})", known, share * 2 / f.layout.sequences)


def _rollouts(seen: Seen, f: Forward, share: float) -> Named | None:
    kind, args = seen.option("loss_type", "grpo"), seen.args
    if not hasattr(seen.trainer, "epsilon_low") or float(seen.option("top_entropy_quantile", 1.0) or 1.0) < 1:
        return None
    if (
        seen.option("use_vllm", False)
        or seen.option("off_policy_mask_threshold") is not None
        or f.metadata["advantages"].dim() != 1
    ):
        return None
    beta = float(seen.option("beta", 0) or 0)
    if beta and getattr(args, "use_bias_correction_kl", False):
        return None
    objective = _rollout_loss(kind, seen, beta)
    if objective is None:
        return None
    factor, batch = share, f.metadata.get("batch") or {}
    items = batch.get("num_items_in_batch") if hasattr(batch, "get") else None
    if kind in ("dapo", "cispo", "vespo") and items is not None:
        per_step = float(items) / world(seen) / share / max(int(getattr(args, "steps_per_generation", 1) or 1), 1)
        factor = len(f) / per_step
    return Named(f"{kind} as TRL writes it", [(1.0, objective)], factor)


def world(seen: Seen) -> int:
    """How many ranks train together."""
    return int(getattr(getattr(seen.trainer, "accelerator", None), "num_processes", 1) or 1)


def _pair_loss(kind: str, beta: float, eps: float, tau: float) -> Objective | None:
    """TRL's loss_type of DPO; None for one that is not here."""
    known: dict[str, Any] = {
        "sigmoid": lambda: of.DPO(beta), "ipo": lambda: of.IPO(beta, by_length=True), "exo_pair": lambda: of.EXO(beta, eps),
        "nca_pair": lambda: of.NCA(beta), "robust": lambda: of.RobustDPO(beta, eps), "bco_pair": lambda: of.BCO(beta),
        "sppo_hard": lambda: of.SPPO(1 / beta), "aot": lambda: of.AOT(beta, eps), "apo_zero": lambda: of.APOZero(beta),
        "apo_down": lambda: of.APODown(beta), "discopop": lambda: of.DiscoPOP(beta, tau),
        "sigmoid_norm": lambda: of.DPONorm(beta),
    }  # fmt: skip
    return known[kind]() if kind in known else None


def _rollout_loss(kind: str, seen: Seen, beta: float) -> Objective | None:
    """TRL's loss_type of GRPO, the rollouts of a batch as one group; None for one that is not here."""
    args, trainer = seen.args, seen.trainer
    low, high = float(trainer.epsilon_low), float(trainer.epsilon_high)
    shared: dict[str, Any] = dict(clip=low, clip_high=high, beta=beta)
    sequence = seen.option("importance_sampling_level", "token") == "sequence"
    if kind in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        shared["dual_clip"] = getattr(args, "delta", None)
    if sequence and kind in ("grpo", "luspo"):
        return (of.GSPO if kind == "grpo" else of.LUSPO)(**shared)
    if sequence or kind == "luspo":
        return None
    if kind == "dr_grpo":
        return of.DrGRPO(max_tokens=int(trainer.max_completion_length), **shared)
    if kind == "sapo":
        return of.SAPO(tau_pos=float(args.sapo_temperature_pos), tau_neg=float(args.sapo_temperature_neg), **shared)
    if kind == "vespo":
        own = dict(k_pos=args.vespo_k_pos, lam_pos=args.vespo_lambda_pos, k_neg=args.vespo_k_neg, lam_neg=args.vespo_lambda_neg)
        return of.VESPO(**shared, **own)
    known = {"grpo": of.GRPO, "bnpo": of.BNPO, "dapo": of.BNPO, "cispo": of.CISPO}
    return known[kind](**shared) if kind in known else None
