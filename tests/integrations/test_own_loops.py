"""Loops that build their loss themselves: prime-rl, slime and miles, NeMo-RL, SkyRL.

None of them trains on a CPU. Each loss here has the signature, the layout and the masks that the stack documents for a custom
loss, and is written anew; skyrl-train's own losses are taken from its package where that is installed (make test-matrix).
docs/stacks.md has the lines of td.tap that stand in these tests.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from loops import EPS, V, data

import tokdyn as td
from tokdyn.testing import tiny

A = torch.tensor([1.0, -0.5, 0.7])
LENGTHS, PROMPTS = [9, 7, 8], [4, 3, 5]  # of each sequence, and of its prompt


def sequences():
    return [ids[:n] for ids, n in zip(data(3, 9), LENGTHS, strict=True)]


def old(log_probs):
    """Log-probs of a rollout's policy, so that some ratios are clipped."""
    shift = torch.linspace(-0.5, 0.5, log_probs.numel()).reshape(log_probs.shape)
    return log_probs.detach() + shift


def clipped(log_probs, before, advantages):
    ratio = (log_probs - before).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def prime_rl(model):
    """compute_loss(trainer_logprobs, inference_logprobs, advantages, loss_mask, …, loss_scale): lists over a packed row.

    Log-probs stand at their own token, the first of the row is that of a pad; ratios out of range are masked, not clipped.
    """
    rows = sequences()
    ids = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    mask = torch.cat([torch.arange(n) >= p for n, p in zip(LENGTHS, PROMPTS, strict=True)])[None]
    z = model(input_ids=ids, position_ids=positions).logits[:, :-1]
    shifted = torch.cat([z.new_zeros(1, 1, V), z], 1) / 0.9
    lp = shifted.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    lp = torch.cat([lp[:, :1], made := td.tap(lp[:, 1:], ids[:, 1:], mask[:, 1:], temperature=0.9)], 1)

    def compute_loss(trainer_logprobs, inference_logprobs, advantages, loss_mask, loss_config, loss_scale):
        total = 0
        for lp, before, a, m in zip(trainer_logprobs, inference_logprobs, advantages, loss_mask, strict=True):
            ratio = (lp - before).exp()
            keep = m & (ratio > loss_config.mask_ratio_low) & (ratio < loss_config.mask_ratio_high)
            total = total + (-ratio * a)[keep].sum()
        return total / loss_scale, {}

    config = SimpleNamespace(mask_ratio_low=0.7, mask_ratio_high=1.4)
    advantages = [a.expand(n) for a, n in zip(A, LENGTHS, strict=True)]
    each = [x.squeeze(0).split(LENGTHS) for x in (lp, old(lp))]
    loss, _ = compute_loss(*each, advantages, mask.squeeze(0).split(LENGTHS), config, int(mask.sum()))
    return loss, made, mask[:, 1:]


def slime(model):
    """custom_loss(args, batch, logits, sum_of_sample_mean): one packed row, the responses' log-probs of all samples."""
    rows = sequences()
    ids = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    mask = torch.cat([torch.arange(n) >= p for n, p in zip(LENGTHS, PROMPTS, strict=True)])[None, 1:]
    logits = model(input_ids=ids, position_ids=positions).logits
    made = []

    def sum_of_sample_mean(x):
        sizes = [n - p for n, p in zip(LENGTHS, PROMPTS, strict=True)]
        return sum(one.mean() for one in x.split(sizes))

    def custom_loss(args, batch, logits, sum_of_sample_mean):
        lp = logits[:, :-1].float().div(args.rollout_temperature).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        lp = td.tap(lp, ids[:, 1:], mask, temperature=args.rollout_temperature)
        made.append(lp)
        response = lp[mask]
        before = old(response) if batch["log_probs"] is None else batch["log_probs"]
        return sum_of_sample_mean(clipped(response, before, batch["advantages"])), {}

    advantages = torch.cat([a.expand(n - p) for a, n, p in zip(A, LENGTHS, PROMPTS, strict=True)])
    batch = dict(log_probs=None, advantages=advantages)
    loss, _ = custom_loss(SimpleNamespace(rollout_temperature=1.0), batch, logits, sum_of_sample_mean)
    return loss / len(rows), made[0], mask


def padded():
    ids = torch.zeros(3, max(LENGTHS), dtype=torch.long)
    mask, real = (torch.zeros(3, max(LENGTHS)) for _ in range(2))
    for b, row in enumerate(sequences()):
        ids[b, : len(row)], mask[b, PROMPTS[b] : len(row)], real[b, : len(row)] = row, 1, 1
    return ids, mask, real.long()


