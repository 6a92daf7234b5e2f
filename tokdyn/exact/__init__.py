"""Exact forces over all chosen parameters: F[m,l] = <J_mᵀ Γ_m, P J_lᵀ Γ_l>, J the Jacobian of the logits.

sides.py     tokens with a force at their logits      scope.py     what moves, under which preconditioner
problem.py   the model, what moves, both sides        products.py  vjp and jvp of a side
naive.py     one gradient per token: the specification of every `fill(problem, out, *, memory, progress)`
engines.py   the one place that chooses among: readout.py (closed form), sweep/ (both sides pulled back together),
             tangents.py (one pulled back, the other moved along), per_direction.py (the last resort), grouped.py, ch2.py
contexts.py  update tokens behind the same ids as one: their forces at the logits add
merged.py    tokens of a side behind the same ids with the same target as one: their gradients are multiples
modules/     what one module's own parameters do, a rule a file
"""

from .engines import choose, matrix_bytes
from .problem import Asked, Problem, ScoredProblem, UnscoredProblem
from .products import Direction
from .progress import Progress
from .scope import CH2, Scope, select
from .sides import ScoredSide, Side

__all__ = ["CH2", "Asked", "Direction", "Problem", "Progress", "Scope", "ScoredProblem", "ScoredSide", "Side",
           "UnscoredProblem", "choose", "matrix_bytes", "select"]  # fmt: skip
