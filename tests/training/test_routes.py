"""Every route of a capture gives the c (v, u) of autograd and proves it against ∂L/∂h."""

from types import SimpleNamespace

import pytest
import torch
from captures import ROUNDING, data, log_probs, one
from loops import EPS, PROMPT
from torch.nn.functional import cross_entropy, logsigmoid

from tokdyn.dynamics import G as G_of
from tokdyn.testing import tiny
from tokdyn.training.capture import tap
from tokdyn.training.recorder import SAMPLE


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "granite", "opt", "mamba"])
def test_labels_inside_the_model_give_one_over_n(family):
    ids, labels = data()
    forward = one(tiny(family), lambda m: m(ids, labels=labels).loss)
    N = 3 * (9 - PROMPT)
    assert forward.residual < ROUNDING
    torch.testing.assert_close(forward.c, torch.full((N,), 1 / N), rtol=100 * EPS, atol=0)
    assert torch.equal(forward.targets, ids[:, PROMPT:].flatten())
    assert forward.position.tolist() == [*range(PROMPT, 9)] * 3 and forward.sequence.tolist() == [0] * 5 + [1] * 5 + [2] * 5


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("route", ["logits", "tap"])
def test_a_loss_of_ones_own_at_a_temperature(family, route):
    """c of a weighted loss with an entropy bonus, against autograd on log-probs and entropies as leaves."""
    ids, _ = data()
    weight = torch.linspace(-1, 1, 3 * 8).reshape(3, 8)
    bonus = 0.3 if route == "tap" else 0.0

    def loss_of(model):
        z = model(ids).logits
        z = z / 0.7
        log_pi = z.log_softmax(-1)
        H = -(log_pi.exp() * log_pi).sum(-1)[:, :-1]
        lp = log_pi[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        if route == "tap":
            assert tap(lp, ids[:, 1:], torch.ones_like(lp), temperature=0.7, entropy=H) is lp
        return -(weight * lp).sum() - bonus * H.mean()

    forward = one(tiny(family), loss_of, temperature=0.7)
    assert forward.route == route and forward.residual < ROUNDING
    torch.testing.assert_close(forward.c, weight.flatten()[weight.flatten() != 0], rtol=200 * EPS, atol=20 * EPS)
    if route == "tap":
        # the gradient of a mean: a quotient and a product, each rounded once
        torch.testing.assert_close(forward.v, torch.full((24,), -bonus / 24), rtol=10 * EPS, atol=0)


class FusedCrossEntropy(torch.autograd.Function):
    """A fused loss: neither logits nor log-probs ever leave it, and its gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx, h, W, y):
        with torch.enable_grad():
            h, W = h.detach().requires_grad_(), W.detach().requires_grad_()
            loss = cross_entropy(h.flatten(0, 1) @ W.T, y.flatten())
            ctx.grads = torch.autograd.grad(loss, (h, W))
        return loss.detach()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.grads[0], g * ctx.grads[1], None


def fused(model):
    """The model with a forward that returns a loss and nothing else, as fused kernels make it."""

    def forward(input_ids, labels=None, **kwargs):
        h = model.base_model(input_ids, use_cache=False).last_hidden_state
        y = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        return SimpleNamespace(loss=FusedCrossEntropy.apply(h, model.get_output_embeddings().weight, y), logits=None)

    model.forward = forward
    return model


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_least_squares_where_nothing_is_exposed(family):
    """The gradient at h alone gives back c; for a softcapped or scaled readout too."""
    ids, labels = data()
    model = tiny(family)
    if family == "llama":
        model = fused(model)

        def loss_of(m):
            return m(ids, labels=labels).loss
    else:

        def loss_of(m):  # the loss reads a copy of what the model returns
            out = m(ids, labels=labels)
            out.logits = None
            return out.loss

    forward = one(model, loss_of)
    assert forward.residual < ROUNDING
    torch.testing.assert_close(forward.c, torch.full((15,), 1 / 15), rtol=2e3 * EPS, atol=0)
    assert forward.route == ("least squares" if family == "llama" else "logits")


def test_a_loss_inside_the_model_under_autocast_reads_no_output():
    """accelerate converts the output of a softcapped model in bfloat16: what comes out is a copy that no loss reads."""
    ids, labels = data()
    model = tiny("gemma2")
    inner = model.forward

    def forward(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            out = inner(*args, **kwargs)
        out.logits = out.logits.float()
        return out

    model.forward = forward
    found = one(model, lambda m: m(ids, labels=labels).loss)
    bf16 = torch.finfo(torch.bfloat16).eps
    assert found.route == "least squares" and found.residual < 4 * bf16
    assert found.eps == bf16
    torch.testing.assert_close(found.c, torch.full((15,), 1 / 15), rtol=4 * bf16, atol=0)


class FusedHead(torch.nn.Module):
    """A causal LM that returns log-probs instead of logits; its lm_head is never called."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.config = lm, lm.config

    @property
    def base_model(self):
        return self.lm.base_model

    def get_output_embeddings(self):
        return self.lm.get_output_embeddings()

    def forward(self, input_ids, labels):
        h = self.base_model(input_ids, use_cache=False).last_hidden_state[:, :-1]
        mask = labels[:, 1:] != -100
        lp = (h @ self.get_output_embeddings().weight.T).log_softmax(-1)
        H = -(lp.exp() * lp).sum(-1)
        lp = lp.gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)
        return SimpleNamespace(log_probs=lp * mask, entropy=H, label_mask=mask)


