"""The command line as a user meets it: the main job, and one clear sentence for every mistake."""

import contextlib
import functools
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tokdyn as td
from tokdyn.cli import app
from tokdyn.loading import DEMO_MODEL, DEMO_PAIRS

RUN = ["profile", "--rows", "1", "--held-out", "0", "--method", "none"]


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def refused(result, *words):
    assert result.exit_code == 2, result.output + result.stderr
    assert all(word in " ".join(result.stderr.split()) for word in words), result.stderr
    assert "Traceback" not in result.stderr


def test_main_job_on_the_demo_model(tmp_path):
    result = call("profile", "--rows", 1, "--held-out", 0, "--skip", 4, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output + result.stderr
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"run.json", "tokens.parquet", "forces.safetensors", "report.html"}
    run = td.load(tmp_path / "run")
    assert run.about["status"] == "complete" and 1.8 < run.about["verify"]["order"] < 2.2
    assert run.about["checks"]["row sums of the matrix against the tangent pass"] < 1e-4
    spelled = "".join(r["token"] for r in run.tokens.to_pylist() if r["side"] == "updated" and r["role"] == "chosen")
    assert spelled == json.loads(DEMO_PAIRS.read_text().splitlines()[4])["chosen"] + "<|endoftext|>"
    assert "chosen 1" in result.output and "order" in result.output
    assert "nats after the step" in result.output and "by itself" in result.output
    again = call("report", tmp_path / "run", "--unit", "rate", "--per", "tokens")
    assert again.exit_code == 0 and "nats per unit learning rate" in again.output and "by itself" not in again.output
    refused(call("report", tmp_path / "run", "--unit", "nats"), "unit must be", "'nats'")


def test_other_objectives_data_forms_and_a_model_folder(tmp_path):
    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    chat = dict(prompt=[dict(role="user", content="Why?")], completion=[dict(role="assistant", content="Because.")])
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    for objective, options in (
        ("sft", ["--data", tmp_path / "chat.jsonl", "--model", tmp_path / "model"]),
        ("grpo", ["--set", "clip=0.1"]),
        ("simko", []),
    ):
        result = call(*RUN, "--objective", objective, *options, "--out", tmp_path / objective)
        assert result.exit_code == 0, result.output + result.stderr
        assert td.load(tmp_path / objective).about["objective"]["name"].lower() == objective


def test_doctor_says_what_is_there():
    result = call("doctor")
    assert result.exit_code == 0
    for word in ("torch", torch.__version__, "cpu kernels", "cuda", "exact forces", "agree"):
        assert word in result.output


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["holds no rows"]),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n', ["line 2", "not JSON"]),
        ('{"prompt": "a", "answer": "b"}\n', ["line 1", "prompt, answer"]),
        ('{"prompt": "a", "chosen": "  ", "rejected": "c"}\n', ["line 1", "chosen is empty"]),
    ],
)
def test_bad_data_is_named_by_file_and_line(tmp_path, text, words):
    (tmp_path / "d.jsonl").write_text(text)
    refused(call(*RUN, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "run"), "d.jsonl", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--objective", "dop"], ["unknown objective 'dop'", "DPO"]),
        (["--set", "beta=much"], ["NAME=NUMBER"]),
        (["--set", "beta=nan"], ["beta must be a finite number"]),
        (["--objective", "ipo", "--set", "beta=0"], ["beta must be positive"]),
        (["--objective", "simko", "--set", "n_candidates=2.5"], ["n_candidates must be a finite whole number"]),
        (["--objective", "simko", "--set", "quantile=2"], ["quantile must lie in [0, 1]"]),
        (["--device", "tpu"], ["tpu"]),
        (["--eta", "inf"], ["eta must be positive"]),
        (["--set", "gamma=1"], ["DPO has no constant 'gamma'", "beta"]),
        (["--model", "./no-such-model-here"], ["no-such-model-here"]),
        (["--data", "nowhere.jsonl"], ["no data file nowhere.jsonl"]),
        (["--max-length", "4"], ["response is empty after truncation"]),
        (["--scope", "nothing_like_it"], ["no trainable parameter"]),
        (["--rows", "999"], ["32 rows"]),
        (["--per", "words"], ["per must be", "'words'"]),
        (["--eta", "-1"], ["eta must be positive"]),
    ],
)
@pytest.mark.filterwarnings("ignore:max_length")
def test_mistakes_get_one_sentence_and_write_nothing(tmp_path, options, words):
    refused(call(*RUN, "--out", tmp_path / "run", *options), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_absent_cuda_is_said(tmp_path):
    refused(call(*RUN, "--out", tmp_path / "run", "--device", "cuda"), "no CUDA device")


def test_taken_folder_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    refused(call(*RUN, "--out", tmp_path / "run"), "exists already", "--overwrite")
    refused(call(*RUN, "--out", tmp_path / "run", "--overwrite"), "thesis.txt")


def test_broken_weights_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][7] = torch.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    refused(call(*RUN, "--model", tmp_path / "model", "--out", tmp_path / "run"), "model.norm.weight holds NaN")
    assert not (tmp_path / "run").exists()


def test_control_c_leaves_a_readable_partial_run(tmp_path):
    """In a terminal, interrupted when the matrix is named: the folder is whole and says that it is partial."""
    tokdyn = Path(sys.executable).with_name("tokdyn")
    command = [tokdyn, "profile", "--rows", "8", "--held-out", "8", "--out", tmp_path / "run"]
    leader, follower = pty.openpty()
    hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell starts what runs behind it deaf to it
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, close_fds=True, preexec_fn=hear)
    os.close(follower)
    seen = ""
    while "force matrix" not in seen:  # ends with the process: read() then fails
        seen += os.read(leader, 4096).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # the terminal closes with the process
        while True:
            seen += os.read(leader, 4096).decode(errors="replace")
    os.close(leader)
    assert process.wait(timeout=300) == 130, seen
    assert "Traceback" not in seen
    assert td.load(tmp_path / "run").about["status"] == "partial"


def test_control_c_before_there_is_anything_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("tokdyn.loading.load_model", interrupt)
    result = call(*RUN, "--out", tmp_path / "run")
    assert result.exit_code == 130 and "nothing was written" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_pair_of_one_text_moves_nothing_and_is_told_so(tmp_path):
    (tmp_path / "same.jsonl").write_text(json.dumps(dict(prompt="Why?", chosen=" Because.", rejected=" Because.")) + "\n")
    result = call("profile", "--rows", 1, "--held-out", 0, "--data", tmp_path / "same.jsonl", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output + result.stderr
    said = " ".join(result.output.split())
    assert "Nothing moves." in said and "chosen 1 and rejected 1" in said and "no step" in said and "holds" not in said
    assert "Nothing moves" in (tmp_path / "run" / "report.html").read_text("utf-8")
    assert call("report", tmp_path / "run").exit_code == 0
