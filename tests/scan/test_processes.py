"""Several processes at one scan: every table is that of one process, bit for bit, also when one of them dies."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched import launched

import tokdyn as td
from tokdyn.objectives import DPO
from tokdyn.runs.scans import Scan
from tokdyn.testing import tiny

WORKERS = Path(__file__).resolve().parents[1] / "workers"
sys.path.insert(0, str(WORKERS))
import scanning  # noqa: E402


def job(out, ranks, hangs="none"):
    return launched(WORKERS / "scanning.py", out, hangs, ranks=ranks)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: sums in another order have other last bits
    out = tmp_path_factory.mktemp("whole") / "scan"
    found = td.scan(tiny("llama"), scanning.pairs(17), scanning.GROUPS, DPO(), out=out, block=2)
    torch.set_num_threads(threads)
    return found


def test_a_dead_process_leaves_its_block_to_the_others(tmp_path, whole):
    """Three draw from one queue; one is killed over a block that it drew. The others do it, and nobody else's work is lost."""
    processes = job(tmp_path / "scan", 3, hangs="2")
    assert processes[2].stdout.readline() == "hangs\n"
    processes[2].send_signal(signal.SIGKILL)
    for process in processes[:2]:
        said, error = process.communicate(timeout=240)
        assert (process.returncode, said) == (0, "complete\n"), error
    processes[2].communicate()
    scan = Scan(tmp_path / "scan")
    assert scan.complete and {commit.writer for _, commit in scan.blocks} <= {"rank0", "rank1", "rank2"}
    for (_, a), (_, b) in zip(whole.blocks, scan.blocks, strict=True):
        assert a.sums == b.sums
    assert scan.tokens().equals(whole.tokens())


def test_accelerate_launches_the_same_job(tmp_path, whole):
    """Its launcher for several processes, which a machine without GPUs runs with gloo: the tables are those of one process."""
    pytest.importorskip("accelerate")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    done = subprocess.run(
        [*command, str(WORKERS / "scanning.py"), str(tmp_path / "scan"), "none"],
        capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert Scan(tmp_path / "scan").tokens().equals(whole.tokens())
