"""Passes of tiny models under a `Capture` alone: what the tests of training/ share."""

from types import SimpleNamespace

import torch
from loops import EPS, PROMPT, V

from tokdyn.training.capture import Capture
from tokdyn.training.diagnosis import explain_empty

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
