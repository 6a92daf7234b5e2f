"""The phenomena of the learning-dynamics papers, one module each, with a figure and the numbers that decide it: `tokdyn study`.

A module here that defines `run(quick=False, seed=0) -> Result` is a study, and its name is the module's; its docstring says
what is shown and by which paper. The other modules are what studies share. Functions that train, sample or write name all of
model, tokenizer, data, sizes and seed, so that some take more than five arguments: a study reads as its table of settings.
"""

from __future__ import annotations

import difflib
import pkgutil
from importlib import import_module
from importlib.abc import InspectLoader
from types import ModuleType


def names() -> list[str]:
    """Names of all studies, sorted, as the command line spells them (with dashes)."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if "\ndef run(" in _source(module))


def load(name: str) -> ModuleType:
    """Import the module of a study.

    Raises:
        ValueError: there is no study of that name, or a package that it needs is not installed.
    """
    if name.replace("_", "-") not in names():
        near = difflib.get_close_matches(name, names(), 1)
        raise ValueError(f"there is no study {name!r}{f', did you mean {near[0]!r}' if near else ''}: {', '.join(names())}")
    try:
        return import_module(f"{__name__}.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        raise ValueError(f"the study {name!r} needs {error.name}: pip install 'tokdyn[studies]'") from error


def _source(module: pkgutil.ModuleInfo) -> str:
    """The source of a module, read without importing it: the packages that a study needs are an extra."""
    spec = module.module_finder.find_spec(module.name, None)
    loader = spec.loader if spec else None
    return loader.get_source(module.name) or "" if isinstance(loader, InspectLoader) else ""
