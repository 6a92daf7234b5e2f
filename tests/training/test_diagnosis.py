"""What a capture cannot see, or sees wrongly, is told with its cause."""

from types import SimpleNamespace

import pytest
import torch
from captures import captured, data, log_probs, one
from loops import EPS, PROMPT

from tokdyn.testing import tiny
from tokdyn.training.capture import Capture, tap
from tokdyn.training.diagnosis import explain_empty, failed_self_check


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


def test_a_mixture_of_experts_says_that_its_router_has_a_loss():
    ids, labels = data()
    model = tiny("qwen2_moe", output_router_logits=True, router_aux_loss_coef=0.1)
    assert captured(model, lambda m: m(ids, labels=labels).loss).router_loss


def past_the_logits(kind, out):
    """A term of a loss that reads the backbone's output itself; its gradient there has a closed form."""
    h = out.hidden_states[-1]
    if kind == "prompt alone":  # where no token is scored
        return 0.1 * h[:, :2].square().sum()
    return {"none": 0.0, "value head": 0.3 * h.sum(), "square": 0.1 * h.square().sum()}[kind]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["none", "value head", "square", "prompt alone"])
def test_a_term_on_the_last_hidden_states_is_named(family, kind):
    """Its share of ∂L/∂h is that of its own gradient, d/dh of the term; c is what it is without it, bit for bit."""
    ids, labels = data()
    own = {}

    def loss_of(m, kind=kind):
        out = m(ids, output_hidden_states=True)
        h = out.hidden_states[-1].detach()
        own["gradient"] = {"none": 0 * h, "value head": 0 * h + 0.3, "square": 0.2 * h}.get(kind, 0.2 * h)
        own["gradient"][:, 2 if kind == "prompt alone" else h.shape[1] :] = 0
        return -log_probs(out.logits, ids)[:, PROMPT - 1 :].sum() + past_the_logits(kind, out)

    forward, clean = one(tiny(family), loss_of), one(tiny(family), lambda m: loss_of(m, "none"))
    loss_of(tiny(family))
    assert torch.equal(forward.c, clean.c) and forward.route == "logits" and forward.v is None
    assert clean.check.beside == 0 and failed_self_check([clean]) is None
    size = float(own["gradient"].double().square().sum())
    # the sum of two gradients is rounded to eps of either before one is taken away
    slack = 2 * EPS * (forward.check.total * size) ** 0.5 * own["gradient"].numel() ** 0.5
    assert abs(forward.check.beside - size) <= slack
    told = failed_self_check([forward])
    assert (told is None) == (kind == "none")
    if told is not None:
        assert "without coming through the logits" in told[0] and forward.check.past_readout > 0.1


def test_a_term_on_the_last_hidden_states_beside_fewer_logits_and_in_a_pass_of_its_own():
    """The logits of the last tokens alone, in bfloat16; and two backward passes through one graph."""
    ids, labels = data()
    k = ids.shape[1] - PROMPT + 1

    def fewer(m, term=0.1):
        with torch.autocast("cpu", torch.bfloat16):
            out = m(ids, logits_to_keep=k, output_hidden_states=True)
        lp = out.logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, PROMPT:, None])
        return -lp.sum() + term * out.hidden_states[-1].float().square().sum()

    class Twice:
        def __init__(self, m):
            out = m(ids, output_hidden_states=True)
            self.parts = [-log_probs(out.logits, ids)[:, PROMPT - 1 :].sum(), out.hidden_states[-1].square().sum()]

        def backward(self):
            self.parts[0].backward(retain_graph=True)
            self.parts[1].backward()

    for loss_of in (fewer, Twice):
        assert "without coming through the logits" in failed_self_check([one(tiny("llama"), loss_of)])[0]
    assert failed_self_check([one(tiny("llama"), lambda m: fewer(m, 0.0))]) is None


def test_a_term_of_a_head_that_reads_the_backbones_output_itself_is_named():
    """No slice between them: one tensor is both, and what c does not explain is all that can be said."""
    ids, labels = data()

    def loss_of(m, term=0.1):
        m.forward = lambda x, h=None: SimpleNamespace(hidden=(h := m.model(x).last_hidden_state), logits=m.lm_head(h))
        out = m(ids)
        return -log_probs(out.logits, ids)[:, PROMPT - 1 :].sum() + term * out.hidden.square().sum()

    assert "c explains the gradient at the hidden states only to" in failed_self_check([one(tiny("llama"), loss_of)])[0]
    assert failed_self_check([one(tiny("llama"), lambda m: loss_of(m, 0.0))]) is None
