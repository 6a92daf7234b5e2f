"""Interventions: a training changed token by token, so that an update does less harm elsewhere, or more of what it is meant to.

An intervention is a weight on the gradient of each update token, G_l -> w_l G_l, hence F[m,l] -> w_l F[m,l]; or another loss.

    nthr              spares the tokens of wrong rollouts that the right ones share (Deng et al., arXiv 2505.18830)
    force_weights     spares the update tokens whose exact force on a protected probe is worst
    both_answers      extended SFT: the rejected answer is learned too, before DPO (Ren & Sutherland, arXiv 2407.10490)
    loss              any objective as a loss to train on: SimKO (CaSP), LLDS, or one of your own
    weigh, weighted   apply weights: to log-probs of your own, or to whatever log-probs or logits a forward pass makes

In a plain loop, with Adam's own direction:

    w = force_weights(model, update, protect, objective, optimizer=optimizer)
    loss(model, update, objective, weights=w).backward()

In a Trainer see integrations/intervene.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ._encoding import Text
from .forces import forces
from .objective import Objective, Scores
from .objectives import SFT
from .sequences import Chi, by_group, collate, required_advantage
from .training.weighting import TokenWeights

# ---------------------------------------------------------------- which tokens


def nthr_scores(model: nn.Module, rollouts: Sequence[Chi], *, scope: str = "readout") -> Float[Tensor, " L"]:
    """How much each rollout token shares with the right answers to its prompt, s_k = Σ_i Σ_k' <g_k', g_k> <h_k', h_k>.

    The sum runs over all tokens k' of all right answers i (A_i > 0) of the group, g = e_y - pi. It is the readout force of
    token k, pulled up with c = 1, on the right answers' log-probability: <∇_W Σ_i log pi(y_i), ∇_W log pi(y_k)>.

    Args:
        model: a causal LM.
        rollouts: sampled answers with advantages, several prompts (groups) together if you like.
        scope: "readout" is the paper's; "full" takes all parameters.

    Returns:
        One score for each scored token of all rollouts [L], 0 in a group without a right answer.

    Raises:
        ValueError: a rollout without advantage.

    Cost: one pass over each group for the readout, a backward and a tangent pass besides for "full".
    """
    scores, advantages = [torch.zeros(len(chi)) for chi in rollouts], _advantages(rollouts)
    for members in by_group(rollouts):
        right = [rollouts[i] for i in members if advantages[i] > 0]
        if right:
            f = forces(model, [rollouts[i] for i in members], right, SFT(), scope=scope, reduce="observe").vector
            assert f is not None
            for i, part in zip(members, f.cpu().split([len(rollouts[i]) for i in members]), strict=True):
                scores[i] = part
    return torch.cat(scores)


def nthr(
    model: nn.Module, rollouts: Sequence[Chi], *, beta: float = 1.0, scale: float = 0.5, scope: str = "readout"
) -> Float[Tensor, " L"]:
    """Weights that spare the tokens of wrong rollouts which the right ones share (negative token hidden reward, NTHR).

    w_k = scale for tokens of wrong answers (A < 0) with s_k > τ, and 1 elsewhere. τ = β · the least mean score of a right
    answer of the group: shared is what weighs as much as a right answer's own tokens (arXiv 2505.18830, section 5).

    Args:
        model, rollouts, scope: as in `nthr_scores`.
        beta: the smaller, the more tokens are spared.
        scale: what is left of their gradient.

    Returns:
        Weights [L], 1 in groups that lack right or wrong answers.

    Raises:
        ValueError: a rollout without advantage, or scale outside [0, 1].
    """
    _check_scale(scale)
    scores = nthr_scores(model, rollouts, scope=scope).split([len(chi) for chi in rollouts])
    weights, advantages = [torch.ones(len(chi)) for chi in rollouts], _advantages(rollouts)
    for members in by_group(rollouts):
        means = [float(scores[i].mean()) for i in members if advantages[i] > 0]
        for i in members:
            if means and advantages[i] < 0:
                weights[i][scores[i] > beta * min(means)] = scale
    return torch.cat(weights)


def force_weights(
    model: nn.Module,
    update: Sequence[Chi],
    protect: Sequence[Chi],
    objective: Objective,
    *,
    share: float = 0.1,
    scale: float = 0.0,
    **options: Any,
) -> Float[Tensor, " L"]:
    """Weights that spare the update tokens whose exact force on protected sequences is worst.

    F_l = Σ_m F[m,l] over the protected tokens m; w_l = scale for the tokens with the most negative F_l, and 1 elsewhere. To
    first order the protected log-probability then changes by eta Σ_l w_l F_l >= eta Σ_l F_l, with room to spare wherever a
    token was spared. Under an Adam or RMSprop that holds at the unweighted step's P; the weighted step has another v', most of
    all before the first step, where P = 1/|g| and a token's share of it says little of what the step would be without
    the token: give no optimizer there.

    Args:
        model: a causal LM.
        update, objective: what is trained on and with what loss, as in `forces`.
        protect: the sequences that are not to lose.
        share: at most so much of all update tokens is spared.
        scale: what is left of their gradient.
        options: of `forces`: scope, optimizer (its coming step is what counts), reference.

    Returns:
        Weights [L].

    Raises:
        ValueError: as `forces`; share or scale outside [0, 1].

    Cost: one backward pass over the protected sequences and one tangent pass over the update.
    """
    f = forces(model, update, protect, objective, reduce="observe", **options).vector
    assert f is not None
    return spare(f, share=share, scale=scale).cpu()


def spare(f: Float[Tensor, " L"], *, share: float = 0.1, scale: float = 0.0) -> Float[Tensor, " L"]:
    """Weights: `scale` for the most negative forces, at most the given share of all, and 1 elsewhere.

    Raises:
        ValueError: share or scale outside [0, 1].
    """
    _check_scale(scale)
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    weights, worst = torch.ones_like(f), f.argsort()[: int(share * len(f))]
    weights[worst[f[worst] < 0]] = scale
    return weights


def both_answers(rows: Sequence[Mapping[str, Text]]) -> list[dict[str, Text]]:
    """Rows for extended SFT: each pair becomes two completions of its prompt, the chosen and the rejected answer.

    Learning both lifts the rejected answers from the floor where pushing them down squeezes hardest, and lets the DPO that
    follows keep more of the chosen ones (arXiv 2407.10490, section 5). SFTTrainer, `data.sequences` and `td.encode` take them.

    Raises:
        ValueError: a row lacks prompt, chosen or rejected.
    """
    made: list[dict[str, Text]] = []
    for n, row in enumerate(rows, 1):
        if missing := [key for key in ("prompt", "chosen", "rejected") if row.get(key) is None]:
            raise ValueError(f"row {n} lacks {', '.join(missing)}: extended SFT needs preference pairs")
        made += [{"prompt": row["prompt"], "completion": row[key]} for key in ("chosen", "rejected")]
    return made


# ---------------------------------------------------------------- losses


def loss(
    model: nn.Module,
    chis: Sequence[Chi],
    objective: Objective,
    *,
    weights: Float[Tensor, " L"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """An objective as a loss to train on, from one forward pass and differentiable.

    Its gradient at the logits is w_l G_l with the G of `td.forces`, so what was predicted is what is done. The objective's sum
    over groups stays a sum: divide for a mean.

    Args:
        model: a causal LM; wrappers are called as they are.
        chis: the sequences, as the objective needs them.
        objective: one of td.objectives, for instance SimKO() or LLDS().
        weights: weight of each scored token's gradient [L].
        temperature: what the logits are divided by.

    Raises:
        ValueError: weights of another length, or sequences that do not fit the objective.
    """
    L = sum(len(chi) for chi in chis)
    if weights is not None and weights.shape != (L,):
        raise ValueError(f"weights must have shape [L]=({L},), one per scored token, got {list(weights.shape)}")
    batch = collate(chis)
    device = next(model.parameters()).device
    logits = model(input_ids=batch.ids.to(device), use_cache=False).logits.flatten(0, 1)[batch.rows.to(device)]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    w = None if weights is None else weights.to(logits)
    log_pi = (logits / temperature).log_softmax(-1)
    log_pi = log_pi if w is None else weigh(log_pi, w[:, None])
    log_probs = log_pi.gather(1, batch.targets.to(device)[:, None]).squeeze(1)

    def top(k: int) -> tuple[Tensor, Tensor]:
        ids = log_pi.detach().topk(k, 1).indices
        return log_pi.gather(1, ids), ids

    scores = Scores.needed(
        objective,
        entropy=lambda: torch.special.entr(log_pi.exp()).sum(1),
        mean_log_prob=lambda: log_pi.mean(1),
        candidates=top,
    )
    return objective.loss(log_probs, chis, scores)


# ---------------------------------------------------------------- applying weights


def weigh(log_probs: Tensor, weights: Tensor) -> Tensor:
    """The same log-probs with each one's gradient times its weight: c_l -> w_l c_l, whatever loss is made of them.

    Args:
        log_probs: of any shape.
        weights: of the same shape, or one that broadcasts to it; no gradient flows to them.

    Raises:
        ValueError: the shapes do not fit.
    """
    try:
        w = weights.detach().expand(log_probs.shape)
    except RuntimeError:
        raise ValueError(f"weights {list(weights.shape)} do not fit log-probs {list(log_probs.shape)}") from None
    same = log_probs.view_as(log_probs)
    if same.requires_grad:
        same.register_hook(lambda grad: grad * w.to(grad))
    return same


@contextlib.contextmanager
def weighted(model: nn.Module, weights: Float[Tensor, "B T"]) -> Iterator[None]:
    """Forward passes with gradients inside have the gradient of every token of the batch times its weight: G_l -> w_l G_l.

    Outputs stay as they are, bit for bit. The loss may be anything made of them: a Trainer's, one inside the model, log-probs
    and entropies of a fused head. backward() may come after. A td.Monitor records the weighted c.

    Args:
        model: a causal LM, or PEFT's, DDP's or torch.compile's wrapper of one.
        weights: one for each token of the batch as the model's ids stand, [B, T]; a token is scored by the logits before it.

    Raises:
        ValueError: the batch has another shape, or neither log-probs nor logits appear (a loss fused with the readout).
    """
    hooks = TokenWeights(model, weights)
    hooks.install()
    try:
        yield
    finally:
        hooks.remove()


# ---------------------------------------------------------------- inside


def _advantages(rollouts: Sequence[Chi]) -> list[float]:
    message = "NTHR tells right from wrong rollouts by their advantage: build them with td.rollouts(...)"
    return [required_advantage(chi, message) for chi in rollouts]


def _check_scale(scale: float) -> None:
    if not 0 <= scale <= 1:
        raise ValueError(f"scale must lie in [0, 1], got {scale}")
