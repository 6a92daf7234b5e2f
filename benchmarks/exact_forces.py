"""Exact force matrix: structured tangents against one gradient per token per side, in one run.

    python benchmarks/exact_forces.py [--length 256] [--vocabulary 2048] [--quick]

Qwen2 shape, d = 256, 4 layers, tied, all parameters, float32. Each side runs in a process of its own, so that its peak memory
is its own; the times are medians of --repeat runs after one warm-up of the smallest size.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
from pathlib import Path


def side(name: str, args: argparse.Namespace, queue) -> None:
    """Seconds, peak memory and the matrix of one method."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import tokdyn as td
    from tokdyn.testing import random_chis

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=args.width, num_hidden_layers=args.layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=int(2.75 * args.width), vocab_size=args.vocabulary, tie_word_embeddings=True,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    update, observe = (random_chis([(1, args.length)], seed=s, vocabulary=args.vocabulary) for s in (1, 2))
    small = [random_chis([(1, 8)], seed=s, vocabulary=args.vocabulary) for s in (1, 2)]
    td.forces(model, *small, method=name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(args.repeat):
        start = time.perf_counter()
        matrix = td.forces(model, update, observe, method=name, memory=args.memory << 20).matrix
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    queue.put((seconds, peak / 1024, matrix.numpy().copy()))


def main() -> None:
    """Run both sides and print the table."""
    import numpy as np
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256, help="tokens per side")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--memory", type=int, default=8192, help="MiB each side may take for gradients or tangents")
    parser.add_argument("--quick", action="store_true", help="a small size, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.quick:
        args.length, args.width, args.layers = 24, 64, 2
    context = multiprocessing.get_context("spawn")
    found = {}
    for name in ("naive", "tangent"):
        queue = context.Queue()
        process = context.Process(target=side, args=(name, args, queue))
        process.start()
        found[name] = queue.get()
        process.join()
    error = np.linalg.norm(found["tangent"][2] - found["naive"][2]) / np.linalg.norm(found["naive"][2])
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {args.threads} threads, float32")
    print(f"d={args.width} layers={args.layers} T={args.length} V={args.vocabulary}: relative error {error:.1e}")
    print(f"{'method':10} {'median s':>9} {'min s':>8} {'peak MiB':>9}")
    for name, (seconds, peak, _) in found.items():
        print(f"{name:10} {statistics.median(seconds):9.2f} {min(seconds):8.2f} {peak:9.0f}")
    (naive, memory, _), (tangent, less, _) = found["naive"], found["tangent"]
    ratio = statistics.median(naive) / statistics.median(tangent)
    print(f"structured tangents: {ratio:.2f}x faster, {memory / max(less, 1):.1f}x less memory")
    if args.json:
        figures = {name: dict(seconds=seconds, peak_mib=peak) for name, (seconds, peak, _) in found.items()}
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        args.json.write_text(json.dumps(dict(settings=settings, error=float(error), ratio=ratio, figures=figures), indent=1))


if __name__ == "__main__":
    main()
