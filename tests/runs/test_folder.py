"""A run's folder is the old run or the new one, whole, wherever its writing is cut off; and nobody else's is touched."""

import json
import shutil

import pyarrow as pa
import pytest
import torch
from crashes import before_each_call

from tokdyn.runs import folder
from tokdyn.runs.folder import check_free, read_folder, write_folder


def write(path, n, overwrite=False):
    write_folder(
        path, {"format": 1, "kind": "profile", "n": n}, pa.table({"n": [n]}), {"n": torch.tensor(n)}, f"{n}", overwrite
    )


def number(path):
    """Which run lies there, all of its files being of the same one."""
    about, tokens, tensors = read_folder(path)
    page = int((path / "report.html").read_text())
    assert about["n"] == tokens["n"][0].as_py() == int(tensors["n"]) == page
    return page


@pytest.mark.parametrize("replaced", [False, True])
def test_a_kill_at_any_call_leaves_the_old_run_or_the_new_one(tmp_path, replaced, counted):
    """Also between the two renames: whoever reads or writes next finds it, and the next writer clears up."""
    place, seen = tmp_path / "place", set()
    place.mkdir()
    if replaced:
        write(place / "run", 1)

    def photograph(n):
        shutil.copytree(place, tmp_path / f"photograph {n}")

    with before_each_call(photograph) as made:
        write(place / "run", 2, replaced)
    assert number(place / "run") == 2 and len(made) > 15
    for there in tmp_path.glob("photograph *"):
        again = there.with_name(f"again {there.name}")
        shutil.copytree(there, again)
        try:
            seen.add(number(there / "run"))
        except FileNotFoundError:
            seen.add(None)
        check_free(again / "run", overwrite=True)  # what the next run does first
        left = [p.name for p in again.iterdir()]
        assert left == ["run"] or not replaced and left == []
        assert not left or number(again / "run") in (1, 2)
        write(again / "run", 3, overwrite=True)
        assert number(again / "run") == 3 and [p.name for p in again.iterdir()] == ["run"]
    assert seen == ({1, 2} if replaced else {None, 2})
    counted(len(made) + 1, f"states of a run's folder, one a call to the system, {'replaced' if replaced else 'new'}")


def test_an_error_of_any_call_leaves_the_old_run_or_the_new_one(tmp_path, counted):
    with before_each_call(lambda n: None) as made:
        write(tmp_path / "run", 0)
        write(tmp_path / "run", 1, True)
    failed = 0
    for broken in range(1, len(made) // 2 + 3):

        def fail(n, broken=broken):
            if n == broken:
                raise OSError(28, "No space left on device")

        before = number(tmp_path / "run")
        with before_each_call(fail):
            try:
                write(tmp_path / "run", broken + 1, True)
            except OSError:
                failed += 1
        assert number(tmp_path / "run") in (before, broken + 1)
    assert failed > 10
    counted(len(made) // 2 + 2, "calls to the system that fail, one at a time")
    check_free(tmp_path / "run", True)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: (p / "thesis.txt").touch(), "it holds thesis.txt"),
        (lambda p: (p / "report.html").unlink() or (p / "report.html").mkdir(), "it holds report.html"),
        (lambda p: (p / "run.json").write_text('{"name": "my own run"}'), "it is not a tokdyn run"),
        (lambda p: (p / "run.json").write_text('{"format": 1, "kind": "mine"}'), "its run.json is not one that tokdyn wrote"),
        (lambda p: (p / "run.json").write_text('{"format": "1", "kind": "profile"}'), "it is not a tokdyn run"),
        (lambda p: (p / "run.json").write_text('{"format": 2, "kind": "training"}'), "its run.json is not one that tokdyn"),
        (lambda p: (p / "run.json").write_text("[" * 100_000), "it is not a tokdyn run"),
        (lambda p: (p / "tokens.parquet").unlink() or (p / "tokens.parquet").symlink_to("/etc/passwd"), "it holds tokens.par"),
    ],
)
def test_only_a_run_is_replaced(tmp_path, make, message):
    write(tmp_path / "run", 1)
    make(tmp_path / "run")
    with pytest.raises(FileExistsError, match=f"is not overwritten, {message}"):
        check_free(tmp_path / "run", overwrite=True)


def test_somebody_elses_folder_of_our_names_stays(tmp_path):
    """A run.json and a report.html of another tool, and no more."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text(json.dumps({"epochs": 3}))
    (tmp_path / "mine" / "report.html").write_text("precious")
    with pytest.raises(FileExistsError, match="it is not a tokdyn run"):
        write(tmp_path / "mine", 1, overwrite=True)
    assert (tmp_path / "mine" / "report.html").read_text() == "precious"


def test_places_that_cannot_be_are_refused_before_the_work(tmp_path, monkeypatch):
    write(tmp_path / "run", 1)
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path / "run")
    for path, message in (
        ("../link", "is a symbolic link: name the folder that it points to"),
        ("../dangling", "is a symbolic link"),
        ("../file", "is a file"),
        ("../file/run", "is not a folder that can be written to"),
        (".", "is the folder you are in"),
        ("..", "or one around it"),
        ("", "is the folder you are in"),
    ):
        with pytest.raises(FileExistsError, match=message):
            check_free(folder.Path(path), overwrite=True)
    assert number(tmp_path / "run") == 1


def test_what_looks_like_ours_beside_a_run_and_is_not_stays(tmp_path):
    """Temporary folders are recognised by what is in them too."""
    others = tmp_path / ".run.abcdefgh.new", tmp_path / ".run.abcdefgh.old", tmp_path / ".run.abc.new"
    for other in others:
        other.mkdir()
        (other / "thesis.txt").touch()
    write(tmp_path / "run", 1)
    assert all((other / "thesis.txt").exists() for other in others)


def test_a_damaged_run_is_named(tmp_path):
    write(tmp_path / "run", 1)
    with (tmp_path / "run" / "tokens.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="tokens.parquet has .* bytes, .* were written"):
        read_folder(tmp_path / "run")
