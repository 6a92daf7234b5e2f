"""Predictions of a probe are those of td.forces under the real optimizer step, and every token's share of it is known."""

import pytest
import torch
from loops import EPS, PROBE, PROMPT, data, dpo, sft, train

import tokdyn as td
from tokdyn.sequences import Chi
from tokdyn.testing import tiny


def first_step(lr, *, family="llama", probe=PROBE, loss_of=sft, dtype=torch.float32):
    """One plain SGD step: the record, the model before it, and the update as sequences."""
    model = tiny(family).to(dtype)
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    ids = data()
    with td.Monitor(model, opt, probe=probe, on_error="raise") as monitor:
        loss_of(model, ids).backward()
        opt.step()
        step = monitor.step_end()
    scored = torch.arange(9) >= PROMPT
    return step, tiny(family).to(dtype), [Chi(row, scored, group=i) for i, row in enumerate(ids)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2_moe"])
def test_a_plain_step_is_what_td_forces_says(family):
    """predicted = eta Σ_l F[m,l]/N and forces = eta Σ_m F[m,l]/N over the blamed group, by td.forces on the model before."""
    lr, N = 1.0, 20  # a step far above the weights' last digit, which Δθ = θ' - θ is rounded to
    step, model, update = first_step(lr, family=family)
    observe = [chi for chis in PROBE.values() for chi in chis]
    F = td.forces(model, update, observe, reduce="update").vector.double() * lr / N
    blamed = td.forces(model, update, PROBE["near"], reduce="observe").vector.double() * lr / N
    exact = tiny(family).double()
    with td.testing.float64():
        F64 = td.forces(exact, update, observe, reduce="update").vector * lr / N
        blamed64 = td.forces(exact, update, PROBE["near"], reduce="observe").vector * lr / N
    for found, same, truth in ((step.predicted, F, F64), (step.forces.double(), blamed, blamed64)):
        band = 100 * EPS * float(truth.norm())  # Δθ of 1e-2 beside weights of 0.5
        assert float((found - truth).norm()) <= 2 * float((same - truth).norm()) + band


def test_predicted_and_actual_differ_by_second_order():
    """Halving eta quarters the difference."""
    gaps = []
    for lr in (0.08, 0.04, 0.02):
        step = first_step(lr)[0]
        gaps.append(float((step.actual - step.predicted).norm()))
        assert step.linearity == pytest.approx(float(step.predicted @ step.actual / (step.predicted @ step.predicted)))
    assert 3 < gaps[0] / gaps[1] < 5 and 3 < gaps[1] / gaps[2] < 5


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02),
    "sgd with nesterov momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd with dampening": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, dampening=0.6),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "adam with amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_is_the_tokens_forces_and_what_was_carried_over(name):
    """Σ_l F_l + carried = Σ_m predicted_m of the blamed group: a tangent pass over the update, one over the probe, and Δθ.

    And Σ_l F_l is what the optimizer's own gradient does, clipping included: every token of the loss was captured.
    """
    _, _, monitor = train(sft, optimizer=OPTIMIZERS[name], max_norm=0.5, accumulate=2)
    blamed = sum(len(chi) for chi in PROBE["near"])
    for step in monitor.steps:
        total = float(step.predicted[:blamed].sum())
        size = float(step.predicted[:blamed].abs().sum()) + abs(step.carried) + float(step.forces.abs().sum())
        # eps·Σ|terms| per inner product over 1e4 parameters, whose rounding grows with its root
        assert abs(float(step.forces.double().sum()) + step.carried - total) < 100 * EPS * size
        assert abs(step.accounted - 1) * abs(total - step.carried) < 100 * EPS * size
        assert step.notes == []
    if name == "sgd":
        assert abs(monitor.steps[-1].carried) < 1e-3 * float(monitor.steps[-1].predicted.abs().sum())


