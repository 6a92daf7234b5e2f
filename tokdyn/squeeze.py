"""Squeezing: where the probability mass goes when a softmax readout takes a step on one token.

One step of size eta on the readout alone moves the logits of the same hidden state by strength · Σ_k c_k (e_{y_k} - pi),
strength = eta ‖h‖². Pushing an unlikely token down (c < 0) takes mass from nearly every token and gives it to the argmax
(Ren & Sutherland, arXiv 2407.10490, §3.3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .exact import ScoredProblem
from .kernels.readout_forces.reference import logit_force
from .ops import token_stats
from .ops.rows import at_once


def step(
    logits: Float[Tensor, "*t V"], targets: Int[Tensor, "*y"], c: Float[Tensor, "*y"], strength: float | Tensor
) -> Float[Tensor, "*t V"]:
    """Logits after one readout step, z + strength Σ_k c_k (e_{y_k} - pi), in the dtype of the logits.

    Args:
        logits: [.., V].
        targets: [..] or [.., K] token ids.
        c: their weights, the same shape; positive pulls up, negative pushes down.
        strength: eta ‖h‖², a number or a tensor [..].

    Raises:
        ValueError: targets and c differ in shape, or do not fit the logits.
    """
    lead = logits.shape[:-1]
    if targets.shape != c.shape or targets.shape[: len(lead)] != lead or targets.dim() - len(lead) not in (0, 1):
        raise ValueError(
            f"targets and c must both have shape {list(lead)} or {[*lead, 'K']}, got {list(targets.shape)} and {list(c.shape)}"
        )
    V = logits.shape[-1]
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    K = targets.shape[len(lead) :].numel()
    force = logit_force(wide.reshape(-1, V), targets.reshape(-1, K), c.reshape(-1, K)).reshape(wide.shape)
    size = torch.as_tensor(strength, dtype=wide.dtype, device=wide.device)
    return (wide + size[..., None] * force).to(logits.dtype)


class Squeeze(NamedTuple):
    """What one readout step does to a distribution, each [T]; probabilities and shares.

    target_before, target_after: pi of the target. argmax_before, argmax_after: pi of the token that was the argmax.
    argmax_gain: argmax_after - argmax_before. falling: share of the tokens other than the target that lose probability.
    predicted_falling: the same share by the first-order sign rule, p_i < ‖p‖² - p_y for c < 0.
    """

    target_before: Tensor
    target_after: Tensor
    argmax_before: Tensor
    argmax_after: Tensor
    argmax_gain: Tensor
    falling: Tensor
    predicted_falling: Tensor


@torch.no_grad()
def diagnose(
    logits: Float[Tensor, "T V"], targets: Int[Tensor, " T"], c: Float[Tensor, " T"], strength: float | Float[Tensor, " T"]
) -> Squeeze:
    """Squeezing of each position under one readout step on its own token, for a readout without softcap.

    Arguments as in `step`, one target a position. Cost: two passes over the logits, no softmax is stored.
    """
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return compare(wide, step(wide, targets, c, strength), targets, c)


@torch.no_grad()
def compare(
    logits: Float[Tensor, "T V"], moved: Float[Tensor, "T V"], targets: Int[Tensor, " T"], c: Float[Tensor, " T"]
) -> Squeeze:
    """Squeezing between the logits before and after a step; c is the weight of the target in that step.

    Neither softmax is stored: token i ≠ y falls where its logit moves by less than the log-sum-exp does, and the sign rule
    is a bound on its logit, p_i < ‖p‖² - p_y being z_i < logsumexp + log(‖p‖² - p_y).
    """
    y = targets[:, None]
    before, after = token_stats(logits, targets), token_stats(moved, targets)
    lse = before.logsumexp
    p_y, p_top = before.log_prob.exp(), before.argmax_log_prob.exp()
    top = before.argmax.clamp(min=0)[:, None]  # -1 marks a NaN, which every other number shows
    q_top = (moved.gather(1, top).squeeze(1) - after.logsumexp).exp()
    falls = moved - logits < (after.logsumexp - lse)[:, None]
    bound = (lse + (before.collision - p_y).clamp(min=0).log())[:, None]
    rule = torch.where(c[:, None] < 0, logits < bound, logits > bound)
    count = max(logits.shape[1] - 1, 1)

    def share(which: Tensor) -> Tensor:
        return (which.sum(1) - which.gather(1, y).squeeze(1).long()).to(lse) / count * (c != 0)

    return Squeeze(p_y, after.log_prob.exp(), p_top, q_top, q_top - p_top, share(falls), share(rule))


def sign_rule(p: Float[Tensor, "T V"], targets: Int[Tensor, " T"], c: Float[Tensor, " T"]) -> Float[Tensor, "T V"]:
    """First-order Δ log p per unit strength for every token, -c (p_i - ‖p‖² + p_y) for i ≠ y and c (1 - 2p_y + ‖p‖²) at y.

    For a negative step (c = -1) token i ≠ y falls if and only if p_i < ‖p‖² - p_y.
    """
    collision = p.square().sum(1, keepdim=True)
    p_y = p.gather(1, targets[:, None])
    rest = -(p - collision + p_y)
    return c[:, None] * rest.scatter(1, targets[:, None], 1 - 2 * p_y + collision)


@torch.no_grad()
def of_updates(problem: ScoredProblem, eta: float) -> Squeeze:
    """Each update token's own step of size eta on the readout weight, through scale and softcap: W h moves by eta ‖h‖² Γ."""
    u, head, parts = problem.updated, problem.tracer.readout, []
    for batch, term in zip(u.batches, u.terms, strict=True):
        hidden, targets = problem.tracer.hidden(batch), batch.targets.to(head.weight.device)
        for rows in torch.arange(len(hidden), device=hidden.device).split(at_once(len(head.weight), hidden.device)):
            h, own = hidden[rows], term.rows(rows)
            z = head.logits(h)
            force = head.pull_back(z, own.logit_force(z))
            after = head.cap(head.uncapped(h) + head.scale * eta * h.square().sum(1, keepdim=True) * force)
            parts.append(compare(z, after, targets[rows], own.own_c))
    return Squeeze(*(torch.cat(column) for column in zip(*parts, strict=True)))
