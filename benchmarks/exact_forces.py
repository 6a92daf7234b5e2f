"""The exact force matrix by structured tangents beside other ways to the same numbers, in one run.

    python benchmarks/exact_forces.py                                     one gradient per token per side and their Gram matrix
    python benchmarks/exact_forces.py --vocabulary 2048 32768             the same, for two vocabularies
    python benchmarks/exact_forces.py --peer bergson                      its token_influence="output" (peers.txt)
    python benchmarks/exact_forces.py --peer kronfluence                  its pairwise scores, identity strategy (peers.txt)
    python benchmarks/exact_forces.py --peer none --reduction --batch 8   reduce= against one forward and backward pass
    python benchmarks/exact_forces.py --peer none --by layer kind         the matrix in parts against the plain one
    python benchmarks/exact_forces.py --peer none --scaling               cost against length and width, memory against length
    python benchmarks/exact_forces.py --pairs 2 4 8 16 32 64             cost against the number of pairs
    python benchmarks/exact_forces.py --shape pairs wide small experts   the shapes of exact_forces_shapes.py, one or several
    python benchmarks/exact_forces.py --quick [...]                       any of these at a small size, to see that it runs

Qwen2 shape, tied, random weights, float32, on the CPU. Every side runs in a process of its own; after a warm-up of eight tokens
they take turns, in the opposite order every other round. peak_MiB is the high-water mark of a side's resident memory above
what it held after its warm-up, cpu_s the processor time of all its threads. `ratio` is the median over rounds of a side's
time over ours, for a reduction of its time over the plain pass's, for parts of theirs over the plain matrix's, so that a
machine that slows down slows both; cpu_ratio is that of processor time. `error` is
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
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
from pathlib import Path
from typing import Any

from exact_forces_processes import measure, ratio
from exact_forces_shapes import SHAPES, Shape, profiled
from exact_forces_shapes import compare as compare_shape
from exact_forces_sides import LINEAR, OURS, PEERS, PLAIN, Size

BOUND = 1e-5


def compare(context: Any, peer: str, size: Size, args: argparse.Namespace) -> tuple[list[dict], str]:
    """Measure ours beside a peer at one size: two rows and a sentence."""
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
    """Measure both reductions beside one forward and backward pass of the update: three rows and a sentence."""
    import numpy as np

    rows, (_, onto, by) = measure(context, [PLAIN, "reduce=update", "reduce=observe"], size, "full", args)
    error = float(abs(onto.sum(dtype=np.float64) - by.sum(dtype=np.float64)) / np.abs(onto).sum(dtype=np.float64))
    for row in rows[1:]:
        row["ratio"], row["error"] = ratio(row, rows[0]), error
        row["cpu_ratio"] = row["cpu_s"] / rows[0]["cpu_s"]
    costs = " and ".join(
        f"{row['side']} costs {row['ratio']:.2f}x ({row['cpu_ratio']:.2f}x of processor time)" for row in rows[1:]
    )
    return rows, f"reductions: {costs} one forward and backward pass of the same {size.batch} x {size.length} tokens"


def parts(context: Any, size: Size, args: argparse.Namespace) -> tuple[list[dict], str]:
    """Measure the matrix in parts beside the plain one: a row each and a sentence."""
    import numpy as np

    rows, (whole, *divided) = measure(context, [OURS, *(f"by={name}" for name in args.by)], size, "full", args)
    for row, F in zip(rows[1:], divided, strict=True):
        row["ratio"], row["error"] = ratio(row, rows[0]), float(np.linalg.norm(F - whole) / np.linalg.norm(whole))
        row["cpu_ratio"] = row["cpu_s"] / rows[0]["cpu_s"]
    costs = " and ".join(
        f"{row['side']} costs {row['ratio']:.2f}x ({row['cpu_ratio']:.2f}x of processor time)" for row in rows[1:]
    )
    return rows, f"parts: {costs} the plain matrix (T={size.length}, V={size.vocabulary})"


def exponent(x: list[int], y: list[float]) -> tuple[float, float]:
    """Slope of log y against log x by least squares, and the largest factor between a point and the line."""
    import numpy as np

    a, b = np.log(x), np.log(y)
    fit = np.polyfit(a, b, 1)
    return float(fit[0]), float(np.exp(np.abs(b - np.polyval(fit, a)).max()))


def scaling(context: Any, size: Size, args: argparse.Namespace) -> tuple[list[dict], list[str], dict]:
    """Measure ours at several lengths and widths: a row each, the fitted exponents in words, and as numbers."""
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


def against_pairs(context: Any, args: argparse.Namespace) -> tuple[list[dict], list[str], dict]:
    """Measure the matrix, its columns summed by sequence, and a reduction at several numbers of pairs, in processor time."""
    sides, rows, said, fits = [OURS, "groups=sequence", "reduce=update"], [], [], {}
    for pairs in args.pairs:
        shape = Shape("pairs", 30, 18, 2 * pairs, args.width, layers=args.layers, vocabulary=args.vocabulary[0], shared=6)
        rows += measure(context, sides, shape, "full", args)[0]
    for side in sides:
        taken = [row["cpu_s"] for row in rows if row["side"] == side]
        costs = ", ".join(f"{pairs}: {seconds:.2f} s" for pairs, seconds in zip(args.pairs, taken, strict=True))
        said.append(f"{side}, pairs a side: {costs}")
        if len(args.pairs) > 1:
            power, off = exponent(args.pairs, taken)
            fits[f"{side} against pairs"] = dict(exponent=power, largest_factor_off=off)
            said[-1] += f"; grows as pairs^{power:.2f} (points within {off:.2f}x of the line)"
    return rows, said, fits


def machine() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def simd() -> str:
    """The vector instructions that torch's own kernels take here."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


