"""tokdyn: how every token of a fine-tuning update moves every token of another answer.

Δ log pi(y_m) ≈ eta Σ_l F[m,l],    F[m,l] = -[A_m K_{m,l} G_l]_{y_m}

Names are imported when they are first used, so that `import tokdyn` and the command line do not wait for torch.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import dynamics, interventions, objectives, observables, ops, probes, squeeze
    from .forces import Forces, forces
    from .integrations.check import check
    from .integrations.trainer import attach
    from .monitor import Monitor
    from .ntk import Kernel, KernelDrift, kernel, kernel_drift, kernel_lower_bound, rank_correlation, sign_delta
    from .profile import Run, load, profile
    from .report.training import watch
    from .runs.scans import Scan
    from .scan import scan
    from .sequences import Batch, Chi, encode, from_batch, preference, rollouts
    from .training.capture import tap
    from .verify import Verification, verify

__all__ = ["Batch", "Chi", "Forces", "Kernel", "KernelDrift", "Monitor", "Run", "Scan", "Verification", "__version__", "attach",
           "check", "dynamics", "encode", "forces", "from_batch", "interventions", "kernel", "kernel_drift",
           "kernel_lower_bound", "load", "objectives", "observables", "ops", "preference", "probes", "profile",
           "rank_correlation", "rollouts", "scan", "sign_delta", "squeeze", "tap", "verify", "watch"]  # fmt: skip

_MODULES = {
    ".forces": "Forces forces",
    ".integrations.check": "check",
    ".integrations.trainer": "attach",
    ".monitor": "Monitor",
    ".ntk": "Kernel KernelDrift kernel kernel_drift kernel_lower_bound rank_correlation sign_delta",
    ".profile": "Run load profile",
    ".report.training": "watch",
    ".runs.scans": "Scan",
    ".scan": "scan",
    ".sequences": "Batch Chi encode from_batch preference rollouts",
    ".training.capture": "tap",
    ".verify": "Verification verify",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}  # name -> the module that it is in


class _Package(ModuleType):
    """A package in which td.forces is the function, also after somebody has imported the module tokdyn.forces."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):  # the import system sets a submodule on its package
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if not TYPE_CHECKING:  # a type checker reads the imports above

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            value = getattr(import_module(_HOME[name], __name__), name)
        elif not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            value = import_module(f".{name}", __name__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