def test_an_unclipped_report_is_noticed():
    """Clipping that nobody told of: the tokens' forces are too large by its factor, and the record says so."""
    model = tiny("llama")
    opt = torch.optim.SGD(model.parameters(), lr=0.02)
    with td.Monitor(model, opt, probe=PROBE, on_error="raise") as monitor:
        sft(model, data()).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        opt.step()
        step = monitor.step_end()
    assert step.accounted == pytest.approx(norm / 0.5, rel=1e-3) and "was clipped" in step.notes[0]


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, lr=0.5), lambda p: torch.optim.Adam(p, lr=1e-3)])
def test_a_step_whose_pushes_cancel_to_rounding_accounts_for_nothing(optimizer):
    """A pair of one text has no gradient. What is left of it is rounding, and so is its quotient with the tokens' sum."""
    model, ids = tiny("llama"), data(B=1)
    opt = optimizer(model.parameters())
    with td.Monitor(model, opt, probe=PROBE, on_error="raise") as monitor:
        dpo(model, torch.cat([ids, data(B=1, T=9, seed=1), ids, data(B=1, T=9, seed=1)])).backward()
        for p in model.parameters():  # the last digits of a gradient that is zero, as other shapes would leave them
            p.grad += 1e-9 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        opt.step()
        step = monitor.step_end()
    assert float(step.forces.abs().sum()) > 0 and step.accounted is None
    if isinstance(opt, torch.optim.SGD):  # Adam's step is of the size of its learning rate whatever the gradient
        assert float(step.predicted.abs().max()) < 1e-6 and step.linearity != step.linearity
    assert step.notes == ["the pushes of this step on the probe cancel to rounding: its gradient moves nothing there"]


def test_forces_need_a_known_optimizer():
    model = tiny("llama")
    opt = torch.optim.Adagrad(model.parameters(), lr=1e-3)
    with td.Monitor(model, opt, probe=PROBE, on_error="raise") as monitor:
        sft(model, data()).backward()
        opt.step()
        step = monitor.step_end()
    assert step.forces is None and "optimizer must be Adam" in step.notes[0]
    assert 0.9 < step.linearity < 1.1  # Δθ needs no formula


class MasterWeights:
    """An optimizer around one of float32 copies, which it writes back when that has stepped: as DeepSpeed's ZeRO-1 and 2."""

    def __init__(self, parameters, lr):
        self.parameters = list(parameters)
        self.copies = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.copies, lr=lr)

    def step(self):
        for copy, p in zip(self.copies, self.parameters, strict=True):
            copy.grad = p.grad.clone()
        self.optimizer.step()
        for copy, p in zip(self.copies, self.parameters, strict=True):
            p.detach().copy_(copy)


@pytest.mark.parametrize(
    "make, dtype, cause",
    [
        (MasterWeights, torch.float32, "AdamW holds copies that are written back later"),
        (torch.optim.SGD, torch.bfloat16, "lost in the rounding of torch.bfloat16"),
    ],
)
def test_a_step_that_moves_nothing_is_named(make, dtype, cause):
    """Weights as before with gradients that are not zero: no Δ log π of 0 is recorded, the forces of the update are."""
    model = tiny("llama").to(dtype)
    opt = make(model.parameters(), lr=1e-3 if make is MasterWeights else 1e-9)
    start = [p.detach().clone() for p in model.parameters()]
    with td.Monitor(model, opt, probe=PROBE) as monitor:
        sft(model, data()).backward()
        with pytest.warns(UserWarning, match=f"weights did not move inside optimizer.step.* {cause}"):
            opt.step()
        step = monitor.step_end()
    assert step.observed is None and step.actual is None and len(step.c) == 20 and len(monitor.problems) == 1
    stayed = all(torch.equal(p, old) for p, old in zip(model.parameters(), start, strict=True))
    assert stayed == (make is torch.optim.SGD)


