"""The command line as a user meets it: the main job, and one clear sentence for every mistake."""

import contextlib
import functools
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import tokdyn as td
from tokdyn._arguments import objective_names
from tokdyn.cli import app
from tokdyn.loading import DEMO_MODEL, DEMO_PAIRS, load_model
from tokdyn.runs import folder
from tokdyn.runs.summary import summary
from tokdyn.runs.table import Listing

PROJECT = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())
RUN = ["profile", "--rows", "1", "--held-out", "0", "--method", "none"]


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def refused(result, *words):
    assert result.exit_code == 2, result.output + result.stderr
    assert all(word in " ".join(result.stderr.split()) for word in words), result.stderr
    assert "Traceback" not in result.stderr


def test_main_job_on_the_demo_model(tmp_path):
    result = call("profile", "--rows", 1, "--held-out", 0, "--skip", 4, "--pairs", 40, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output + result.stderr
    written = {"run.json", "tokens.parquet", "forces.safetensors", "report.html", "run.yaml", "manifest-0.json"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == written
    run = td.load(tmp_path / "run")
    assert run.about["status"] == "complete" and 1.8 < run.about["verify"]["order"] < 2.2
    assert run.about["checks"]["row sums of the matrix against the tangent pass"] < 1e-4
    assert len(run.pairs.index) == 40 and "Why." in result.output
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
        ("grpo", ["--set", "clip=0.1", "--observable", "entropy"]),
        ("simko", []),
    ):
        result = call(*RUN, "--objective", objective, *options, "--out", tmp_path / objective)
        assert result.exit_code == 0, result.output + result.stderr
        assert td.load(tmp_path / objective).about["objective"]["name"].lower() == objective
    assert td.load(tmp_path / "grpo").about["observable"]["name"] == "Entropy"


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
    rows = ("--rows", max(1, text.count("\n")))  # those behind them are not looked at
    refused(call(*RUN, *rows, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "run"), "d.jsonl", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--objective", "dop"], ["unknown objective 'dop'", "DPO"]),
        (["--set", "beta=much"], ["NAME=NUMBER"]),
        (["--observable", "entropie"], ["observable must be log-prob, entropy"]),
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
        (["--method", "guess"], ["method must be"]),
        (["--memory", "much"], ["memory must be a number of bytes"]),
        (["--reference", "./no-such-model-here"], ["no-such-model-here"]),
        (["--adapter", "./no-adapter-here"], ["there is no adapter folder ./no-adapter-here"]),
        (["--adapter", str(DEMO_MODEL)], ["holds no adapter", "adapter_config.json"]),
    ],
)
@pytest.mark.filterwarnings("ignore:max_length")
def test_mistakes_get_one_sentence_before_the_model_is_loaded_and_write_nothing(tmp_path, monkeypatch, options, words):
    if "--scope" not in options:  # which parameters there are is the model's to say

        def load(*args, **kwargs):
            raise AssertionError("the model was loaded")

        monkeypatch.setattr("tokdyn.loading.load_weights", load)
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


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_readable_partial_run(tmp_path, sent):
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
    process.send_signal(sent)
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

    monkeypatch.setattr("tokdyn.loading.load_weights", interrupt)
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


# ---------------------------------------------------------------- at once


WITHOUT_TORCH = """
import sys
from tokdyn.__main__ import main
try:
    main()
except SystemExit as end:
    print("exit", end.code)
heavy = {"torch", "transformers", "numpy", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["--help"], 0, "profile"),
        (["profile", "--help"], 0, "--objective"),
        (["--version"], 0, f"tokdyn {td.__version__}"),
        (["profile", "--rows", "0"], 2, "--rows"),
        (["profile", os.path.realpath(sys.executable)], 2, "the data are --data"),
        (["profile", "--objective", "dop"], 2, "unknown objective 'dop'"),
        (["profile", "--set", "beta=much"], 2, "NAME=NUMBER"),
        (["profile", "--eta", "nan"], 2, "eta must be positive"),
        (["profile", "--method", "guess"], 2, "method must be"),
        (["profile", "--memory", "much"], 2, "memory must be"),
        (["profile", "--scope", "("], 2, "regular expression"),
        (["profile", "--data", "nowhere.jsonl"], 2, "no data file nowhere.jsonl"),
        (["profile", "--model", "./nowhere"], 2, "no model folder ./nowhere"),
        (["profile", "--model", os.path.realpath(sys.executable)], 2, "is a file: a model is a folder"),
        (["profile", "--out", os.path.realpath(sys.executable)], 2, "choose another place"),
    ],
)
def test_help_and_bad_arguments_do_not_wait_for_torch(tmp_path, arguments, code, said):
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and f"exit {code}" in done.stdout, done.stderr
    assert said in " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("imported", ["typer", "rich", "tokdyn.cli"])
def test_control_c_during_the_imports_is_no_traceback(tmp_path, imported):
    """As the installed script begins: interrupted when a module is looked for."""
    module, _, name = PROJECT["project"]["scripts"]["tokdyn"].partition(":")
    program = f"""
