"""Times, peak memory, and the machine's bandwidth and matrix rate that they are compared with."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]
PACKAGES = ("tokdyn", "torch", "triton", "numpy", "transformers", "liger-kernel", "cut-cross-entropy")
MIB = 2**20


@dataclass(frozen=True)
class Floors:
    """What the machine does at best, measured in this run: bytes and flops per second, the latter by dtype."""

    bandwidth: int | float
    flops: dict[torch.dtype, float]

    def seconds(self, moved: int | float, flops: int | float, dtype: torch.dtype) -> float:
        """Time that moving the bytes or the flops take at best, whichever is longer."""
        return max(moved / self.bandwidth, flops / self.flops[dtype])


def once(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Seconds of one call: by events on a GPU, where `repeats` calls follow each other, by the clock elsewhere.

    Of one thread it is processor time, in which what else runs on the machine counts less.
    """
    if device.type != "cuda":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        for _ in range(repeats):
            call()
        return (clock() - began) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def interleaved(
    calls: dict[str, Call], device: torch.device, *, rounds: int, seconds: float, repeats: dict[str, int] | None = None
) -> dict[str, list[float]]:
    """Times of every call; in each round the calls follow each other, so that a busy machine slows all alike.

    Ends after `rounds`, or, once there are three, when `seconds` have passed.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - began > seconds:
            break
        for name, call in calls.items():
            found[name].append(once(call, device, (repeats or {}).get(name, 1)))
    return found


def floors(device: torch.device, dtypes: tuple[torch.dtype, ...], quick: bool = False) -> Floors:
    """Bandwidth and matrix rate, the best of several tries.

    On a GPU a copy between two buffers, bytes read and written, and a square product by cuBLAS; on a CPU reading a buffer by a
    sum or an inner product, whichever is faster, and a product of the shape of a readout by the BLAS that torch ships.
    """
    tries = 2 if quick else 5
    n = 2**20 if quick else (2**30 if device.type == "cuda" else 2**27)
    x = torch.ones(n, device=device)
    if device.type == "cuda":
        y = torch.empty_like(x)
        ways: list[tuple[float, Call]] = [(2.0 * x.nbytes, lambda: y.copy_(x))]
        M, N, K = (256, 256, 256) if quick else (8192, 8192, 8192)
    else:
        left, right = x[: n // 2], x[n // 2 :]
        ways = [(x.nbytes, x.sum), (x.nbytes, lambda: torch.dot(left, right))]
        M, N, K = (64, 256, 64) if quick else (1024, 16384, 896)
    bandwidth = max(moved / min(once(call, device) for _ in range(tries)) for moved, call in ways)
    rates = {}
    for dtype in dtypes:
        a, b = torch.randn(M, K, device=device).to(dtype), torch.randn(N, K, device=device).to(dtype)
        product = functools.partial(torch.mm, a, b.T, out=torch.zeros(M, N, device=device, dtype=dtype))
        once(product, device)
        rates[dtype] = 2.0 * M * N * K / min(once(product, device) for _ in range(tries))
    return Floors(bandwidth, rates)


def peak_memory(call: Call, device: torch.device) -> int:
    """Most bytes held beyond what was there before, the result included.

    On a GPU by torch's allocator. On a CPU by the resident size of this process, which the system counts page by page: call
    it in a process of its own that `steady_memory` began, or what the allocator kept back hides what is taken anew.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        raise RuntimeError("peak memory on a CPU is read from /proc, which only Linux has")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def steady_memory() -> dict[str, str]:
    """Environment of a process whose peak is to be measured: every larger block comes from the system and goes back to it."""
    return {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def spread(seconds: list[float]) -> tuple[float, float, float]:
    """Median, least and most."""
    return statistics.median(seconds), min(seconds), max(seconds)


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on: processor, whether it multiplies bfloat16 matrices itself, GPU, threads, how busy it was before."""
    found: dict[str, Any] = dict(
        processor=_processor(), system=f"{platform.system()} {platform.machine()}", processors=os.cpu_count(),
        threads=torch.get_num_threads(), gpu=None, bfloat16_matrix_units=torch.cpu._is_amx_tile_supported(),
    )  # fmt: skip
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found["gpu"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {about.multi_processor_count} multiprocessors"
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 1)
    return found


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what takes part; a package that is not installed is left out."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
