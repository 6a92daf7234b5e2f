"""SIGKILL again and again over a scan, a profile and a training's records, each gone on with. python tests/kills.py --kills 200

After each kill what the folder's index called done must be there with its checksum, and be no less than before; what comes out
in the end must be what a run gives that nobody stopped, byte for byte (of a training: every value of its tables). Exits with 1
where something is lost.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from loops import recorded

import tokdyn as td
from tokdyn import steps as records
from tokdyn.runs import manifest, tiles
from tokdyn.testing import random_chis, tiny
from tokdyn.training import step_folder

ROWS, STEPS = 40, 40
PAIRS = [
    [chi.with_(role=role, group=0) for chi, role in zip(chis, ("chosen", "rejected"), strict=True)]
    for chis in (random_chis([(3, 2 + n % 4), (3, 3 + n % 3)], seed=n) for n in range(ROWS))
]


def scan(out):
    td.scan(tiny("llama"), PAIRS, {"watched": random_chis([(3, 4), (1, 3)], seed=50)}, out=out, block=1, resume=True)


def profile(out):
    """In some dozens of tiles, each written by itself."""
    update = [chi.with_(group=n) for n in range(3) for chi in PAIRS[n]]
    td.profile(tiny("llama"), update, random_chis([(2, 9), (1, 8)], seed=51), out=out, memory=1 << 15, resume=True)


def training(out):
    """From the start, as a training goes on from its checkpoint: the steps that the folder has are taken and not recorded."""
    recorded(out, 1 + max(steps_done(out), default=0), STEPS, resume=out.exists()).close()


def steps_done(out):
    if not (out / "run.json").exists():
        return []
    table = records.read(out)[1]["steps"]
    return [] if table is None else table["step"].to_pylist()


def kept(folder):
    """The keys of all that counts in a folder, the files read against their checksums."""
    found = []
    for commit in manifest.committed(folder):
        commit.verify()
        found.append((commit.writer, commit.number, commit.key))
    return set(found)


def beside(out):
    return out.with_name(f".{out.name}.tiles")


def files(*names):
    return lambda out: {name: (out / name).read_bytes() for name in names}


def blocks(out):
    return {block: commit.sums for block, commit in td.load(out).blocks}


def tables(out):
    return {name: str(table.to_pydict()) for name, table in records.read(out)[1].items()}  # where NaN is NaN


WORK = {  # what does it, where its index is, what it gives in the end
    "scan": (scan, lambda out: out, blocks),
    "profile": (profile, beside, files("tokens.parquet", "forces.safetensors")),
    "training": (training, lambda out: out, tables),
}


def child(work, out):
    """A process that goes on with the work."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work(out)
            code = 0
        finally:
            os._exit(code)
    return pid


def kill_after(pid, seconds):
    """Whether a process still ran, and so was killed; one that failed raises."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, f"the process failed with status {status}"
            return False
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


def torment(name, place, kills):
    """So many kills of one kind of work; the number of runs that came to their end."""
    work, index, result = WORK[name]
    begin = time.monotonic()
    work(place / name)
    whole, seconds = result(place / name), time.monotonic() - begin
    killed, ended, out, before = 0, 0, place / f"{name}-0", set()
    while killed < kills or before:
        last, begin = killed >= kills, time.monotonic()  # what was begun is ended
        if kill_after(child(work, out), 3600 if last else random.uniform(0.1, 0.9) * seconds):
            killed += 1
            now = kept(index(out))
            assert before <= now, f"{name}: lost {before - now} at kill {killed}"
            before = now
            continue
        assert result(out) == whole, f"{name}: the end differs after {killed} kills"
        ended, before, seconds = ended + 1, set(), min(seconds, time.monotonic() - begin)
        out = place / f"{name}-{ended}"
    left = {path.name for path in place.iterdir()} - {name, *(f"{name}-{n}" for n in range(ended + 1))}
    assert not [each for each in left if name in each], f"{name}: {left} was left"
    return ended


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    torch.set_num_threads(1)
    tiles.EVERY, step_folder.RECORDS = 0.0, 2
    shares = [len(range(n, args.kills, len(WORK))) for n in range(len(WORK))]
    with tempfile.TemporaryDirectory() as place:
        for name, n in zip(WORK, shares, strict=True):
            ended = torment(name, Path(place), n)
            print(
                f"{name}: {n} kills, {ended} runs came to their end, all as one that nobody stopped; nothing lost", flush=True
            )
    sys.exit(0)


if __name__ == "__main__":
    main()
