"""Which pieces of a scan or a profile a process does: all, every n-th, or the next one that nobody of its job has taken.

A job's queue is on the store of its process group (torchrun's, accelerate's, Slurm's through MASTER_ADDR): a block number is
drawn from a counter, so that nobody waits for a slow process; who draws one says so, and shows every second that it lives.
What a process drew and did not finish is done again by another once it has shown nothing for PATIENCE seconds.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

BEAT, PATIENCE = 1.0, 30.0  # seconds
JOB = "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"  # what launchers set


class Own:
    """Blocks of one process by itself: every n-th from the i-th on.

    Args:
        end: how many blocks there are; None where that is not known.
        shard: (i, n).
    """

    def __init__(self, end: int | None, shard: tuple[int, int] | None = None) -> None:
        self.end, (self.first, self.step), self.shard = end, shard or (0, 1), shard

    @property
    def name(self) -> str | None:
        """What this process is called in the folder; None for the first number that is free."""
        return None if self.shard is None else f"{self.first}-of-{self.step}"

    def __iter__(self) -> Iterator[int]:
        k = self.first
        while self.end is None or k < self.end:
            yield k
            k += self.step

    def finished(self, k: int, empty: bool = False) -> None:
        """A block is written; `empty`: there is nothing in it, nor in later ones."""
        if empty:
            self.end = k


class Queue:
    """Blocks from the counter of a job.

    Args:
        store: of the process group, one for every process of the job.
        rank, ranks: which process this is, of how many.
        patience: seconds without a sign of life after which a process counts as dead.

    `end` and `done` are set before it is gone through.

    Attributes:
        end: how many blocks there are; None where that is not known.
        done: whether a block is on the disk already.
    """

    def __init__(self, store: Any, rank: int, ranks: int, patience: float = PATIENCE) -> None:
        self.store, self.rank, self.ranks, self.patience = store, rank, ranks, patience
        self.end: int | None = None
        self.done: Callable[[int], bool] = lambda k: False
        self.seen: dict[int, tuple[int, float]] = {}  # rank -> its last sign, and when it was new here
        self._lock, self._over = threading.Lock(), threading.Event()

    @property
    def name(self) -> str:
        """What this process is called in the folder."""
        return f"rank{self.rank}"

    @contextlib.contextmanager
    def living(self) -> Iterator[None]:
        """Show that this process lives, as long as the block runs; rank 0, which may hold the store, leaves last."""
        beats = threading.Thread(target=self._beat, daemon=True)
        beats.start()
        try:
            yield
            self._add(f"left/{self.rank}", 1)
            while self.rank == 0 and any(not self._count(f"left/{r}") and not self._dead(r) for r in range(1, self.ranks)):
                time.sleep(BEAT / 4)
        finally:
            self._over.set()
            beats.join()

    def first_says(self, check: Callable[[], None]) -> None:
        """Have rank 0 make a check that others would change the outcome of; they wait for it."""
        if self.rank == 0:
            check()
            self._add("checked", 1)
            return
        while not self._count("checked"):
            if self._dead(0):
                raise ValueError("rank 0 of this job has ended before it began: its message says why")
            time.sleep(BEAT / 10)

    def __iter__(self) -> Iterator[int]:
        while True:
            k = self._add("next", 1) - 1
            if self.end is not None and k >= self.end or self._count("empty"):
                break
            self._set(f"claim/{k}", str(self.rank))
            yield k
        while open_ := [k for k in range(self._drawn()) if not self._count(f"done/{k}")]:
            for k in open_:
                owner = self._owner(k)
                if owner is not None and not self._dead(owner):
                    continue
                if owner is None and not self._nobody_claims(k):
                    continue
                if self.done(k):
                    self.finished(k)
                elif self._take(k, owner):
                    yield k
            time.sleep(BEAT / 4)

    def finished(self, k: int, empty: bool = False) -> None:
        """A block is written; `empty`: there is nothing in it, nor in later ones."""
        self._add(f"done/{k}", 1)
        if empty:
            self._add("empty", 1)

    def claims(self, name: str) -> bool:
        """Take a piece of work that has a name in place of a number; False where another process has it, which lives."""
        key = f"piece/{name}"
        with self._asking():
            owner = int(self.store.compare_set(key, "", str(self.rank)))
        if owner == self.rank or not self._dead(owner):
            return owner == self.rank
        with self._asking():
            return int(self.store.compare_set(key, str(owner), str(self.rank))) == self.rank

    def _drawn(self) -> int:
        """How many blocks have been drawn from the counter."""
        n = self._add("next", 0)
        return n if self.end is None else min(n, self.end)

    def _owner(self, k: int) -> int | None:
        with self._asking():
            return int(self.store.get(f"claim/{k}")) if self.store.check([f"claim/{k}"]) else None

    def _nobody_claims(self, k: int) -> bool:
        """Whether a drawn block has had no owner for as long as it takes to call a process dead."""
        first = self.seen.setdefault(-1 - k, (0, time.monotonic()))[1]
        return time.monotonic() - first > self.patience

    def _take(self, k: int, owner: int | None) -> bool:
        """Take over what a dead process drew; False where another was quicker."""
        with self._asking():
            now = self.store.compare_set(f"claim/{k}", "" if owner is None else str(owner), str(self.rank))
        return int(now) == self.rank

    def _dead(self, rank: int) -> bool:
        """Whether a process has shown no sign of life for long; a process that has left is done with its blocks."""
        if rank == self.rank:
            return False
        sign, now = self._count(f"beat/{rank}"), time.monotonic()
        last, since = self.seen.setdefault(rank, (sign, now))
        if sign != last:
            self.seen[rank] = sign, now
            return False
        return now - since > self.patience

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(ValueError):  # the store is gone: nobody is left to see it
                self._add(f"beat/{self.rank}", 1)

    def _add(self, key: str, n: int) -> int:
        with self._asking():
            return int(self.store.add(key, n))

    def _count(self, key: str) -> int:
        return self._add(key, 0)

    def _set(self, key: str, value: str) -> None:
        with self._asking():
            self.store.set(key, value)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """The store, one thread at a time."""
        with self._lock:
            try:
                yield
            except RuntimeError as error:
                raise ValueError(
                    "the process that holds the queue of this job (rank 0, or torchrun) is gone: begin again with --resume"
                ) from error


def job() -> Queue | None:
    """The queue of the job that this process is one of; None where it is alone.

    A process group that was set up is taken as it is, otherwise what torchrun, accelerate or Slurm put into the environment.
    """
    import torch

    dist: Any = torch.distributed
    if dist.is_available() and dist.is_initialized():
        store, rank, ranks = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    elif dist.is_available() and all(name in os.environ for name in JOB) and int(os.environ["WORLD_SIZE"]) > 1:
        store, rank, ranks = next(iter(dist.rendezvous("env://")))
    else:
        return None
    return None if ranks == 1 else Queue(dist.PrefixStore("tokdyn", store), rank, ranks)


@contextlib.contextmanager
def shared() -> Iterator[Queue | None]:
    """The job of this process, which shows inside the block that it lives; None where it is alone."""
    team = job()
    with contextlib.nullcontext() if team is None else team.living():
        yield team
