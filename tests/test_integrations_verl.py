"""verl's own engine under tokdyn: what it trains is the same to the bit, and c is the slope of its own loss.

It needs verl (`make test-matrix` installs it); the engine runs on one process of a CPU, sharded by FSDP2.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from trainers import save_model, word_tokenizer

pytestmark = pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed")
WORKER = Path(__file__).parent / "workers" / "verl_engine.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return save_model(tmp_path_factory.mktemp("model"), word_tokenizer())


@pytest.mark.parametrize("form", ["ROW", "PADDED"])
@pytest.mark.parametrize("entropy", [0.0, 0.05], ids=["", "entropy bonus"])
def test_verls_engine_is_captured_and_unchanged(model, tmp_path, form, entropy):
    out = tmp_path / "found"
    call = [sys.executable, str(WORKER), str(model), form, str(entropy), str(out)]
    done = subprocess.run(call, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    off, on = torch.load(out, weights_only=False).values()
    assert on["norms"] == off["norms"] and torch.equal(on["weights"], off["weights"])
    assert [(step["step"], step["passes"]) for step in on["steps"]] == [(1, 2), (2, 2), (3, 2)]
    for step, slopes in zip(on["steps"], off["slopes"], strict=True):
        assert step["residual"] < 1e-5 and step["linearity"] == pytest.approx(1, abs=0.3)  # the step is not small
        assert step["routes"] == (("least squares" if entropy else "logits",) if form == "PADDED" else ("tap",))
        explained = 0
        for row in step["rows"]:
            of = slopes[row["micro_batch"]]
            at = of["offsets"][row["sequence"] - 2 * row["micro_batch"]] + row["position"]
            assert row["token_id"] == int(of["ids"][at])
            assert row["c"] == pytest.approx(float(of["c"][at - 1]), rel=1e-4, abs=1e-7)
            explained += abs(row["c"])
        assert explained == pytest.approx(sum(float(of["c"].abs().sum()) for of in slopes), rel=1e-4)
