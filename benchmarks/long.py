"""What long sequences cost by their length T, and the peak memory beside the estimate; many short ones, packed.

    python benchmarks/long.py [--what reduction scoring …] [--shapes demo layer] [--lengths 1024 2048 …] [--short 16]
                              [--quick] [--json FILE] [--add]

reduction    reduce="update" of one sequence of T tokens on another, the last 64 of each scored
again        the same with memory="1MiB": the layers' graphs are made again in the backward pass
scoring      logits and token statistics of a sequence, all of its tokens scored
readout      the readout's matrix, scope="readout", of such a sequence on another
row sums     the same reduced, reduce="update"

CPU seconds on one thread and peak memory beside the model, each length in a process of its own. `exponent` is the slope of log
seconds over log T between a length and the one before. "demo" is the demo model's shape whole, "layer" one layer of a 0.5B
shape (896 wide, vocabulary 32,000 instead of 151,936), "deep" the demo's width with 16 layers. Then the matrix of so many
sequences of 64 tokens on as many others, packed into common graphs and one each. --add leaves what is in FILE for other
lengths and kinds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

SCORED = 64
WHAT = ("reduction", "again", "scoring", "readout", "row sums")
SHAPES: dict[str, dict[str, Any]] = {
    "demo": dict(vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
                 intermediate_size=704),
    "layer": dict(vocab_size=32000, hidden_size=896, num_hidden_layers=1, num_attention_heads=14, num_key_value_heads=2,
                  intermediate_size=4864),
    "deep": dict(vocab_size=4096, hidden_size=256, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=4,
                 intermediate_size=704),
}  # fmt: skip


def model_of(shape: str) -> Any:
    """A random model of a shape."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.Qwen2Config(**SHAPES[shape], max_position_embeddings=1 << 16, tie_word_embeddings=True)
    return tf.AutoModelForCausalLM.from_config(config).eval()


def sequence(shape: str, T: int, seed: int, scored: int = SCORED) -> Any:
    """T random tokens, the last so many scored (half of them at most, or all but the first)."""
    from tokdyn import Chi

    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (T,), generator=torch.Generator().manual_seed(seed))
    return Chi(ids, torch.arange(T) >= T - (scored if scored == T - 1 else min(scored, T // 2)))


def one(what: str, shape: str, T: int) -> dict[str, Any]:
    """CPU seconds and peak bytes of one call, and what was told before."""
    import tokdyn as td
    from tokdyn.bench.measure import peak_memory
    from tokdyn.exact.memory import MEMORY, peak, readout_bytes, reduction_bytes, scoring_bytes
    from tokdyn.exact.scope import select
    from tokdyn.model.trace import trace

    model, memory = model_of(shape), 1 << 20 if what == "again" else MEMORY
    every = what not in ("reduction", "again")

    def call(T: int, memory: int) -> Any:
        u, o = (sequence(shape, T, seed, T - 1 if every else SCORED) for seed in (1, 2))
        if what == "scoring":
            with trace(model) as tracer:
                return [stats for _, _, stats in tracer.score([u])]
        options = dict(scope="readout") if every else {}
        return td.forces(model, [u], [o], reduce=None if what == "readout" else "update", memory=memory, **options)

    def told() -> dict[str, int]:
        with trace(model) as tracer:
            u, o = (tracer.batches([sequence(shape, T, seed, T - 1 if every else SCORED)]) for seed in (1, 2))
            if what == "scoring":
                return scoring_bytes(tracer, u)
            if every:
                return readout_bytes(tracer, o, u, None if what == "readout" else "update")
            return reduction_bytes(tracer, select(tracer, "full"), u, o, memory)

    call(64, MEMORY)
    estimate = told()
    begin = time.process_time()
    taken = peak_memory(lambda: call(T, memory), torch.device("cpu"))
    seconds = time.process_time() - begin
    return dict(what=what, shape=shape, T=T, cpu_s=seconds, peak_mib=taken / 2**20, told_mib=peak(estimate) / 2**20)


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


def measured(asked: argparse.Namespace, told: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each kind, shape and length, printed as it is done; those that were told before and are not made again stay."""
    rows = {(row["what"], row["shape"], row["T"]): row for row in told.get("rows", [])}
    print("| what | shape | T | CPU s | exponent | peak MiB | told MiB | apart |\n|---|---|---|---|---|---|---|---|")
    kinds = [",".join(asked.what)] if asked.quick else asked.what  # a process for each, where it is not quick
    for some, shape, T in product(kinds, asked.shapes, asked.lengths):
        for row in in_its_own("--one", some, shape, str(T)):
            what = row["what"]
            rows[what, shape, T], row["exponent"] = row, None
            shorter = [of for key, of in rows.items() if key[:2] == (what, shape) and key[2] < T]
            if shorter:
                last = max(shorter, key=lambda of: of["T"])
                row["exponent"] = math.log(row["cpu_s"] / last["cpu_s"]) / math.log(T / last["T"])
            if asked.json:
                written(asked.json, told | {"rows": ordered(rows)})
            slope = "" if row["exponent"] is None else f"{row['exponent']:.2f}"
            sizes = f"{row['peak_mib']:.0f} | {row['told_mib']:.0f} | {row['told_mib'] / row['peak_mib'] - 1:+.0%}"
            print(f"| {what} | {shape} | {T} | {row['cpu_s']:.1f} | {slope} | {sizes} |", flush=True)
    return ordered(rows)


def ordered(rows: dict[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows.values(), key=lambda row: (WHAT.index(row["what"]), row["shape"], row["T"]))


def written(file: Path, told: dict[str, Any]) -> None:
    """The figures in a file, after each row: the last ones take long."""
    from tokdyn.bench.measure import machine, versions

    file.write_text(json.dumps(dict(machine=machine(torch.device("cpu")), versions=versions()) | told, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=list(WHAT), choices=WHAT)
    parser.add_argument("--shapes", nargs="+", default=["demo", "layer"], choices=list(SHAPES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--short", type=int, default=16, help="sequences of 64 tokens on each side; 0 leaves them out")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--add", action="store_true", help="to what is in FILE")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--pack", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one or asked.pack:
        torch.set_num_threads(1)
        kinds, shape, T = asked.one or ("", "", 0)
        print(json.dumps([one(what, shape, int(T)) for what in kinds.split(",")] if kinds else short(asked.pack)))
        return
    if asked.quick:
        asked.shapes, asked.lengths, asked.short = ["demo"], [1024], 3
    told = json.loads(asked.json.read_text()) if asked.add else {}
    told["rows"] = measured(asked, told)
    if asked.short:
        told["short"] = packed = in_its_own("--pack", str(asked.short))
        ratio = packed["alone_cpu_s"] / packed["packed_cpu_s"]
        print(f"\n{asked.short} x 64 tokens on each side: packed {packed['packed_cpu_s']:.1f} CPU s, "
              f"one each {ratio:.2f} times that")  # fmt: skip
    if asked.json:
        written(asked.json, told)


if __name__ == "__main__":
    main()
