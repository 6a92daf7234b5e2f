"""What tokdyn/prediction.py tells beside what is taken: time and memory of profiles and scans, by shapes; then larger models.

    python benchmarks/prediction.py [--shapes demo wide …] [--quick] [--json FILE]

Of each shape: a profile without the matrix, one with it, a scan of eight rows on two groups. Seconds are processor time on one
thread; the rate is measured in the same process on one batch. Peaks are beside the model, in a process whose allocator gives
memory back. The larger models are counted from their published configurations, on an H200 by its published peak rate and memory
at an efficiency that is assumed: nothing of that is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

V = 2048
SHAPES: dict[str, dict[str, Any]] = {  # configuration, then prompt and response of two sequences a side
    "demo": dict(width=256, layers=4, vocabulary=4096, lengths=[(60, 40), (50, 30)]),
    "wide": dict(width=512, layers=2, vocabulary=V, lengths=[(20, 28), (12, 36)]),
    "deep": dict(width=128, layers=12, vocabulary=V, lengths=[(60, 40), (50, 30)]),
    "long": dict(width=256, layers=2, vocabulary=V, lengths=[(700, 32)]),
    "vocabulary": dict(width=128, layers=2, vocabulary=32000, lengths=[(40, 60), (30, 50)]),
}
QUICK = {"quick": dict(width=64, layers=2, vocabulary=101, lengths=[(12, 8), (9, 5)])}
ROWS, GROUPS = 8, 2

# Published: config.json of Qwen/Qwen2.5-0.5B, meta-llama/Llama-3.1-8B and -70B.
LLAMA = dict(family="llama", vocab_size=128256, num_key_value_heads=8, tie_word_embeddings=False)
PUBLISHED: dict[str, dict[str, Any]] = {
    "0.5B": dict(family="qwen2", vocab_size=151936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, intermediate_size=4864, tie_word_embeddings=True),
    "8B": LLAMA | dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14336),
    "70B": LLAMA | dict(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28672),
}  # fmt: skip
H200 = dict(multiplications=989.5e12 / 2, bytes=141e9)  # bfloat16 without sparsity, two operations each; NVIDIA's data sheet
EFFICIENCY = dict(passes=0.35, matrix=0.15)  # assumed
PAIR = [(512, 256), (512, 256)]  # an update of two answers, watched as it is trained
PROBE, DATA = [[(512, 256)] * 64] * 2, 60_000
TWIN = 16  # by how much a published model is narrowed to see what its graph keeps


def measured(name: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Told and taken, of each kind of work on a shape."""
    import tokdyn as td
    from tokdyn import prediction as told
    from tokdyn.bench.measure import peak_memory
    from tokdyn.exact import Asked
    from tokdyn.exact.memory import MEMORY
    from tokdyn.model.trace import trace
    from tokdyn.testing import random_chis

    model = qwen2(config["vocabulary"], config["width"], config["layers"])
    draw = lambda seed, n=1: random_chis(config["lengths"] * n, seed=seed, vocabulary=config["vocabulary"])  # noqa: E731
    update, observe = draw(1), draw(2)
    rows, groups = [[chi] for chi in draw(3, ROWS)[:ROWS]], {str(g): draw(4 + g) for g in range(GROUPS)}
    o, u = told.side(observe), told.side(update)
    SFT = td.objectives.SFT()
    asked = Asked(update, observe, SFT)
    with trace(model) as tracer:
        shape, whole = told.profile_memory_of(tracer, asked, "full", True, MEMORY)
        rate = told.measured(tracer, shape, asked)
    beside = lambda parts: told.most(parts) - shape.item * shape.parameters  # noqa: E731

    def scan() -> None:
        with tempfile.TemporaryDirectory() as place:
            td.scan(model, rows, groups, SFT, out=Path(place) / "scan")

    probe = [told.side(chis) for chis in groups.values()]
    scanned = td.scan.estimate(model, rows, groups, SFT).memory
    pulled = max(told.reduction_memory(shape, group, group)["backward"] for group in probe)  # while the directions are made
    scanning = max(scanned["logits and tangents"], pulled) + scanned["directions"]
    kinds: dict[str, tuple[Callable[[], Any], dict[str, float], float]] = {
        "profile, no matrix": (lambda: td.profile(model, update, observe, SFT, method="none"),
                               told.profile_work(shape, o, u, False), beside(whole | {"matrix": 0.0})),
        "profile": (lambda: td.profile(model, update, observe, SFT), told.profile_work(shape, o, u), beside(whole)),
        "scan": (scan, told.scan_work(shape, probe, told.side(rows[0]), len(rows)), scanning),
    }  # fmt: skip
    td.profile(model, random_chis([(2, 3)]), random_chis([(2, 3)]), SFT)
    scan()  # what is imported at first is not counted
    found = []
    for what, (call, work, memory) in kinds.items():
        begin = time.process_time()
        taken = peak_memory(call, torch.device("cpu"))
        seconds = time.process_time() - begin
        found.append(dict(
            shape=name, what=what, cpu_s=seconds, told_s=sum(work[part] / rate[part] for part in work), peak_mib=taken / 2**20,
            told_mib=memory / 2**20, rates={part: x / 1e9 for part, x in rate.items()},
        ))  # fmt: skip
    return found


