"""A run that was killed is told from one that computes: real processes, and a folder's file in between."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import torch
from pages import Tags
from typer.testing import CliRunner

import tokdyn as td
from tokdyn import steps
from tokdyn.cli import app
from tokdyn.testing import tiny
from tokdyn.training.heartbeat import ALIVE, MISSED, Heartbeat, silent_since

TRAINING = """
import sys, time
from pathlib import Path
from tokdyn.training.heartbeat import Heartbeat
Heartbeat(Path(sys.argv[1]), every=0.02)
print("begun", flush=True)
time.sleep(3600)  # one long step: nothing is recorded
"""


def until(condition):
    while not condition():  # ends with the test run's own limit
        time.sleep(0.01)


def test_a_process_beats_between_records_and_no_more_when_it_is_killed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", TRAINING, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"begun\n"
    first = (tmp_path / ALIVE).read_text()
    until(lambda: (tmp_path / ALIVE).read_text() != first)  # it goes on by itself
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    last = datetime.fromisoformat(json.loads((tmp_path / ALIVE).read_text())["at"])
    until(lambda: silent_since(tmp_path))
    assert silent_since(tmp_path) == last
    assert datetime.now(UTC) - last > MISSED * timedelta(seconds=0.02)


def test_a_monitored_training_beats_until_it_ends(tmp_path):
    model = tiny("llama")
    monitor = td.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), out=tmp_path / "run")
    with monitor:
        assert (tmp_path / "run" / ALIVE).exists() and silent_since(tmp_path / "run") is None
        before = steps.read(tmp_path / "run")[0]["status"]
    assert before == "running" and not (tmp_path / "run" / ALIVE).exists()


def test_a_folder_that_is_gone_stops_neither_training_nor_heartbeat(tmp_path):
    beat = Heartbeat(tmp_path, every=0.001)
    (tmp_path / ALIVE).unlink()
    until((tmp_path / ALIVE).exists)
    beat.path = tmp_path / "gone" / ALIVE
    time.sleep(0.01)
    assert beat._thread.is_alive()
    beat.stop()
    assert not beat._thread.is_alive()


def test_a_dead_run_is_named_and_followed_no_longer(tmp_path, monkeypatch):
    """At once where it is dead already; where it dies while it is followed, after the page that says so."""
    (tmp_path / "run.json").write_text(json.dumps({"format": 2, "kind": "training", "status": "running"}))

    def beat(at):
        (tmp_path / ALIVE).write_text(json.dumps({"at": at.isoformat(), "every": 10.0}))

    long_ago = datetime(2000, 1, 2, 3, 4, 5, tzinfo=UTC)
    beat(datetime.now(UTC))
    alive = Tags(td.watch(tmp_path).read_text("utf-8")).words
    assert "running training" in alive and "No sign of life" not in alive
    monkeypatch.setattr("time.sleep", lambda _: beat(long_ago))
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--follow"])
    shown = " ".join(result.output.split())
    assert shown.index("The training runs") < shown.index("No sign of life since 2000-01-02 03:04:05 UTC"), result.stderr
    page = Tags((tmp_path / "report.html").read_text("utf-8"))
    assert "No sign of life since 2000-01-02 03:04:05 UTC" in page.words and "Still running" not in page.words
    assert not [attrs for _, attrs in page.tags if attrs.get("http-equiv") == "refresh"]
    again = " ".join(CliRunner().invoke(app, ["report", str(tmp_path), "--follow"]).output.split())
    assert "2000-01-02 03:04:05 UTC" in again and "nothing to follow" in again and "The training runs" not in again


def test_a_dead_run_is_replaced_with_all_it_left(tmp_path):
    model = tiny("llama")
    first = td.Monitor(model, out=tmp_path / "run")
    first.start()
    first._heartbeat._over.set()  # killed while it wrote
    first._folder.writer.close()  # a lock ends with its process
    (tmp_path / "run" / f".{ALIVE}").touch()
    again = td.Monitor(model, out=tmp_path / "run", overwrite=True)
    again.start()
    again.close()
    assert not (tmp_path / "run" / ALIVE).exists() and steps.read(tmp_path / "run")[0]["status"] == "complete"
    first.close()
