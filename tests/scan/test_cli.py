"""`tokdyn scan` from the shell's side: what it writes, how it goes on, what it refuses; a row's profile; the report."""

import json

import pytest
import torch
from typer.testing import CliRunner

import tokdyn as td
from tokdyn.cli import app
from tokdyn.loading import DEMO_PAIRS, load_model, load_optimizer
from tokdyn.runs.scans import Scan
from tokdyn.testing import random_chis, tiny


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "scan"
    said = run("scan", "--data", "demo", "--probe", "demo", "--probe-rows", 1, "--kind", "chosen", "--rows", 3, "--block", 2,
               "--set", "beta=0.3", "--out", out)  # fmt: skip
    assert said.exit_code == 0, said.output
    return out


def test_a_scan_of_the_demo(folder):
    scan = Scan(folder)
    model, tokenizer = load_model("demo")
    row = td.data.read(DEMO_PAIRS)[1]
    watched = td.probes.load(tokenizer, DEMO_PAIRS, rows=1, types=["chosen"])["chosen"]
    truth = td.forces(model, td.preference(tokenizer, **row), watched, td.objectives.DPO(beta=0.3), reduce="observe").vector
    f = torch.tensor(scan.tokens().to_pandas().query("row == 1").force_chosen.to_numpy())
    assert float((f - truth).norm() / truth.norm()) < 1e-4  # float32: two orders of sums of 4096 terms in four layers
    assert scan.complete and scan.about["model"]["name"] == "demo"


def test_it_goes_on_and_does_not_replace(folder):
    again = run("scan", "--data", "demo", "--probe", "demo", "--probe-rows", 1, "--kind", "chosen", "--rows", 3, "--block", 2,
                "--set", "beta=0.3", "--out", folder)  # fmt: skip
    assert again.exit_code == 2 and "go on with --resume" in again.output
    other = run("scan", "--data", "demo", "--probe", "demo", "--kind", "rejected", "--rows", 3, "--out", folder, "--resume")
    assert other.exit_code == 2 and "was begun with" in other.output


def test_report_and_profile_of_a_row(folder):
    said = run("report", folder)
    assert said.exit_code == 0 and "What hurts chosen most" in said.output
    assert "profiles/row-0000002" not in (folder / "report.html").read_text()
    profiled = run("profile", "--scan", folder, "--row", 2, "--method", "none")
    assert profiled.exit_code == 0, profiled.output
    about = td.load(folder / "profiles" / "row-0000002").about
    assert about["objective"]["arguments"] == {"beta": 0.3}
    assert {each["response"] for each in about["sequences"] if each["side"] == "updated"} == {
        td.data.read(DEMO_PAIRS)[1][key] for key in ("chosen", "rejected")
    }
    run("report", folder)
    assert 'href="profiles/row-0000002/report.html"' in (folder / "report.html").read_text()
    assert run("profile", "--scan", folder).exit_code == 2
    assert "there is no row 9" in run("profile", "--scan", folder, "--row", 9).output


@pytest.mark.parametrize(
    "words, said",
    [
        (["--shard", "4/4"], "--shard takes i/n"),
        (["--probe", "nothing.jsonl"], "no data file nothing.jsonl"),
        (["--truncate", "middle"], "--truncate must be"),
        (["--model", "./nowhere"], "no model folder"),
        (["--objective", "dpoo"], "unknown objective"),
    ],
)
def test_mistakes_are_refused_before_a_model_is_loaded(tmp_path, words, said, monkeypatch):
    import tokdyn.loading

    monkeypatch.setattr(tokdyn.loading, "load_weights", lambda *a, **k: pytest.fail("a model was loaded"))
    asked = {"--data": "demo", "--probe": "demo", "--out": tmp_path / "out"} | dict(zip(words[::2], words[1::2], strict=True))
    found = run("scan", *(word for pair in asked.items() for word in pair))
    assert found.exit_code == 2 and said in " ".join(found.output.split())


@pytest.mark.parametrize("place, said", [("link", "is a symbolic link"), ("taken", "holds no scan"), ("run", "holds no scan"),
                                         ("file/scan", "cannot be made")])  # fmt: skip
def test_a_place_that_cannot_be_a_scans_is_said_before_a_model_is_loaded(tmp_path, place, said, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "taken")
    (tmp_path / "file").touch()
    chis = random_chis([(2, 2)], seed=1)
    td.forces(tiny("llama"), chis, chis).save(tmp_path / "run")
    monkeypatch.setattr("tokdyn.loading.load_weights", lambda *args, **options: pytest.fail("the model was loaded"))
    before = sorted(tmp_path.rglob("*"))
    for words in ([], ["--resume"], ["--shard", "0/2"]):
        result = run("scan", "--data", "demo", "--probe", "demo", "--out", tmp_path / place, *words)
        assert result.exit_code == 2 and said in " ".join(result.stderr.split()), result.output + result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_the_optimizer_of_a_checkpoint(tmp_path):
    """A Trainer's own checkpoint: the state of every parameter stands at that parameter."""
    import datasets
    from transformers import Trainer, TrainingArguments

    model = td.testing.tiny("llama")
    rows = datasets.Dataset.from_list([{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4)
    arguments = TrainingArguments(tmp_path / "run", max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
                                  per_device_train_batch_size=2)  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    found = load_optimizer(model, str(tmp_path / "run" / "checkpoint-2"))
    own = trainer.optimizer.optimizer
    for p in model.parameters():
        assert torch.equal(found.state[p]["exp_avg_sq"], own.state[p]["exp_avg_sq"])
    other = td.testing.tiny("llama", intermediate_size=40)
    with pytest.raises(ValueError, match="is of other parameters"):
        load_optimizer(other, str(tmp_path / "run" / "checkpoint-2"))
    with pytest.raises(ValueError, match="holds no optimizer.pt"):
        load_optimizer(model, str(tmp_path))
