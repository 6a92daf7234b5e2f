"""The folder of a training: nothing lost, nothing doubled, and nobody else's folder touched."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from crashes import before_each_call
from loops import data, recorded, sft, train

import tokdyn as td
from tokdyn import steps as records
from tokdyn.testing import tiny
from tokdyn.training import step_folder
from tokdyn.training.step_folder import Folder, prepare

TOKENS, WATCHED = 20, 12  # scored tokens of a step, tokens of the probe


@pytest.fixture(scope="module")
def like():
    """A record with a probe, of which others are made."""
    return train(sft, steps=1)[2].steps[0]


def record(like, n):
    return replace(
        like,
        step=n,
        _tokens=like._tokens | {"step": torch.full((TOKENS,), n)},
        observed=like.observed.set_column(0, "step", [[n] * WATCHED]),
    )


def steps_of(path):
    """The steps in a folder, which must have all rows of each of its tables once."""
    about, tables = records.read(path)
    found = tables["steps"]["step"].to_pylist() if tables["steps"] is not None else []
    for name, rows in (("tokens", TOKENS), ("probe", WATCHED)):
        assert (tables[name]["step"].to_pylist() if tables[name] is not None else []) == [n for n in found for _ in range(rows)]
    return found


def write(path, like, steps, resume=True):
    prepare(path, {}, resume=resume)
    folder = Folder(path, 0, {}, resume=resume)
    for n in steps:
        folder.add(record(like, n))
        folder.flush()
    return folder


def test_a_kill_at_any_call_leaves_whole_steps_and_a_resumed_training_has_each_once(tmp_path, like, counted):
    work = tmp_path / "work"

    def photograph(n):
        if (work / "run.json").exists():
            shutil.copytree(work, tmp_path / f"photograph {n}")

    folder = write(work, like, [], resume=False)
    with before_each_call(photograph):
        folder.add(record(like, 1))
        folder.close("complete")
    photographs, seen = list(tmp_path.glob("photograph *")), set()
    for path in photographs:
        seen.add(tuple(steps_of(path)))
        write(path, like, [1, 2]).close("complete")  # from a checkpoint before step 1
        assert steps_of(path) == [1, 2] and records.read(path)[0]["status"] == "complete"
        assert not [p for p in path.iterdir() if p.name.startswith(".")]
    assert seen == {(), (1,)} and len(photographs) > 20
    counted(len(photographs), "states of a training's folder, one a call to the system")


def test_a_write_that_fails_once_at_any_call_loses_nothing_and_doubles_nothing(tmp_path, like, counted):
    """The next write takes what waits: the failure of the disk is told, and the folder is what it would have been."""
    with before_each_call(lambda n: None) as made:
        write(tmp_path / "as it should be", like, [1]).close("complete")
    told = 0
    for broken in range(1, len(made) + 1):
        path = tmp_path / str(broken)
        folder = write(path, like, [], resume=False)

        def fail(n, broken=broken):
            if n == broken:
                raise OSError(28, "No space left on device")

        with before_each_call(fail):
            try:
                folder.add(record(like, 1))
                folder.flush()
            except OSError as error:
                told += "No space left" in str(error)
        folder.add(record(like, 2))
        folder.close("complete")
        assert steps_of(path) == [1, 2] and not [p for p in path.iterdir() if p.name.startswith(".")]
    assert told > 10
    counted(len(made), "calls to the system that fail, one at a time")


def test_a_disk_that_stays_full_is_tried_seldom_and_what_is_dropped_is_said(tmp_path, like, monkeypatch):
    """Every further step does not try again with all that waits; memory is bounded; run.json says what is lost."""
    monkeypatch.setattr(step_folder, "MOST", 10)
    monkeypatch.setattr(step_folder, "RECORDS", 2)
    folder, told = write(tmp_path / "run", like, [], resume=False), []
    write_ = folder.writer.commit

    def full(files, key):
        raise OSError(28, "No space left on device")

    folder.writer.commit = full
    for n in range(1, 31):
        try:
            folder.add(record(like, n))
        except OSError as error:
            told.append(str(error))
    assert len(folder.waiting) == 10 and [text.split("; ")[1] for text in told[:4]] == [
        "2 wait in memory", "4 wait in memory", "8 wait in memory", "10 wait in memory",
    ]  # fmt: skip
    assert "10 wait in memory, 20 were dropped (steps 1 to 20)" in told[-1]
    folder.writer.commit = write_
    folder.close("complete")
    assert steps_of(tmp_path / "run") == list(range(21, 31))
    assert records.read(tmp_path / "run")[0]["dropped"] == list(range(1, 21))


def test_records_are_written_every_so_many_or_every_so_many_seconds(tmp_path, like, monkeypatch):
    folder = write(tmp_path / "run", like, [], resume=False)
    assert steps_of(tmp_path / "run") == []  # and can be read from the first moment
    for n in range(1, step_folder.RECORDS):
        folder.add(record(like, n))
    assert steps_of(tmp_path / "run") == []
    folder.add(record(like, step_folder.RECORDS))
    assert steps_of(tmp_path / "run") == list(range(1, step_folder.RECORDS + 1))
    folder._written -= step_folder.SECONDS
    folder.add(record(like, 99))
    assert steps_of(tmp_path / "run")[-1] == 99
    folder.close("complete")


def test_a_killed_training_is_resumed_in_its_folder(tmp_path, monkeypatch):
    """Killed at step 5, gone on with from the checkpoint of step 3: the tables are those of a training that was not killed."""
    monkeypatch.setattr(step_folder, "RECORDS", 2)
    whole = recorded(tmp_path / "whole", 1, 6)
    whole.close()
    killed = recorded(tmp_path / "run", 1, 5)
    with pytest.raises(FileExistsError, match="a process still writes to it"):
        recorded(tmp_path / "run", 4, 6, resume=True)
    killed._folder.writer.close()  # what the system does at its death
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]
    with pytest.raises(FileExistsError, match="exists already: .*resume=True"):
        recorded(tmp_path / "run", 4, 6)
    recorded(tmp_path / "run", 4, 6, resume=True).close()
    killed._folder = None
    killed.close()
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    for name in ("tokens", "probe", "steps"):
        (_, one), (_, other) = records.read(tmp_path / "run"), records.read(tmp_path / "whole")
        assert str(one[name].to_pydict()) == str(other[name].to_pydict())  # where NaN is NaN
    assert records.read(tmp_path / "run")[0]["status"] == "complete"
    with pytest.raises(ValueError, match="not resumed: its training was of probe .*near"):
        td.Monitor(model := tiny("llama"), out=tmp_path / "run", resume=True).start()
    with pytest.raises(ValueError, match="choose one"):
        td.Monitor(model, out=tmp_path / "run", resume=True, overwrite=True).start()


def test_a_resumed_training_counts_on_where_nobody_counts_for_it(tmp_path):
    for first in (1, 4):
        model = tiny("llama")
        opt = torch.optim.SGD(model.parameters(), lr=0.01)
        with td.Monitor(model, opt, out=tmp_path / "run", resume=True, on_error="raise") as monitor:
            for _ in range(3):
                sft(model, data()).backward()
                opt.step()
                monitor.step_end()
                opt.zero_grad()
        assert [step.step for step in monitor.steps] == [first, first + 1, first + 2]
    assert records.read(tmp_path / "run")[1]["steps"]["step"].to_pylist() == [1, 2, 3, 4, 5, 6]


def test_records_that_are_on_the_disk_are_read_back_as_they_were(tmp_path, monkeypatch):
    from tokdyn import monitor as module

    monkeypatch.setattr(module, "KEPT", 2)
    monkeypatch.setattr(step_folder, "RECORDS", 2)
    kept = train(sft, steps=5)[2].steps
    watch = train(sft, steps=5, out=tmp_path / "run")[2]
    assert len(watch.steps) == 5 and len(watch.steps._recent) <= 3
    for step, want in zip(watch.steps, train(sft, steps=5)[2].steps, strict=True):
        assert (step.step, step.metrics, step.routes, step.passes) == (want.step, want.metrics, want.routes, want.passes)
        assert (step.sums, step.notes, step.excluded) == (want.sums, want.notes, want.excluded)
        for name in ("c", "predicted", "actual", "forces"):
            assert (
                torch.equal(getattr(step, name), getattr(want, name)) and getattr(step, name).dtype == getattr(want, name).dtype
            )
        assert (step.linearity, step.carried, step.accounted) == (want.linearity, want.carried, want.accounted)
        assert step.observed.equals(want.observed) and step.tokens.num_rows == TOKENS
    assert [step.step for step in watch.steps[1:3]] == [2, 3] and watch.steps[-1].step == kept[-1].step == 5
    with pytest.raises(IndexError):
        watch.steps[5]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: (p / "thesis.txt").touch(), "it holds thesis.txt"),
        (lambda p: ((p / "report.html").unlink(missing_ok=True), (p / "report.html").mkdir()), "it holds report.html"),
        (lambda p: (p / "alive").symlink_to("/etc/passwd"), "it holds alive"),
        (lambda p: (p / "run.json").write_text('{"kind": "training"}'), "it is not a tokdyn run"),
        (lambda p: (p / "run.json").write_text('{"kind": "mine", "format": 2}'), "its run.json is not one that tokdyn wrote"),
        (lambda p: (p / "run.json").write_text('{"kind": "profile", "format": 1}'), "its run.json is not one"),
        (lambda p: (p / "run.json").unlink(), "it is not a tokdyn run"),
    ],
)
def test_only_a_trainings_folder_is_replaced(tmp_path, like, make, message):
    path = tmp_path / "run"
    write(path, like, [1], resume=False).close("complete")
    make(path)
    before = sorted(p.name for p in path.iterdir())
    for options in (dict(overwrite=True), dict(resume=True)):
        with pytest.raises(FileExistsError, match=f"is not overwritten, {message}"):
            prepare(path, {}, **options)
    assert sorted(p.name for p in path.iterdir()) == before


def test_links_and_the_folder_one_is_in_are_refused(tmp_path, like, monkeypatch):
    write(tmp_path / "run", like, [1], resume=False).close("complete")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    for path, message in (("../link", "is a symbolic link"), (".", "the folder you are in"), ("..", "one around it")):
        with pytest.raises(FileExistsError, match=message):
            prepare(step_folder.Path(path), {}, overwrite=True)
    assert steps_of(tmp_path / "run") == [1]


def test_an_overwritten_folder_is_empty_of_all_ranks(tmp_path, like):
    for rank in (0, 1):
        folder = Folder(tmp_path / "run", rank, {})
        folder.add(record(like, 1))
        folder.close("complete")
    os.makedirs(tmp_path / "other")
    prepare(tmp_path / "run", {}, overwrite=True)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.json"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["kind"] == "training"
