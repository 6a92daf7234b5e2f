"""Forces under an optimizer are those of its coming step, of every kind and after any number of steps."""

import pytest
import torch
from engines import forces
from pairs import OBSERVED, pair
from real_steps import first_order_change, gradients_of, log_probs, moved_by, own_part

import tokdyn as td
from tokdyn import interventions
from tokdyn.objectives import DPO
from tokdyn.testing import float64, relative_error, tiny, tiny_lora

# On the way of a gradient lie some 30 sums of up to V = 61 terms (two layers, there and back), each off by √V eps of its terms:
# √(30 V) eps = 5e-6 in either factor of a force
FP32 = 1e-5


def two_groups(model):
    head = [p for n, p in model.named_parameters() if "embed" in n or "lm_head" in n]
    rest = [p for p in model.parameters() if all(p is not other for other in head)]
    return torch.optim.AdamW([{"params": head, "lr": 1e-4}, {"params": rest, "lr": 1e-3, "betas": (0.8, 0.9)}])


OPTIMIZERS = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "SGD, Nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, nesterov=True),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-4),
    "RMSprop, centered": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-4, centered=True, momentum=0.9),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3),
    "Adam, decay": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, weight_decay=0.1),
    "AdamW, amsgrad": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.1, amsgrad=True),
    "AdamW, two groups": two_groups,
}


def train(model, optimizer, steps):
    """Steps on tokens below 40 alone: the lookup rows of the others are fresh."""
    for seed in range(steps):
        optimizer.zero_grad()
        model(torch.randint(0, 40, (1, 9), generator=torch.Generator().manual_seed(seed))).logits.square().mean().backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


AFTER = [(name, 3) for name in OPTIMIZERS]
AFTER += [(name, n) for name in ("SGD", "RMSprop, centered", "AdamW, amsgrad", "AdamW, two groups") for n in (0, 1)]


@pytest.mark.parametrize(("name", "steps"), AFTER)
def test_forces_under_an_optimizer_predict_what_its_real_step_does(name, steps):
    """Row sums times lr, predict(), both reductions and verify() against the optimizer's own step() in float64."""
    with float64():
        model = tiny("llama", tied=False).double()
        optimizer = OPTIMIZERS[name](model)
        train(model, optimizer, steps)
        gradients = gradients_of(model, interventions.loss(model, pair(), DPO()))
        fresh = gradients["model.embed_tokens.weight"][40:]
        assert bool(fresh.any())  # rows that no step before has touched
        real = first_order_change(model, optimizer, gradients, OBSERVED)
        lr = max(group["lr"] for group in optimizer.param_groups)
        found = forces(model, pair(), OBSERVED, DPO(), optimizer=optimizer)
        near = 1e-6 * float(real.abs().max())  # of second order in steps that move by 1e-3 of a step: see first_order_change
        assert found.lr == lr and float((found.matrix.sum(1) * lr - real).abs().max()) < near
        assert float((found.predict() - real).abs().max()) < near
        whole = forces(model, pair(), OBSERVED, DPO(), optimizer=optimizer, reduce="update")
        assert float((whole.predict() - real).abs().max()) < near
        each = forces(model, pair(), OBSERVED, DPO(), optimizer=optimizer, reduce="observe").vector
        assert abs(float(each.sum() * lr - real.sum())) < near * len(real)
        check = td.verify(model, pair(), OBSERVED, DPO(), eta=1e-2 * lr, optimizer=optimizer)
        named = dict(model.named_parameters())
        with torch.no_grad(), moved_by(model, own_part(optimizer, named, gradients, 1e-2)):
            after = log_probs(model, OBSERVED)
        # what verify calls actual is what the optimizer's step at that learning rate does
        torch.testing.assert_close(check.actual, after - log_probs(model, OBSERVED).detach(), rtol=1e-8, atol=1e-12)
        assert 1.9 < check.order < 2.1


