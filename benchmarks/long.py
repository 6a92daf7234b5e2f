"""What long sequences cost: a reduction by the length T, and its peak memory beside the estimate; many short ones, packed.

    python benchmarks/long.py [--shapes demo layer] [--lengths 1024 2048 …] [--short 16] [--quick] [--json FILE]

A reduction (reduce="update") of one sequence of T tokens on another, the last 64 of each scored: CPU seconds on one thread and
peak memory beside the model, each length in a process of its own. `exponent` is the slope of log seconds over log T between a
length and the one before. "demo" is the demo model's shape whole, "layer" one layer of a 0.5B shape (896 wide, vocabulary
32,000 instead of 151,936). Then the matrix of so many sequences of 64 tokens on as many others, packed into common graphs and
one each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

SCORED = 64
SHAPES: dict[str, dict[str, Any]] = {
    "demo": dict(vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
                 intermediate_size=704),
    "layer": dict(vocab_size=32000, hidden_size=896, num_hidden_layers=1, num_attention_heads=14, num_key_value_heads=2,
                  intermediate_size=4864),
}  # fmt: skip


def model_of(shape: str) -> Any:
    """A random model of a shape."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.Qwen2Config(**SHAPES[shape], max_position_embeddings=1 << 16, tie_word_embeddings=True)
    return tf.AutoModelForCausalLM.from_config(config).eval()


def sequence(shape: str, T: int, seed: int) -> Any:
    """T random tokens, the last 64 scored."""
    from tokdyn import Chi

    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (T,), generator=torch.Generator().manual_seed(seed))
    return Chi(ids, torch.arange(T) >= T - min(SCORED, T // 2))


def reduction(shape: str, T: int) -> dict[str, Any]:
    """CPU seconds and peak bytes of one reduction, and what was told before."""
    import tokdyn as td
    from tokdyn.bench.measure import peak_memory
    from tokdyn.exact import Scope
    from tokdyn.exact.memory import peak, reduction_bytes
    from tokdyn.model.trace import trace

    model, (u, o) = model_of(shape), (sequence(shape, T, seed) for seed in (1, 2))
    few = [sequence(shape, 64, seed) for seed in (3, 4)]
    td.forces(model, few[:1], few[1:], reduce="update")
    with trace(model) as tracer:
        told = reduction_bytes(Scope.named(tracer, "full"), tracer.batches([u]), tracer.batches([o]))
    begin = time.process_time()
    taken = peak_memory(lambda: td.forces(model, [u], [o], reduce="update"), torch.device("cpu"))
    return dict(shape=shape, T=T, cpu_s=time.process_time() - begin, peak_mib=taken / 2**20, told_mib=peak(told) / 2**20)


def short(n: int) -> dict[str, Any]:
    """CPU seconds of the matrix of n sequences of 64 tokens on n others: in common graphs, and each in its own."""
    from tokdyn.exact import Asked, Scope, UnscoredProblem, sweep
    from tokdyn.exact.sweep.plan import planned
    from tokdyn.model.trace import trace
    from tokdyn.objectives import SFT

    model = model_of("demo")
    sides = [[sequence("demo", 64, seed + n * side) for seed in range(n)] for side in (0, 1)]
    seconds: dict[str, list[float]] = {"packed": [], "one each": []}
    with trace(model) as tracer:
        problem = UnscoredProblem.about(Asked(*sides, SFT()), Scope.named(tracer, "full")).scored()
        found = {}
        for _ in range(2):
            for name, p in (("packed", planned(problem)), ("one each", planned(problem).apart())):
                F, begin = problem.empty(), time.process_time()
                sweep.fill(p, F)
                seconds[name].append(time.process_time() - begin)
                found[name] = F
    apart = float((found["packed"] - found["one each"]).norm() / found["one each"].norm())
    return dict(sequences=n, tokens=64, packed_cpu_s=min(seconds["packed"]), alone_cpu_s=min(seconds["one each"]), apart=apart)


def in_its_own(*words: str) -> Any:
    """What this script prints in a process whose allocator gives memory back, on one thread."""
    from tokdyn.bench.measure import steady_memory

    done = subprocess.run(
        [sys.executable, __file__, *words], check=True, capture_output=True, text=True,
        env=os.environ | steady_memory() | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--short", type=int, default=16, help="sequences of 64 tokens on each side")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--pack", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one or asked.pack:
        torch.set_num_threads(1)
        print(json.dumps(reduction(asked.one[0], int(asked.one[1])) if asked.one else short(asked.pack)))
        return
    if asked.quick:
        asked.shapes, asked.lengths, asked.short = ["demo"], [512], 3
    rows: list[dict[str, Any]] = []
    print("| shape | T | CPU s | exponent | peak MiB | told MiB | apart |\n|---|---|---|---|---|---|---|")
    for shape in asked.shapes:
        for T in asked.lengths:
            row = in_its_own("--one", shape, str(T))
            before = rows[-1] if rows and rows[-1]["shape"] == shape else None
            row["exponent"] = before and math.log(row["cpu_s"] / before["cpu_s"]) / math.log(T / before["T"])
            rows.append(row)
            slope = "" if before is None else f"{row['exponent']:.2f}"
            sizes = f"{row['peak_mib']:.0f} | {row['told_mib']:.0f} | {row['told_mib'] / row['peak_mib'] - 1:+.0%}"
            print(f"| {shape} | {T} | {row['cpu_s']:.1f} | {slope} | {sizes} |", flush=True)
    packed = in_its_own("--pack", str(asked.short))
    ratio = packed["alone_cpu_s"] / packed["packed_cpu_s"]
    print(
        f"\n{asked.short} x 64 tokens on each side: packed {packed['packed_cpu_s']:.1f} CPU s, one each {ratio:.2f} times that"
    )
    if asked.json:
        from tokdyn.bench.measure import machine, versions

        told = dict(machine=machine(torch.device("cpu")), versions=versions(), reductions=rows, short=packed)
        asked.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
