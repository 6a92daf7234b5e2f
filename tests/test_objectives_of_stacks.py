"""Objectives against the losses of TRL and verl themselves: their own functions on the same log-probs, in float64."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from losses import close, each, problem, read

from tokdyn import objectives as td


def padded(parts):
    """Per-token values of ragged responses as trainers hold them: [B, T], and the mask."""
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(list(parts), batch_first=True), pad([torch.ones(len(x)) for x in parts], batch_first=True)


def trl_slope(kind, chis, log_probs, beta=0.0, level="token", **options):
    """-∂L/∂log pi of every token by GRPOTrainer._compute_loss itself, on these log-probs instead of a model's."""
    trainers = pytest.importorskip("trl.trainer.grpo_trainer")
    lp, mask = padded(each(log_probs, chis))
    lp = lp.detach().requires_grad_()
    old, reference = (padded([getattr(chi, name) for chi in chis])[0] for name in ("old_log_probs", "reference_log_probs"))
    N = int(mask.sum())
    config = trainers.GRPOConfig(
        loss_type=kind, bf16=False, use_cpu=True, report_to="none", use_bias_correction_kl=False, **options
    )
    config.steps_per_generation = 1
    alone = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer = SimpleNamespace(
        args=config, loss_type=kind, beta=beta, epsilon_low=config.epsilon, epsilon_high=config.epsilon_high or config.epsilon,
        importance_sampling_level=level, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        vllm_importance_sampling_correction=False, max_completion_length=9, current_gradient_accumulation_steps=1,
        accelerator=alone, model=torch.nn.Identity(), _metrics={"train": defaultdict(list)},
        aux_loss_enabled=False, _entropy_bonus_enabled=False,
        get_gamma_weights=getattr(trainers.GRPOTrainer, "get_gamma_weights", None),
        _get_per_token_logps_and_entropies=lambda *_, **__: (lp, torch.zeros_like(lp), None),
    )  # fmt: skip
    ids, prompt = torch.zeros_like(mask).long(), torch.zeros(len(chis), 1).long()
    inputs = dict(
        prompt_ids=prompt, prompt_mask=prompt, completion_ids=ids, completion_mask=mask, old_per_token_logps=old,
        ref_per_token_logps=reference, num_items_in_batch=torch.tensor(N),
        advantages=torch.tensor([chi.advantage for chi in chis], dtype=torch.float64),
    )  # fmt: skip
    loss = trainers.GRPOTrainer._compute_loss(trainer, torch.nn.Identity(), inputs)
    return -torch.autograd.grad(loss, lp)[0][mask.bool()]


