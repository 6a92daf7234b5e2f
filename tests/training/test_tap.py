"""td.tap: log-probs that a loss builds itself."""

import pytest
import torch
from captures import ROUNDING, data, log_probs, one
from loops import V

import tokdyn as td
from tokdyn.testing import tiny
from tokdyn.training.capture import Capture, _grid, tap


def test_tap_takes_the_tokens_from_the_input():
    """Without labels, the last k log-probs are those of the last k tokens."""
    ids, _ = data()

    def loss_of(m):
        lp = log_probs(m(ids).logits, ids)[:, -3:]
        return -tap(lp).sum()

    forward = one(tiny("llama"), loss_of)
    assert torch.equal(forward.targets, ids[:, -3:].flatten()) and forward.residual < ROUNDING


@pytest.mark.parametrize("shape, grid", [((2, 7), (2, 7)), ((2, 3), (2, 3)), ((14,), (2, 7)), ((2, 8), None), ((3, 7), None),
                                         ((13,), None), ((2, 7, 1), None)])  # fmt: skip
def test_log_probs_that_fit_hidden_states(shape, grid):
    """All of a batch's positions, the last of each sequence, or all in one row; nothing else."""
    if grid is None:
        with pytest.raises(ValueError, match="do not fit hidden states"):
            _grid(torch.zeros(shape), 2, 7)
    else:
        assert _grid(torch.zeros(shape), 2, 7) == grid


def test_tap_without_a_monitor_or_gradients_does_nothing():
    lp = torch.randn(2, 3, requires_grad=True) * 1
    assert td.tap(lp) is lp and lp._backward_hooks is None
    assert td.tap(lp.detach()) is not None


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
