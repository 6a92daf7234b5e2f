"""A training of 5,000 steps, each recorded with a probe: what a step leaves in memory. python tests/soak.py

Two slopes over the steps after the first fifth, by least squares: of what Python's allocator holds (records, tables), and of
the process (tensors, Arrow's buffers and what the allocators keep as well). Exits with 1 where a step leaves more than 0.5 KiB.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch
from loops import PROBE, data, sft

import tokdyn as td
from tokdyn.testing import tiny


def resident():
    """The memory of this process that is in RAM, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000)
    args = parser.parse_args()
    begin, model = time.process_time(), tiny("llama")
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    taken, batch = [], data()
    tracemalloc.start()
    with tempfile.TemporaryDirectory() as place, td.Monitor(model, opt, probe=PROBE, out=Path(place) / "run") as monitor:
        for n in range(1, args.steps + 1):
            sft(model, batch).backward()
            opt.step()
            assert monitor.step_end().observed is not None
            opt.zero_grad()
            if n % max(1, args.steps // 100) == 0:
                gc.collect()
                taken.append((n, tracemalloc.get_traced_memory()[0], resident()))
                print("step {}: {} B, {} B".format(*taken[-1]), file=sys.stderr, flush=True)
        assert len(monitor.steps) == args.steps and monitor.steps[0].step == 1
    late = np.array([row for row in taken if row[0] > args.steps // 5], dtype=float)
    python, process = (np.polyfit(late[:, 0], late[:, i] / 1024, 1)[0] for i in (1, 2))
    print(
        f"{args.steps} steps with a probe, {time.process_time() - begin:.0f} s of a processor: a step leaves {python:.3f} KiB "
        f"in Python's memory, {process:.3f} KiB in the process ({late[0, 2] / 2**20:.0f} -> {late[-1, 2] / 2**20:.0f} MiB)"
    )
    sys.exit(int(python >= 0.5 or process >= 0.5))


if __name__ == "__main__":
    main()