def qwen2(vocabulary: int, width: int, depth: int) -> Any:
    """A random model: heads of 32, a gated MLP of 2.75 widths."""
    import transformers as tf

    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(tf.Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 32,
        num_key_value_heads=width // 64, intermediate_size=11 * width // 4, max_position_embeddings=1 << 12,
        tie_word_embeddings=True,
    )).eval()  # fmt: skip


def published(config: dict[str, Any]) -> Any:
    """The Shape of a published configuration: weights from a model without data, what a graph keeps from narrow twins of it.

    A layer of a model a sixteenth as wide keeps a sixteenth of the numbers.
    """
    import transformers as tf

    from tokdyn import prediction as told
    from tokdyn.exact.memory import Graph, Widths
    from tokdyn.exact.scope import select
    from tokdyn.model.trace import trace

    def made(**changes: Any) -> Any:
        given = {k: x for k, x in config.items() if k != "family"} | changes
        return tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(config["family"], **given), dtype=torch.float32)

    twin = {name: config[name] // TWIN for name in ("hidden_size", "intermediate_size")} | dict(vocab_size=64, head_dim=4)
    kept = []
    for depth in (1, 2):
        with trace(made(num_hidden_layers=depth, **twin).eval()) as tracer:
            kept.append(TWIN * Graph.of(tracer, select(tracer, "full"), 128).each / 4)
    with torch.device("meta"):
        model = made()
    a_layer = kept[1] - kept[0]
    widths = Widths(config["vocab_size"], config["hidden_size"], config["intermediate_size"])
    return told.Shape.of_modules(model, widths, 2, kept[0] + (config["num_hidden_layers"] - 1) * a_layer)


def larger() -> list[dict[str, Any]]:
    """Time and memory of the published models on H200s, at the assumed efficiency."""
    from tokdyn import prediction as told

    found = []
    for name, config in PUBLISHED.items():
        shape = published(config)
        rate = {part: H200["multiplications"] * x for part, x in EFFICIENCY.items()}
        scanned = told.reduction_memory(shape, PROBE[0], PAIR)
        scanned["direction"] *= len(PROBE)
        for what, work, memory in (
            ("reduction", {"passes": told.reduction_work(shape, PAIR, PAIR)}, told.reduction_memory(shape, PAIR, PAIR)),
            ("profile", told.profile_work(shape, PAIR, PAIR), told.profile_memory(shape, PAIR, PAIR)),
            ("scan", told.scan_work(shape, PROBE, PAIR, DATA), scanned),
        ):
            held = told.most(memory)
            found.append(dict(model=name, what=what, parameters_b=shape.parameters / 1e9, tera=sum(work.values()) / 1e12,
                              seconds=sum(work[part] / rate[part] for part in work), gb=held / 1e9,
                              devices=math.ceil(held / H200["bytes"])))  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        torch.set_num_threads(1)
        print(json.dumps(measured(asked.one, (SHAPES | QUICK)[asked.one])))
        return
    from tokdyn.bench.measure import machine, steady_memory, versions

    rows: list[dict[str, Any]] = []
    print("| shape | what | told s | taken s | ratio | told MiB | peak MiB | ratio |\n|---|---|---|---|---|---|---|---|")
    for name in QUICK if asked.quick else asked.shapes:
        env = os.environ | steady_memory() | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--one", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
        for row in json.loads(done.stdout.splitlines()[-1]):
            rows.append(row)
            ratios = row["told_s"] / row["cpu_s"], row["told_mib"] / row["peak_mib"]
            times = f"{row['told_s']:.2f} | {row['cpu_s']:.2f} | {ratios[0]:.2f}"
            sizes = f"{row['told_mib']:.0f} | {row['peak_mib']:.0f} | {ratios[1]:.2f}"
            print(f"| {name} | {row['what']} | {times} | {sizes} |", flush=True)
    models = larger()
    print("\n| model | what | 10^12 multiplications | s on an H200 | GB | H200s |\n|---|---|---|---|---|---|")
    for row in models:
        cells = f"{row['tera']:.0f} | {row['seconds']:.2g} | {row['gb']:.0f} | {row['devices']}"
        print(f"| {row['model']} | {row['what']} | {cells} |")
    if asked.json:
        told = dict(machine=machine(torch.device("cpu")), versions=versions(), efficiency=EFFICIENCY, rows=rows, larger=models)
        asked.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
