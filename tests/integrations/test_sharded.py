"""A model that two ranks hold together (FSDP2, gloo): its forces are those of one process, and its training is left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKERS = Path(__file__).resolve().parents[1] / "workers"
sys.path.insert(0, str(WORKERS))
import sharded  # noqa: E402

# On the way of a gradient lie some 30 sums of up to V = 61 terms, each off by √V eps of its terms: √(30 V) eps = 5e-6
FP32 = 1e-5


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded")
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKERS / "sharded.py"), str(rank), str(out / "store"), str(out)],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for process in processes:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("kind", sharded.KINDS)
def test_reductions_verify_and_the_readouts_matrix_are_those_of_one_process(ranks, kind):
    whole, order = sharded.answers(sharded.model(kind))
    for rank in ranks:
        found, its = rank[kind]
        for name, x in whole.items():
            # a real change is a difference of two log-probs of size 5, rounded
            atol = 10 * 5 * 40 * torch.finfo(torch.float32).eps if name == "actual" else FP32 * float(x.norm())
            assert float((found[name] - x).norm()) <= atol, name
        assert its == pytest.approx(order, abs=0.05)


def test_what_needs_the_model_whole_is_refused_by_name(ranks):
    for rank in ranks:
        said = rank["refusals"]
        assert len(said) == 6 and all("FSDP2" in text for text in said.values()), said


def test_training_is_as_without_it(ranks):
    """Asked between backward and step: gradients stay, and no stale whole weight is trained on."""
    for rank in ranks:
        asked, alone = rank["losses"]
        assert asked == alone
