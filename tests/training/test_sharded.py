"""Weights that are spread over ranks: nothing is gathered where only some ranks may ask."""

import pytest
from captures import ROUNDING, data
from torch.nn.functional import cross_entropy

from tokdyn.testing import tiny
from tokdyn.training import recorder
from tokdyn.training.capture import Capture
from tokdyn.training.diagnosis import explain_empty


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
