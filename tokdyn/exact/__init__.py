"""Exact forces over all chosen parameters: F[m,l] = <J_mᵀ g_m, P J_lᵀ Γ_l>, J the Jacobian of the logits.

motions.py    pull (forces at the logits -> a direction of the parameters) and push (a direction -> velocities)
naive.py      the matrix by one gradient per token: the oracle
matrix.py     the matrix without gradients of model size, by the cheaper of the two ways below
tiling.py       what memory goes to, and what each way costs
sweep.py        both sides pulled back together, an inner product per module
tangents.py     one side pulled back, the other moved along
plan.py       which modules move, and by which rule (rules.py); segments.py: where the backbone can be cut
"""

from .products import Direction, Progress, Side, finite_difference, pull, pull_each, push, push_all, scaled, select

__all__ = ["Direction", "Progress", "Side", "finite_difference", "pull", "pull_each", "push", "push_all", "scaled", "select"]
