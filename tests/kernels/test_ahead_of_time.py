"""Every GPU kernel compiles for sm_80 and sm_90 without a GPU, and its machine code keeps within its limits."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parents[1]
TRITON = sorted(ROOT.glob("kernels/*/triton.py"))
CUDA = sorted(ROOT.glob("csrc/cuda/*.cu"))
assert TRITON and CUDA, f"no kernels under {ROOT}"
GATE = TESTS / "ahead_of_time.py"

if importlib.util.find_spec("triton") is None:
    pytest.skip("there is no Triton for this platform", allow_module_level=True)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")


FAULTY = [TESTS / "faulty_kernels.py", *([TESTS / "faulty_kernels.cu"] if shutil.which("nvcc") else [])]


def judged(folder: Path, *sources: Path) -> tuple[int, list[dict[str, Any]]]:
    """The gate's exit code and what it found."""
    file = folder / "judged.json"
    run = subprocess.run([sys.executable, GATE, "--jobs", "2", "--json", file, *sources], capture_output=True, text=True)
    assert file.exists(), run.stdout + run.stderr
    return run.returncode, json.loads(file.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, list[dict[str, Any]]]:
    """Everything by its source, in one run: most of its time goes into starting and into the largest kernels."""
    folder = tmp_path_factory.mktemp("gate")
    broken = folder / "broken.cu"
    broken.write_text("__global__ void kernel() { undeclared(); }")
    cuda = [broken, *CUDA] if shutil.which("nvcc") else []
    code, rows = judged(folder, *cuda, *TRITON, *FAULTY)
    assert code == 1, "there are faulty kernels"
    by_source: dict[Path, list[dict[str, Any]]] = {source: [] for source in (*cuda, *TRITON, *FAULTY)}
    for row in rows:
        by_source[Path(row["source"])].append(row)
    return by_source


@pytest.mark.parametrize("source", TRITON, ids=lambda path: path.parent.name)
def test_triton_kernels(found: dict[Path, list[dict[str, Any]]], source: Path):
    assert {row.get("architecture") for row in found[source]} == {80, 90}, found[source]
    assert not [row for row in found[source] if row["faults"]]


@needs_nvcc
def test_cuda_kernels(found: dict[Path, list[dict[str, Any]]]):
    rows = [row for source in CUDA for row in found[source]]
    assert not [row for row in rows if row["faults"]]
    names = {row["name"].split("<")[0] for row in rows}
    assert names == {"token_stats_kernel", "topk_kernel"}
    assert sum(row["budget"] > 0 for row in rows) == 4, "token_stats has a budget for two types on two architectures"


def test_the_gate_finds_what_is_wrong_with_triton_kernels(found: dict[Path, list[dict[str, Any]]]):
    faults = {row["name"]: row["faults"] for row in found[TESTS / "faulty_kernels.py"]}
    expected = {
        "spills": "local memory",
        "register factor": "wgmma with the left factor in registers",
        "shared memory": "bytes of shared memory",
        "over budget": "instructions per element, the budget is 1.5",
        "no loop": "has a budget but no loop",
        "forgotten_kernel": "listed by no variant",
        "sound sum": None,
        "sound product": None,
    }
    assert set(faults) == set(expected)
    for name, words in expected.items():
        assert len(faults[name]) == (words is not None), name
        assert words is None or words in faults[name][0]


@needs_nvcc
def test_the_gate_finds_a_spill_of_nvcc_and_a_file_that_does_not_compile(found: dict[Path, list[dict[str, Any]]]):
    rows = found[TESTS / "faulty_kernels.cu"]
    assert len(rows) == 2 and all("local memory" in row["faults"][0] for row in rows)
    (broken,) = [rows for source, rows in found.items() if source.name == "broken.cu"]
    assert len(broken) == 2 and all("CalledProcessError" in row["faults"][0] for row in broken)


@needs_nvcc
def test_without_a_fault_the_exit_code_is_0(tmp_path: Path):
    assert judged(tmp_path, ROOT / "csrc/cuda/device.cu") == (0, [])  # code of the host alone
