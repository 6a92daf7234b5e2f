"""The exact force matrix by structured tangents beside other ways to the same numbers, in one run.

    python benchmarks/exact_forces.py                                     one gradient per token per side and their Gram matrix
    python benchmarks/exact_forces.py --vocabulary 2048 32768             the same, for two vocabularies
    python benchmarks/exact_forces.py --peer bergson                      its token_influence="output" (peers.txt)
    python benchmarks/exact_forces.py --peer kronfluence                  its pairwise scores, identity strategy (peers.txt)
    python benchmarks/exact_forces.py --peer none --reduction --batch 8   reduce= against one forward and backward pass
    python benchmarks/exact_forces.py --peer none --scaling               cost against length and width, memory against length
    python benchmarks/exact_forces.py --quick [...]                       any of these at a small size, to see that it runs

Qwen2 shape, tied, random weights, float32, on the CPU. Every side runs in a process of its own; after a warm-up of eight tokens
they take turns, in the opposite order every other round. peak_MiB is the high-water mark of a side's resident memory above
what it held after its warm-up, cpu_s the processor time of all its threads. `ratio` is the median over rounds of a side's
time over ours, for a reduction of its time over the plain pass's, so that a machine that slows down slows both. `error` is
|F - F'| / |F'| over all pairs, F' the other side's matrix, and for the reductions how far their totals are apart over the sum
of the absolute forces; above 1e-5 the run fails.

What the peers compute. Both give inner products of loss gradients, <∇L(y_m), ∇L(y_l)>, which is F[m,l] of a cross entropy
summed over tokens: it must agree, and is compared entry by entry. Both cover the backbone's linear layers, weight and bias, and
not the norms, the lookup or a readout that is tied to it; tokdyn then runs on the same parameters (`scope=`), and the run stops
where the two sides count different numbers of them.

* bergson resolves the update's side by itself (`output`: one tangent pass per query, a number for each loss token), but a query
  is one document, so each observed token is a document that ends with it and has no other label. Its own collector, batches and
  tangent passes run here with the gradients in memory; loading a model and writing an index to disk are left out, in its
  favour. (Its other mode, `gradient`, resolves the positions that a loss acts through: another quantity.)
* kronfluence scores pairs of examples: one example per loss token on both sides, cut behind it, the readout applied to that one
  position. All query gradients are kept, so that the update is passed over once.
* --whole does not cut: every example is the whole text with one label, which costs a peer about twice the tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

BOUND = 1e-5
LINEAR = r"\.layers\.\d+\..*_proj\."  # what the peers cover of this model: the backbone's linear layers
OURS, PLAIN = "tangent", "forward+backward"
PEERS = ("bergson", "kronfluence")


class Size(NamedTuple):
    """Tokens per sequence and side, vocabulary, width, layers, sequences per side."""

    length: int
    vocabulary: int
    width: int
    layers: int
    batch: int = 1


def model_of(size: Size) -> Any:
    """A random model of Qwen2 shape; the same on every side."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=size.width, num_hidden_layers=size.layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=int(2.75 * size.width), vocab_size=size.vocabulary, tie_word_embeddings=True,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def texts(size: Size) -> list[Any]:
    """Update and observed sequences: one token of prompt, the rest scored."""
    from tokdyn.testing import random_chis

    return [random_chis([(1, size.length)] * size.batch, seed=seed, vocabulary=size.vocabulary) for seed in (1, 2)]


def tokdyn_side(model: Any, **options: Any) -> Callable:
    """td.forces: (matrix or vector, number of parameters that took part)."""
    import tokdyn as td

    def run(update: Any, observe: Any) -> tuple[Any, int]:
        result = td.forces(model, update, observe, **options)
        moving = [name for name, rule in result.coverage.items() if rule != "frozen" and not rule.startswith("outside scope")]
        tensors = {id(p): p.numel() for p in map(model.get_parameter, moving)}
        return result.matrix if result.vector is None else result.vector, sum(tensors.values())

    return run


