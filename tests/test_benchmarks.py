"""Every benchmark still runs, in its quick form, and what it compares agrees."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_exact_forces_runs_and_both_sides_agree(tmp_path):
    command = [sys.executable, BENCHMARKS / "exact_forces.py", "--quick", "--json", tmp_path / "b.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["error"] < 1e-5
    assert "structured tangents:" in done.stdout and set(found["figures"]) == {"naive", "tangent"}
