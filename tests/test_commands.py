"""Commands for machines and for repeating: --json, --config, --dry-run, diff, completion, exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import tokdyn as td
from tokdyn import cli
from tokdyn.cli import app
from tokdyn.loading import DEMO_MODEL

DEMO_BYTES = 2 * (DEMO_MODEL / "model.safetensors").stat().st_size  # bfloat16 there (beside a header), float32 when loaded
SMALL = ["profile", "--rows", "1", "--held-out", "0", "--skip", "4", "--scope", "readout"]


def call(*args, **options):
    return CliRunner().invoke(app, [str(a) for a in args], **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with --json, the same made again from its run.yaml with another loss, and what was printed."""
    folder = tmp_path_factory.mktemp("runs")
    first = call(*SMALL, "--set", "beta=0.3", "--out", folder / "a", "--json")
    again = call("profile", "--config", folder / "a/run.yaml", "--objective", "ipo", "--out", folder / "b", "--json")
    assert first.exit_code == again.exit_code == 0, first.stderr + again.stderr
    return folder, json.loads(first.stdout), json.loads(again.stdout)


def test_json_is_one_document_and_says_what_the_run_holds(runs):
    folder, first, _ = runs
    run = td.load(folder / "a")
    assert first["run"]["verify"] == run.about["verify"] and first["path"] == str(folder / "a")
    rows = [row for row in run.tokens.to_pylist() if row["side"] == "observed"]
    assert sum(x["actual"] for x in first["answers"].values()) == pytest.approx(sum(row["actual"] for row in rows))
    shown = json.loads(call("report", folder / "a", "--json").stdout)
    assert shown["answers"] == first["answers"] and shown["page"].endswith("report.html")


def test_a_run_writes_the_options_that_make_it_again_and_the_command_line_wins(runs):
    folder, first, again = runs
    recipe = yaml.safe_load((folder / "a/run.yaml").read_text())
    assert recipe["set"] == ["beta=0.3"] and recipe["scope"] == "readout" and "out" not in recipe and recipe["skip"] == 4
    assert first["run"]["objective"] == {"name": "DPO", "arguments": {"beta": 0.3}}
    assert again["run"]["objective"]["name"] == "IPO" and again["run"]["objective"]["arguments"]["beta"] == 0.3
    assert again["run"]["sequences"] == first["run"]["sequences"]
    # a run with what commands lay beside it is still a run that may be replaced
    (folder / "c").mkdir()
    (folder / "c/run.yaml").write_text("rows: 1\nno-such-option: 2\n")
    refused = call("profile", "--config", folder / "c/run.yaml")
    assert refused.exit_code == 2 and "no-such-option" in refused.stderr
    assert call("profile", "--config", folder / "none.yaml").exit_code == 2
    plan = call("profile", "--config", folder / "a/run.yaml", "--out", folder / "a", "--overwrite", "--dry-run")
    assert plan.exit_code == 0, plan.stderr


def test_diff_tells_two_runs_and_writes_their_page(runs):
    folder, *_ = runs
    result = call("diff", folder / "a", folder / "b")
    assert result.exit_code == 0, result.stderr
    assert "objective name: DPO in A, IPO in B" in result.stdout and (folder / "b/diff.html").exists()
    told = json.loads(call("diff", folder / "a", folder / "b", "--out", folder / "x.html", "--unit", "rate", "--json").stdout)
    a, b = (td.load(folder / name) for name in "ab")
    change = sum(x["force_b"] - x["force_a"] for x in told["answers"].values())
    assert change == pytest.approx(float(b.vector.double().sum() - a.vector.double().sum()), rel=1e-4)
    assert call("diff", folder / "a", folder / "none").exit_code == 2


def test_a_dry_run_counts_the_tokens_and_times_one_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("tokdyn.profile", lambda *a, **k: pytest.fail("it was not dry"))
    result = call(*SMALL, "--out", tmp_path / "run", "--dry-run", "--json")
    assert result.exit_code == 0 and not (tmp_path / "run").exists()
    plan = json.loads(result.stdout)
    M, L = (int(plan[side].split()[0]) for side in ("observed", "update"))
    assert M == L > 20 and plan["matrix"].startswith(f"{M} x {L},")  # one pair, watched as it is trained
    weights = int(re.search(r"model ([\d,]+)", plan["memory"])[1].replace(",", ""))
    assert plan["time"].startswith("about ") and weights == pytest.approx(DEMO_BYTES / 2**20, abs=1)
    assert call(*SMALL, "--objective", "dpx", "--dry-run").exit_code == 2


def test_other_commands_print_json_too(tmp_path):
    told = json.loads(call("probe", "build", "demo", "--rows", 2, "--out", tmp_path / "p.jsonl", "--json").stdout)
    assert told["prompts"] == 2 == told["kinds"]["chosen"] == len((tmp_path / "p.jsonl").read_text().splitlines())
    assert "dpo-decay" in json.loads(call("study", "--json").stdout)
    health = json.loads(call("doctor", "--json").stdout)
    assert health["agree"] is True and health["relative error"] < 1e-5 and health["tokdyn"] == td.__version__


def test_colours_and_width_follow_the_terminal(runs):
    """A terminal gets colours, with NO_COLOR none; nothing is wider than it. A console reads that once: processes."""
    command = [sys.executable, "-m", "tokdyn", "report", str(runs[0] / "a")]
    own = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    for given, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        env = own | {"FORCE_COLOR": "1", "COLUMNS": "60"} | given
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]", done.stdout)) == coloured
        text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
        assert max(map(len, text.splitlines()[:-1])) <= 60  # the last line is a path, which is never broken


@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_a_file_that_bench_cannot_write_is_said_before_it_measures(tmp_path, option):
    result = call("bench", option, tmp_path / "nowhere" / "figures")
    assert result.exit_code == 2 and "there is no folder" in " ".join(result.stderr.split())


def test_help_names_the_completion_of_shells():
    assert "--install-completion" in call("--help").stdout


def test_a_terminal_without_unicode_gets_letters_that_it_has():
    assert "“␣η” Σ|F| → 1.2×10⁻⁴, 你".encode("ascii", "tokdyn").decode() == ('"_eta" Sum|F| -> 1.2x10^-\\u2074, \\u4f60')
    assert "“η”".encode("utf-8", "tokdyn").decode() == "“η”"


def test_every_exit_code_of_the_documents_is_one_that_the_code_gives():
    told = (Path(__file__).parents[1] / "docs/reference/cli.md").read_text()
    codes = set(map(int, re.findall(r"^\| (\d+) \|", told, re.M)))
    sources = [path.read_text() for path in Path(cli.__file__).parent.rglob("*.py") if path.name in ("cli.py", "_app.py") or
               path.parent.name == "commands"]  # fmt: skip
    given = set(map(int, re.findall(r"typer\.Exit\((\d+)\)", "".join(sources))))
    assert given <= codes and {0, 1, 2, 130} == codes
