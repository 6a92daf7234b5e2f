"""What an installation promises: its version, its dependencies, and no top-level package `kernels`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

import tokdyn

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_version():
    assert tokdyn.__version__ == importlib.metadata.version("tokdyn")


def test_importing_it_waits_for_nothing_and_every_name_is_there():
    """In a fresh process; td.forces is the function, also after the module of that name was imported, and dir() is complete."""
    program = """
import sys, tokdyn as td
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
assert set(td.__all__) <= set(dir(td)) and {"attach", "watch", "Monitor", "tap"} <= set(dir(td))
import tokdyn.forces, tokdyn.profile, tokdyn.verify
from tokdyn import forces, profile, verify
assert all(callable(f) and f is getattr(td, f.__name__) for f in (forces, profile, verify))
for name in td.__all__:
    found = getattr(td, name)
    assert getattr(found, "__module__", getattr(found, "__name__", "tokdyn")).startswith("tokdyn"), name
assert td.data.read and not hasattr(td, "no_such_name")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_kernels_is_not_a_top_level_package():
    found = importlib.util.find_spec("kernels")  # the Hugging Face package of that name may well be installed
    assert found is None or ROOT / "kernels" not in (Path(place) for place in found.submodule_search_locations or [])
    ours = importlib.util.find_spec("tokdyn.kernels.token_stats.reference")
    assert ours is not None and ours.origin is not None and ours.origin.endswith("token_stats/reference.py")


def test_the_build_never_needs_torch():
    assert {Requirement(line).name for line in PROJECT["build-system"]["requires"]} == {"setuptools", "pybind11"}


def test_every_dependency_is_pinned_inside_its_range():
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    versions = {pin.name.lower(): next(iter(pin.specifier)).version for pin in pins}
    assert pins[0].name == "torch", "the Makefile installs it first"
    optional = [line for lines in PROJECT["project"]["optional-dependencies"].values() for line in lines]
    for requirement in map(Requirement, PROJECT["project"]["dependencies"] + optional + PROJECT["build-system"]["requires"]):
        assert requirement.specifier.contains(versions[requirement.name.lower()]), requirement


def test_the_pins_agree_with_what_torch_from_the_index_asks_for():
    """Its Linux build asks for one Triton; the build for the CPU alone, which the tests run on, does not say so."""
    asked = {"2.13.0": "3.7.1"}  # torch: triton, from the wheel's metadata
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pins["triton"] == asked[pins["torch"]], "pip finds no set of packages for a new environment"


def test_mypy_reads_kernels_under_the_name_that_they_are_installed_as():
    checked = [ROOT / path for path in PROJECT["tool"]["mypy"]["files"]]
    (link,) = (path for path in checked if path.name == "kernels")
    assert link.resolve() == ROOT / "kernels" and link.relative_to(ROOT / ".mypy").parts == ("tokdyn", "kernels")
