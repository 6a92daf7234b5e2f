"""tokdyn: how every token of a fine-tuning update moves every token of another answer.

Δ log pi(y_m) ≈ eta Σ_l F[m,l],    F[m,l] = -[A_m K_{m,l} G_l]_{y_m}
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import dynamics, interventions, objectives, ops, probes, squeeze
from ._version import __version__
from .forces import Forces, forces
from .ntk import Kernel, KernelDrift, kernel, kernel_drift, kernel_lower_bound, rank_correlation, sign_delta
from .profile import Run, load, profile
from .sequences import Batch, Chi, encode, from_batch, preference, rollouts
from .verify import Verification, verify

if TYPE_CHECKING:
    from .integrations.trainer import attach
    from .monitor import Monitor
    from .report.training import watch
    from .training.capture import tap

__all__ = ["Batch", "Chi", "Forces", "Kernel", "KernelDrift", "Monitor", "Run", "Verification", "__version__", "attach",
           "dynamics", "encode", "forces", "from_batch", "interventions", "kernel", "kernel_drift", "kernel_lower_bound",
           "load", "objectives", "ops", "preference", "probes", "profile", "rank_correlation", "rollouts", "sign_delta",
           "squeeze", "tap", "verify", "watch"]  # fmt: skip

_TRAINING = {"Monitor": ".monitor", "attach": ".integrations.trainer", "tap": ".training.capture", "watch": ".report.training"}


def __getattr__(name: str) -> Any:
    if name not in _TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_TRAINING[name], __name__), name)
