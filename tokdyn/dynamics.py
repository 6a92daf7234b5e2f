"""The paper's decomposition in code: A, K, G, F and Δ log pi as pure functions of dense tensors, for small vocabularies.

    [Δ log pi(· | chi_o)]_m = -eta A_m Σ_l K_{m,l} G_l + O(eta²)

(Ren & Sutherland, arXiv 2407.10490, eq. 4 and 6; docs/theory.md, The decomposition). Slow on purpose: the fast computations are
tested against it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .objective import GTerm


def A(logits: Float[Tensor, "*m V"]) -> Float[Tensor, "*m V V"]:
    """Log-softmax Jacobian A = ∂ log pi/∂z = I - 1 piᵀ, [.., V, V]."""
    pi = logits.softmax(-1)
    return torch.eye(pi.shape[-1], dtype=pi.dtype, device=pi.device) - pi[..., None, :].expand(*pi.shape, pi.shape[-1])


def K(J_o: Float[Tensor, "M V P"], J_u: Float[Tensor, "L V P"]) -> Float[Tensor, "M L V V"]:
    """Empirical neural tangent kernel blocks K_{m,l} = ∇θ z_m (∇θ z_l)ᵀ from the logits' Jacobians."""
    return torch.einsum("mvp,lwp->mlvw", J_o, J_u)


def G(logits: Float[Tensor, "L V"], gterm: GTerm) -> Float[Tensor, "L V"]:
    """Loss gradient at the logits, G_l = ∂L/∂z_l, from its GTerm (objective.GTerm has the formula)."""
    return -gterm.logit_force(logits)


def F(
    A_o: Float[Tensor, "M V V"], K_ou: Float[Tensor, "M L V V"], G_u: Float[Tensor, "L V"], y_o: Int[Tensor, " M"]
) -> Float[Tensor, "M L"]:
    """Force of update token l on observed token m, F[m,l] = -[A_m K_{m,l} G_l]_{y_m}; nats per unit learning rate."""
    row = A_o.gather(1, y_o[:, None, None].expand(-1, 1, A_o.shape[-1])).squeeze(1)
    return -torch.einsum("mv,mlvw,lw->ml", row, K_ou, G_u)


def delta_log_pi(
    A_o: Float[Tensor, "M V V"], K_ou: Float[Tensor, "M L V V"], G_u: Float[Tensor, "L V"], eta: float
) -> Float[Tensor, "M V"]:
    """First-order change of every log-probability, -eta A_m Σ_l K_{m,l} G_l, in nats."""
    return -eta * torch.einsum("mxv,mlvw,lw->mx", A_o, K_ou, G_u)
