"""Do equal unconfident tokens of right and wrong answers cancel each other in GRPO, and do other tokens gain by it?

Cheng et al., *The Cancellation Hypothesis in Critic-Free RL* (arXiv 2605.08666): right and wrong answers have like shares of
tokens that rise in training; a token's change is not decided by its own advantage alone, since gradients of other tokens act
on it, chiefly between identical tokens that are both predicted with low confidence; so opposing signals cancel at tokens that
right and wrong answers share, and tokens specific to right answers are reinforced more. Here on sums that the demo model half
solves: exact inner products of the gradients of log pi of every two tokens of a batch of answers to several problems, all
parameters. Pairs behind the same text, which share their Jacobian, are left out where the kinds of pairs are compared.

Asserted: GRPO's forces are these products times c. Measured, over seeds with problems of their own: all of the above, in one
update, to first order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tokdyn as td

from . import answers
from .answers import Row, Tokens, over
from .figures import BLUE, COLOURS, GREY, figure
from .parts import Keep, unkept
from .result import Claim, Estimate, Result, above, below, both, told

PAPER = "arXiv 2605.08666"
LIKELY = 0.5  # probability from which a token is confident
LOW = "equal, unconfident"
KINDS = (LOW, "equal, confident", "different, unconfident", "different, confident")
ALIKE, SOME = 0.1, 0.1  # shares that count as alike, and as more than a few


def run(quick: bool = False, seed: int = 0, model: str = "demo", keep: Keep = unkept, runs: int | None = None) -> Result:
    """Inner products of the gradients of all tokens of a batch of answers.

    Args:
        quick: one seed of 5 prompts; else eight seeds of 12.
        seed: of the first run.
        model: a folder or a hub name.
        keep: where finished seeds are kept (`parts`).
        runs: how many, each with a seed of its own; as above when absent.
    """
    seeds = range(seed, seed + (runs or (1 if quick else 8)))
    return conclude(answers.of_seeds(_seed, model, quick, seeds, keep))


def _seed(model: Any, tokenizer: Any, quick: bool, seed: int) -> list[Row]:
    """A row for each prompt of one GRPO batch: its right answers' tokens against all update tokens of the batch."""
    made = answers.answered(model, tokenizer, 6 if quick else 16, 5 if quick else 12, seed)
    chis = [chi for group in made.groups for chi in group]
    gram = td.forces(made.policy, chis, chis, td.objectives.SFT())  # c = 1: F is the Gram matrix of the gradients
    grpo = td.forces(made.policy, chis, made.groups[0], td.objectives.GRPO())
    K, of, p = answers.matrix(gram), answers.tokens(chis), answers.column(gram.updated, "log_prob").exp()
    F = K * grpo.c.double()
    some = answers.matrix(grpo)
    gap = float((some - F[: len(some)]).norm() / some.norm())
    prompt = torch.tensor([chi.group for chi in chis for _ in range(len(chi))])
    every = {"K": K, "F": F, "p": p}
    return [{"seed": seed, "prompt": n, "gap": gap} | _prompt(every, of, prompt == n) for n in prompt.unique().tolist()]


def _prompt(every: dict[str, Tensor], of: Tokens, here: Tensor) -> Row:
    """One prompt: sizes of each kind of pair, shares of rising tokens, what cancels of the push on right answers' tokens."""
    return _pairs(every["K"], of, every["p"], here) | _flips(every["F"], of, here) | _cancelled(every["F"], of, here)


def _pairs(K: Tensor, of: Tokens, p: Tensor, here: Tensor) -> Row:
    """Mean |<g, g>| of this prompt's right tokens and all wrong ones in other contexts, by kind; nan where there is none."""
    equal, sure = of.token[:, None] == of.token, p >= LIKELY
    across = (here & (of.advantage > 0))[:, None] & (of.advantage < 0) & (of.context[:, None] != of.context)
    low, high = ~sure[:, None] & ~sure, sure[:, None] & sure
    masks = dict(zip(KINDS, (equal & low, equal & high, ~equal & low, ~equal & high), strict=True))
    size = {kind: _mean(K.abs()[mask & across]) for kind, mask in masks.items()}
    return size | {f"{LOW} minus {kind}": size[LOW] - size[kind] for kind in KINDS[1:]}


def _flips(F: Tensor, of: Tokens, here: Tensor) -> Row:
    """Shares of tokens that the update lifts, in right and in wrong answers, and that it moves against their advantage."""
    change = F.sum(1)
    right, wrong = ((change > 0)[here & side].double().mean() for side in (of.advantage > 0, of.advantage < 0))
    return {"rise, right": float(right), "rise, wrong": float(wrong), "rise, difference": float(right - wrong),
            "flipped": float((change * of.advantage < 0)[here].double().mean())}  # fmt: skip