def test_single_tokens_under_an_optimizer_have_the_real_steps_diagonal():
    """F[m,l] = <∇ log pi(y_m), P ⊙ -∇L_l>, with P read off the optimizer's own step and gradients by plain autograd."""
    with float64():
        model = tiny("llama", tied=False).double()
        optimizer = OPTIMIZERS["AdamW, two groups"](model)
        train(model, optimizer, 2)
        g, named = gradients_of(model, interventions.loss(model, pair(), DPO())), dict(model.named_parameters())
        moved = own_part(optimizer, named, g)
        P = {n: torch.where(g[n] == 0, 0, moved[n] / -g[n]) / 1e-3 for n in g}  # where nothing pulls no token does
        found = forces(model, pair(), OBSERVED, DPO(), optimizer=optimizer)
        rows = [gradients_of(model, lp) for lp in log_probs(model, OBSERVED)]
        columns = [gradients_of(model, lp) for lp in log_probs(model, pair())]
        truth = torch.stack([
            torch.stack([sum((o[n] * P[n] * u[n]).sum() for n in P) * c for u, c in zip(columns, found.c, strict=True)])
            for o in rows
        ])  # fmt: skip
    # moved is a difference of weights of size 1, so that P carries a rounding of eps/(lr |P g|), Adam's steps being of size lr
    assert relative_error(found.matrix, truth) < 1e-8


@pytest.mark.parametrize("name", ["RMSprop", "RMSprop, centered", "Adam", "AdamW, amsgrad"])
@pytest.mark.parametrize("kind", ["tied", "untied, biases", "lora"])
def test_preconditioned_forces_agree_between_methods(kind, name):
    model = {
        "tied": lambda: tiny("llama"),
        "lora": lambda: tiny_lora("llama"),
        "untied, biases": lambda: tiny("gpt2", tied=False),
    }[kind]()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, 1)
    naive = forces(model, pair(), OBSERVED, DPO(), method="naive", optimizer=optimizer).matrix
    assert relative_error(forces(model, pair(), OBSERVED, DPO(), optimizer=optimizer).matrix, naive) < FP32
    for reduce, axis in (("update", 1), ("observe", 0)):
        vector = forces(model, pair(), OBSERVED, DPO(), optimizer=optimizer, reduce=reduce).vector
        # rounding of a sum is relative to the sum of magnitudes
        assert float((vector - naive.sum(axis)).norm()) < FP32 * float(naive.abs().sum(axis).norm())
    assert relative_error(naive, forces(model, pair(), OBSERVED, DPO(), method="naive").matrix) > 0.1


def test_the_parts_of_a_step_add_up_under_an_optimizer():
    """P is that of the whole gradient whatever the scope, also of a tied weight, so that scopes remain parts of one step."""
    with float64():
        model = tiny("llama").double()
        optimizer = OPTIMIZERS["Adam"](model)
        scopes = ("full", r"layers", r"^(?!.*layers)")
        whole, *parts = (forces(model, pair(), OBSERVED, DPO(), optimizer=optimizer, scope=s).matrix for s in scopes)
        assert relative_error(parts[0] + parts[1], whole) < 1e-11
        head, lookup = (forces(model, pair(), OBSERVED, DPO(), optimizer=optimizer, scope=s) for s in ("readout", "backbone"))
        assert head.matrix.isfinite().all() and lookup.matrix.isfinite().all()


def test_predict_asks_for_a_step_size_where_no_optimizer_gave_one(tmp_path):
    model = tiny("llama")
    plain = forces(model, pair(), OBSERVED, DPO(), reduce="update")
    with pytest.raises(ValueError, match=r"predict\(eta\), or forces\(optimizer=...\)"):
        plain.predict()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    found = forces(model, pair(), OBSERVED, DPO(), reduce="update", optimizer=optimizer)
    assert torch.equal(found.predict(), found.predict(0.25)) and torch.equal(found.predict(), 0.25 * found.vector)
    found.save(tmp_path / "kept")
    assert torch.equal(td.Forces.load(tmp_path / "kept").predict(), found.predict())
