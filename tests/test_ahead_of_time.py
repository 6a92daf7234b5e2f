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
ROOT = TESTS.parent
TRITON = sorted(ROOT.glob("kernels/*/triton.py"))
CUDA = sorted(ROOT.glob("csrc/cuda/*.cu"))
GATE = TESTS / "ahead_of_time.py"

if importlib.util.find_spec("triton") is None:
    pytest.skip("there is no Triton for this platform", allow_module_level=True)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")


def judged(folder: Path, *arguments: str | Path, parts: int = 1) -> list[dict[str, Any]]:
    """What the gate finds, in `parts` processes at a time; its exit code says whether it found a fault."""
    files = [folder / f"{part}.json" for part in range(parts)]
    started = []
    for part, file in enumerate(files):
        command = [sys.executable, GATE, "--part", f"{part}/{parts}", "--json", file, *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    found = []
    for process, file in zip(started, files, strict=True):
        output = process.communicate()[0]
        assert file.exists(), output
        rows = json.loads(file.read_text())
        assert process.returncode == any(row["faults"] for row in rows)
        found += rows
    return found


@pytest.fixture(scope="module")
def triton_kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return judged(tmp_path_factory.mktemp("triton"), *TRITON, parts=2)


@pytest.mark.parametrize("source", TRITON, ids=lambda path: path.parent.name)
def test_triton_kernels(triton_kernels: list[dict[str, Any]], source: Path):
    mine = [row for row in triton_kernels if row["source"] == str(source)]
    assert {row.get("architecture") for row in mine} == {80, 90}, mine
    assert not [row for row in mine if row["faults"]]


@needs_nvcc
def test_cuda_kernels(tmp_path: Path):
    rows = judged(tmp_path, *CUDA, parts=2)
    assert not [row for row in rows if row["faults"]]
    names = {row["name"].split("<")[0] for row in rows}
    assert names == {"token_stats_kernel", "topk_kernel"}
    assert sum(row["budget"] > 0 for row in rows) == 4, "token_stats has a budget for two types on two architectures"


def test_the_gate_finds_what_is_wrong_with_triton_kernels(tmp_path: Path):
    faults = {row["name"]: row["faults"] for row in judged(tmp_path, "--arch", "90", TESTS / "faulty_kernels.py", parts=2)}
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
def test_the_gate_finds_a_spill_of_nvcc_and_a_file_that_does_not_compile(tmp_path: Path):
    rows = judged(tmp_path, TESTS / "faulty_kernels.cu")
    assert len(rows) == 2 and all("local memory" in row["faults"][0] for row in rows)
    broken = tmp_path / "broken.cu"
    broken.write_text("__global__ void kernel() { undeclared(); }")
    assert all("CalledProcessError" in row["faults"][0] for row in judged(tmp_path, broken))
