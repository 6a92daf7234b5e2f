"""What an optimizer's own step() makes of a gradient: the oracle of every number that takes an optimizer."""

import copy
from contextlib import contextmanager

import torch


def step(optimizer, trained, gradients):
    """Take a step with these gradients; what it did, by name."""
    before = {name: p.detach().clone() for name, p in trained.items()}
    for name, p in trained.items():
        p.grad = gradients[name].clone()
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in trained.items()}


def forgetful(optimizer, trained, scale=1.0):
    """Copies of optimizer and parameters that have forgotten past gradients but not their squares; learning rates scaled."""
    twins = copy.deepcopy(trained)
    twin = type(optimizer)(list(twins.values()))
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    twin.param_groups = [groups[id(p)] | {"params": [twins[n]], "lr": groups[id(p)]["lr"] * scale} for n, p in trained.items()]
    for n, p in trained.items():
        if p in optimizer.state:
            twin.state[twins[n]] = copy.deepcopy(optimizer.state[p])
            for kept in ("exp_avg", "momentum_buffer"):
                if twin.state[twins[n]].get(kept) is not None:
                    twin.state[twins[n]][kept].zero_()
    return twin, twins


def own_part(optimizer, trained, gradients, scale=1.0):
    """What the optimizer's real step makes of this gradient, by name: its past gradients forgotten, its decay taken out."""
    twin, twins = forgetful(optimizer, trained, scale)
    moved, groups = step(twin, twins, gradients), {id(p): group for group in twin.param_groups for p in group["params"]}
    for n, p in twins.items():
        group, theta = groups[id(p)], trained[n].detach()
        decay = group.get("weight_decay", 0)
        if group.get("decoupled_weight_decay"):
            moved[n] = moved[n] + group["lr"] * decay * theta
        elif decay:  # the step is a diagonal times (±g + λθ): the share of g in it
            g = -gradients[n] if group["maximize"] else gradients[n]
            moved[n] = moved[n] * g / (g + decay * theta)
    return moved


def log_probs(model, chis):
    """log pi of all scored tokens, by the model's own forward pass."""
    rows = []
    for chi in chis:
        at = chi.scored.nonzero().squeeze(1)
        rows.append(model(chi.ids[None]).logits[0].log_softmax(-1)[at - 1, chi.ids[at]])
    return torch.cat(rows)


def gradients_of(model, value):
    """∇ of a value by name, zero where it does not reach."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


@contextmanager
def moved_by(model, moved):
    """The model with its parameters moved, and as it was again."""
    named = dict(model.named_parameters())
    before = {n: named[n].detach().clone() for n in moved}
    try:
        with torch.no_grad():
            for n, x in moved.items():
                named[n] += x
        yield model
    finally:
        with torch.no_grad():
            for n, x in before.items():
                named[n].copy_(x)


@torch.no_grad()
def first_order_change(model, optimizer, gradients, observe, scale=1e-3):
    """d log pi(observed)/ds at s = 0 as the optimizer steps on this gradient with all learning rates times s, [M].

    Two real steps at `scale` and half of it, extrapolated: the error is of second order in the change that they make.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before, slopes = log_probs(model, observe), []
    for s in (scale, scale / 2):
        with moved_by(model, own_part(optimizer, named, gradients, s)):
            slopes.append((log_probs(model, observe) - before) / s)
    return 2 * slopes[1] - slopes[0]
