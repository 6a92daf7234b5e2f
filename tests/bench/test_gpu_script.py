"""benchmarks/gpu.sh without a GPU: its commands exist, it says what is missing, and a stage that fails stops no other."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if os.name != "posix":
    pytest.skip("the script is for Linux", allow_module_level=True)


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu"]


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [BENCHMARKS / "gpu.sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})


def test_every_file_and_option_of_its_commands_is_there():
    done = script("--dry-run", "--minutes", "15")
    assert done.returncode == 0 and "every file and option is there" in done.stdout, done.stdout + done.stderr
    for stage in (
        "build",
        "tests",
        "memcheck",
        "machine code",
        "operators: attention",
        "exact forces",
        "exact forces: pairs, experts",
        "exact forces: 4096 x 4096",
    ):
        assert f"{stage} (at most" in done.stdout


def test_a_command_that_is_gone_is_found(gpu):
    python = [sys.executable, "-P", "benchmarks/exact_forces_gpu.py"]
    gone = [
        gpu.Stage("gone", 0, [sys.executable, "benchmarks/no_such_file.py"], 1),
        gpu.Stage("old", 0, [*python, "--lengths", "3"], 1),
    ]
    assert gpu.check(gone) == ["gone: there is no benchmarks/no_such_file.py", "old: no option --lengths"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    done = script("--out", str(tmp_path / "results"))
    assert done.returncode == 2 and "there is no CUDA device" in done.stderr
    assert not (tmp_path / "results").exists()


def test_stages_that_fail_last_too_long_or_lack_something_stop_no_other(gpu, tmp_path):
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    found = [
        gpu.Stage("fails", 0, python("print('here'); raise SystemExit(3)"), 60, ()),
        gpu.Stage("hangs", 1, python("import subprocess; subprocess.run(['sleep', '100'])"), 1, ()),
        gpu.Stage("beside", 1, python("print('7 passed, 1 skipped in 0.1s')"), 60, ()),
        gpu.Stage("lacks", 2, python(""), 60, ("no_such_package", "no-such-program!")),
        gpu.Stage("works", 3, python("print('done')"), 60, ("torch",)),
    ]
    began = time.monotonic()
    records = gpu.run(found, began + 90)
    assert [record["outcome"] for record in records] == ["failed", "out of time", "passed", "not run", "passed"]
    assert records[0]["exit"] == 3 and "here" in records[0]["output"]
    assert records[3]["why"] == "needs the package no_such_package, the program no-such-program"
    assert {record["outcome"] for record in gpu.run(found[:1], time.monotonic())} == {"not run"}
    about = dict(gpu="H200, 139 GiB", date="2026-01-01", versions=dict(torch="2"), commit="abc", figures={})
    page = gpu.page(about | dict(stages=records))
    assert "| beside | passed | " in page and "| 7 passed, 1 skipped in 0.1s |" in page and "| hangs | out of time | " in page


def test_the_page_holds_the_figures(gpu):
    row = dict(
        case="token_stats", op="token_stats", dtype="bfloat16", sizes=dict(T=3), side="triton", ran=False, why="no reason"
    )
    bar = dict(case="token_stats", dtype="bfloat16", side="triton", bar="at most 1 ms", value=None, met=None)
    kernels = dict(
        machine=dict(gpu="H200", system="Linux"), floors=dict(gb_per_s=4300.0, tflop_per_s=dict(bfloat16=790.0)),
        date="2026-01-01", versions={}, settings=dict(device="cuda", quick=False, rounds=7), rows=[row], bars=[bar],
    )  # fmt: skip
    exact = dict(about="Qwen2 shape.", rows=[dict(what="matrix", seconds=1.0, peak_mib=2.0, error=3e-3, bar="in 300 s")])
    code = [dict(name="sum", architecture=90, faults=[]), dict(name="product", architecture=90, faults=["spills"])]
    figures = {"operators: rows": kernels, "operators: products": kernels, "exact forces": exact, "machine code": code}
    page = gpu.page(dict(gpu="H200", date="2026-01-01", versions={}, commit=None, stages=[], figures=figures))
    assert page.count("| token_stats bfloat16 T=3 | triton | did not run: no reason |") == 2
    assert "| matrix | 1.0 | 2 | 3.0e-03 | in 300 s |" in page and "product (sm_90): spills" in page
    assert page.count("not measured") == 2


def test_exact_forces_on_a_small_model_of_that_shape(tmp_path):
    command = [sys.executable, BENCHMARKS / "exact_forces_gpu.py", "--quick", "--device", "cpu", "--json", tmp_path / "e.json"]
    command += ["--rows", "matrix", "reduction", "pairs", "experts"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "e.json").read_text())
    exact, rounded, *timed = found["rows"]
    assert exact["error"] < 1e-5 < rounded["error"] < 0.1
    names = ["matrix 12 x 12", "reduction over 24 tokens", "experts: 8 x 8 tokens", "pairs: 48 x 32 tokens"]
    assert [row["what"] for row in timed] == names
