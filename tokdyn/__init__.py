"""tokdyn: how every token of a fine-tuning update moves every token of another answer.

Δ log pi(y_m) ≈ eta Σ_l F[m,l],    F[m,l] = -[A_m K_{m,l} G_l]_{y_m}
"""

from . import dynamics, objectives, ops, squeeze
from ._version import __version__
from .forces import Forces, forces
from .profile import Run, load, profile
from .sequences import Batch, Chi, encode, from_batch, preference, rollouts
from .verify import Verification, verify

__all__ = ["Batch", "Chi", "Forces", "Run", "Verification", "__version__", "dynamics", "encode", "forces", "from_batch", "load",
           "objectives", "ops", "preference", "profile", "rollouts", "squeeze", "verify"]  # fmt: skip