import os, signal, sys
class Interrupt:
    def find_spec(name, path, target=None):
        if name == {imported!r}:
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt)
from {module} import {name}
{name}()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 130 and done.stderr.startswith("interrupted") and "Traceback" not in done.stderr, done.stderr


def test_names_of_objectives_are_those_of_the_module():
    assert objective_names() == td.objectives.__all__


# ---------------------------------------------------------------- what is printed


def figures(renderable, width):
    """The figures in what a terminal of that width shows, however they are arranged."""
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return sorted(re.findall(r"[+-]\d+\.\d{4}", console.file.getvalue()))


def test_no_figure_is_cut_in_a_narrow_terminal(tmp_path):
    assert call("profile", "--rows", 2, "--held-out", 0, "--out", tmp_path / "run").exit_code == 0
    run = td.load(tmp_path / "run")
    shown = summary(run.about, run.tokens, run.matrix)
    whole = figures(shown, 1000)
    assert len(whole) >= 4 * (2 + 6)  # predicted, actual and by each of four answers and what pairs share
    rest = figures(shown, 80)
    assert set(rest) <= set(whole) and len(rest) >= 4 * 2 and figures(shown, 20) == whole
    part = Listing("", ("kind", "rows", "of less interest"), (1, 2), dim=(2,))
    part.add_row("random_permute", "1000000", "123456789")
    lines = io.StringIO()
    Console(width=30, file=lines).print(part)
    assert "1000000" in lines.getvalue() and "also: of less interest" in " ".join(lines.getvalue().split())
    table = Listing("", ("kind", "rows", "words each"), (1, 2))
    table.add_row("random_permute", "1000000", "123456789")
    console = Console(width=20, file=io.StringIO())
    console.print(table)
    assert {"1000000", "123456789"} <= set(console.file.getvalue().split())


def test_rows_that_are_not_there_to_hold_out_are_said(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    options = ["profile", "--rows", 1, "--held-out", 2, "--method", "none", "--data", tmp_path / "d.jsonl"]
    result = call(*options, "--out", tmp_path / "run")
    assert result.exit_code == 0 and "--held-out asks for 2 further rows and" in " ".join(result.stderr.split())


def test_a_run_that_cannot_be_written_in_the_end_is_shown_and_kept_elsewhere(tmp_path, monkeypatch):
    write = folder.write_folder

    def full(path, *args):
        if path == tmp_path / "run":
            raise OSError(28, "No space left on device")
        write(path, *args)

    monkeypatch.setattr(folder, "write_folder", full)
    result = call(*RUN, "--out", tmp_path / "run")
    assert result.exit_code == 1 and "Change of each answer" in result.output
    (place,) = re.findall(r"No space left on device\); it is in (\S+)", result.stderr)
    assert td.load(place).about["status"] == "complete" and f"Run in {place}" in result.output
    shutil.rmtree(Path(place).parent)


def test_a_place_that_cannot_be_written_to_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    monkeypatch.setattr("tokdyn.loading.load_weights", None)
    refused(call(*RUN, "--out", tmp_path / "run"), "cannot be made", "Read-only file system")


@pytest.mark.parametrize(
    "error, said",
    [
        (RuntimeError("shapes\ncannot be multiplied"), "RuntimeError: shapes cannot be multiplied (tokdyn --debug"),
        (KeyError(), "KeyError (tokdyn --debug"),
        (ModuleNotFoundError("no", name="scipy.stats"), "package scipy, which is not installed: pip install 'tokdyn[studies]'"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "",
)
def test_what_a_model_raises_is_one_sentence_and_debug_shows_where(tmp_path, monkeypatch, error, said):
    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr("tokdyn.loading.load_weights", load)
    refused(call(*RUN, "--out", tmp_path / "run"), said)
    shown = call("--debug", *RUN, "--out", tmp_path / "run")
    assert shown.exit_code == 2 and "Traceback" in shown.stderr and "in load" in shown.stderr


def test_an_adapter_is_profiled_on_its_own_weights(tmp_path):
    """The folder that PEFT saves, alone or beside its base; and the sum over LoRA's weights is what td.profile gives there."""
    peft = pytest.importorskip("peft")
    model, tokenizer = load_model("demo")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / "lora")
    rows = td.data.read(DEMO_PAIRS)[:1]
    update = td.data.sequences(tokenizer, rows, td.objectives.DPO())
    expected = td.profile(model.eval(), update, td.data.watched(tokenizer, rows), td.objectives.DPO(), method="none")
    for name, options in (("alone", ["--model", tmp_path / "lora"]), ("beside", ["--adapter", tmp_path / "lora"])):
        result = call(*RUN, *options, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output + result.stderr
        torch.testing.assert_close(td.load(tmp_path / name).vector, expected.vector)  # the same weights, the same operations
    about = tmp_path / "lora" / "adapter_config.json"
    about.write_text(about.read_text().replace(str(DEMO_MODEL), "./gone"))
    refused(call(*RUN, "--model", tmp_path / "lora", "--out", tmp_path / "run"), "./gone", "--model BASE --adapter")
