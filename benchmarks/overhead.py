"""What tokdyn costs a training of the demo model: on and off in turn, in one run.

    python benchmarks/overhead.py [--loss dpo|sft|fused] [--rounds 5] [--part time|memory|both] [--json FILE] [--quick]

One round trains some steps without tokdyn, as many that are recorded, as many between two records, and one recorded with a
probe. Writing the folder is counted at the rate it happens, once in 20 records. Overhead is the ratio to the steps without
tokdyn of the same round, by the clock and in processor time (all threads; the steadier one on a busy machine):

    every step          recorded / off - 1
    every 10th, probe   (9 between + 1 with probe) / 10 off - 1

Peak memory is that of a process of its own per way. --loss dpo and sft read the model's logits; fused is DPO on the log-probs
of TRL's fused head, where the statistics cost a product [N, d] x [d, V] of their own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

RECORDS = 10  # steps from one record with a probe to the next
WRITES = 20  # records from one writing of the folder to the next


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
    prompt = T // 4
    batches = [torch.randint(2, V, (args.batch, T)) for _ in range(4)]
    full, rest = divmod(args.probe, T - prompt)
    probe = random_chis([(prompt, T - prompt)] * full + [(prompt, rest)] * (rest > 0), vocabulary=V, seed=1)
    if args.loss == "fused":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model)

    def loss(ids):
        labels = ids.clone()
        labels[:, :prompt] = -100
        if args.loss == "sft":
            return model(ids, labels=labels).loss
        if args.loss == "fused":
            lp = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs.sum(1)
        else:
            z = model(ids).logits[:, prompt - 1 : -1]
            lp = torch.log_softmax(z, -1).gather(-1, ids[:, prompt:, None]).squeeze(-1).sum(1)
        chosen, rejected = lp.chunk(2)
        return -logsigmoid(0.1 * (chosen - rejected)).mean()

    return model, optimizer, batches, probe, loss


def block(way: str, steps: int, parts) -> tuple[float, float]:
    """Seconds per step of a training, (by the clock, of the processor): "off", "recorded", "between" records, or "probe"."""
    import tokdyn as td

    model, optimizer, batches, probe, loss = parts
    folder = tempfile.TemporaryDirectory()
    monitor = None
    if way != "off":
        options = dict(every=1) if way == "recorded" else dict(every=RECORDS, probe=probe)
        monitor = td.Monitor(model, optimizer, on_error="raise", out=Path(folder.name) / "run", **options)
        monitor.start()
    start, used = time.perf_counter(), time.process_time()
    for n in range(steps):
        if monitor is not None:
            monitor.step_begin(RECORDS if way == "probe" else RECORDS + n + 1)
        loss(batches[n % len(batches)]).backward()
        optimizer.step()
        if monitor is not None:
            monitor.step_end(force=True)
        optimizer.zero_grad()
    seconds = [time.perf_counter() - start, time.process_time() - used]
    if monitor is not None:
        start, used = time.perf_counter(), time.process_time()
        monitor.close()
        records = len(monitor.steps)
        assert records == (0 if way == "between" else steps)
        seconds[0] += (time.perf_counter() - start) * records / WRITES
        seconds[1] += (time.process_time() - used) * records / WRITES
    folder.cleanup()
    return seconds[0] / steps, seconds[1] / steps


def memory(way: str, args: argparse.Namespace, queue) -> None:
    """Main function of a process that trains one way and puts its peak resident MiB into the queue."""
    parts = setting(args)
    block(way, args.steps, parts)
    status = Path("/proc/self/status")  # ru_maxrss of a new process starts at its parent's
    lines = status.read_text().splitlines() if status.exists() else []
    peak = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    queue.put((peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024)


def measure_time(args: argparse.Namespace) -> dict[str, list[float]]:
    """Overheads in percent, one of each round, and seconds per step."""
    parts = setting(args)
    for way in ("off", "recorded", "probe"):
        block(way, 1, parts)  # warm-up: the first calls register and compile
    found: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        took = {way: block(way, 1 if way == "probe" else args.steps, parts) for way in ("off", "recorded", "between", "probe")}
        for clock, i in (("", 0), (" processor", 1)):
            off = took["off"][i]
            apart = ((RECORDS - 1) * took["between"][i] + took["probe"][i]) / RECORDS
            found.setdefault(f"every step{clock}", []).append(100 * (took["recorded"][i] / off - 1))
            found.setdefault(f"every {RECORDS}th, probe{clock}", []).append(100 * (apart / off - 1))
        found.setdefault("seconds per step, off", []).append(took["off"][0])
    return found


def measure_memory(args: argparse.Namespace) -> dict[str, list[float]]:
    """Peak MiB by way, one of each round: what the allocator keeps of freed memory differs from process to process."""
    context, peak = multiprocessing.get_context("spawn"), {"off": [], "recorded": [], "probe": []}
    for _ in range(args.rounds):
        for way, found in peak.items():
            queue = context.Queue()
            process = context.Process(target=memory, args=(way, args, queue))
            process.start()
            found.append(queue.get())
            process.join()
    return peak


def main() -> None:
    """Measure, and print the tables."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=("dpo", "sft", "fused"), default="dpo")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step (twice the pairs)")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence, the first quarter unscored")
    parser.add_argument("--probe", type=int, default=512, help="scored tokens of the probe")
    parser.add_argument("--steps", type=int, default=3, help="steps of a kind in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", choices=("time", "memory", "both"), default="both")
    parser.add_argument("--quick", action="store_true", help="a small size, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.length, args.probe, args.steps, args.rounds = 2, 16, 24, 1, 1
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {args.threads} threads, float32")
    print(f"demo model, {args.loss}, {args.batch} sequences of {args.length} tokens, probe of {args.probe} tokens")
    figures: dict[str, object] = {}
    if args.part != "memory":
        times = figures["time"] = measure_time(args)
        print(f"{statistics.median(times['seconds per step, off']):.4f} s a step without tokdyn, {args.rounds} rounds")
        print(f"{'overhead':22}{'median %':>12}{'range %':>18}{'processor %':>14}")
        for way in ("every step", f"every {RECORDS}th, probe"):
            over, cpu = times[way], statistics.median(times[f"{way} processor"])
            print(f"{way:22}{statistics.median(over):12.1f}{f'{min(over):.1f} to {max(over):.1f}':>18}{cpu:14.1f}")
    if args.part != "time":
        peak = figures["peak MiB"] = measure_memory(args)
        print(f"{'memory':22}{'median MiB':>12}{'range MiB':>18}{'more %':>14}")
        for way, MiB in peak.items():
            more = 100 * (statistics.median(MiB) / statistics.median(peak["off"]) - 1)
            print(f"{way:22}{statistics.median(MiB):12.0f}{f'{min(MiB):.0f} to {max(MiB):.0f}':>18}{more:14.1f}")
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        args.json.write_text(json.dumps(dict(settings=settings, figures=figures), indent=1))


if __name__ == "__main__":
    main()
