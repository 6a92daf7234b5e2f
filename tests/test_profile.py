"""A run holds what forces() and verify() give, survives the disk, and an interrupt."""

import json

import pytest
import torch

import tokdyn as td
from tokdyn.findings import blocks, by_sequence
from tokdyn.testing import random_chis, relative_error, tiny


def pair():
    chosen, rejected = random_chis([(3, 5), (2, 6)], seed=1)
    return [chosen.with_(role="chosen", group=0), rejected.with_(role="rejected", group=0)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return td.profile(
        tiny("llama"), pair(), pair(), out=tmp_path_factory.mktemp("runs") / "one", about={"model": {"name": "tiny"}}
    )


def test_run_is_forces_and_verify(run):
    model = tiny("llama")
    naive = td.forces(model, pair(), pair(), td.objectives.DPO(), method="naive").matrix
    assert relative_error(run.matrix, naive) < 1e-6
    assert relative_error(run.vector, naive.sum(1)) < 4e-5
    check = td.verify(model, pair(), pair(), td.objectives.DPO())
    observed = [row for row in run.tokens.to_pylist() if row["side"] == "observed"]
    assert [row["actual"] for row in observed] == pytest.approx(check.actual.tolist(), rel=1e-6, abs=1e-9)
    assert run.about["verify"]["order"] == pytest.approx(check.order, rel=1e-6)
    assert run.about["checks"]["row sums of the matrix against the tangent pass"] < 4e-5
    top = td.forces(model, pair(), pair(), td.objectives.DPO(), reduce="update").vocabulary(2, k=3)
    assert [f"<{i}>" for i in top.rising.tolist()] == [entry["token"] for entry in observed[2]["risers"][:3]]
    assert [entry["delta"] for entry in observed[2]["fallers"][:3]] == pytest.approx(top.fall.tolist(), rel=1e-4)


def test_squeezing_columns_are_a_readout_step_of_the_token(run):
    model = tiny("llama")
    updated = [row for row in run.tokens.to_pylist() if row["side"] == "updated"]
    chi, eta = pair()[1], run.about["settings"]["eta"]
    out = model(chi.ids[None], output_hidden_states=True)
    h, z = out.hidden_states[-1][0, :-1][chi.scored[1:]], out.logits[0, :-1][chi.scored[1:]]
    W, h, z = model.lm_head.weight.detach(), h.detach(), z.detach()
    for i, row in enumerate(updated[len(pair()[0]) :]):
        G = -row["c"] * (torch.nn.functional.one_hot(chi.ids[row["position"]], 61) - z[i].softmax(0))
        p = ((W - eta * torch.outer(G, h[i])) @ h[i]).softmax(0)
        assert row["p_target_after"] == pytest.approx(float(p[row["token_id"]]), rel=1e-4)
        assert row["p_argmax_after"] == pytest.approx(float(p[row["argmax"]]), rel=1e-4)


def test_run_survives_the_disk(run, tmp_path):
    run.save(tmp_path / "r")
    again = td.load(tmp_path / "r")
    assert torch.equal(again.matrix, run.matrix) and torch.equal(again.vector, run.vector)
    assert again.tokens.equals(run.tokens) and again.about == json.loads(json.dumps(run.about))
    assert {p.name for p in (tmp_path / "r").iterdir()} == {"run.json", "tokens.parquet", "forces.safetensors", "report.html"}
    with pytest.raises(FileExistsError, match="overwrite"):
        run.save(tmp_path / "r")
    run.save(tmp_path / "r", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["r"]  # no scaffolding is left
    with pytest.raises(FileNotFoundError, match="holds no run"):
        td.load(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not a tokdyn run"):
        run.save(tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "precious"


def test_blocks_and_sums_are_those_of_the_matrix(run):
    rows = run.tokens.to_pylist()
    u, o = ([row for row in rows if row["side"] == side] for side in ("updated", "observed"))
    table = blocks(o, u, run.matrix)
    assert table["rejected 1"]["chosen 1"] == pytest.approx(float(run.matrix[5:, :5].sum()), rel=1e-5)
    total = run.about["settings"]["eta"] * sum(table["chosen 1"].values())
    assert by_sequence(o)["chosen 1"]["predicted"] == pytest.approx(total, rel=1e-4)


def test_interrupt_keeps_what_is_done(tmp_path):
    def stop(what, done, total):
        if what == "force matrix" and done == 5:
            raise KeyboardInterrupt

    run = td.profile(tiny("llama"), pair(), pair(), method="tangent", out=tmp_path / "p", stage=stop)
    again = td.load(tmp_path / "p")
    assert again.about["status"] == "partial" and again.about["verify"]["order"] == run.about["verify"]["order"]
    whole = td.forces(tiny("llama"), pair(), pair(), td.objectives.DPO()).matrix
    done = ~again.matrix.isnan()
    assert bool(done[:, :5].all()) and not bool(done[:, 5:].any())  # the chosen answer's columns, whole ones
    assert relative_error(again.matrix[:, :5], whole[:, :5]) < 1e-6


def test_error_writes_nothing(tmp_path):
    with pytest.raises(ValueError):
        td.profile(tiny("llama"), pair(), random_chis([(2, 3)], vocabulary=900), out=tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
