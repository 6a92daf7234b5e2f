"""Capture: every route gives the c of autograd, proves it against ∂L/∂h, and leaves model and gradients as they were."""

import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, logsigmoid

import tokdyn as td
from tokdyn.dynamics import G as G_of
from tokdyn.model.trace import Tracer, scale_and_cap
from tokdyn.model.unwrap import unwrap
from tokdyn.testing import tiny, tiny_lora
from tokdyn.training import capture as capturing
from tokdyn.training import recorder
from tokdyn.training.capture import Capture, tap
from tokdyn.training.diagnosis import explain_empty

V, PROMPT = 61, 4
EPS = torch.finfo(torch.float32).eps
# G W is a sum over V terms, the hidden states one over d, each in float32; a few such sums lie between c and ∂L/∂h
ROUNDING = 4 * (V**0.5 + 32**0.5) * EPS


def data(B=3, T=9, seed=0):
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return ids, labels


def log_probs(z, ids, temperature=1.0):
    return (z / temperature).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)


def captured(model, loss_of, temperature=1.0, three=False):
    """The passes of one step and what was counted."""
    capture = Capture(model, temperature)
    capture.facts.fit_v_and_u = three
    capture.install()
    capture.recording = True
    try:
        loss = loss_of(model)
        loss.backward()
        if capture.step.failure is not None:
            raise capture.step.failure
        found, seen = capture.take(), capture.summary()
        assert found, explain_empty(seen)
        return SimpleNamespace(forwards=found, seen=seen.seen, excluded=seen.excluded, router_loss=seen.router_loss)
    finally:
        capture.remove()


def one(*args, **kwargs):
    (forward,) = captured(*args, **kwargs).forwards
    return forward


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


# ---------------------------------------------------------------- the routes


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
        torch.testing.assert_close(forward.v, torch.full((24,), -bonus / 24), rtol=10 * EPS, atol=0)


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


@pytest.mark.parametrize("loss", ["smoothing", "made inside"])
def test_sharded_weights_are_not_gathered_in_a_backward_pass(monkeypatch, loss):
    """Other ranks may not need them: what one pass shows to be missing is fitted from the next one on, and named."""
    monkeypatch.setattr(recorder, "is_sharded", lambda p: True)
    ids, labels = data()
    model = tiny("llama")
    if loss == "made inside":  # and the output is a copy that no loss reads
        inner = model.forward

        def forward(*args, **kwargs):
            out = inner(*args, **kwargs)
            out.logits = out.logits * 1
            return out

        model.forward = forward
        monkeypatch.setattr(recorder, "scale_and_cap", lambda lm: (1.0, 1e9))  # the head's own output is not the logits
    capture = Capture(model)
    capture.install()
    capture.recording = True

    def run():
        capture.start()
        if loss == "smoothing":
            z = model(ids).logits[:, :-1].flatten(0, 1)
            cross_entropy(z, labels[:, 1:].flatten(), label_smoothing=0.1).backward()
        else:
            model(ids, labels=labels).loss.backward()
        return capture.take()

    first = run()
    assert capture.facts.retry_next_step
    if loss == "smoothing":
        assert first[0].route == "logits" and first[0].residual > 1e-2
    else:
        assert first == [] and "from the next recorded step on" in explain_empty(capture.summary())
    (second,) = run()
    assert second.route == "least squares" and second.residual < ROUNDING
    capture.remove()


@pytest.mark.parametrize("terms", ["c", "entropy", "smoothing"])
def test_force_is_the_norm_of_G(terms):
    """Forward.force equals ‖∂L/∂z‖ of the loss's own backward pass, and so does G rebuilt from c, v and u."""
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
    loose = 1e4 if terms == "smoothing" else 50  # there c, v, u are fitted, with the condition of three alike directions
    torch.testing.assert_close(rebuilt, G, rtol=0, atol=loose * EPS * scale)
    torch.testing.assert_close(forward.force, G.norm(dim=1), rtol=0, atol=loose * EPS * scale)


# ---------------------------------------------------------------- units, batches, wrappers


def test_accumulation_and_scale_sit_inside_c():
    ids, labels = data()
    model = tiny("llama")

    def loss_of(m):
        (m(ids, labels=labels).loss / 4).backward()
        return m(ids[:1], labels=labels[:1]).loss / 4

    a, b = captured(model, loss_of).forwards
    torch.testing.assert_close(a.c, torch.full((15,), 1 / 60), rtol=100 * EPS, atol=0)
    torch.testing.assert_close(b.c, torch.full((5,), 1 / 20), rtol=100 * EPS, atol=0)


