"""What a capture cannot see, or sees wrongly, is told with its cause."""

from types import SimpleNamespace

import pytest
import torch
from captures import captured, data, log_probs, one
from loops import EPS, PROMPT

from tokdyn.testing import tiny
from tokdyn.training.capture import Capture, tap
from tokdyn.training.diagnosis import explain_empty


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