def test_log_probs_of_a_fused_head():
    ids, labels = data()

    def loss_of(m):
        out = m(ids, labels=labels)
        plus, minus = out.log_probs[0].sum(), out.log_probs[1].sum()
        return -logsigmoid(0.1 * (plus - minus)) - out.entropy.mean()

    model = FusedHead(tiny("llama"))
    forward = one(model, loss_of)
    assert forward.route == "log_probs" and len(forward) == 15
    with torch.no_grad():
        lp = model(ids, labels).log_probs.sum(1)
    c = 0.1 * (1 - torch.sigmoid(0.1 * (lp[0] - lp[1])))
    expected = torch.cat([c.expand(5), -c.expand(5), torch.zeros(5)])
    torch.testing.assert_close(forward.c, expected, rtol=100 * EPS, atol=0)
    # the entropy of unscored tokens is in this loss too: what c and v leave out is exactly what falls outside the mask
    assert forward.residual == pytest.approx(forward.outside, rel=1e-3) and forward.outside > 0.05


def test_label_smoothing_is_explained_by_three_terms():
    ids, labels = data()

    def loss_of(m):
        return cross_entropy(m(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)

    for three in (False, True):  # the pass in which c alone is found wanting, and those after it
        forward = one(tiny("llama"), loss_of, three=three)
        assert forward.residual < ROUNDING and forward.route == "least squares" and len(forward) == 15
        torch.testing.assert_close(forward.c, torch.full((15,), 0.9 / 15), rtol=1e3 * EPS, atol=0)
        torch.testing.assert_close(forward.u, torch.full((15,), 0.1 / 15), rtol=1e4 * EPS, atol=0)
        assert float(forward.v.abs().max()) < 1e4 * EPS / 15


@pytest.mark.parametrize("terms", ["c", "entropy", "smoothing"])
def test_force_is_the_norm_of_G(terms):
    """Forward.norm_of_G equals ‖∂L/∂z‖ of the loss's own backward pass, and so does G rebuilt from c, v and u."""
    ids, labels = data()
    kept = {}

    def loss_of(m):
        z = m(ids).logits
        z.retain_grad()
        kept["z"] = z
        lp = z.log_softmax(-1)
        H = -(lp.exp() * lp).sum(-1)[:, :-1]
        y = lp[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        if terms == "entropy":
            tap(y, ids[:, 1:], labels[:, 1:] != -100, entropy=H)
        loss = -y[:, PROMPT - 1 :].sum()
        loss = loss - 0.5 * H[:, PROMPT - 1 :].sum() if terms == "entropy" else loss
        return loss - 0.2 * lp[:, PROMPT - 1 : -1].mean(-1).sum() if terms == "smoothing" else loss

    forward = one(tiny("llama", tied=False), loss_of)
    G = kept["z"].grad[:, PROMPT - 1 : -1].flatten(0, 1)
    rebuilt = G_of(kept["z"].detach()[:, PROMPT - 1 : -1].flatten(0, 1), forward.gterm())
    scale = float(G.norm(dim=1).max())
    # pi is off by |z - max z| < 10 and four more roundings, c by as much; for "smoothing" c, v, u are fitted, with the
    # condition of three alike directions
    loose = 1e4 if terms == "smoothing" else 50
    torch.testing.assert_close(rebuilt, G, rtol=0, atol=loose * EPS * scale)
    torch.testing.assert_close(forward.norm_of_G, G.norm(dim=1), rtol=0, atol=loose * EPS * scale)


def test_two_backward_passes_through_one_graph_add_up():
    ids, labels = data()

    def loss_of(m):
        lp = log_probs(m(ids).logits, ids)
        (-lp[0, 4:].sum()).backward(retain_graph=True)
        return -2 * lp[1, 4:].sum()

    forward = one(tiny("llama"), loss_of)
    torch.testing.assert_close(forward.c, torch.tensor([1.0] * 4 + [2.0] * 4), rtol=100 * EPS, atol=0)
    assert forward.residual < ROUNDING


def test_two_backward_passes_add_up_where_c_v_and_u_are_fitted():
    """The pass that least squares takes over, on more tokens than a check is made on: 3 L of L + 2 L."""
    ids, labels = data(B=5, T=14)

    def loss_of(m):
        loss = cross_entropy(m(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)
        loss.backward(retain_graph=True)
        return 2 * loss

    forward = one(tiny("llama"), loss_of)
    assert len(forward) == 50 > SAMPLE and forward.route == "least squares" and forward.residual < ROUNDING
    torch.testing.assert_close(forward.c, torch.full((50,), 3 * 0.9 / 50), rtol=1e3 * EPS, atol=0)
    torch.testing.assert_close(forward.u, torch.full((50,), 3 * 0.1 / 50), rtol=1e4 * EPS, atol=0)


def test_in_place_operations_on_the_logits():
    """OpenRLHF divides the logits in place: c is of the loss, statistics are of the distribution it scored."""
    ids, _ = data()

    def loss_of(m):
        z = m(ids).logits
        z.div_(0.7)
        return -log_probs(z, ids)[:, PROMPT - 1 :].sum()

    forward = one(tiny("llama"), loss_of, temperature=0.7)
    assert forward.residual < ROUNDING
    torch.testing.assert_close(forward.c, torch.ones(15), rtol=100 * EPS, atol=0)
    with torch.no_grad():
        z = tiny("llama")(ids).logits
        lp = log_probs(z, ids, 0.7)[:, PROMPT - 1 :].flatten()
    # a logit is off by √d/2 roundings of its size, d = 32, the worst of hundreds by three times that, and so is log pi, twice
    torch.testing.assert_close(forward.stats.log_prob, lp, rtol=0, atol=20 * EPS * float(z.abs().max()) / 0.7)


def test_half_precision_weights():
    ids, labels = data()
    forward = one(tiny("llama").bfloat16(), lambda m: m(ids, labels=labels).loss)
    bf16 = torch.finfo(torch.bfloat16).eps
    assert forward.residual < 4 * bf16
    torch.testing.assert_close(forward.c.float(), torch.full((15,), 1 / 15), rtol=2 * bf16, atol=0)
