"""Specification of dual_gram, in plain torch."""

from __future__ import annotations

from torch import Tensor


def dual_gram(
    a1: Tensor,
    a2: Tensor,
    d1: Tensor,
    d2: Tensor,
    *,
    out: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """out += (a1 a2ᵀ) ⊙ (d1 d2ᵀ): inner products of the weight gradients Σ d aᵀ of one Linear, position by position.

    a1 [M, p], a2 [L, p], d1 [M, q], d2 [L, q] -> [M, L]; segments = (which of S_o segments each m is in [M], likewise [L])
    sums every pair of segments -> [S_o, S_u]. Segment numbers start at 0 and their largest sets the size unless out does.
    """
    gram = (a1 @ a2.T) * (d1 @ d2.T)
    if segments is not None:
        rows, columns = segments
        shape = (int(rows.max()) + 1, int(columns.max()) + 1) if out is None else tuple(out.shape)
        by_row = gram.new_zeros(shape[0], gram.shape[1]).index_add_(0, rows, gram)
        gram = gram.new_zeros(shape).index_add_(1, columns, by_row)
    return gram if out is None else out.add_(gram)
