"""A lookup's padding row, which autograd gives no gradient: texts that hold it beside a tied readout are refused by name."""

import pytest
import torch

import tokdyn as td
from tokdyn.testing import random_chis, relative_error, tiny

PAD = 60


def model_with_padding(tied):
    model = tiny("llama", tied=tied)
    model.get_input_embeddings().padding_idx = PAD
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    return model


def texts(seed, *, hold):
    """Two sequences without the padding id, or with it inside the prompt of one."""
    chis = [chi.with_(ids=torch.where(chi.ids == PAD, 3, chi.ids)) for chi in random_chis([(4, 4), (3, 2)], seed=seed)]
    ids = chis[0].ids.clone()
    ids[1] = PAD
    return [chis[0].with_(ids=ids) if hold else chis[0], chis[1]]


@pytest.mark.parametrize(
    "where, options", [("update", {"reduce": "observe"}), ("observe", {}), ("observe", {"method": "naive"})]
)
def test_a_text_that_holds_the_padding_row_of_a_tied_embedding_is_refused(where, options):
    sides = [texts(seed, hold=side == where) for seed, side in ((1, "update"), (2, "observe"))]
    with pytest.raises(ValueError, match=f"sequence 0 of {where} holds the token {PAD} inside its text"):
        td.forces(model_with_padding(tied=True), *sides, **options)


@pytest.mark.parametrize("tied, hold, scope", [(True, False, "full"), (False, True, "full"), (True, True, "backbone")])
def test_all_others_are_as_without_it(tied, hold, scope):
    """No text holds it, or its row does not move: one reduction is the sum of the matrix of one gradient per token."""
    model, update, observe = model_with_padding(tied), texts(1, hold=hold), texts(2, hold=hold)
    truth = td.forces(model, update, observe, method="naive", scope=scope).matrix
    for reduce, axis in (("update", 1), ("observe", 0)):
        vector = td.forces(model, update, observe, reduce=reduce, scope=scope).vector
        assert relative_error(vector, truth.sum(axis)) < 1e-4  # sums cancel tenfold at most
    assert relative_error(td.forces(model, update, observe, scope=scope).matrix, truth) < 1e-5


def test_why_it_is_refused():
    """The real step moves the row through the readout, and an input that reads it follows: autograd's F has no such term."""
    model, update, observe = model_with_padding(tied=True).double(), texts(1, hold=False), texts(2, hold=True)

    def log_probs(net, chis):
        rows = [net(chi.ids[None]).logits[0].log_softmax(-1) for chi in chis]
        return torch.cat(
            [z[chi.scored.nonzero().flatten() - 1, chi.ids[chi.scored]] for z, chi in zip(rows, chis, strict=True)]
        )

    parameters = list(model.parameters())
    direction = torch.autograd.grad(log_probs(model, update).sum(), parameters)
    grads = torch.autograd.grad(log_probs(model, observe).sum(), parameters)
    autograd = sum(float((a * b).sum()) for a, b in zip(grads, direction, strict=True))
    moved = []
    for h in (1e-5, -1e-5):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += h * d
            moved.append(float(log_probs(model, observe).sum()))
            for p, d in zip(parameters, direction, strict=True):
                p -= h * d
    real = (moved[0] - moved[1]) / 2e-5
    assert abs(real - autograd) > 1e-3 * abs(real)