def plain_side(model: Any) -> Callable:
    """One forward and backward pass of the update, gradients of all parameters."""
    import torch

    def run(update: Any, observe: Any) -> tuple[None, int]:
        ids = torch.stack([chi.ids for chi in update])
        z = model(ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
        model.zero_grad()
        return None, sum(p.numel() for p in model.parameters())

    return run


def bergson_side(model: Any, args: argparse.Namespace, folder: str) -> Callable:
    """bergson's token_influence="output": query gradients by its collector, then a tangent pass for each."""
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
    from bergson.data import allocate_batches, pad_and_tensor
    from bergson.score.output_influence import output_token_influence, query_directions
    from datasets import Dataset

    tokens = max(args.peer_tokens or 2048, args.length + 1)  # 2048 is its default
    cfg = IndexConfig(run_path=f"{folder}/index", include_bias=True, token_batch_size=tokens)
    cfg.partial_run_path.mkdir(parents=True)
    model.requires_grad_(False)  # as bergson sets a model up: hooks take what they need
    model.get_input_embeddings().requires_grad_(True)

    def run(update: Any, observe: Any) -> tuple[Any, int]:
        (u,), (o,) = ([chi.ids.tolist() for chi in side] for side in (update, observe))
        documents = [o if args.whole else o[: t + 1] for t in range(1, len(o))]
        labels = [[-100] * t + [o[t]] + [-100] * (len(ids) - t - 1) for t, ids in enumerate(documents, 1)]
        queries = Dataset.from_dict(dict(input_ids=documents, labels=labels, length=[len(ids) for ids in documents]))
        model.set_attn_implementation("sdpa")
        collector = InMemoryCollector(
            model=model.base_model, data=queries, cfg=cfg, processor=GradientProcessor(include_bias=cfg.include_bias)
        )
        batches = allocate_batches(queries["length"][:], cfg.token_batch_size)
        CollectorComputer(model, queries, collector=collector, batches=batches, cfg=cfg).run_with_collector_hooks()
        model.set_attn_implementation("eager")  # as bergson does: the fused one has no forward derivative
        grads = {name: g.T for name, g in collector.gradients.items()}
        x, y, _, _ = pad_and_tensor([u], labels=[u], sync_max_len=False)
        rates, _ = output_token_influence(model, x, y, query_directions(model, grads, collector.target_info), cfg)
        return rates[0].T, sum(len(g) for g in grads.values())

    return run


def kronfluence_side(model: Any, args: argparse.Namespace, folder: str) -> Callable:
    """kronfluence's pairwise scores without a preconditioner, one example per loss token."""
    import torch
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    tracked = [name for name, m in model.model.named_modules(prefix="model") if isinstance(m, torch.nn.Linear)]
    covered = sum(p.numel() for name in tracked for p in model.get_submodule(name).parameters())

    class TokenLoss(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
            ids, last, targets = batch
            h = model.model(ids).last_hidden_state[torch.arange(len(ids)), last]
            return torch.nn.functional.cross_entropy(model.lm_head(h), targets, reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> Any:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return tracked

    def collate(examples: list[tuple[Any, int]]) -> tuple[Any, Any, Any]:
        ids = [ids if args.whole else ids[:t] for ids, t in examples]
        targets = torch.stack([ids[t] for ids, t in examples])
        return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor([t - 1 for _, t in examples]), targets

    task = TokenLoss()
    analyzer = Analyzer("tokens", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=folder)
    analyzer.fit_all_factors("identity", [], factor_args=FactorArguments(strategy="identity"))

    def run(update: Any, observe: Any) -> tuple[Any, int]:
        (u,), (o,) = ([chi.ids for chi in side] for side in (update, observe))
        train, query = ([(ids, t) for t in range(1, len(ids))] for ids in (u, o))
        examples = max(1, (args.peer_tokens or 8192) // len(u))
        analyzer.compute_pairwise_scores(
            "scores", "identity", query, train, examples, examples, dataloader_kwargs=DataLoaderKwargs(collate_fn=collate),
            score_args=ScoreArguments(query_gradient_accumulation_steps=len(query)), overwrite_output_dir=True,
        )  # fmt: skip
        return analyzer.load_pairwise_scores("scores")["all_modules"], covered

    return run


def side_of(name: str, model: Any, args: argparse.Namespace, scope: str, folder: str) -> Callable:
    """What a side's name stands for."""
    match name.partition("="):
        case ("tangent", _, _):
            return tokdyn_side(model, scope=scope, memory=args.memory << 20)
        case ("naive", _, _):
            return tokdyn_side(model, scope=scope, memory=args.naive_memory << 20, method="naive")
        case ("reduce", _, axis):
            return tokdyn_side(model, scope=scope, reduce=axis)
        case ("bergson", _, _):
            return bergson_side(model, args, folder)
        case ("kronfluence", _, _):
            return kronfluence_side(model, args, folder)
        case _:
            return plain_side(model)


def resident(what: str) -> float:
    """VmRSS (now) or VmHWM (the most since it was reset) of this process in MiB; NaN where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) / 1024
    return math.nan


def work(connection: Any, name: str, size: Size, scope: str, args: argparse.Namespace) -> None:
    """A side's process: warm up, then run when told to, and report seconds, peak, result and parameters."""
    import torch

    torch.set_num_threads(args.threads)
    if name in PEERS:  # progress bars and logs
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(EOFError, BrokenPipeError):  # the parent has gone
        try:
            serve(connection, side_of(name, model_of(size), args, scope, folder), size)
        except Exception:
            connection.send(traceback.format_exc())


def serve(connection: Any, run: Callable, size: Size) -> None:
    run(*texts(size._replace(length=min(8, size.length), batch=1)))
    sides = texts(size)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what the warm-up left behind would hide what is taken anew
    base = resident("VmRSS")
    connection.send("ready")
    while connection.recv():
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark so far
        start, cpu = time.perf_counter(), time.process_time()
        result, parameters = run(*sides)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        peak = resident("VmHWM") - base
        connection.send((seconds, cpu, peak, None if result is None else result.detach().numpy().copy(), parameters))
        del result


class Worker:
    """A side in a process of its own; a context manager."""

    def __init__(self, context: Any, name: str, size: Size, scope: str, args: argparse.Namespace):
        self.name, (self.here, there) = name, context.Pipe()
        self.process = context.Process(target=work, args=(there, name, size, scope, args), daemon=True)
        self.process.start()
        there.close()

    def __enter__(self) -> Worker:
        return self

    def answer(self) -> Any:
        """The next message. Ends the run when the side has failed."""
        try:
            said = self.here.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            raise SystemExit(f"{self.name} ended with code {code}: out of memory? Try a smaller size") from None
        if isinstance(said, str) and said != "ready":
            raise SystemExit(f"{self.name} failed:\n{said}")
        return said

    def once(self) -> Any:
        self.here.send(True)
        return self.answer()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.here.send(False)
        self.process.join(5)
        self.process.terminate()


def measure(context: Any, names: list[str], size: Size, scope: str, args: argparse.Namespace) -> tuple[list[dict], list[Any]]:
    """All sides at one size, taking turns: a row per side, and their results."""
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(context, name, size, scope, args)) for name in names]
        for worker in workers:
            assert worker.answer() == "ready"
        found: dict[str, list[Any]] = {name: [] for name in names}
        for turn in range(args.repeat):
            for worker in workers[:: -1 if turn % 2 else 1]:
                found[worker.name].append(worker.once())
    rows = []
    for name, runs in found.items():
        seconds = [run[0] for run in runs]
        row = dict(side=name, scope="linear" if scope == LINEAR else scope, parameters=runs[0][4], **size._asdict())
        row |= dict(runs=len(runs), median_s=statistics.median(seconds), min_s=min(seconds), max_s=max(seconds))
        row |= dict(cpu_s=statistics.median(run[1] for run in runs), peak_MiB=max(run[2] for run in runs))
        rows.append(row | dict(ratio=None, error=None, seconds=seconds))
    return rows, [runs[-1][3] for runs in found.values()]


def ratio(row: dict, to: dict) -> float:
    """Median over the rounds of row's time / to's time."""
    return statistics.median(a / b for a, b in zip(row["seconds"], to["seconds"], strict=True))


def compare(context: Any, peer: str, size: Size, args: argparse.Namespace) -> tuple[list[dict], str]:
    """Ours beside a peer at one size: two rows and a sentence."""
    import numpy as np

    scope = LINEAR if peer in PEERS else "full"
    rows, (theirs, F) = measure(context, [peer, OURS], size, scope, args)
    if rows[0]["parameters"] != rows[1]["parameters"]:
        raise SystemExit(f"{peer} covers {rows[0]['parameters']} parameters and tokdyn {rows[1]['parameters']}: no comparison")
    error = float(np.linalg.norm(F - theirs) / np.linalg.norm(theirs))
    faster = ratio(*rows)
    less = rows[0]["peak_MiB"] / max(rows[1]["peak_MiB"], 1)
    rows[0]["ratio"], rows[1]["error"] = faster, error
    return rows, (
        f"structured tangents: {faster:.2f}x faster than {peer}, {less:.1f}x less memory, relative error {error:.1e} "
        f"(V={size.vocabulary})"
    )


def reduction(context: Any, size: Size, args: argparse.Namespace) -> tuple[list[dict], str]:
    """Both reductions beside one forward and backward pass of the update: three rows and a sentence."""
    import numpy as np

    rows, (_, onto, by) = measure(context, [PLAIN, "reduce=update", "reduce=observe"], size, "full", args)
    error = float(abs(onto.sum(dtype=np.float64) - by.sum(dtype=np.float64)) / np.abs(onto).sum(dtype=np.float64))
    for row in rows[1:]:
        row["ratio"], row["error"] = ratio(row, rows[0]), error
    costs = " and ".join(f"{row['side']} costs {row['ratio']:.2f}x" for row in rows[1:])
    return rows, f"reductions: {costs} one forward and backward pass of the same {size.batch} x {size.length} tokens"


def exponent(x: list[int], y: list[float]) -> tuple[float, float]:
    """Slope of log y against log x by least squares, and the largest factor between a point and the line."""
    import numpy as np

    a, b = np.log(x), np.log(y)
    fit = np.polyfit(a, b, 1)
    return float(fit[0]), float(np.exp(np.abs(b - np.polyval(fit, a)).max()))


def scaling(context: Any, size: Size, args: argparse.Namespace) -> tuple[list[dict], list[str], dict]:
    """Our cost against length and against width: a row each, what was fitted in words, and as numbers."""
    import numpy as np

    rows, said, fits = [], [], {}
    for axis, symbol, values in (("length", "T", args.lengths), ("width", "d", args.widths)):
        mine = [measure(context, [OURS], size._replace(**{axis: value}), "full", args)[0][0] for value in values]
        rows += mine
        if len(values) > 1:
            power, off = exponent(values, [row["median_s"] for row in mine])
            busy, _ = exponent(values, [row["cpu_s"] for row in mine])
            fits[f"seconds_against_{symbol}"] = dict(exponent=power, largest_factor_off=off, exponent_cpu=busy)
            said.append(
                f"time grows as {symbol}^{power:.2f} (points within {off:.2f}x of the line), "
                f"processor time as {symbol}^{busy:.2f}"
            )
        if axis == "length" and len(values) > 2:
            peak = np.array([row["peak_MiB"] for row in mine])
            slope, start = np.polyfit(values, peak, 1)
            residual = peak - start - slope * np.array(values)
            r2 = 1 - residual.var() / peak.var()
            power, off = exponent(values, list(np.maximum(peak, 1)))
            fits["peak_against_T"] = dict(
                MiB_per_token=float(slope), MiB_at_0=float(start), R2=float(r2), exponent=power, largest_factor_off=off
            )
            said.append(
                f"peak memory at a budget of {args.memory} MiB is {start:.0f} MiB + {slope:.3f} MiB x T (R² {r2:.3f}); "
                f"as a power T^{power:.2f}"
            )
    return rows, said, fits


def machine() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Of everything that takes part; None where it is not installed."""
    found: dict[str, str | None] = dict(python=platform.python_version())
    for name in ("tokdyn", "torch", "transformers", "numpy", *PEERS):
        found[name] = importlib.metadata.version(name) if importlib.util.find_spec(name) else None
    return found


def table(rows: list[dict]) -> str:
    """The rows, aligned."""
    forms = dict(side="", scope="", parameters="", length="", vocabulary="", width="", layers="", batch="", runs="",
                 median_s=".3f", min_s=".3f", max_s=".3f", cpu_s=".3f", peak_MiB=".0f", ratio=".2f", error=".1e")  # fmt: skip
    cells = [list(forms)] + [["-" if row[k] is None else format(row[k], f) for k, f in forms.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("naive", *PEERS, "none"), default="naive", help="the other side")
    parser.add_argument("--reduction", action="store_true", help="also time reduce= against one forward and backward pass")
    parser.add_argument("--scaling", action="store_true", help="also fit cost against --lengths and --widths")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence, one sequence a side")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[2048], help="one size for each")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1, help="sequences a side, for --reduction")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="for --scaling")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512], help="for --scaling")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--memory", type=int, default=832, help="MiB that tokdyn may take for cotangents and tangents")
    parser.add_argument("--naive-memory", type=int, default=12288, help="MiB of gradients that the naive side may keep")
    parser.add_argument("--peer-tokens", type=int, help="tokens in a batch of a peer: 2048 for bergson, 8192 for kronfluence")
    parser.add_argument("--whole", action="store_true", help="do not cut the peers' examples behind their loss token")
    parser.add_argument("--quick", action="store_true", help="a small size, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.quick:
        args.length, args.width, args.layers, args.repeat, args.threads = 24, 64, 2, 2, 1
        args.vocabulary = args.vocabulary[:1]
        args.lengths, args.widths = [8, 16, 32], [32, 64]
    if args.peer in PEERS and importlib.util.find_spec(args.peer) is None:
        missing = f"{args.peer} is not installed: pip install -c constraints.txt -r benchmarks/peers.txt"
        if not args.quick:
            parser.error(missing)
        print(f"{missing}. Only tokdyn's side runs.")
        args.peer = "none"
    return args


def main() -> None:
    """Run what is asked for and print one table."""
    args = arguments()
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    if os.name == "posix":  # import once; every side is a fork of that
        context.set_forkserver_preload(["torch", "tokdyn.testing", "transformers.models.qwen2.modeling_qwen2"])
    sizes = [Size(args.length, V, args.width, args.layers) for V in args.vocabulary]
    about = dict(machine=machine(), threads=args.threads, dtype="float32", versions=versions())
    busy = [os.getloadavg()[0]]
    rows, said, fits = [], [], {}
    if args.peer != "none":
        for size in sizes:
            found, sentence = compare(context, args.peer, size, args)
            rows, said = rows + found, [*said, sentence]
    elif not (args.reduction or args.scaling):
        for size in sizes:
            rows += measure(context, [OURS], size, "full", args)[0]
    if args.reduction:
        for size in sizes:
            found, sentence = reduction(context, size._replace(batch=args.batch), args)
            rows, said = rows + found, [*said, sentence]
    if args.scaling:
        found, sentences, fits = scaling(context, sizes[0], args)
        rows, said = rows + found, said + sentences
    busy.append(os.getloadavg()[0])
    packages = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    print(f"{about['machine']}, {args.threads} threads, float32; load average {busy[0]:.1f} before, {busy[1]:.1f} after")
    print(packages)
    print(table(rows))
    print(*said, sep="\n")
    errors = [row["error"] for row in rows if row["error"] is not None]
    if args.json:
        figures = {side: [row for row in rows if row["side"] == side] for side in dict.fromkeys(row["side"] for row in rows)}
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        about |= dict(settings=settings, load_average=busy, error=max(errors, default=None), figures=figures, fits=fits)
        args.json.write_text(json.dumps(about, indent=1))
    if any(not error < BOUND for error in errors):
        raise SystemExit(f"the sides disagree: relative error {max(errors):.1e}, bound {BOUND:.0e}")


if __name__ == "__main__":
    main()
