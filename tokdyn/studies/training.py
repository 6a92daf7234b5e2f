"""Small plain training loops for the language studies: every loss is one of `td.objectives`, every step is written out.

    for chis in batches(train, 8, seed):
        step(model, optimizer, td.objectives.SFT(), chis)

Losses are sums over tokens, pairs or groups as the objectives define them; `step` divides by `mean_over`, so that a learning
rate means the same for batches of every size.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import tokdyn as td

from ..interventions import loss
from ..objectives import Objective
from ..sequences import collate


def logits(model: nn.Module, chis: Sequence[td.Chi]) -> Float[Tensor, "N V"]:
    """The logits that predict each scored token of the sequences, from one padded forward pass."""
    batch = collate(chis)
    return model(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1)[batch.rows]


def targets(chis: Sequence[td.Chi]) -> Tensor:
    """The scored tokens of the sequences, one after the other."""
    return torch.cat([chi.ids[chi.scored] for chi in chis])


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    chis: Sequence[td.Chi],
    *,
    mean_over: float = 1.0,
    weights: Float[Tensor, " L"] | None = None,
) -> float:
    """One optimizer step on the loss divided by `mean_over`, each token's gradient times its weight; returns the loss."""
    value = loss(model, chis, objective, weights=weights) / mean_over
    optimizer.zero_grad()
    if value.requires_grad:  # a batch of groups without any advantage has no gradient
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(value.detach())


def adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam without weight decay, so that the data alone moves the weights."""
    return torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)


def batches(items: Sequence[Any], size: int, seed: int, *, epochs: int) -> Iterator[list[Any]]:
    """The items in batches, in a new order each epoch."""
    order = random.Random(seed)
    for _ in range(epochs):
        shuffled = list(items)
        order.shuffle(shuffled)
        yield from (shuffled[i : i + size] for i in range(0, len(shuffled), size))


def sft(model: nn.Module, chis: Sequence[td.Chi], *, epochs: int, lr: float, seed: int) -> None:
    """Supervised training on all scored tokens; the loss is the mean over a batch's tokens."""
    optimizer, objective = adam(model, lr), td.objectives.SFT()
    for batch in batches(chis, 8, seed, epochs=epochs):
        step(model, optimizer, objective, batch, mean_over=sum(len(chi) for chi in batch))


def with_reference(model: nn.Module, chis: Sequence[td.Chi]) -> list[td.Chi]:
    """The sequences with the model's own log-probabilities as log pi_ref."""
    parts = log_probs(model, chis)
    return [chi.with_(reference_log_probs=part) for chi, part in zip(chis, parts, strict=True)]


@torch.no_grad()
def log_probs(model: nn.Module, chis: Sequence[td.Chi], size: int = 32) -> list[Tensor]:
    """log pi of the scored tokens of each sequence."""
    return [part for part, _ in _read(model, chis, size)]


@dataclass(frozen=True)
class Reading:
    """Log-probabilities of a set of sequences, nats, the mean over a sequence's scored tokens.

    log_prob: of the sequence's own tokens; argmax: of the most likely token at each position.
    """

    log_prob: Float[Tensor, " S"]
    argmax: Float[Tensor, " S"]


@torch.no_grad()
def read(model: nn.Module, chis: Sequence[td.Chi], size: int = 32) -> Reading:
    """Mean log-probability per token of each sequence, and of the argmax along it."""
    parts = _read(model, chis, size)
    return Reading(torch.stack([y.mean() for y, _ in parts]), torch.stack([top.mean() for _, top in parts]))


def _read(model: nn.Module, chis: Sequence[td.Chi], size: int) -> list[tuple[Tensor, Tensor]]:
    """(log-probs of the targets, log-probs of the argmax) of each sequence; `size` of similar length share a batch."""
    order = sorted(range(len(chis)), key=lambda i: chis[i].ids.numel())
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for start in range(0, len(order), size):
        members = order[start : start + size]
        some = [chis[i] for i in members]
        stats = td.ops.token_stats(logits(model, some), targets(some))
        sizes = [len(chi) for chi in some]
        found |= dict(
            zip(members, zip(stats.log_prob.split(sizes), stats.argmax_log_prob.split(sizes), strict=True), strict=True)
        )
    return [found[i] for i in range(len(chis))]


@torch.no_grad()
def hidden(model: nn.Module, chis: Sequence[td.Chi]) -> list[Tensor]:
    """The hidden states that enter the readout to predict each scored token, [n, d] for each sequence."""
    found = []
    for chi in chis:
        h = model(input_ids=chi.ids[None], output_hidden_states=True, use_cache=False).hidden_states[-1][0]
        found.append(h[chi.scored.nonzero().squeeze(1) - 1])
    return found


@torch.no_grad()
def sample(model: Any, prompts: Sequence[Sequence[int]], *, length: int, end: int, seed: int) -> list[list[int]]:
    """One response to each prompt, sampled at temperature 1, without the end token; prompts of one length share a batch."""
    generator = torch.Generator().manual_seed(seed)
    responses: list[list[int]] = [[] for _ in prompts]
    for n in sorted({len(p) for p in prompts}):
        alive = [i for i, p in enumerate(prompts) if len(p) == n]
        ids, cache = torch.tensor([list(prompts[i]) for i in alive]), None
        for _ in range(length):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            ids = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)
            going = [k for k, token in enumerate(ids[:, 0].tolist()) if token != end]
            for k in going:
                responses[alive[k]].append(int(ids[k, 0]))
            if not going:
                break
            if len(going) < len(alive):
                cache.batch_select_indices(torch.tensor(going))
                ids, alive = ids[going], [alive[k] for k in going]
    return responses
