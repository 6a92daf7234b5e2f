"""verl's engine and OpenRLHF's training step, their own code: they train the same to the bit, and c is the slope of their loss.

`make test-matrix` installs both. They run on one process of a CPU: verl's FSDP2 engine as it is, OpenRLHF's actor with what
asks for a GPU standing aside (tests/workers/openrlhf_actor.py).
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from trainers import save_model, word_tokenizer

WORKERS = Path(__file__).parents[1] / "workers"


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return save_model(tmp_path_factory.mktemp("model"), word_tokenizer())


def without_and_with(worker, *args, out):
    """What a worker leaves behind without tokdyn and with it, after the two were seen to train the same."""
    call = [sys.executable, str(WORKERS / worker), *map(str, args), str(out)]
    done = subprocess.run(call, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    off, on = torch.load(out, weights_only=False).values()
    assert on["norms"] == off["norms"] and torch.equal(on["weights"], off["weights"])
    assert [step["step"] for step in on["steps"]] == [1, 2, 3]
    for step in on["steps"]:
        assert step["residual"] < 1e-5 and step["linearity"] == pytest.approx(1, abs=0.3)  # the step is not small
    return off, on


@needs("verl")
@pytest.mark.parametrize("form", ["ROW", "PADDED"])
@pytest.mark.parametrize("entropy", [0.0, 0.05], ids=["", "entropy bonus"])
def test_verls_engine(model, tmp_path, form, entropy):
    off, on = without_and_with("verl_engine.py", model, form, entropy, out=tmp_path / "found")
    assert [step["passes"] for step in on["steps"]] == [2, 2, 2]
    for step, slopes in zip(on["steps"], off["slopes"], strict=True):
        assert step["routes"] == (("least squares" if entropy else "logits",) if form == "PADDED" else ("tap",))
        explained = 0
        for row in step["rows"]:
            of = slopes[row["micro_batch"]]
            at = of["offsets"][row["sequence"] - 2 * row["micro_batch"]] + row["position"]
            assert row["token_id"] == int(of["ids"][at])
            assert row["c"] == pytest.approx(float(of["c"][at - 1]), rel=1e-4, abs=1e-7)
            explained += abs(row["c"])
        assert explained == pytest.approx(sum(float(of["c"].abs().sum()) for of in slopes), rel=1e-4)


@needs("openrlhf")
@pytest.mark.parametrize("entropy", [0.0, 0.05], ids=["", "entropy bonus"])
def test_openrlhfs_training_step(model, tmp_path, entropy):
    off, on = without_and_with("openrlhf_actor.py", model, entropy, out=tmp_path / "found")
    assert min(on["norms"]) > 0.2  # clipped to half and less
    for step, slopes, ids in zip(on["steps"], off["slopes"], off["ids"], strict=True):
        assert step["routes"] == (("least squares",) if entropy else ("tap",)) and len(step["rows"]) == 9
        assert step["accounted"] == pytest.approx(1, abs=1e-3)
        for row in step["rows"]:
            assert row["token_id"] == int(ids[row["sequence"], row["position"]])
            c = float(slopes[row["sequence"], row["position"] - 3])  # responses begin behind three tokens
            assert row["c"] == pytest.approx(c, rel=1e-4, abs=1e-6)


@needs("verl")
def test_verl_finds_a_module_named_in_the_job(model, tmp_path):
    """`actor_rollout_ref.model.external_lib`: verl's model settings import it, and the engine is then watched."""
    (tmp_path / "my_tokdyn.py").write_text("from tokdyn.integrations.verl import install\n\ninstall(every=10)\n")
    job = (
        "import sys\n"
        "from verl.workers.config import HFModelConfig\n"
        "from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead as engine\n"
        "before = engine.forward_step\n"
        "HFModelConfig(path=sys.argv[1], external_lib='my_tokdyn', use_remove_padding=False)\n"
        "assert engine.forward_step is not before\n"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", job, str(model)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
