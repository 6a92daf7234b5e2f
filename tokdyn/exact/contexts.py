"""Update tokens with the same context: one Jacobian, so their forces at the logits are added before anything is pulled back.

    Σ_l F[m,l] = <J_mᵀ Γ_m, P J_xᵀ Σ_l Γ_l>     over the tokens l of context x

What the two answers of a pair do to the prefix that they share cancels there, to exactly zero where c⁺ = -c⁻.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from ..objective import GTerm
from ..sequences import Batch
from .sides import Side


def by_context(side: Side, labels: Int[Tensor, " L"]) -> Side:
    """One token for each context, with the sum of its tokens' forces at the logits.

    Args:
        side: tokens l.
        labels: the context of each of them, numbered in order of appearance (`sequences.context_numbers`).

    Raises:
        ValueError: terms of different temperatures.
    """
    term = _added(_joined(side.terms), labels)
    batches, terms, start, seen = [], [], 0, 0
    for batch in side.batches:
        own = labels[start : start + len(batch.targets)].tolist()
        start += len(own)
        first = {label: n for n, label in reversed(list(enumerate(own))) if label >= seen}
        if first:
            batches.append(only(batch, torch.tensor([first[label] for label in sorted(first)])))
            terms.append(term.rows(slice(seen, seen + len(first))))
            seen += len(first)
    return Side(batches, terms)


def all_cancel(side: Side, labels: Int[Tensor, " L"], vocabulary: int) -> bool:
    """Whether there are forces at the logits, and in every context they add up to zero but for rounding.

    c is a smooth function of log-probabilities, each a sum over V terms that is off by √V eps of its size: what is left of
    Σ|c| below 4 √V eps is none of the loss's doing. A step along it would be a step along rounding errors.
    """
    term = _joined(side.terms)
    net, gross = _size(_added(term, labels)), torch.zeros(int(labels.max()) + 1).double().index_add_(0, labels, _size(term))
    return bool(gross.any()) and bool((net <= 4 * vocabulary**0.5 * torch.finfo(torch.float32).eps * gross).all())


def _size(term: GTerm) -> Tensor:
    """|c| of all targets, |v| and |u| of each token: its force at the logits is at most a constant times that."""
    parts = [term.c if term.c.dim() == 2 else term.c[:, None], *(x[:, None] for x in (term.v, term.uniform) if x is not None)]
    return torch.cat(parts, 1).double().abs().sum(1).cpu()


def _joined(terms: Sequence[GTerm]) -> GTerm:
    """The terms of all batches as one."""
    return GTerm.joined(terms)


def _added(term: GTerm, labels: Int[Tensor, " L"]) -> GTerm:
    """The sum of the terms of each context: the c of one target are added, targets that differ stand side by side."""
    device, K = term.c.device, 1 if term.c.dim() == 1 else term.c.shape[1]
    X, of = int(labels.max()) + 1, labels.to(device)

    def total(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.zeros(X, dtype=x.dtype, device=device).index_add_(0, of, x)

    number, place, pairs = (
        dict[tuple[int, int], int](),
        list[int](),
        zip(labels.repeat_interleave(K).tolist(), term.targets.flatten().tolist(), strict=True),
    )
    of_context = [list[int]() for _ in range(X)]
    for x, y in pairs:
        if (x, y) not in number:
            number[x, y] = len(number)
            of_context[x].append(y)
        place.append(number[x, y])
    c = torch.zeros(len(number), dtype=term.c.dtype, device=device)
    c.index_add_(0, torch.tensor(place, device=device), term.c.flatten())
    width = max(map(len, of_context))
    filled = [[(y, number[x, y]) for y in ys] for x, ys in enumerate(of_context)]
    targets = torch.tensor([[y for y, _ in row] + [row[0][0]] * (width - len(row)) for row in filled], device=device)
    padded = torch.cat([c, c.new_zeros(1)])[
        torch.tensor([[n for _, n in row] + [len(number)] * (width - len(row)) for row in filled], device=device)
    ]
    if width == 1:
        targets, padded = targets[:, 0], padded[:, 0]
    return GTerm(targets, padded, total(term.v), total(term.uniform), term.temperature)


def only(batch: Batch, tokens: Int[Tensor, " n"]) -> Batch:
    """Some tokens of a batch, with the sequences that hold them."""
    T = batch.ids.shape[1]
    rows = batch.rows[tokens]
    kept, place = (rows // T).unique(return_inverse=True)
    of = batch.targets[tokens], batch.sequence[tokens], batch.position[tokens]
    return Batch(batch.ids[kept], place * T + rows % T, *of, None if batch.position_ids is None else batch.position_ids[kept])
