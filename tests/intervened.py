"""Answers to train on and the gradients of their tokens, by plain autograd."""

import torch

import tokdyn as td
from tokdyn.testing import random_chis

EPS = torch.finfo(torch.float32).eps
CHOSEN, REJECTED = random_chis([(3, 5), (3, 6)], seed=1, group=0)
PAIR = [CHOSEN.with_(role="chosen"), REJECTED.with_(role="rejected")]
PROTECT = random_chis([(2, 4), (4, 3)], seed=9)


def group(advantages=(1.2, 0.4, -0.9, -0.7), *, seed=3, number=0):
    """Rollouts of one prompt."""
    (prompt,) = random_chis([(3, 1)], seed=seed)
    made = random_chis([(1, 4 + i) for i in range(len(advantages))], seed=seed + 1)
    ids = [torch.cat([prompt.ids[:3], chi.ids[1:]]) for chi in made]
    return [td.Chi(x, torch.arange(len(x)) >= 3, advantage=a, group=number) for x, a in zip(ids, advantages, strict=True)]


ROLLOUTS = group()


def gradient(model, value):
    """∇ of all trainable parameters as one vector."""
    params = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(value, params, allow_unused=True, retain_graph=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(params, grads, strict=True)])


def token_gradients(model, chis):
    """∇ log pi(y_l) of each scored token by plain autograd, [L, P]."""
    rows = []
    for chi in chis:
        log_pi = model(chi.ids[None]).logits[0].log_softmax(-1)
        for t in chi.scored.nonzero().squeeze(1).tolist():
            rows.append(gradient(model, log_pi[t - 1, chi.ids[t]]))
    return torch.stack(rows)