def test_two_backward_passes_through_one_graph_add_up():
    ids, labels = data()

    def loss_of(m):
        lp = log_probs(m(ids).logits, ids)
        (-lp[0, 4:].sum()).backward(retain_graph=True)
        return -2 * lp[1, 4:].sum()

    forward = one(tiny("llama"), loss_of)
    torch.testing.assert_close(forward.c, torch.tensor([1.0] * 4 + [2.0] * 4), rtol=100 * EPS, atol=0)
    assert forward.residual < ROUNDING


def test_left_padding_and_packing_are_undone():
    """The same two sequences right-padded, left-padded and packed give the same tokens, positions, c and statistics."""
    ids = torch.randint(0, V, (14,), generator=torch.Generator().manual_seed(1))
    a, b = ids[:6], ids[6:]
    pad = torch.zeros(2, dtype=torch.long)
    right = (torch.stack([torch.cat([a, pad]), b]), torch.tensor([[1] * 6 + [0] * 2, [1] * 8]))
    left = (torch.stack([torch.cat([pad, a]), b]), torch.tensor([[0] * 2 + [1] * 6, [1] * 8]))
    model, found = tiny("llama"), []
    for batch, mask in (right, left):
        labels = batch.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)  # nothing real precedes a first token
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = dict(attention_mask=mask, position_ids=positions, labels=labels)
        found.append(one(model, lambda m, x=batch, i=inputs: m(x, **i).loss))
    labels = ids.clone()
    labels[6] = -100  # the first label of a packed document belongs to nobody
    inputs = dict(position_ids=torch.cat([torch.arange(6), torch.arange(8)])[None], labels=labels[None], use_cache=False)
    found.append(one(model, lambda m: m(ids[None], **inputs).loss))
    first = found[0]
    for f in found:
        chis = f.chis()
        assert [chi.ids.tolist() for chi in chis] == [a.tolist(), b.tolist()]
        assert [int(chi.scored.sum()) for chi in chis] == [5, 7]
        assert f.position.tolist() == [*range(1, 6), *range(1, 8)] and f.residual < ROUNDING
        torch.testing.assert_close(f.c, torch.full((12,), 1 / 12), rtol=100 * EPS, atol=0)
        torch.testing.assert_close(f.stats.log_prob, first.stats.log_prob, rtol=0, atol=200 * EPS * 5)  # log-probs of size 5


def test_logits_of_the_last_tokens_only():
    ids, _ = data()
    forward = one(tiny("llama"), lambda m: -log_probs(m(ids, logits_to_keep=4).logits, ids[:, 5:]).sum())
    assert forward.position.tolist() == [6, 7, 8] * 3 and torch.equal(forward.targets, ids[:, 6:].flatten())
    assert forward.residual < ROUNDING


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_one_pass(reentrant):
    ids, labels = data()
    model = tiny("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = captured(model, lambda m: m(ids, labels=labels).loss)
    assert len(found.forwards) == 1 and found.forwards[0].residual < ROUNDING


@pytest.mark.parametrize("how", ["lora", "lora on the head", "modules_to_save", "frozen backbone"])
def test_adapters(how):
    """Adapted heads are part of the readout; a frozen backbone sends no gradient to h, so the check is made at the logits."""
    import peft

    ids, labels = data()
    if how == "lora":
        model = tiny_lora("llama")
    elif how == "frozen backbone":
        model = tiny("llama", tied=False)
        for name, p in model.named_parameters():
            p.requires_grad = "lm_head" in name
    else:
        more = (
            dict(target_modules=["q_proj", "lm_head"])
            if "head" in how
            else dict(modules_to_save=["lm_head"], target_modules=["q_proj"])
        )
        config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **more)
        model = peft.get_peft_model(tiny("llama", tied=False), config)
    found = captured(model, lambda m: m(input_ids=ids, labels=labels).loss)
    (forward,) = found.forwards
    assert found.seen == 1 and forward.residual < ROUNDING
    torch.testing.assert_close(forward.c, torch.full((15,), 1 / 15), rtol=100 * EPS, atol=0)


def test_a_peft_that_calls_forward_directly():
    """PEFT up to 0.20 calls model.forward, so the causal LM's own hooks never fire; the wrapper's does."""

    class Wrapper(torch.nn.Module):
        def __init__(self, lm):
            super().__init__()
            self.lm = lm

        def get_base_model(self):
            return self.lm

        def forward(self, **kwargs):
            return self.lm.forward(**kwargs)

    ids, labels = data()
    found = captured(Wrapper(tiny("llama")), lambda m: m(input_ids=ids, labels=labels).loss)
    assert len(found.forwards) == 1 and found.seen == 1 and found.forwards[0].residual < ROUNDING