@pytest.mark.parametrize("nothing", ["learning rate", "gradient"])
def test_a_step_of_zero_is_no_problem(nothing):
    """Under a warm-up that begins at 0, or without a gradient, the probe does not move and is said not to."""
    model = tiny("llama")
    opt = torch.optim.SGD(model.parameters(), lr=0.0 if nothing == "learning rate" else 0.1)
    with td.Monitor(model, opt, probe=PROBE, on_error="raise") as monitor:
        (sft(model, data()) * (nothing != "gradient")).backward()
        opt.step()
        step = monitor.step_end()
    assert monitor.problems == [] and not step.actual.any() and not step.predicted.any()


def test_the_readouts_share_of_a_step():
    """With only the readout trainable it is all of it."""
    model = tiny("gemma2", tied=False)
    for name, p in model.named_parameters():
        p.requires_grad = "lm_head" in name
    opt = torch.optim.AdamW(model.lm_head.parameters(), lr=1e-3)
    with td.Monitor(model, opt, probe=PROBE, on_error="raise") as monitor:
        sft(model, data()).backward()
        opt.step()
        step = monitor.step_end()
    readout = torch.tensor(step.observed["predicted_readout"].to_pylist(), dtype=torch.float64)
    assert float((readout - step.predicted).norm()) < 100 * EPS * float(step.predicted.norm())


@pytest.mark.parametrize("told", [False, True], ids=["mask", "position_ids"])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_behind_padding_on_the_left_the_forces_of_all_tokens_are_what_the_gradient_does(family, told):
    """GPT-2 counts the padding as positions unless it is told others: the replay must stand where the loss stood."""
    model, pads = tiny(family), torch.tensor([0, 3, 1, 5])
    opt = torch.optim.SGD(model.parameters(), lr=0.02)
    ids = torch.stack([torch.nn.functional.pad(row, (int(n), 5 - int(n))) for row, n in zip(data(), pads, strict=True)])
    place = torch.arange(ids.shape[1])
    mask = ((place >= pads[:, None]) & (place < pads[:, None] + 9)).long()
    labels = torch.where((place >= pads[:, None] + PROMPT) & mask.bool(), ids, -100)
    more = dict(position_ids=(mask.cumsum(1) - 1).clamp(min=0)) if told else {}
    with td.Monitor(model, opt, probe=PROBE, on_error="raise") as monitor:
        model(input_ids=ids, attention_mask=mask, labels=labels, **more).loss.backward()
        opt.step()
        step = monitor.step_end()
    own = float(step.forces.double().sum()) / step.accounted  # what the gradient does, by the optimizer's own
    assert abs(float(step.forces.double().sum()) - own) < 100 * EPS * (abs(own) + float(step.forces.abs().sum()))


def test_a_probe_of_the_entropy_is_what_td_forces_says_of_it():
    """The step's forces and its predicted change of the entropy; and which token lowered it."""
    lr, N = 1.0, 20
    model, ids = tiny("llama"), data()
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    with td.Monitor(model, opt, probe=PROBE, observable="entropy", on_error="raise") as monitor:
        sft(model, ids).backward()
        opt.step()
        step = monitor.step_end()
        figures = monitor.metrics()
    scored = torch.arange(9) >= PROMPT
    update = [Chi(row, scored, group=i) for i, row in enumerate(ids)]
    options = dict(objective=td.objectives.SFT(), observable="entropy")
    F = td.forces(tiny("llama"), update, PROBE["near"], reduce="observe", **options).vector.double() * lr / N
    assert float((step.forces.double() - F).norm()) < 1e-3 * float(F.norm())
    every = [chi for chis in PROBE.values() for chi in chis]
    real = td.verify(tiny("llama"), update, every, eta=lr / N, **options)
    assert float((step.actual - real.actual).norm()) < 1e-2 * float(real.actual.norm())
    assert float((step.predicted - real.predicted).norm()) < 1e-3 * float(real.predicted.norm())
    assert "near/value" in figures and "near/log_prob" not in figures
