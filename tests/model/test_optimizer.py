"""The diagonal of a step: what torch's optimizers make of a gradient at frozen second moments."""

import pytest
import torch
from torch import nn

from tokdyn.model.optimizer import preconditioner, steps_of

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
G = torch.Generator()


def trained_parameters():
    G.manual_seed(0)
    return dict(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double().named_parameters())


def step(optimizer, trained, gradients):
    """Take a step with these gradients; what it did, by name."""
    before = {name: p.detach().clone() for name, p in trained.items()}
    for name, p in trained.items():
        p.grad = gradients[name].clone()
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in trained.items()}


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
        steps, P = steps_of(optimizer, trained), preconditioner(optimizer, trained)
        for n, p in trained.items():
            momentum = group["lr"] * past[n]  # RMSprop's buffer holds gradients that are already times their P
            if "betas" in group:
                momentum *= P[n] / (1 - group["betas"][0] ** float(optimizer.state[p]["step"]))
            # θ is of size 1 and Δθ its difference: a few roundings of θ
            assert torch.allclose(moved[n], -steps[n] * g[n] - momentum, rtol=1e-12, atol=8 * torch.finfo(torch.float64).eps)


def test_frozen_parameters_have_no_diagonal():
    trained = trained_parameters()
    some = {"1.weight": trained["1.weight"]}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    assert preconditioner(optimizer, some).keys() == steps_of(optimizer, some).keys() == {"1.weight"}
    assert torch.equal(steps_of(optimizer, some)["1.weight"], torch.full((2, 3), 0.5, dtype=torch.float64))


def test_what_has_no_diagonal_is_said():
    trained = trained_parameters()
    parameters = list(trained.values())
    with pytest.raises(ValueError, match="parameter 1.weight is trainable but the optimizer does not hold it"):
        preconditioner(torch.optim.SGD(parameters[:2]), trained)
    with pytest.raises(ValueError, match="must be Adam, AdamW, RMSprop or SGD, got Adagrad"):
        preconditioner(torch.optim.Adagrad(parameters), trained)
    with pytest.raises(ValueError, match="no second moment for 0.weight yet: take a step"):
        steps_of(torch.optim.AdamW(parameters), trained)