def nemo_rl(model):
    """loss_fn(next_token_logits, data, global_valid_seqs, global_valid_toks): masks of tokens and samples, one mean.

    Nothing is tapped where the loss reads the model's own logits; the tap here names the scored tokens.
    """
    ids, token_mask, real = padded()
    batch = dict(input_ids=ids, token_mask=token_mask, sample_mask=torch.tensor([1.0, 1.0, 0.0]),
                 advantages=A[:, None].expand(ids.shape))  # fmt: skip
    made = []

    def loss_fn(next_token_logits, data, global_valid_seqs, global_valid_toks):
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        lp = next_token_logits[:, :-1].float().log_softmax(-1).gather(-1, data["input_ids"][:, 1:, None]).squeeze(-1)
        lp = td.tap(lp, data["input_ids"][:, 1:], mask)
        made.append((lp, mask))
        value = clipped(lp, old(lp), data["advantages"][:, 1:])
        return (value * mask).sum() / global_valid_toks, {}

    total = (token_mask[:, 1:] * batch["sample_mask"][:, None]).sum()
    loss, _ = loss_fn(model(input_ids=ids, attention_mask=real).logits, batch, torch.tensor(2), total)
    return loss, *made[0]


def skyrl(model, loss_of=None):
    """policy_loss(log_probs, old_log_probs, advantages, config, loss_mask): right-aligned responses [B, k], a mean of means."""
    rows, k = sequences(), max(n - p for n, p in zip(LENGTHS, PROMPTS, strict=True))
    width = max(PROMPTS) + k
    ids, real, mask = (torch.zeros(3, width, dtype=torch.long) for _ in range(3))
    for b, (row, p) in enumerate(zip(rows, PROMPTS, strict=True)):  # prompts are padded on the left, responses on the right
        first = width - k - p
        ids[b, first : first + len(row)] = row
        real[b, first : first + len(row)] = 1
        mask[b, width - k : first + len(row)] = 1
    positions = (real.cumsum(1) - 1).clamp(min=0)
    z = model(input_ids=ids, attention_mask=real, position_ids=positions).logits[:, -k - 1 : -1]
    lp = z.log_softmax(-1).gather(-1, ids[:, -k:, None]).squeeze(-1)
    made = []

    def policy_loss(log_probs, old_log_probs, advantages, config, loss_mask=None):
        log_probs = td.tap(log_probs, mask=loss_mask, temperature=1.0)
        made.append(log_probs)
        if loss_of is not None:
            return loss_of(log_probs, old_log_probs, advantages, config, loss_mask)
        value = clipped(log_probs, old_log_probs, advantages) * loss_mask
        return (value.sum(1) / loss_mask.sum(1).clamp(min=1)).mean(), {}

    loss, _ = policy_loss(lp, old(lp), A[:, None].expand(3, k), CONFIG, mask[:, -k:])
    return loss, made[0], mask[:, -k:]


CONFIG = SimpleNamespace(
    policy_loss_type="regular", loss_reduction="token_mean", max_seq_len=16, eps_clip_low=0.2, eps_clip_high=0.2,
    clip_ratio_c=3.0, use_tis=False, cispo=SimpleNamespace(cispo_eps_clip_low=0.2, cispo_eps_clip_high=0.2),
    sapo=SimpleNamespace(tau_pos=1.0, tau_neg=1.05),
)  # fmt: skip


def own_of_skyrl(name):
    """A loss of skyrl-train: its file alone, since the folder's __init__ asks for another version of ray."""
    if (spec := find_spec("skyrl_train")) is None:
        pytest.skip("skyrl-train is installed by make test-matrix")
    folder = ModuleType("skyrl_train.utils")
    folder.__path__ = [str(Path(place) / "utils") for place in spec.submodule_search_locations]
    sys.modules.setdefault("skyrl_train.utils", folder)
    from skyrl_train.utils import ppo_utils

    return getattr(ppo_utils, name)


SKYRL = ["ppo_policy_loss", "gspo_policy_loss", "sapo_policy_loss", "compute_policy_loss_cispo"]


@pytest.mark.parametrize("name", SKYRL)
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "seq_mean_token_sum_norm"])
def test_c_of_skyrls_own_losses(name, reduction, monkeypatch):
    monkeypatch.setattr(CONFIG, "loss_reduction", reduction)
    own = own_of_skyrl(name)
    agrees(lambda model: skyrl(model, own), clips=name == "ppo_policy_loss")


@pytest.mark.parametrize("loop", [prime_rl, slime, nemo_rl, skyrl], ids=lambda loop: loop.__name__)
def test_c_is_the_losss_own_gradient_and_training_goes_on_bit_by_bit(loop):
    agrees(loop)


def agrees(loop, clips=True):
    """c of each scored token is -∂L/∂log pi by autograd; c, ‖G‖ and the mask account for all of ∂L/∂h."""
    loss, log_probs, mask = loop(tiny("llama").train())
    (grad,) = torch.autograd.grad(loss, log_probs)
    expected = -grad[mask.bool()]
    assert bool((expected == 0).any()) >= clips and bool(expected.any())

    grads = []
    for watch in (False, True):
        model = tiny("llama").train()
        opt = torch.optim.SGD(model.parameters(), lr=0.0)
        monitor = td.Monitor(model, opt, on_error="raise") if watch else None
        if monitor is not None:
            monitor.start()
            monitor.step_begin()
        loop(model)[0].backward()
        opt.step()
        step = monitor.step_end() if monitor is not None else None
        grads.append([p.grad for p in model.parameters()])
        if monitor is not None:
            monitor.close()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert step.routes == ("tap",) and torch.equal(step.c, expected)
    assert step.residual < 1e3 * EPS
