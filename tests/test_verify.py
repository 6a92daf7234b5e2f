"""The main job's check on the model that ships: the difference to a real step is of second order."""

import pytest
import torch

import tokdyn as td
from tokdyn.data import read, sequences, watched
from tokdyn.loading import DEMO_PAIRS, load_model
from tokdyn.objectives import DPO, GRPO, SFT
from tokdyn.testing import random_chis, tiny


@pytest.fixture(scope="module")
def demo():
    return *load_model(), read(DEMO_PAIRS)[:2]


@pytest.mark.parametrize("objective", [SFT(), DPO(), GRPO()], ids=lambda o: type(o).__name__)
def test_residual_is_of_second_order_on_the_demo_model(demo, objective):
    model, tokenizer, rows = demo
    before = {name: p.clone() for name, p in model.state_dict().items()}
    check = td.verify(model, sequences(tokenizer, rows[:1], objective), watched(tokenizer, rows), objective)
    assert 1.8 < check.order < 2.2
    assert float(check.predicted.abs().max()) == pytest.approx(0.2, rel=1e-15)
    assert 0.9 < check.linearity < 1.1
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in before.items())


def test_the_prediction_is_eta_times_the_forces(demo):
    model, tokenizer, rows = demo
    update, observe = sequences(tokenizer, rows[:1], DPO()), watched(tokenizer, rows[1:])
    check = td.verify(model, update, observe, DPO(), eta=1e-4)
    forces = td.forces(model, update, observe, DPO(), reduce="update")
    assert torch.allclose(check.predicted.float(), forces.predict(1e-4), rtol=1e-5)


def test_the_actual_change_is_that_of_a_trained_copy(demo):
    """One plain SGD step of the plain loss, on a copy, moves the log-probs by what verify calls actual."""
    import copy

    model, tokenizer, rows = demo
    update = sequences(tokenizer, rows[:1], SFT())
    check = td.verify(model, update, update, SFT())
    trained = copy.deepcopy(model)
    chi = update[0]

    def log_probs(m):
        z = m(chi.ids[None]).logits[0, :-1]
        return z.log_softmax(-1).gather(1, chi.ids[1:, None]).squeeze(1)[chi.scored[1:]]

    before = log_probs(trained)
    (-before.sum()).backward()
    with torch.no_grad():
        for p in trained.parameters():
            p -= check.eta * p.grad
        after = log_probs(trained)
    # both are differences of float32 log-probs of size ~5, each off by some 20 eps of that: test_steps.py
    assert torch.allclose(check.actual.float(), after - before.detach(), atol=20 * torch.finfo(torch.float32).eps * 5)


def test_eta_must_be_positive(demo):
    model, tokenizer, rows = demo
    update = sequences(tokenizer, rows[:1], SFT())
    with pytest.raises(ValueError, match="eta must be positive"):
        td.verify(model, update, update, SFT(), eta=0.0)


@pytest.mark.parametrize("ask", [td.verify, td.profile, td.kernel], ids=lambda ask: ask.__name__)
def test_an_estimate_is_no_scope_that_a_step_could_take(ask):
    """ "ch2" once went for a regular expression there, which finds no parameter or any whose name holds it."""
    chis = random_chis([(2, 3)], seed=1)
    with pytest.raises(ValueError, match='scope="ch2" is an estimate of the force matrix'):
        ask(tiny("llama"), chis, chis, scope="ch2")


def twins(**changes):
    """A preference pair of one text, and one that differs in its last token."""
    chosen = random_chis([(3, 5)], seed=1)[0].with_(role="chosen", group=0)
    ids = chosen.ids.clone()
    ids[-1] = (ids[-1] + 1) % 60
    return [chosen, chosen.with_(role="rejected")], [chosen, chosen.with_(role="rejected", ids=ids)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pushes_that_cancel_to_rounding_are_no_step_of_a_large_eta(family, dtype):
    """F = 0 for a pair of one text; what is computed of it is rounding, and dividing by it made steps of 2e5."""
    model, observe = tiny(family).to(dtype), random_chis([(3, 4)], seed=2)
    same, nearly = twins()
    reference = tiny(family, seed=3).to(dtype)
    for update in (same, [*same, *(chi.with_(group=1) for chi in same)]):
        for more in ({}, {"eta": 1.0}, {"reference": reference}):
            with pytest.raises(ValueError, match="nothing moves: the pushes of this update cancel to rounding"):
                td.verify(model, update, [*update, *observe], DPO(), **more)
    check = td.verify(model, nearly, [*nearly, *observe], DPO())
    assert 0 < check.eta < 100 and float(check.predicted.abs().max()) == pytest.approx(0.2, rel=1e-6)
    rollouts = [chi.with_(advantage=a) for chi, a in zip(same, (1.0, -1.0), strict=True)]
    with pytest.raises(ValueError, match="nothing moves"):
        td.verify(model, rollouts, observe, GRPO())


def test_a_profile_of_a_pair_of_one_text_says_so_and_takes_no_step(tmp_path):
    (same, _), observe = twins(), random_chis([(3, 4)], seed=2)
    run = td.profile(tiny("llama"), same, [*same, *observe], DPO(), out=tmp_path / "run")
    again = td.load(tmp_path / "run")
    assert [finding["title"] for finding in again.about["findings"]] == ["Nothing moves"]
    assert "cancel to rounding" in again.about["findings"][0]["text"]
    assert again.about["settings"]["eta"] is None and again.about["verify"] is None
    observed = [row for row in again.tokens.to_pylist() if row["side"] == "observed"]
    assert all(row["actual"] is None and row["predicted"] is None for row in observed)
    assert not any(row["risers"] or row["fallers"] for row in observed)
    assert not run.vector.any()  # added at the logits, before anything could round
    gross = float(run.matrix.abs().sum())
    assert gross > 1 and run.about["checks"]["row sums of the matrix against the tangent pass"] < 1e-5
