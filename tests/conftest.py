"""Shapes and types of tokdyn's signatures are checked while the tests run."""

import sys
from importlib.machinery import ModuleSpec, PathFinder

from jaxtyping import install_import_hook

# where a float is expected an integer will do, as PEP 484 has it
hook = install_import_hook("tokdyn", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


class TritonModules:
    """Finds kernels/<op>/triton.py before the hook does: Triton reads a kernel's source, which a type check would wrap."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, path) if name.startswith("tokdyn.kernels.") and name.endswith(".triton") else None


sys.meta_path.insert(0, TritonModules)
