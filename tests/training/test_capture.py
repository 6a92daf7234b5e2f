"""A capture leaves model, graph and gradients as they were, and looks at the passes with gradients alone."""

import weakref

import pytest
import torch
from captures import captured, data, log_probs
from torch.nn.functional import cross_entropy

from tokdyn.testing import tiny
from tokdyn.training import capture as capturing
from tokdyn.training.capture import Capture, tap


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
            assert tables(model) == before and capture not in capturing._active
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


def test_passes_without_gradients_are_counted_and_left_out():
    ids, labels = data()

    def loss_of(m):
        with torch.no_grad():
            m(ids)
            m(ids, labels=labels)
        return m(ids, labels=labels).loss

    found = captured(tiny("llama"), loss_of)
    assert found.excluded == 2 and found.seen == 3 and len(found.forwards) == 1
