"""A write of several files counts whole or not at all, wherever it is cut off: nothing lost, nothing doubled, nothing left."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crashes import before_each_call

from tokdyn.runs import manifest
from tokdyn.runs.lock import lock
from tokdyn.runs.manifest import Writer, busy, committed

BLOCKS = 6
SIDES = "left", "right"


def write(folder, blocks=BLOCKS, size=1, told=None):
    """The work of these tests: two files a block, which say which block they are of."""
    with Writer(folder, "0", {"work": 1}) as writer:
        for n in range(blocks):
            if not writer.done(f"block {n}"):
                text = f"{n} " * size
                writer.commit({f"{side}.txt": lambda path, text=text: path.write_text(text) for side in SIDES}, f"block {n}")
                if told is not None:
                    os.write(told, b"!")


def blocks(folder):
    """The numbers of the blocks that count, from the contents of both of their files, which must agree."""
    found = []
    for commit in committed(folder):
        commit.verify()
        left, right = (set(commit.files[f"{side}.txt"].read_text().split()) for side in SIDES)
        assert left == right == {commit.key.removeprefix("block ")}
        found.append(int(left.pop()))
    return found


def require_whole(folder, n=BLOCKS, more=("manifest-0.json",)):
    """All blocks once each, and no file besides."""
    assert blocks(folder) == list(range(n))
    named = {path.name for commit in committed(folder) for path in commit.files.values()}
    assert {path.name for path in folder.iterdir()} == named | set(more)


def test_a_crash_at_any_call_leaves_whole_blocks_and_the_next_run_ends_the_work(tmp_path, counted):
    """The folder as it is at each call of a write to the system is what a kill there leaves; each is read, and gone on with."""
    work, seen = tmp_path / "work", []

    def photograph(n):
        if work.exists():
            shutil.copytree(work, tmp_path / f"photograph {n}")

    with before_each_call(photograph) as made:
        write(work, 2)
    require_whole(work, 2)
    assert len(made) > 20
    for folder in sorted(tmp_path.glob("photograph *")):
        seen.append(blocks(folder))
        assert seen[-1] in ([], [0], [0, 1])
        write(folder, 3)
        require_whole(folder, 3)
    assert [] in seen and [0] in seen and [0, 1] in seen
    counted(len(seen), "states of a folder, one a call to the system")


def test_an_error_of_any_call_leaves_whole_blocks_and_the_same_run_can_go_on(tmp_path, counted):
    """A disk that fails once: `commit` raises, and tried again in the same process every block is there once."""
    with before_each_call(lambda n: None) as made:
        write(tmp_path / "as it should be", 2)
    failed = 0
    for broken in range(1, len(made) + 1):
        folder = tmp_path / str(broken)

        def fail(n, broken=broken):
            if n == broken:
                raise OSError(28, "No space left on device")

        with before_each_call(fail):
            try:
                write(folder, 2)
            except OSError:
                failed += 1
        assert blocks(folder) in ([], [0], [0, 1])
        write(folder, 2)
        require_whole(folder, 2)
    assert failed > len(made) // 2
    counted(len(made), "calls to the system that fail, one at a time")


def test_what_counts_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """What a power cut keeps is what was synced: a file before it has its name, the folder before and after the manifest."""
    seen, names, real = [], {}, {name: getattr(os, name) for name in ("open", "fsync", "replace")}

    def opened(path, *args, **options):
        fd = real["open"](path, *args, **options)
        names[fd] = Path(path).name
        return fd

    with Writer(tmp_path) as writer:
        monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(f"sync {names[fd]}"), real["fsync"](fd)))
        monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(f"name {Path(b).name}"), real["replace"](a, b)))
        writer.commit({f"{side}.txt": lambda path: path.write_text("1") for side in SIDES})
        monkeypatch.undo()
    files = [*(f"{side}-0-000001.txt" for side in SIDES), "manifest-0.json"]
    pairs = [[f"sync .{name}.part", f"name {name}"] for name in files]
    folder = [f"sync {tmp_path.name}"]
    assert seen == pairs[0] + pairs[1] + folder + pairs[2] + folder


def test_an_interrupt_after_the_manifest_is_a_commit(tmp_path):
    """Ctrl-C in the last sync: what the disk says counts, and the writer in memory says the same."""
    sync = manifest.sync_folder

    def interrupted(folder):
        sync(folder)
        if any(c.number == 1 for c in committed(folder)):
            raise KeyboardInterrupt

    with Writer(tmp_path) as writer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "sync_folder", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.commit({"a.txt": lambda path: path.write_text("1")}, "first")
        assert [c.key for c in writer.commits] == ["first"] == [c.key for c in committed(tmp_path)] and writer.done("first")
        patch.undo()
        writer.commit({"a.txt": lambda path: path.write_text("2")}, "second")
    assert [c.files["a.txt"].read_text() for c in committed(tmp_path)] == ["1", "2"]


def test_killed_again_and_again(tmp_path):
    """SIGKILL at a random moment of each of 30 processes that go on with the same work; readers look on."""
    random.seed(0)
    counted = 0
    for _ in range(30):
        here, there = os.pipe()
        child = os.fork()
        if not child:
            try:
                write(tmp_path, 10_000, size=2000, told=there)
            finally:
                os._exit(1)
        os.close(there)
        assert os.read(here, 1)  # it has come as far as one block more
        end = time.monotonic() + random.uniform(0.0, 0.02)
        while time.monotonic() < end:
            now = blocks(tmp_path)
            assert now == list(range(len(now))) and len(now) > counted
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(here)
        now = blocks(tmp_path)
        assert now == list(range(len(now))) and len(now) > counted
        counted = len(now)
    write(tmp_path, counted + 1)
    require_whole(tmp_path, counted + 1)


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk: the second file of a block does not fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Writer(tmp_path) as writer:
        small, large = (lambda path, n=n: path.write_bytes(b"x" * n) for n in (10, 100_000))
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            with pytest.raises(OSError):
                writer.commit({"a.bin": small, "b.bin": large})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert committed(tmp_path) == [] and sorted(p.name for p in tmp_path.iterdir()) == [".lock-0", "manifest-0.json"]
        writer.commit({"a.bin": small, "b.bin": large})
    assert [path.name for path in committed(tmp_path)[0].files.values()] == ["a-0-000001.bin", "b-0-000001.bin"]


def test_several_writers_share_a_folder_and_a_key_counts_once(tmp_path):
    work = {"work": 1}
    with Writer(tmp_path, None, work) as one, Writer(tmp_path, None, work) as other:
        assert (one.name, other.name) == ("0", "1") and busy(tmp_path) == ["0", "1"]
        one.commit({"a.txt": lambda path: path.write_text("of 0")}, "x")
        other.commit({"a.txt": lambda path: path.write_text("of 1")}, "x")
        other.commit({"a.txt": lambda path: path.write_text("of 1")}, "y")
        assert other.done("x") and not one.done("y")
        one.commit({"a.txt": lambda path: path.write_text("of 0")}, "z")
        assert one.done("y")
        with pytest.raises(FileExistsError, match="another process writes to .* as 0"):
            Writer(tmp_path, "0", work)
    found = committed(tmp_path)
    assert [(c.key, c.files["a.txt"].read_text()) for c in found] == [("x", "of 0"), ("z", "of 0"), ("y", "of 1")]
    assert busy(tmp_path) == [] and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_writers_must_be_about_the_same(tmp_path):
    Writer(tmp_path, "0", {"eta": 0.1, "rows": [1, 2]}).close()
    assert manifest.about(tmp_path) == {"eta": 0.1, "rows": [1, 2]} and manifest.about(tmp_path / "none") is None
    for name in ("0", "1"):
        with pytest.raises(ValueError, match=r"was begun with eta=0\.1, not 0\.2: go on with the same"):
            Writer(tmp_path, name, {"eta": 0.2, "rows": (1, 2)})
    assert busy(tmp_path) == []


def test_a_lock_ends_with_its_process_and_not_with_a_sibling(tmp_path):
    """A killed writer keeps nobody out; a child that was forked from a writer does not hold on to its lock."""
    here, there = os.pipe()
    child = os.fork()
    if not child:
        writer = Writer(tmp_path)  # noqa: F841
        os.write(there, b"!")
        if not os.fork():  # as a loader's worker: it outlives the writer
            time.sleep(5)
            os._exit(0)
        time.sleep(60)
    os.read(here, 1)
    assert busy(tmp_path) == ["0"]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert busy(tmp_path) == []
    Writer(tmp_path).close()


def test_a_lock_is_let_go_once(tmp_path, monkeypatch):
    """An error while it is let go of: a second call must not close whatever file has the number by then."""
    unlock = lock(tmp_path / ".lock-0")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):

        def fail(path, missing_ok=False):
            raise OSError(28, "No space left on device")

        patch.setattr(type(tmp_path), "unlink", fail)
        unlock()
    others = [os.open(tmp_path / f"other {n}", os.O_CREAT | os.O_RDWR) for n in range(4)]  # one takes the number
    unlock()
    for fd in others:
        os.close(fd)  # raises where it was closed already
    again = lock(tmp_path / ".lock-0")
    assert again is not None and busy(tmp_path) == ["0"]
    unlock()
    assert busy(tmp_path) == ["0"]


def test_a_child_that_ends_does_not_take_its_parents_lock_along(tmp_path):
    with Writer(tmp_path) as writer:
        if not (child := os.fork()):
            writer.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / ".lock-0").exists()
        seen = subprocess.run(
            [sys.executable, "-c", "import sys; from pathlib import Path; sys.path[:0] = sys.argv[2:]\n"
             "from lock import lock; print(lock(Path(sys.argv[1])))", tmp_path / ".lock-0", Path(manifest.__file__).parent],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert seen.stdout == "None\n"


def test_what_is_not_ours_stays(tmp_path):
    """A sweep takes files of numbers that no commit has used, of its own writer."""
    write(tmp_path, 1)
    kept = ("notes.txt", "left-1-000009.txt", "left-0-000001.txt", "left-0-9.txt", ".hidden")
    swept = ("left-0-000002.txt", ".left-0-000002.txt.part", ".manifest-0.json.part")
    for name in (*kept, *swept):
        (tmp_path / name).exists() or (tmp_path / name).write_text("?")
    Writer(tmp_path, "0", {"work": 1}).close()
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {*kept, "manifest-0.json", "right-0-000001.txt"} and blocks(tmp_path) == [0]


def test_a_damaged_folder_is_named(tmp_path):
    write(tmp_path, 2)
    second = tmp_path / "right-0-000002.txt"
    size = second.stat().st_size
    second.write_bytes(b"9" * size)
    with pytest.raises(ValueError, match="right-0-000002.txt is not what was written: its checksum differs"):
        committed(tmp_path)[1].verify()
    second.write_bytes(b"")
    with pytest.raises(ValueError, match=f"right-0-000002.txt has 0 bytes, {size} were written"):
        committed(tmp_path)
    second.unlink()
    with pytest.raises(ValueError, match="right-0-000002.txt is missing"):
        committed(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(format=2), "it is in format 2, this version reads up to 1"),
        (lambda m: m.pop("commits"), "no 'commits'"),
        (lambda m: m["commits"][0]["files"].update(a=["../outside.txt", 1, 1]), r"names a file \.\./outside\.txt"),
        (lambda m: m["commits"][0]["files"].update(a=["/etc/passwd", 1, 1]), "names a file /etc/passwd"),
        (lambda m: m["commits"][0]["files"].update(a=["..", 1, 1]), r"names a file \.\. "),
        (lambda m: m["commits"][0].update(number=7), "commit 1 has the number 7"),
        (lambda m: m["commits"][0].update(files=[1]), "list"),
        (lambda m: m.update(commits=7), "not iterable"),
    ],
)
def test_a_manifest_that_no_writer_wrote_is_one_sentence(tmp_path, change, message):
    write(tmp_path, 1)
    path = tmp_path / "manifest-0.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))
    for read in (committed, lambda folder: Writer(folder, "0", {"work": 1})):
        with pytest.raises(ValueError, match=f"manifest-0.json is not a manifest that tokdyn wrote: .*{message}"):
            read(tmp_path)


@pytest.mark.parametrize("text", [b"", b"[", b"[" * 100_000, b"\xff\xfe", b"null", b"[]", b'{"format": 1e999}'])
def test_garbage_for_a_manifest_is_one_sentence(tmp_path, text):
    (tmp_path / "manifest-0.json").write_bytes(text)
    with pytest.raises(ValueError, match="manifest-0.json is not a manifest that tokdyn wrote: .{4,110}$"):
        committed(tmp_path)


@pytest.mark.parametrize("name", ["../a.txt", "a/b.txt", ".a.txt", "", "a\n.txt"])
def test_names_stay_in_the_folder(tmp_path, name):
    with Writer(tmp_path / "in") as writer, pytest.raises(ValueError, match="is named by letters"):
        writer.commit({name: lambda path: path.write_text("?")})
    with pytest.raises(ValueError, match="a writer is named by letters"):
        Writer(tmp_path / "in", name)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