def test_compiled_models():
    """Outer hooks fire; a loss outside is captured, one inside is out of sight and said to be."""
    ids, labels = data()
    torch._dynamo.reset()
    model = torch.compile(tiny("llama"), backend="aot_eager")
    forward = one(model, lambda m: cross_entropy(m(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    assert forward.residual < ROUNDING
    torch.testing.assert_close(forward.c, torch.full((15,), 1 / 15), rtol=100 * EPS, atol=0)
    with pytest.raises(AssertionError, match="inside the compiled model.*compute it outside"):
        captured(model, lambda m: m(ids, labels=labels).loss)


def test_half_precision_weights():
    ids, labels = data()
    forward = one(tiny("llama").bfloat16(), lambda m: m(ids, labels=labels).loss)
    bf16 = torch.finfo(torch.bfloat16).eps
    assert forward.residual < 4 * bf16
    torch.testing.assert_close(forward.c.float(), torch.full((15,), 1 / 15), rtol=2 * bf16, atol=0)


def test_a_mixture_of_experts_says_that_its_router_has_a_loss():
    ids, labels = data()
    model = tiny("qwen2_moe", output_router_logits=True, router_aux_loss_coef=0.1)
    assert captured(model, lambda m: m(ids, labels=labels).loss).router_loss


# ---------------------------------------------------------------- what must not happen


def test_hooks_change_nothing_and_are_all_taken_off():
    """Output objects, gradients and hook tables are what they are without tokdyn, also after an exception in the loop."""
    ids, labels = data()

    def tables(model):
        return [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]

    grads = []
    for on in (False, True):
        model = tiny("gemma2")
        before = tables(model)
        if on:
            capture = Capture(model)
            capture.install()
            capture.recording = True
        out = model(ids, labels=labels)
        out.loss.backward()
        grads.append([p.grad for p in model.parameters()])
        if on:
            assert len(capture.take()) == 1 and type(out).__name__ == "CausalLMOutputWithPast"
            capture.remove()
            assert tables(model) == before and capturing._active == []
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    model = tiny("llama")
    before = tables(model)
    with pytest.raises(RuntimeError, match="user's own"):
        captured(model, lambda m: (_ for _ in ()).throw(RuntimeError("user's own")))
    assert tables(model) == before


@pytest.mark.parametrize("route", ["logits", "tap", "fitted"])
def test_nothing_of_a_step_outlives_it(route):
    """No hook holds on to what it hangs on: the graph of a pass is gone with its last user."""
    ids, labels = data()
    kept = []

    def loss_of(m):
        handle = m.base_model.register_forward_hook(lambda *a: kept.append(weakref.ref(a[2].last_hidden_state)))
        z = m(ids).logits
        handle.remove()
        kept.append(weakref.ref(z))
        lp = log_probs(z, ids)
        if route == "tap":
            tap(lp)
        return -lp.mean() if route != "fitted" else cross_entropy(z.flatten(0, 1), ids.flatten(), label_smoothing=0.1)

    captured(tiny("llama"), loss_of)
    assert [tensor() for tensor in kept] == [None, None]


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
        lp = log_probs(tiny("llama")(ids).logits, ids, 0.7)[:, PROMPT - 1 :].flatten()
    torch.testing.assert_close(forward.stats.log_prob, lp, rtol=20 * EPS, atol=0)


def test_passes_without_gradients_are_counted_and_left_out():
    ids, labels = data()

    def loss_of(m):
        with torch.no_grad():
            m(ids)
            m(ids, labels=labels)
        return m(ids, labels=labels).loss

    found = captured(tiny("llama"), loss_of)
    assert found.excluded == 2 and found.seen == 3 and len(found.forwards) == 1


@pytest.mark.parametrize("wrong", ["temperature", "mask", "tap"])
def test_the_residual_sees_a_wrong_capture(wrong):
    ids, labels = data()

    def loss_of(m):
        lp = log_probs(m(ids).logits, ids, 0.7)
        if wrong == "mask":
            tap(lp, ids[:, 1:], labels[:, 1:] == -100, temperature=0.7)
        if wrong == "tap":
            tap(lp, ids[:, 1:], labels[:, 1:] != -100, temperature=1.0)
        return -lp[:, PROMPT - 1 :].mean()

    forward = one(tiny("llama"), loss_of)
    assert forward.residual > (5 * EPS**0.5 if wrong == "temperature" else 0.02)
    # a temperature near 1 moves pi along the entropy's own direction: the fit calls most of it an entropy term, and is told of
    assert (forward.v is not None) == (wrong == "temperature")
    assert (forward.outside > 0.9) == (wrong == "mask")
    assert (forward.log_prob_error > 0.1) == (wrong == "tap")


@pytest.mark.parametrize(
    "case, message",
    [
        ("elsewhere", "no forward pass of LlamaForCausalLM was seen"),
        ("no gradients", "all 1 forward passes ran without gradients"),
        ("no backward", "no gradient came back"),
        ("nothing exposed", "neither log_probs nor logits that carry gradients, and it was given no labels"),
        ("in place", "compiled in place"),
    ],
)
def test_every_way_of_seeing_nothing_has_a_name(case, message):
    ids, labels = data()
    model = tiny("llama")
    if case == "nothing exposed":
        inner = model.forward
        model.forward = lambda *a, **k: SimpleNamespace(loss=inner(*a, **k).logits.mean(), logits=None)
    if case == "in place":
        torch._dynamo.reset()
        model.compile(backend="aot_eager")
    capture = Capture(model)
    capture.install()
    capture.recording = True
    if case in ("no backward", "nothing exposed"):
        model(ids)
    if case == "no gradients":
        with torch.no_grad():
            model(ids)
    if case == "in place":
        model(ids, labels=labels).loss.backward()
    assert capture.take() == [] and message in explain_empty(capture.summary())
    capture.remove()


@pytest.mark.parametrize(
    "case, message",
    [
        ("shape", "do not fit hidden states"),
        ("labels", "labels must have the log-probs' shape"),
        ("early", "td.tap found no hidden states"),
        ("empty", "the output embedding is empty here"),
    ],
)
def test_mistakes_are_kept_not_raised(case, message):
    ids, _ = data()
    model = tiny("llama", tied=False)
    capture = Capture(model)
    capture.install()
    capture.recording = True
    z = torch.zeros(3, 9, V, requires_grad=True).tanh() if case == "early" else model(ids).logits
    lp = log_probs(z, ids)
    if case == "shape":
        tap(lp[:2])
    elif case == "labels":
        tap(lp, ids)
    elif case == "early":
        tap(lp)
    else:
        weight, model.lm_head.weight.data = model.lm_head.weight.data, torch.empty(0)
        tap(lp)
        model.lm_head.weight.data = weight
    lp.sum().backward()
    assert message in str(capture.step.failure)
    capture.remove()


def test_tap_without_a_monitor_or_gradients_does_nothing():
    lp = torch.randn(2, 3, requires_grad=True) * 1
    assert td.tap(lp) is lp and lp._backward_hooks is None
    assert td.tap(lp.detach()) is not None


def test_tap_takes_the_tokens_from_the_input():
    """Without labels, the last k log-probs are those of the last k tokens."""
    ids, _ = data()

    def loss_of(m):
        lp = log_probs(m(ids).logits, ids)[:, -3:]
        return -tap(lp).sum()

    forward = one(tiny("llama"), loss_of)
    assert torch.equal(forward.targets, ids[:, -3:].flatten()) and forward.residual < ROUNDING


def test_a_model_without_readout_is_refused():
    with pytest.raises(ValueError, match="no output embeddings"):
        unwrap(torch.nn.Linear(2, 2))


def test_copies_of_a_model_on_several_devices_are_refused():
    with pytest.raises(ValueError, match="DataParallel runs copies of the model"):
        Capture(torch.nn.DataParallel(tiny("llama")))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.parametrize("what", ["whole", "layer"])
def test_fsdp1_is_refused(what):
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = tiny("llama")
        if what == "whole":
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        else:
            model.model.layers[0] = FullyShardedDataParallel(model.model.layers[0], device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="FSDP1 .* use FSDP2"):
            Capture(model)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "names, scale, cap",
    [
        (dict(logit_scale=0.5), 0.5, None),
        (dict(logits_scaling=4.0, model_type="granite"), 0.25, None),
        (dict(logits_scaling=4.0, model_type="hyperclovax"), 4.0, None),
        (dict(output_multiplier=3.0), 3.0, None),
        (dict(lm_head_multiplier=3.0, final_logit_softcapping=30.0), 3.0, 30.0),
        (dict(logit_scale=None, logits_soft_cap=20.0), 1.0, 20.0),
    ],
)
def test_every_name_of_a_scale_and_a_softcap(names, scale, cap):
    """As a capture reads them and as a trace does."""
    model = tiny("llama")
    model.config = SimpleNamespace(**names)
    readout = Tracer(model).readout
    assert scale_and_cap(model) == (readout.scale, readout.softcap) == (scale, cap)
