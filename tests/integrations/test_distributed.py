"""One rank and two (gloo): the same c, G and Δ log pi under DDP and under FSDP2, and training that no probe disturbs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parents[1] / "workers" / "distributed.py"
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process found, and each of two."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(world), str(out / f"store-{world}"), str(out), port],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for world in (1, 2)
        for rank in range(world)
    ]  # fmt: skip
    for process in processes:
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
    return torch.load(out / "1-0.pt", weights_only=False), [torch.load(out / f"2-{r}.pt", weights_only=False) for r in (0, 1)]


def both(ranks, kind, step, name):
    return torch.tensor(ranks[0][kind]["records"][step][name] + ranks[1][kind]["records"][step][name])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "ddp, accumulated", "fsdp2, accumulated"])
def test_ranks_see_the_same_c_and_G(runs, kind):
    """Two ranks' tokens, one after the other, are one rank's: c in the units of the optimizer step, ‖G‖ and the statistics."""
    alone, ranks = runs
    assert ranks[0][kind]["dtensor"] == ("fsdp2" in kind)
    plain = alone[kind.replace("ddp", "plain").replace("fsdp2", "plain")]
    for step, record in enumerate(plain["records"]):
        assert record["ranks"] == 1 and all(rank[kind]["records"][step]["ranks"] == 2 for rank in ranks)
        assert torch.equal(both(ranks, kind, step, "token_id"), torch.tensor(record["token_id"]))
        for name in ("c", "force", "entropy"):
            mine = torch.tensor(record[name])
            # weights of later steps are sums over ranks in another order
            torch.testing.assert_close(both(ranks, kind, step, name), mine, rtol=1e3 * EPS, atol=0)
        figures = plain["figures"][step]
        for rank in ranks:
            assert rank[kind]["figures"][step] == pytest.approx(figures, rel=2e-3, abs=1e-6)
            assert rank[kind]["records"][step]["residual"] < 1e-5


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_see_the_same_change(runs, kind):
    """actual and predicted Δ log pi of the probe: log-probs of size 5 in float32, so differences to some 1e-6."""
    alone, ranks = runs
    rounding = 5 * 40 * EPS
    for step, record in enumerate(alone["plain"]["records"]):
        for rank in ranks:
            found = rank[kind]["records"][step]
            assert float((found["actual"] - record["actual"]).abs().max()) < rounding
            assert float((found["readout"] - record["readout"]).norm()) < 1e-5 * float(record["readout"].norm())
            # FSDP2: central differences, extrapolated, whose rounding the extrapolation multiplies by 3
            assert float((found["predicted"] - record["predicted"]).abs().max()) < (3 if kind == "fsdp2" else 1) * rounding


def test_update_tokens_are_asked_on_every_rank(runs):
    """DDP: each rank has the forces of its own tokens, and together they account for the step. FSDP2: the readout's part."""
    alone, ranks = runs
    for step, record in enumerate(alone["plain"]["records"]):
        forces = torch.cat([rank["ddp"]["records"][step]["forces"] for rank in ranks])
        torch.testing.assert_close(forces, record["forces"], rtol=0, atol=100 * EPS * float(record["forces"].abs().max()))
        assert ranks[0]["ddp"]["records"][step]["accounted"] == pytest.approx(1, abs=1e-4)
    sharded = torch.cat([rank["fsdp2"]["records"][0]["forces"] for rank in ranks])
    truth = alone["readout forces"]
    torch.testing.assert_close(sharded, truth, rtol=0, atol=100 * EPS * float(truth.abs().max()))
    assert "readout's part" in ranks[0]["fsdp2"]["records"][0]["notes"][0]


def test_a_probe_between_backward_and_step_must_give_the_weights_back(runs):
    """FSDP2 leaves the root unsharded after a pass without gradients, and the next trains on stale weights: tokdyn reshards.

    The naive probe shows that the hazard is still there; if it no longer is, this test says so.
    """
    _, ranks = runs
    for rank in ranks:
        assert rank["fsdp2"]["losses"] == rank["fsdp2 without"]["losses"]
        assert rank["ddp"]["losses"] == rank["ddp without"]["losses"]
        assert rank["fsdp2 naive"]["losses"] != rank["fsdp2 without"]["losses"]


@pytest.mark.parametrize("loss", ["smoothing", "entropy"])
def test_no_rank_waits_for_a_gather_that_the_others_do_not_make(runs, loss):
    """Rank 0 alone fits label smoothing, or needs the moments of an entropy term, while the readout is sharded by itself."""
    _, ranks = runs
    for rank, one in enumerate(ranks):
        for step in one["lopsided"][loss]:
            routes = dict(smoothing=("least squares", "logits")[rank], entropy="log_probs")
            assert step["routes"] == (routes[loss],) and step["residual"] < 1e-5
            expected = (0.9 if loss == "smoothing" and rank == 0 else 1.0) / 24
            torch.testing.assert_close(step["c"], torch.full((12,), expected), rtol=2e4 * EPS, atol=0)


def test_fsdp_that_shards_nothing_is_named(runs):
    """On CPUs a Trainer with fsdp trains under DDP; both ranks say so, and that of nothing else."""
    for rank in runs[1]:
        ((step, text),) = rank["trainer"]["of fsdp"]
        assert step == 0 and "args.fsdp is set and no parameter of the DistributedDataParallel" in text
        assert rank["trainer"]["fsdp"] == rank["trainer"]["without"]


def test_a_trainer_on_two_ranks(runs):
    """td.attach under DDP with accumulation: one rank's c, figures and Δ log pi, and losses and norms as without it."""
    alone, ranks = runs[0]["trainer"], [rank["trainer"] for rank in runs[1]]
    for one in (alone, *ranks):
        assert one["with"] == one["without"] and len(one["with"]) == 2
        assert one["passes"] == [2, 2] and one["accounted"] == pytest.approx([1, 1], abs=1e-3)
    for step in range(2):
        together = sorted(zip(ranks[0]["token_id"][step] + ranks[1]["token_id"][step],
                              torch.cat([rank["c"][step] for rank in ranks]).tolist(), strict=True))  # fmt: skip
        single = sorted(zip(alone["token_id"][step], alone["c"][step].tolist(), strict=True))
        assert [token for token, _ in together] == [token for token, _ in single]
        torch.testing.assert_close(
            torch.tensor([c for _, c in together]), torch.tensor([c for _, c in single]), rtol=100 * EPS, atol=0
        )
        for rank in ranks:
            assert rank["figures"][step] == pytest.approx(alone["figures"][step], rel=2e-3, abs=1e-6)
            for name in ("actual", "predicted"):
                assert float((rank[name][step] - alone[name][step]).abs().max()) < 5 * 40 * EPS


def test_checks_under_two_ranks_are_silent_where_nothing_is_wrong(runs):
    """td.check on each rank and td.attach on the first; tokens counted over all ranks, and over each rank's own."""
    for n, rank in enumerate(rank["checks"] for rank in runs[1]):
        for name in ("clean", "by rank"):
            for report in (rank[name], rank[f"{name}, attached"]):
                if report is None:  # the first rank looks while they train
                    assert n > 0
                    continue
                assert report["bad"] == [] and report["skipped"] == {}
                assert report["fine"]["scale"] == "c is that of a mean over the tokens of the step"


def test_a_loss_that_is_divided_by_the_ranks_twice_is_named(runs):
    for n, rank in enumerate(rank["checks"] for rank in runs[1]):
        for report in (rank["twice"], *[rank["twice, attached"]] * (n == 0)):
            ((check, what),) = report["bad"]
            assert check == "scale" and "divided by the ranks (2) once too often" in what
