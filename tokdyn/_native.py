"""What was compiled at installation, and how to reach it."""

from __future__ import annotations

import importlib
from types import ModuleType


def load() -> tuple[ModuleType | None, str]:
    """The compiled extension tokdyn._C and "", or None and the reason why there is none."""
    try:
        return importlib.import_module("tokdyn._C"), ""
    except ModuleNotFoundError:
        return None, "not built: the installation found no working C++17 compiler (pip install -v shows why)"
    except ImportError as error:
        return None, f"built, but does not load: {error}"


def parts() -> dict[str, str]:
    """The native parts of this installation, each with what it is or why it is missing: `tokdyn doctor` prints them."""
    extension, reason = load()
    if extension is None:
        return {"extension": reason, "cpu kernels": "not built", "cuda": "not built"}
    built = extension.build()
    return {
        "extension": built["compiler"],
        "cpu kernels": f"{extension.simd_levels()[-1]} (built: {built['simd']})",
        "cuda": f"{built['cuda']}; {extension.cuda_here()}" if hasattr(extension, "cuda_here") else built["cuda"],
    }
