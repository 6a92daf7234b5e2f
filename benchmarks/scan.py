"""What a scan costs: CPU time a row in batches of like length and one row at a time, by number of groups; peak memory by rows.

    python benchmarks/scan.py [--data pairs.jsonl] [--rows 32] [--groups 1 2 4] [--quick]

CPU seconds of this process on one thread, both sides in one run; peak memory is that of a process of its own for each number of
rows. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import tokdyn as td
from tokdyn.exact import Scope
from tokdyn.exact.scanning import Pulled, Row, packed
from tokdyn.loading import DEMO_PAIRS, load_model
from tokdyn.model.trace import trace
from tokdyn.objectives import DPO


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(DEMO_PAIRS), help="preference pairs; the last four rows are the probe")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--memory-rows", type=int, nargs="*", default=[32, 128])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def rows_of(tokenizer, path: str, n: int) -> list[Row]:
    table = td.data.read(path)[:-4]
    return [Row(f"row {i}", td.data.row_sequences(tokenizer, table[i % len(table)], DPO(), f"row {i}")) for i in range(n)]


def timed(pulled: Pulled, updates: list) -> float:
    start = time.process_time()
    for update in updates:
        pulled.forces(update)
    return time.process_time() - start


def times(data: str, n: int, groups: list[int]) -> None:
    model, tokenizer = load_model("demo")
    probe = td.probes.load(tokenizer, td.probes.build(data)[-4:])
    with trace(model) as tracer:
        scope, rows = Scope.named(tracer, "full"), rows_of(tokenizer, data, n)
        together, alone = [packed(tracer, rows, DPO())], [packed(tracer, [row], DPO()) for row in rows]
        real = sum(chi.ids.numel() for row in rows for chi in row.chis)
        padded = sum(batch.ids.numel() for batch in together[0].batches)
        print(f"{n} rows, {real} positions, {padded} with padding in {len(together[0].batches)} batches of like length\n")
        print("| groups | CPU s a row, batches | CPU s a row, one row a pass | ratio |\n|---|---|---|---|")
        for G in groups:
            pulled = Pulled.of(scope, dict(list(probe.items())[:G]))
            timed(pulled, together[:1])
            a, b = timed(pulled, together), timed(pulled, alone)
            print(f"| {G} | {a / n:.4f} | {b / n:.4f} | {b / a:.2f} |")


def peak(data: str, n: int) -> None:
    model, tokenizer = load_model("demo")
    table = td.data.read(data)
    watched = td.probes.load(tokenizer, table[-4:], types=["chosen"])
    with tempfile.TemporaryDirectory() as folder:
        rows = [table[i % (len(table) - 4)] for i in range(n)]
        td.scan(model, rows, watched, out=Path(folder) / "scan", tokenizer=tokenizer, block=16)
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main() -> None:
    asked = arguments()
    torch.set_num_threads(1)
    if asked.peak_of:
        peak(asked.data, asked.peak_of)
        return
    if asked.quick:
        asked.rows, asked.groups, asked.memory_rows = 4, [2], [2]
    times(asked.data, asked.rows, asked.groups)
    print("\n| rows | peak memory of the process, MiB |\n|---|---|")
    for n in asked.memory_rows:
        command = [sys.executable, __file__, "--data", asked.data, "--peak-of", str(n)]
        print(f"| {n} | {json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout):.0f} |")


if __name__ == "__main__":
    main()