def _cancelled(F: Tensor, of: Tokens, here: Tensor) -> Row:
    """Of the pushes of right and of wrong tokens on a right answer's: the share that cancels, and the mean that is left.

    For tokens that wrong answers to the same prompt have too, and for the others; nan where there is none.
    """
    right, wrong = F[:, of.advantage > 0].sum(1), F[:, of.advantage < 0].sum(1)
    shared, found = torch.isin(of.token, of.token[here & (of.advantage < 0)]), Row()
    for name, kind in (("shared", shared), ("specific", ~shared)):
        at = here & (of.advantage > 0) & kind
        gross, net = (right.abs() + wrong.abs())[at], (right + wrong)[at]
        found[f"cancelled, {name}"] = float(1 - net.abs().sum() / gross.sum()) if len(gross) else float("nan")
        found[f"left, {name}"] = _mean(net)
    for key in ("cancelled", "left"):
        found[f"{key}, difference"] = found[f"{key}, specific"] - found[f"{key}, shared"]
    return found


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else float("nan")


def conclude(rows: list[Row]) -> Result:
    """The study's claims and figure, from one row a prompt."""
    import pyarrow as pa

    size = {kind: over(rows, kind) for kind in KINDS}
    cancelled = {name: over(rows, f"cancelled, {name}") for name in ("shared", "specific")}
    gap = max(row["gap"] for row in rows)
    return Result(
        f"{100 * cancelled['shared'].mean:.0f}% of the push on tokens that right and wrong answers share cancels, "
        f"{100 * cancelled['specific'].mean:.0f}% at the right ones' own",
        [
            Claim(
                "GRPO's forces are the gradients' inner products times c (identity; docs/theory.md, The decomposition)",
                "‖F - <g_m, g_l> c_l‖ / ‖F‖ = 0 up to float32 rounding",
                f"at most {gap:.1e} over {len(rows)} prompts",
                told(gap < 1e-4),
            ),
            *_flipped(rows),
            _coupled(rows, size),
            *_cancels(rows, cancelled),
        ],
        {"prompts": pa.Table.from_pylist(rows)},
        {"cancellation": _figure(size, cancelled)},
        notes=f"{len(rows)} prompts with right and wrong answers among G = {answers.G}. A token is confident from pi = "
        f"{LIKELY} on; it is shared where a wrong answer to the same prompt has its id.",
    )  # fmt: skip


def _flipped(rows: list[Row]) -> list[Claim]:
    """Claims about which tokens rise."""
    right, wrong, apart, flipped = (over(rows, key) for key in ("rise, right", "rise, wrong", "rise, difference", "flipped"))
    return [
        Claim(
            f"Right and wrong answers have like shares of tokens that rise ({PAPER}, token flipping)",
            f"rising tokens' share in right minus that in wrong answers, to first order: within {ALIKE} of 0, its interval too",
            f"right {right.words()}, wrong {wrong.words()}; difference {apart.words()}",
            both(below(apart, ALIKE), above(apart, -ALIKE)),
        ),
        Claim(
            f"A token's change is not decided by its own advantage alone ({PAPER})",
            f"share of tokens that the whole update moves against their own advantage above {SOME}, its interval too",
            flipped.words(),
            above(flipped, SOME),
        ),
    ]


def _coupled(rows: list[Row], size: dict[str, Estimate]) -> Claim:
    more = {kind: over(rows, f"{LOW} minus {kind}") for kind in KINDS[1:]}
    return Claim(
        f"Tokens of right and wrong answers are coupled chiefly where they are identical and unconfident ({PAPER})",
        "mean |<g, g>| larger than of the three other kinds of pairs, intervals of the differences too",
        "; ".join(f"{kind} {value.words()}" for kind, value in size.items()),
        both(*map(above, more.values())),
    )


def _cancels(rows: list[Row], cancelled: dict[str, Estimate]) -> list[Claim]:
    """Claims about shared tokens and those of right answers alone."""
    left, more = over(rows, "left, difference"), over(rows, "cancelled, difference")
    return [
        Claim(
            f"Opposing signals cancel at tokens that right and wrong answers share ({PAPER})",
            "of the gross push of right and of wrong tokens on such tokens of right answers more than half cancels (interval)",
            cancelled["shared"].words(),
            above(cancelled["shared"], 0.5),
        ),
        Claim(
            f"and less at tokens specific to right answers ({PAPER})",
            "share that cancels there minus that at shared tokens below 0, its interval too",
            f"{cancelled['specific'].words()}; difference {more.words()}",
            below(more),
        ),
        Claim(
            f"which are reinforced more ({PAPER})",
            "mean net force on them minus that on shared tokens of right answers above 0, its interval too",
            f"{over(rows, 'left, specific').words()} against {over(rows, 'left, shared').words()}; difference "
            f"{left.words('nats per unit learning rate')}",
            above(left),
        ),
    ]


def _figure(size: dict[str, Estimate], cancelled: dict[str, Estimate]) -> Any:
    made, (left, right) = figure(
        1, 2, title="Which tokens of right and wrong answers are coupled, and where they cancel", height=3
    )
    for panel, values in ((left, size), (right, cancelled)):
        for k, value in enumerate(values.values()):
            panel.errorbar([value.mean], [k], xerr=[value.half], fmt="o", color=BLUE if k == 0 else COLOURS[6], capsize=3)
        panel.set_yticks(range(len(values)), list(values))
        panel.axvline(0, color=GREY, linewidth=0.8)
    left.set(xlabel="mean |<g, g>| (nats per unit lr)", ylabel="pair of a right and a wrong token", title="coupling, 95%")
    right.set(xlabel="share of the gross push that cancels", ylabel="token of a right answer", title="cancellation, 95%")
    return made
