"""Weights at work: any forward pass of a loss, weighted token by token, changes its gradient as they say and nothing else."""

import contextlib

import pytest
import torch
from intervened import EPS, PAIR, ROLLOUTS, gradient

import tokdyn as td
from tokdyn.interventions import weigh, weighted
from tokdyn.objectives import DPO, SFT, SimKO
from tokdyn.testing import float64, relative_error, tiny, tiny_lora


@pytest.mark.parametrize("objective", [DPO(), SFT(), SimKO(quantile=0.5, alpha=0.3)])
def test_weighted_log_probs_scale_c_and_leave_the_loss(objective):
    """c_l -> w_l c_l for any loss of the log-probs, with its value bit for bit."""
    chis, L = (ROLLOUTS, sum(map(len, ROLLOUTS))) if objective.reads == "rollouts" else (PAIR, 11)
    w = torch.rand(L, generator=torch.Generator().manual_seed(0)).double()
    lp = (-torch.rand(L, generator=torch.Generator().manual_seed(1)).double() * 5).requires_grad_()
    scores = td.objectives.Scores(torch.rand(L).double(), None, torch.randint(0, 61, (L, 3)), -torch.rand(L, 3).double())
    plain, with_weights = (objective.loss(x, chis, scores) for x in (lp, weigh(lp, w)))
    assert torch.equal(plain, with_weights)
    c, cw = (torch.autograd.grad(value, lp)[0] for value in (plain, with_weights))
    assert torch.equal(cw, w * c) and bool(c.any())


def by_labels(model, ids):
    return model(input_ids=ids, labels=torch.where(torch.arange(ids.shape[1]) >= 4, ids, -100)).loss


def by_logits(model, ids):
    log_pi = model(input_ids=ids).logits[:, 3:-1].log_softmax(-1)
    H = -(log_pi.exp() * log_pi).sum(-1)
    return -(log_pi.gather(-1, ids[:, 4:, None]).squeeze(-1).exp() + 0.1 * H).mean()


def by_last_logits(model, ids):
    return -(model(input_ids=ids, logits_to_keep=4).logits[:, :-1] / 0.7).log_softmax(-1).gather(-1, ids[:, 4:, None]).mean()


def ids_of_batch():
    return torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
@pytest.mark.parametrize("loss_of", [by_labels, by_logits, by_last_logits])
def test_a_weighted_pass_is_the_weighted_sum_of_its_tokens(family, loss_of):
    """∇L with weights on all tokens is Σ_t w_t ∇L with weight 1 on token t alone; all ones change no bit."""
    with float64():
        model, ids = tiny(family).double(), ids_of_batch()

        def of(w):
            with weighted(model, w) if w is not None else contextlib.nullcontext():
                value = loss_of(model, ids)
            return value, gradient(model, value)

        value, whole = of(None)
        assert all(torch.equal(a, b) for a, b in zip(of(torch.ones(2, 7)), (value, whole), strict=True))
        w = torch.rand(2, 7, generator=torch.Generator().manual_seed(5)).double()
        parts = torch.zeros_like(whole)
        for b in range(2):
            for t in range(7):
                one = torch.zeros(2, 7)
                one[b, t] = 1
                part = of(one)[1]
                assert bool(part.any()) == (t >= 4)  # only scored tokens, and each of them, carry the loss
                parts += w[b, t] * part
        same, found = of(w)
    assert torch.equal(same, value)
    assert relative_error(found, parts) < 1e-12
    assert not model._forward_hooks and not model.lm_head._forward_hooks and not model._forward_pre_hooks


def test_lora_and_compiled_wrappers_are_weighted():
    ids = ids_of_batch()
    w = torch.rand(2, 7, generator=torch.Generator().manual_seed(5))
    for model, inner in ((m := tiny_lora("llama"), m), (torch.compile(n := tiny("llama"), backend="eager"), n)):
        found = []
        for way in (model, inner):
            with weighted(way, w):
                value = by_logits(way, ids)
            found.append(gradient(inner, value))
        assert relative_error(*found) < 100 * EPS and relative_error(found[0], gradient(inner, by_logits(inner, ids))) > 0.01


def test_a_fused_head_is_weighted():
    """A head that gives log-probs and entropies, as TRL's trainers patch it in: the same gradient as from logits."""

    class Fused(torch.nn.Module):
        def __init__(self, lm):
            super().__init__()
            self.lm = lm

        def get_output_embeddings(self):
            return self.lm.lm_head

        def forward(self, input_ids, labels=None):
            h = self.lm.model(input_ids).last_hidden_state[:, :-1]
            log_pi = (h @ self.lm.lm_head.weight.T).log_softmax(-1)
            picked = log_pi.gather(-1, labels[:, 1:, None]).squeeze(-1)
            out = type("Output", (), {})()
            out.log_probs, out.entropy = picked, -(log_pi.exp() * log_pi).sum(-1)
            return out

    with float64():
        lm, ids = tiny("llama").double(), ids_of_batch()
        model, w = Fused(lm), torch.rand(2, 7, generator=torch.Generator().manual_seed(5)).double()
        with weighted(model, w):
            out = model(ids, labels=ids)
        value = -(out.log_probs[:, 3:].exp() + 0.1 * out.entropy[:, 3:]).mean()
        with weighted(lm, w):
            plain = by_logits(lm, ids)
        assert relative_error(gradient(lm, value), gradient(lm, plain)) < 1e-12


def test_a_monitor_records_the_weighted_c_and_agrees_with_itself():
    model, ids = tiny("llama"), ids_of_batch()
    w = torch.rand(2, 7, generator=torch.Generator().manual_seed(5))
    found = []
    for weights in (torch.ones(2, 7), w):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with td.Monitor(model, optimizer, on_error="raise") as monitor:
            with weighted(model, weights):
                value = by_labels(model, ids)
            value.backward()
            optimizer.step()
            found.append(monitor.step_end())
    assert found[1].residual < 1e-5
    torch.testing.assert_close(found[1].c, found[0].c * w[:, 4:].flatten(), rtol=1e3 * EPS, atol=0)
