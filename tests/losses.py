"""Sequences with random log-probs for losses to read: what the tests of objectives share."""

import torch

from tokdyn import Chi
from tokdyn.objectives import Scores

V, U = 13, torch.finfo(torch.float64).eps
ORACLE = 1e-8

# (role, group, scored tokens, advantage): unequal lengths, interleaved groups, a response of one token
PAIRS = [("rejected", 7, 4, None), ("chosen", 2, 3, None), ("chosen", 7, 6, None), ("rejected", 2, 5, None),
         ("chosen", 4, 1, None), ("rejected", 4, 2, None)]  # fmt: skip
ROLLOUTS = [("response", 0, 6, 1.2), ("response", 5, 4, -0.9), ("response", 0, 3, -0.7), ("response", 5, 7, 0.9),
            ("response", 0, 5, -0.5)]  # fmt: skip


def problem(reads, seed=0):
    """Chis with random reference and old log-probs, and the random logits [L, V] that score their tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    chis, logits = [], []
    for i, (role, group, n, advantage) in enumerate(ROLLOUTS if reads == "rollouts" else PAIRS):
        z = 2 * normal(n, V)
        y = torch.randint(0, V, (n,), generator=generator)
        if i == 1:
            y = z.argmax(1)  # a response whose tokens are all of rank 1
        lp = z.log_softmax(1).gather(1, y[:, None])[:, 0]
        prompt = torch.randint(0, V, (2,), generator=generator)
        chis.append(
            Chi(torch.cat([prompt, y]), torch.arange(n + 2) >= 2, role=role, group=group, advantage=advantage,
                reference_log_probs=lp + 0.5 * normal(n), old_log_probs=lp + 0.3 * normal(n))
        )  # fmt: skip
        logits.append(z)
    return chis, torch.cat(logits)


def read(logits, chis):
    """What a loss may read of the logits, all of it differentiable."""
    log_pi = logits.log_softmax(1)
    y = torch.cat([chi.ids[chi.scored] for chi in chis])
    top = log_pi.detach().topk(3).indices
    entropy = -(log_pi.exp() * log_pi).sum(1)
    return log_pi.gather(1, y[:, None])[:, 0], Scores(entropy, log_pi.mean(1), top, log_pi.gather(1, top))


def each(x, chis):
    return x.split([len(chi) for chi in chis])


def close(value, truth):
    return torch.allclose(value, torch.as_tensor(truth, dtype=value.dtype), rtol=0, atol=ORACLE)
