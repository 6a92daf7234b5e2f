"""What tokdyn costs a training of the demo model: on and off in turn, in one run.

    python benchmarks/overhead.py [--loss dpo|sft] [--steps 10] [--repeat 5] [--quick]

Three ways to train, one after the other, `--repeat` times: without tokdyn; recording every step; recording every 10th step with
a probe of 512 tokens. Overhead is the ratio of a block's time to that of the block without tokdyn next to it, by the clock and
in processor time (all threads; it is the steadier one on a busy machine): median and range. Peak memory is that of a process
of its own per way.
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

WAYS = {"off": None, "every step": dict(every=1), "every 10th step, probe of 512 tokens": dict(every=10, probe=True)}


def setting(args: argparse.Namespace):
    """Model, optimizer, batches, probe and a function that makes one step's loss."""
    import torch
    from torch.nn.functional import logsigmoid

    from tokdyn.loading import load_model
    from tokdyn.testing import random_chis

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = load_model("demo")[0].train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    V, T = model.config.vocab_size, args.length
    batches = [torch.randint(2, V, (args.batch, T)) for _ in range(4)]
    probe = random_chis([(T // 4, T - T // 4)] * -(-args.probe // (T - T // 4)), vocabulary=V, seed=1)

    def loss(ids):
        labels = ids.clone()
        labels[:, : T // 4] = -100
        if args.loss == "sft":
            return model(ids, labels=labels).loss
        z = model(ids).logits[:, :-1]
        lp = torch.log_softmax(z, -1).gather(-1, ids[:, 1:, None]).squeeze(-1)[:, T // 4 - 1 :].sum(1)
        chosen, rejected = lp.chunk(2)
        return -logsigmoid(0.1 * (chosen - rejected)).mean()

    return model, optimizer, batches, probe, loss


def block(way: str, steps: int, parts) -> tuple[float, float]:
    """Seconds of so many steps, by the clock and of the processor."""
    import tokdyn as td

    model, optimizer, batches, probe, loss = parts
    options = dict(WAYS[way] or {})
    if options.pop("probe", False):
        options["probe"] = probe
    monitor = None if WAYS[way] is None else td.Monitor(model, optimizer, on_error="raise", **options)
    if monitor is not None:
        monitor.start()
    start, used = time.perf_counter(), time.process_time()
    for n in range(steps):
        if monitor is not None:
            monitor.step_begin(steps + n + 1)  # not the first step of a training, which is always recorded
        loss(batches[n % len(batches)]).backward()
        optimizer.step()
        if monitor is not None:
            monitor.step_end(force=True)
        optimizer.zero_grad()
    seconds = time.perf_counter() - start, time.process_time() - used
    if monitor is not None:
        monitor.close()
    return seconds


def memory(way: str, args: argparse.Namespace, queue) -> None:
    """Peak MiB of a process that trains one way."""
    parts = setting(args)
    block(way, args.steps, parts)
    status = Path("/proc/self/status")  # ru_maxrss of a new process starts at its parent's
    lines = status.read_text().splitlines() if status.exists() else []
    peak = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    queue.put((peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024)


def main() -> None:
    """Run the ways in turn and print the table."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=("dpo", "sft"), default="dpo")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step (twice the pairs)")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence, the first quarter unscored")
    parser.add_argument("--probe", type=int, default=512, help="tokens of the probe")
    parser.add_argument("--steps", type=int, default=10, help="steps per block")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a small size, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.length, args.probe, args.repeat = 2, 16, 24, 1
    parts = setting(args)
    for way in WAYS:
        block(way, args.steps, parts)  # warm-up: the first calls register and compile
    seconds = {way: [] for way in WAYS}
    for _ in range(args.repeat):
        for way in WAYS:
            seconds[way].append([s / args.steps for s in block(way, args.steps, parts)])
    context = multiprocessing.get_context("spawn")
    peak = {}
    for way in WAYS:
        queue = context.Queue()
        process = context.Process(target=memory, args=(way, args, queue))
        process.start()
        peak[way] = queue.get()
        process.join()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {args.threads} threads, float32")
    print(f"demo model, {args.loss}, {args.batch} sequences of {args.length} tokens")
    head = ("median s/step", "overhead %", "range %", "processor %", "peak MiB", "more %")
    print(f"{'':38}" + "".join(f"{name:>15}" for name in head))
    figures = {}
    for way, times in seconds.items():
        over, cpu = ([100 * (a[i] / b[i] - 1) for a, b in zip(times, seconds["off"], strict=True)] for i in (0, 1))
        more = 100 * (peak[way] / peak["off"] - 1)
        figures[way] = dict(seconds=times, overhead_percent=over, processor_percent=cpu, peak_mib=peak[way], more_percent=more)
        cells = [f"{statistics.median(t[0] for t in times):.4f}", f"{statistics.median(over):.1f}"]
        cells += [f"{min(over):.1f} to {max(over):.1f}", f"{statistics.median(cpu):.1f}", f"{peak[way]:.0f}", f"{more:.1f}"]
        print(f"{way:38}" + "".join(f"{cell:>15}" for cell in cells))
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        args.json.write_text(json.dumps(dict(settings=settings, figures=figures), indent=1))


if __name__ == "__main__":
    main()
