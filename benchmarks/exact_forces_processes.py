"""The processes of exact_forces.py: every side runs in one of its own, takes its turn when told to, and is timed there."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import math
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exact_forces_sides import LINEAR, PEERS, Size


def resident(what: str) -> float:
    """VmRSS (now) or VmHWM (the most since it was reset) of this process in MiB; NaN where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) / 1024
    return math.nan


def work(connection: Any, name: str, size: Size, scope: str, args: argparse.Namespace) -> None:
    """Main function of a side's process: make its model and serve it; a failure is sent to the parent as text."""
    import torch

    torch.set_num_threads(args.threads)
    if name in PEERS:  # progress bars and logs
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(EOFError, BrokenPipeError):  # the parent has gone
        try:
            serve(connection, size.side(name, size.model(), args, scope, folder), size)
        except Exception:
            connection.send(traceback.format_exc())


def serve(connection: Any, run: Callable, size: Size) -> None:
    """Warm a side up, say "ready", then run and report each time the parent sends True."""
    run(*size.small().texts())
    sides = size.texts()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what the warm-up left behind would hide what is taken anew
    base = resident("VmRSS")
    connection.send("ready")
    while connection.recv():
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark so far
        start, cpu = time.perf_counter(), time.process_time()
        result, parameters = run(*sides)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        peak = resident("VmHWM") - base
        connection.send((seconds, cpu, peak, None if result is None else result.detach().numpy().copy(), parameters))
        del result


class Worker:
    """A side in a process of its own, from the parent's view; leaving the context ends the process."""

    def __init__(self, context: Any, name: str, size: Size, scope: str, args: argparse.Namespace):
        self.name, (self.here, there) = name, context.Pipe()
        self.process = context.Process(target=work, args=(there, name, size, scope, args), daemon=True)
        self.process.start()
        there.close()

    def __enter__(self) -> Worker:
        return self

    def answer(self) -> Any:
        """The next message of the side; SystemExit with its traceback when it has failed."""
        try:
            said = self.here.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            raise SystemExit(f"{self.name} ended with code {code}: out of memory? Try a smaller size") from None
        if isinstance(said, str) and said != "ready":
            raise SystemExit(f"{self.name} failed:\n{said}")
        return said

    def once(self) -> Any:
        """Let the side run once: (seconds, processor seconds, peak MiB, result, parameters)."""
        self.here.send(True)
        return self.answer()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.here.send(False)
        self.process.join(5)
        self.process.terminate()


def measure(context: Any, names: list[str], size: Size, scope: str, args: argparse.Namespace) -> tuple[list[dict], list[Any]]:
    """All sides at one size, taking turns: a row per side, and their results."""
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(context, name, size, scope, args)) for name in names]
        for worker in workers:
            assert worker.answer() == "ready"
        found: dict[str, list[Any]] = {name: [] for name in names}
        for turn in range(args.repeat):
            for worker in workers[:: -1 if turn % 2 else 1]:
                found[worker.name].append(worker.once())
    rows = []
    for name, runs in found.items():
        seconds = [run[0] for run in runs]
        row = dict(side=name, scope="linear" if scope == LINEAR else scope, parameters=runs[0][4], **size.labels())
        row |= dict(runs=len(runs), median_s=statistics.median(seconds), min_s=min(seconds), max_s=max(seconds))
        row |= dict(cpu_s=statistics.median(run[1] for run in runs), peak_MiB=max(run[2] for run in runs))
        rows.append(row | dict(ratio=None, error=None, seconds=seconds))
    return rows, [runs[-1][3] for runs in found.values()]


def ratio(row: dict, to: dict) -> float:
    """Median over the rounds of row's time / to's time."""
    return statistics.median(a / b for a, b in zip(row["seconds"], to["seconds"], strict=True))
