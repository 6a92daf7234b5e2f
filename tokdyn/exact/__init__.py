"""Exact forces over all chosen parameters: F[m,l] = <J_mᵀ g_m, P J_lᵀ Γ_l>, J the Jacobian of the logits.

products.py        pull: forces at the logits -> a direction of the parameters (vjp); push: a direction -> velocities (jvp)
naive.py           the matrix by one gradient per token: the oracle
engines.py         the matrix without gradients of model size, by the cheaper of sweep and tangents
sweep/             both sides pulled back together, an inner product per module: plan.py which modules move, and by which
                   rule; segments.py where the backbone can be cut; budget.py what memory goes to and what each way costs
tangents.py        one side pulled back, the other moved along
modules/           the rules: what a module's parameters do to its output
"""

from .products import Direction, Progress, Side, finite_difference, pull, pull_each, push, push_all, scaled, select

__all__ = ["Direction", "Progress", "Side", "finite_difference", "pull", "pull_each", "push", "push_all", "scaled", "select"]