@pytest.mark.parametrize(
    ("kind", "objective", "options", "factor"),
    [
        ("grpo", td.GRPO(beta=0.3), {}, lambda chis: 1 / len({chi.group for chi in chis})),  # ours sums groups, of one size
        ("grpo", td.GRPO(dual_clip=1.3), {"delta": 1.3}, lambda chis: 1 / len({chi.group for chi in chis})),
        ("dapo", td.DAPO(beta=0.3), {"epsilon_high": 0.28}, lambda chis: 1.0),
        ("dr_grpo", td.DrGRPO(max_tokens=9), {}, lambda chis: 1 / len({chi.group for chi in chis})),
        ("bnpo", td.BNPO(beta=0.3), {}, lambda chis: 1.0),
        ("cispo", td.CISPO(clip_high=1.1, beta=0.3), {"epsilon_high": 1.1}, lambda chis: 1.0),
        ("sapo", td.SAPO(tau_neg=1.5), {"sapo_temperature_neg": 1.5}, lambda chis: 1 / len({chi.group for chi in chis})),
        (
            "luspo",
            td.LUSPO(clip=0.05, clip_high=0.08),
            {"epsilon": 0.05, "epsilon_high": 0.08, "level": "sequence"},
            lambda chis: 1 / len({chi.group for chi in chis}),
        ),
        ("vespo", td.VESPO(k_pos=1.5), {"vespo_k_pos": 1.5}, lambda chis: 1.0),
    ],
    ids=["GRPO", "GRPO, delta", "DAPO", "Dr. GRPO", "BNPO", "CISPO", "SAPO", "LUSPO", "VESPO"],
)
def test_c_is_the_slope_of_trls_own_loss_up_to_the_factor_that_theory_names(kind, objective, options, factor):
    """docs/theory.md, Stacks: for groups of one size; DAPO's mean over all tokens needs no factor."""
    chis, z = problem("rollouts", 1)
    chis = [chi.with_(group=i // 2) for i, chi in enumerate(chis[:4])]
    log_probs = read(z, problem("rollouts", 1)[0])[0][: sum(map(len, chis))]
    theirs = trl_slope(kind, chis, log_probs, beta=objective.beta, **options)
    assert close(objective.g_terms(log_probs, chis).c * factor(chis), theirs) and bool(theirs.any())


def dpo_slope(kind, chis, log_probs, **options):
    """-∂L/∂log pi of every token by DPOTrainer._compute_loss itself, on these log-probs instead of a model's."""
    trainers = pytest.importorskip("trl.trainer.dpo_trainer")
    order = [i for role in ("chosen", "rejected") for i in sorted(range(len(chis)), key=lambda i: chis[i].group)
             if chis[i].role == role]  # fmt: skip
    lp, mask = padded([each(log_probs, chis)[i] for i in order])
    lp = lp.detach().requires_grad_()
    ref = torch.stack([chis[i].reference_log_probs.sum() for i in order])
    shifted = torch.cat([torch.zeros(len(order), 1), mask], 1).long()
    config = trainers.DPOConfig(loss_type=[kind], bf16=False, use_cpu=True, report_to="none", **options)
    alone = SimpleNamespace(num_processes=1, device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    zero = torch.zeros_like(lp)
    logits = torch.stack([lp, (-lp.exp()).log1p()], 2)  # whose log-softmax at the first token is lp itself: what TRL 1.12 reads
    logits = torch.cat([logits, logits[:, :1]], 1)  # of the last token, which scores nothing
    output = SimpleNamespace(log_probs=lp, entropy=zero, mean_logits=zero, is_top1=zero.bool(), logits=logits)
    trainer = SimpleNamespace(
        args=config, loss_types=[kind], loss_weights=[1.0], beta=config.beta, label_smoothing=config.label_smoothing,
        _tp_size=1, f_divergence_type="reverse_kl", ld_alpha=None, use_weighting=False, aux_loss_enabled=False,
        precompute_ref_logps=True,
        accelerator=alone, model=torch.nn.Identity(), _metrics={"train": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    B = len(order) // 2
    inputs = dict(input_ids=torch.zeros_like(shifted), attention_mask=torch.ones_like(shifted), completion_mask=shifted,
                  ref_chosen_logps=ref[:B], ref_rejected_logps=ref[B:])  # fmt: skip
    loss = trainers.DPOTrainer._compute_loss(trainer, lambda **_: output, inputs, False)
    slope = -torch.autograd.grad(loss, lp)[0]
    rows = {i: slope[row][mask[row].bool()] for row, i in enumerate(order)}
    return B * torch.cat([rows[i] for i in range(len(chis))])  # TRL takes the mean over pairs


@pytest.mark.parametrize(
    ("kind", "objective", "options"),
    [
        ("sigmoid", td.DPO(beta=0.3), {}),
        ("ipo", td.IPO(beta=0.3, by_length=True), {}),
        ("exo_pair", td.EXO(beta=0.3, epsilon=0.01), {"label_smoothing": 0.01}),
        ("nca_pair", td.NCA(beta=0.3), {}),
        ("robust", td.RobustDPO(beta=0.3, epsilon=0.2), {"label_smoothing": 0.2}),
        ("bco_pair", td.BCO(beta=0.3), {}),
        ("sppo_hard", td.SPPO(eta=1 / 0.3), {}),
        ("aot", td.AOT(beta=0.3, epsilon=0.1), {"label_smoothing": 0.1}),
        ("apo_zero", td.APOZero(beta=0.3), {}),
        ("apo_down", td.APODown(beta=0.3), {}),
        ("discopop", td.DiscoPOP(beta=0.3), {}),
        ("sigmoid_norm", td.DPONorm(beta=0.3), {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_c_is_the_slope_of_trls_own_preference_loss(kind, objective, options):
    trainers = pytest.importorskip("trl.trainer.dpo_trainer")
    if kind == "sigmoid_norm" and "sigmoid_norm" not in open(trainers.__file__, encoding="utf-8").read():
        pytest.skip("this TRL has no sigmoid_norm")
    chis, z = problem("preference", 1)
    log_probs, _ = read(z, chis)
    theirs = dpo_slope(kind, chis, log_probs, beta=0.3, **options)
    # TRL makes the constants of EXO in float32
    assert (objective.g_terms(log_probs, chis).c - theirs).abs().max() < (1e-6 if kind == "exo_pair" else 1e-8)
    assert bool(theirs.any())


# ---------------------------------------------------------------- verl


class Config(dict):
    """Read both ways, as verl's is."""

    __getattr__ = dict.get


def verl_slope(kind, chis, log_probs, **policy):
    """-∂L/∂log pi of every token by verl's registered policy loss."""
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    lp, mask = padded(each(log_probs, chis))
    lp = lp.detach().requires_grad_()
    old = padded([chi.old_log_probs for chi in chis])[0]
    A = torch.tensor([chi.advantage for chi in chis], dtype=torch.float64)[:, None].expand_as(lp).contiguous()
    known = {
        name: policy.pop(name) for name in ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c") if name in policy
    }
    config = Config(dict(clip_ratio=0.2, clip_ratio_c=3.0, global_batch_info={}, policy_loss=Config(policy)) | known)
    loss, _ = core.get_policy_loss_fn(kind)(
        old_log_prob=old, log_prob=lp, advantages=A, response_mask=mask, loss_agg_mode="token-mean", config=config
    )
    return -torch.autograd.grad(loss, lp)[0][mask.bool()]


@pytest.mark.parametrize(
    ("kind", "objective", "policy"),
    [
        ("vanilla", td.BNPO(dual_clip=1.3), dict(clip_ratio_c=1.3)),
        ("clip_cov", td.ClipCov(low=0.1, fraction=0.9), dict(clip_cov_ratio=0.9, clip_cov_lb=0.1, clip_cov_ub=5.0)),
        ("kl_cov", td.KLCov(fraction=0.2, kl=0.5), dict(kl_cov_ratio=0.2, ppo_kl_coef=0.5)),
        ("geo_mean", td.GMPO(clip=0.1, clip_high=0.15), dict(clip_ratio_low=0.1, clip_ratio_high=0.15)),
    ],
    ids=["dual clip", "Clip-Cov, all that lie between", "KL-Cov", "GMPO"],
)
def test_c_is_the_slope_of_verls_own_loss(kind, objective, policy):
    chis, z = problem("rollouts", 1)
    chis = [chi.with_(group=0) for chi in chis]  # verl's means are over the batch
    log_probs, _ = read(z, chis)
    theirs = verl_slope(kind, chis, log_probs, **policy)
    # verl divides by a number of tokens + 1e-8
    assert (objective.g_terms(log_probs, chis).c - theirs).abs().max() < 1e-7 and bool(theirs.any())


def test_gmpo_is_trls_experimental_trainer():
    """The same on two of its inputs: a clipped and an unclipped response, bounds of the log-ratio."""
    trainers = pytest.importorskip("trl.experimental.gmpo.gmpo_trainer")
    chis, z = problem("rollouts", 1)
    chis = [chi.with_(group=0) for chi in chis]
    log_probs, _ = read(z, chis)
    lp, mask = padded(each(log_probs, chis))
    lp = lp.detach().requires_grad_()
    old = padded([chi.old_log_probs for chi in chis])[0]
    alone = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer = SimpleNamespace(
        beta=0.0, epsilon_low=0.1, epsilon_high=0.15, top_entropy_quantile=1.0, current_gradient_accumulation_steps=1,
        accelerator=alone, model=torch.nn.Identity(), _metrics={"train": defaultdict(list)}, args=SimpleNamespace(),
        _get_per_token_logps_and_entropies=lambda *_, **__: (lp, torch.zeros_like(lp), None),
    )  # fmt: skip
    prompt = torch.zeros(len(chis), 1).long()
    inputs = dict(prompt_ids=prompt, prompt_mask=prompt, completion_ids=mask.long(), completion_mask=mask,
                  old_per_token_logps=old, advantages=torch.tensor([chi.advantage for chi in chis]).double())  # fmt: skip
    loss = trainers.GMPOTrainer._compute_loss(trainer, torch.nn.Identity(), inputs)
    theirs = -torch.autograd.grad(loss, lp)[0][mask.bool()]
    assert close(td.GMPO(clip=0.1, clip_high=0.15).g_terms(log_probs, chis).c, theirs) and bool(theirs.any())
