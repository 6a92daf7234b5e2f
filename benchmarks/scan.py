"""What a scan costs: CPU time a row in batches of like length and row by row; memory by rows, and of a pass as estimated.

    python benchmarks/scan.py [--data pairs.jsonl] [--rows 32] [--groups 1 2 4] [--quick]

CPU seconds of this process on one thread, both sides in one run; memory is that of processes of their own. Prints tables.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers as tf

import tokdyn as td
from tokdyn.bench.measure import MIB, peak_memory, steady_memory
from tokdyn.exact import Scope
from tokdyn.exact.memory import pass_bytes
from tokdyn.exact.scanning import Pulled, Row, packed
from tokdyn.loading import DEMO_PAIRS, load_model
from tokdyn.model.trace import trace
from tokdyn.objectives import DPO, SFT
from tokdyn.testing import random_chis


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(DEMO_PAIRS), help="preference pairs; the last four rows are the probe")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--memory-rows", type=int, nargs="*", default=[32, 128])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--passes", action="store_true", help=argparse.SUPPRESS)
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


WIDE = dict(vocab_size=32000, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=344, tie_word_embeddings=True)  # fmt: skip
OLD = dict(vocab_size=8000, n_embd=192, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
SHAPES: dict[str, dict | None] = {"Qwen2 256": None, "Qwen2 128, V 32000": WIDE, "GPT-2 192, V 8000": OLD}


def passes(quick: bool) -> None:
    """Peak of a pass against `pass_bytes`: models, numbers of groups and lengths that put it in a layer or at the logits."""
    print("| model | groups | sequences | prompt, response | peak MiB | estimated MiB | apart |\n|---|---|---|---|---|---|---|")
    for name, shape in list(SHAPES.items())[: 1 if quick else None]:
        config = None if shape is None else (tf.GPT2Config if "n_embd" in shape else tf.Qwen2Config)(**shape)
        model = load_model("demo")[0] if config is None else tf.AutoModelForCausalLM.from_config(config).eval()
        V = model.config.vocab_size
        with trace(model) as tracer:
            scope = Scope.named(tracer, "full")
            for G in [1] if quick else [1, 4]:
                pulled = Pulled.of(scope, {str(g): random_chis([(4, 4)], vocabulary=V) for g in range(G)})
                for n, x, y in [(8, 100, 28), (2, 20, 300)]:
                    rows = [Row(str(i), random_chis([(x, y)], vocabulary=V)) for i in range(n)]
                    update = packed(tracer, rows, SFT(), 1 << 20)
                    pulled.forces(update)
                    taken = peak_memory(lambda pulled=pulled, update=update: pulled.forces(update), torch.device("cpu"))
                    told = pass_bytes(tracer, update.batches[0], G)
                    sizes = f"{taken / MIB:.1f} | {told / MIB:.1f} | {told / taken - 1:+.0%}"
                    print(f"| {name} | {G} | {n} | {x}, {y} | {sizes} |")


def main() -> None:
    asked = arguments()
    torch.set_num_threads(1)
    if asked.peak_of:
        peak(asked.data, asked.peak_of)
        return
    if asked.passes:
        passes(asked.quick)
        return
    if asked.quick:
        asked.rows, asked.groups, asked.memory_rows = 4, [2], [2]
    times(asked.data, asked.rows, asked.groups)
    print("\n| rows | peak memory of the process, MiB |\n|---|---|")
    for n in asked.memory_rows:
        command = [sys.executable, __file__, "--data", asked.data, "--peak-of", str(n)]
        print(f"| {n} | {json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout):.0f} |")
    own = [sys.executable, __file__, "--passes", *(["--quick"] if asked.quick else [])]
    print("\n" + subprocess.run(own, check=True, capture_output=True, text=True, env=os.environ | steady_memory()).stdout)


if __name__ == "__main__":
    main()