def versions() -> dict[str, str | None]:
    """Versions of Python and the compared packages; None for one that is not installed."""
    found: dict[str, str | None] = dict(python=platform.python_version())
    for name in ("tokdyn", "torch", "transformers", "numpy", *PEERS):
        found[name] = importlib.metadata.version(name) if importlib.util.find_spec(name) else None
    return found


def table(rows: list[dict]) -> str:
    """The rows as text with aligned columns; "-" for what a row does not have."""
    forms = dict(shape="", side="", scope="", parameters="", length="", vocabulary="", width="", layers="", batch="", runs="",
                 median_s=".3f", min_s=".3f", max_s=".3f", cpu_s=".3f", peak_MiB=".0f", ratio=".2f", cpu_ratio=".2f",
                 error=".1e", share=".0%")  # fmt: skip
    forms = {key: form for key, form in forms.items() if any(key in row for row in rows)}
    cells = [list(forms)] + [["-" if row.get(k) is None else format(row[k], f) for k, f in forms.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("naive", *PEERS, "none"), default="naive", help="the other side")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=[], help="these shapes, and nothing else")
    parser.add_argument("--profile", action="store_true", help="also say in which parts the time of a --shape goes")
    parser.add_argument("--pairs", type=int, nargs="+", default=[], help="these numbers of pairs, and nothing else")
    parser.add_argument("--reduction", action="store_true", help="also time reduce= against one forward and backward pass")
    parser.add_argument("--by", nargs="+", choices=("layer", "kind", "module"), default=[], help="also time these parts")
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
        args.length, args.width, args.layers, args.repeat, args.threads = 24, 64, 2, 1, 1
        args.vocabulary = args.vocabulary[:1]
        args.lengths, args.widths, args.pairs = [8, 16, 32], [32, 64], args.pairs[:2]
    if args.peer in PEERS and importlib.util.find_spec(args.peer) is None:
        missing = f"{args.peer} is not installed: pip install -c constraints.txt -r benchmarks/peers.txt"
        if not args.quick:
            parser.error(missing)
        print(f"{missing}. Only tokdyn's side runs.")
        args.peer = "none"
    return args


def measured(context: Any, args: argparse.Namespace) -> tuple[list[dict], list[str], dict]:
    """Everything that the options ask for: rows, a sentence for each comparison, and fitted exponents."""
    rows, said, fits = [], [], {}
    if args.shape:
        shapes = [shape for name in args.shape for shape in SHAPES[name]]
        for shape in dict.fromkeys(shape.quick() for shape in shapes) if args.quick else shapes:
            found, sentence = compare_shape(context, shape, args)
            print(sentence, flush=True)  # as it comes: all of them take minutes
            rows += found
            if args.profile and isinstance(shape, Shape):
                said.append(profiled(shape, args))
        return rows, said, fits
    if args.pairs:
        return against_pairs(context, args)
    sizes = [Size(args.length, V, args.width, args.layers) for V in args.vocabulary]
    if args.peer != "none":
        for size in sizes:
            found, sentence = compare(context, args.peer, size, args)
            rows, said = rows + found, [*said, sentence]
    elif not (args.reduction or args.scaling or args.by):
        for size in sizes:
            rows += measure(context, [OURS], size, "full", args)[0]
    if args.by:
        for size in sizes:
            found, sentence = parts(context, size, args)
            rows, said = rows + found, [*said, sentence]
    if args.reduction:
        for size in sizes:
            found, sentence = reduction(context, size._replace(batch=args.batch), args)
            rows, said = rows + found, [*said, sentence]
    if args.scaling:
        found, sentences, fits = scaling(context, sizes[0], args)
        rows, said = rows + found, said + sentences
    return rows, said, fits


def main() -> None:
    """Run what is asked for and print one table."""
    args = arguments()
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    if os.name == "posix":  # import once; every side is a fork of that
        context.set_forkserver_preload(["torch", "tokdyn.testing", "transformers.models.qwen2.modeling_qwen2"])
    about = dict(machine=machine(), simd=simd(), threads=args.threads, dtype="float32", versions=versions())
    busy = [os.getloadavg()[0]]
    rows, said, fits = measured(context, args)
    busy.append(os.getloadavg()[0])
    packages = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    print(f"{about['machine']}, {about['simd']}, {args.threads} threads, float32")
    print(f"load average {busy[0]:.1f} before, {busy[1]:.1f} after")
    print(packages)
    print(table(rows))
    print(*said, sep="\n")
    errors = [row["error"] for row in rows if row["error"] is not None]
    if args.json:
        figures = {side: [row for row in rows if row["side"] == side] for side in dict.fromkeys(row["side"] for row in rows)}
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        about |= dict(
            settings=settings, said=said, load_average=busy, error=max(errors, default=None), figures=figures, fits=fits
        )
        args.json.write_text(json.dumps(about, indent=1))
    if any(not error < BOUND for error in errors):
        raise SystemExit(f"the sides disagree: relative error {max(errors):.1e}, bound {BOUND:.0e}")


if __name__ == "__main__":
    main()
