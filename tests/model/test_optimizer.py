"""The diagonal of a step, before and after it: what torch's optimizers make of a gradient, by their own step()."""

import copy

import pytest
import torch
from real_steps import own_part, step
from torch import nn

from tokdyn.model.optimizer import learning_rate, preconditioner, steps_of, without_buffer
from tokdyn.testing import relative_error

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD, maximize": lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.95)),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0, maximize=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.5),
}
DECAYING = {  # with decay in the gradient, and apart from it
    "SGD, decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.2),
    "Adam, decay": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.2, amsgrad=True),
    "Adam, decay, maximize": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.2, maximize=True),
    "AdamW, decay": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2),
    "RMSprop, decay": lambda p: torch.optim.RMSprop(p, lr=0.1, weight_decay=0.2, centered=True),
}
G = torch.Generator()


def trained_parameters():
    G.manual_seed(0)
    return dict(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double().named_parameters())


def gradients_like(trained):
    return {name: torch.randn(p.shape, dtype=p.dtype, generator=G) for name, p in trained.items()}


def carried(optimizer, p):
    """What past gradients leave in the buffer that the coming step moves along, before it is scaled."""
    state, group = optimizer.state[p], optimizer.param_groups[0]
    if "betas" in group:
        return group["betas"][0] * state["exp_avg"]
    if state.get("momentum_buffer") is None:
        return torch.zeros_like(p)
    return group["momentum"] * state["momentum_buffer"] * (group["momentum"] if group.get("nesterov") else 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_diagonal_times_its_gradient_and_what_it_carries(name):
    """Δθ = -steps ⊙ g - (what momentum carries), with v and t as they stand after the step."""
    trained = trained_parameters()
    optimizer = OPTIMIZERS[name](trained.values())
    group = optimizer.param_groups[0]
    step(optimizer, trained, gradients_like(trained))  # with momentum torch starts the buffers at this step's gradient
    for _ in range(2):
        past = {n: carried(optimizer, p).clone() for n, p in trained.items()}
        g = gradients_like(trained)
        moved = step(optimizer, trained, g)
        steps = steps_of(optimizer, trained)
        for n in trained:
            momentum = group["lr"] * past[n]  # RMSprop's buffer holds gradients that are already times their P
            if "betas" in group:
                momentum = steps[n].abs() / (1 - group["betas"][0]) * past[n]
            # θ is of size 1 and Δθ its difference: a few roundings of θ
            assert torch.allclose(moved[n], -steps[n] * g[n] - momentum, rtol=1e-12, atol=8 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS | DECAYING)
def test_the_coming_step_is_minus_lr_P_times_its_gradient(name, before):
    """By the optimizer's own step() on a copy, in float64, with rows that no step before has touched."""
    trained = trained_parameters()
    optimizer = (OPTIMIZERS | DECAYING)[name](trained.values())
    for _ in range(before):
        past = gradients_like(trained)
        past["0.weight"][1:] = 0
        step(optimizer, trained, past)
    g = gradients_like(trained)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(trained)
    P, lr = preconditioner(optimizer, trained, g), learning_rate(optimizer, trained)
    assert str(optimizer.state_dict()) == str(state) and all(torch.equal(trained[n], weights[n]) for n in trained)
    for n, moved in own_part(optimizer, trained, g).items():
        # θ is of size 1 and Δθ its difference: a few roundings of θ, times g/(g + λθ) where decay is a part of the gradient
        assert torch.allclose(-lr * P[n] * g[n], moved, rtol=1e-12, atol=1e3 * torch.finfo(torch.float64).eps)


def test_groups_step_at_their_own_learning_rates_and_counts():
    trained = trained_parameters()
    first, second = {n: trained[n] for n in ("0.weight", "0.bias")}, {n: trained[n] for n in ("1.weight", "1.bias")}
    optimizer = torch.optim.AdamW([{"params": first.values(), "lr": 0.1}, {"params": second.values(), "lr": 0.004}])
    for _ in range(2):
        step(optimizer, first, gradients_like(first))
    g = gradients_like(trained)
    P = preconditioner(optimizer, trained, g)
    assert learning_rate(optimizer, trained) == 0.1 and learning_rate(optimizer, second) == 0.004
    for n, moved in own_part(optimizer, trained, g).items():
        assert torch.allclose(-0.1 * P[n] * g[n], moved, rtol=1e-12, atol=8 * torch.finfo(torch.float64).eps)
    for group in optimizer.param_groups:  # before a warm-up: shares are unknown, and then alike
        group["lr"] = 0.0
    assert all(bool((x > 0).all() and x.isfinite().all()) for x in preconditioner(optimizer, trained, g).values())


@pytest.mark.parametrize("before", [0, 1])
def test_what_a_step_leaves_says_what_was_read_before_it(before):
    """`preconditioner` before a step and `steps_of` after it are one thing, up to the learning rate; the first step too."""
    trained = trained_parameters()
    for make in OPTIMIZERS.values():
        optimizer = make(trained.values())
        for _ in range(before):
            step(optimizer, trained, gradients_like(trained))
        g = gradients_like(trained)
        P, lr, first = preconditioner(optimizer, trained, g), learning_rate(optimizer, trained), without_buffer(optimizer)
        step(optimizer, trained, g)
        for n, steps in steps_of(optimizer, trained, first).items():
            assert relative_error(lr * P[n], steps) < 100 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_a_finite_diagonal(dtype):
    """What nothing has pulled has P = 1/ε = 1e8, beyond float16; the rest is the diagonal of the wide weights, rounded."""
    wide = {n: p.detach().to(dtype).double() for n, p in trained_parameters().items()}
    half = {n: p.to(dtype) for n, p in wide.items()}
    g = {n: x.to(dtype) for n, x in gradients_like(wide).items()}
    g["0.weight"][1] = 0
    found, truth = (
        preconditioner(torch.optim.Adam(list(p.values())), p, {n: x.to(p[n]) for n, x in g.items()}) for p in (half, wide)
    )
    for n in half:
        assert found[n].dtype == dtype and bool(found[n].isfinite().all())
        pulled = g[n] != 0
        assert relative_error(found[n][pulled], truth[n][pulled]) <= torch.finfo(dtype).eps


def test_a_gradient_that_is_absent_is_zero():
    trained = trained_parameters()
    optimizer, g = torch.optim.RMSprop(trained.values()), gradients_like(trained)
    step(optimizer, trained, gradients_like(trained))
    whole = preconditioner(optimizer, trained, g | {"0.bias": torch.zeros_like(g["0.bias"])})
    part = preconditioner(optimizer, trained, {n: x for n, x in g.items() if n != "0.bias"})
    assert all(torch.equal(whole[n], part[n]) for n in trained)


def test_frozen_parameters_have_no_diagonal():
    trained = trained_parameters()
    some = {"1.weight": trained["1.weight"]}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    assert preconditioner(optimizer, some, {}).keys() == steps_of(optimizer, some).keys() == {"1.weight"}
    assert torch.equal(steps_of(optimizer, some)["1.weight"], torch.full((2, 3), 0.5, dtype=torch.float64))


def test_what_has_no_diagonal_is_said():
    trained = trained_parameters()
    parameters = list(trained.values())
    with pytest.raises(ValueError, match="parameter 1.weight is trainable but the optimizer does not hold it"):
        preconditioner(torch.optim.SGD(parameters[:2]), trained, {})
    with pytest.raises(ValueError, match="must be Adam, AdamW, RMSprop or SGD, got Adagrad"):
        preconditioner(torch.optim.Adagrad(parameters), trained, {})
    with pytest.raises(ValueError, match="no second moment for 0.weight yet"):
        steps_of(torch.optim.AdamW(parameters), trained)
