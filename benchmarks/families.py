"""Every kind of causal LM in the installed transformers, and every method of PEFT, against one gradient per token.

    python benchmarks/families.py [KIND...] [--json FILE] [--markdown FILE] [--minutes N] [--again]
    python benchmarks/families.py --peft ...

Each kind is built tiny: its own configuration with every size shrunk, two layers of width 32, random weights. A row of the
table is the error of the matrix and of both reductions against method="naive" (relative to the naive matrix, and to the sum of
magnitudes for reductions), the rules that parameters took part by, and the seconds; above the bound, the same in float64. A run
goes on where the last one stopped (`--json` holds what is done) and ends after `--minutes`; kinds that cannot be built, or
fail, are rows with their reason.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))  # where a test loads this file

from tiny_kinds import CannotBuild, V, build, kinds, perturbed, reason  # noqa: E402

import tokdyn as td  # noqa: E402
from tokdyn.testing import float64, random_chis, relative_error  # noqa: E402

BOUND = 1e-5  # float32: tests/exact/test_architectures.py
IN_FLOAT64 = 1e-9  # what a formula leaves that is right: a wrong one is as far off in float64 as in float32
FIGURES = {"matrix": None, "update": 1, "observe": 0}  # with the axis of F that a reduction sums over
SECONDS = 120  # of the processor, for one kind
UPDATE, OBSERVE = random_chis([(5, 3), (2, 4)], seed=1, vocabulary=V), random_chis([(4, 4), (1, 2)], seed=2, vocabulary=V)


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so many seconds of the processor."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s of the processor")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def measured(model: nn.Module) -> dict[str, Any]:
    """A row: errors of the matrix and of both reductions against autograd, how many tensors went by which rule, seconds."""
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    start = time.perf_counter()
    naive = oracle(model)
    row["seconds naive"] = round(time.perf_counter() - start, 2)
    if not bool(naive.isfinite().all()):
        raise ValueError("the naive matrix is not finite")
    row["repeats"] = relative_error(oracle(model), naive)
    start = time.perf_counter()
    row |= errors(model, naive)
    row["seconds"] = round(time.perf_counter() - start, 2)
    if any(isinstance(row[name], float) and row[name] >= BOUND for name in FIGURES):
        with contextlib.suppress(Exception), float64():  # a kind that does not run in it stays marked
            double = copy.deepcopy(model).double()
            truth = oracle(double)
            own = {name: apart(naive if axis is None else naive.sum(axis), truth, axis) for name, axis in FIGURES.items()}
            row["float64"] = {name: x for name, x in errors(double, truth).items() if name in FIGURES} | {"naive": own}
    return row


def oracle(model: nn.Module) -> Tensor:
    """The matrix by one gradient per token."""
    naive = td.forces(model, UPDATE, OBSERVE, method="naive").matrix
    assert naive is not None
    return naive


def apart(found: Tensor, truth: Tensor, axis: int | None) -> float:
    """The error of a matrix relative to its norm, of a reduction to that of the sums of magnitudes."""
    if axis is None:
        return relative_error(found, truth)
    return float((found - truth.sum(axis)).norm() / truth.abs().sum(axis).norm())


def errors(model: nn.Module, truth: Tensor) -> dict[str, Any]:
    """The three figures, or what was raised instead, and the rules of the matrix."""
    found: dict[str, Any] = {}
    for name, axis in FIGURES.items():
        try:
            forces = td.forces(model, UPDATE, OBSERVE, reduce=None if axis is None else name)
            found[name] = apart(forces.matrix if axis is None else forces.vector, truth, axis)
            if axis is None:
                found["rules"] = dict(Counter(rule for rule in forces.coverage.values() if rule != "frozen"))
        except Exception as error:
            found[name] = reason(error)
    return found


def is_rounding(row: dict[str, Any], name: str) -> bool:
    """Whether a figure above the bound is float32's doing: the formula is right in float64, and no two results that are as far
    from that one as naive's own lie further apart (the triangle inequality)."""
    of = row.get("float64", {})
    value = of.get(name)
    return isinstance(value, float) and value < IN_FLOAT64 and row[name] <= 2 * of["naive"][name]


def is_right(row: dict[str, Any]) -> bool:
    """Whether all three figures are there and below the bound, or above it by float32's rounding alone."""
    return all(isinstance(row.get(name), float) and (row[name] < BOUND or is_rounding(row, name)) for name in FIGURES)


def row_of(name: str, make: Any) -> dict[str, Any]:
    """The row of one kind or method; what is raised is part of it."""
    try:
        with at_most(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return measured(make(name))
    except CannotBuild as error:
        return {"not built": str(error)}
    except Exception as error:
        return {"failed": reason(error)}


def drawn(day: date, count: int = 12) -> list[str]:
    """So many kinds for a day: all of them come up as days go by."""
    every = list(kinds())
    start = day.toordinal() * count
    return [every[(start + i) % len(every)] for i in range(count)]


# ------------------------------------------------------------------------------------------------------------ PEFT


def methods() -> dict[str, Any]:
    """PEFT's methods by name, each a function that adapts a model."""
    import peft

    both, mlp = ["q_proj", "v_proj"], ["down_proj"]
    lora = dict(r=4, lora_alpha=8, target_modules="all-linear")
    plain = dict(target_modules=both + mlp)
    prompts = dict(num_virtual_tokens=3)
    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "LoRA": ("LoraConfig", lora), "rsLoRA": ("LoraConfig", lora | dict(use_rslora=True)),
        "DoRA": ("LoraConfig", lora | dict(use_dora=True)), "LoRA bias": ("LoraConfig", lora | dict(bias="all",
            lora_bias=True)),
        "LoRA on embeddings": ("LoraConfig", dict(r=4, target_modules=["embed_tokens", *both])),
        "LoRA modules_to_save": ("LoraConfig", dict(r=4, target_modules=both, modules_to_save=["down_proj"])),
        "LoRA token indices": ("LoraConfig", dict(r=4, target_modules=both, trainable_token_indices=[3, 5])),
        "PiSSA": ("LoraConfig", lora | dict(init_lora_weights="pissa")),
        "AdaLoRA": ("AdaLoraConfig", plain | dict(init_r=4, target_r=2, total_step=10)),
        "LoHa": ("LoHaConfig", plain | dict(r=4)), "LoKr": ("LoKrConfig", plain | dict(r=4)),
        "IA3": ("IA3Config", dict(target_modules=[*both, "down_proj"], feedforward_modules=["down_proj"])),
        "VeRA": ("VeraConfig", dict(target_modules=both, r=4)), "RandLoRA": ("RandLoraConfig", dict(target_modules=both, r=4)),
        "OFT": ("OFTConfig", plain | dict(oft_block_size=4)), "BOFT": ("BOFTConfig", plain | dict(boft_block_size=4)),
        "HRA": ("HRAConfig", plain | dict(r=4)), "FourierFT": ("FourierFTConfig", plain | dict(n_frequency=10)),
        "LN tuning": ("LNTuningConfig", dict(target_modules=["input_layernorm", "norm"])),
        "VB-LoRA": ("VBLoRAConfig", plain | dict(r=2, num_vectors=8, vector_length=8, topk=2)),
        "MiSS": ("MissConfig", plain | dict(r=4)), "ROAD": ("RoadConfig", plain | dict(group_size=8)),
        "C3A": ("C3AConfig", plain | dict(block_size=8)), "SHiRA": ("ShiraConfig", plain | dict(r=2)),
        "HiRA": ("HiraConfig", plain | dict(r=4)), "WaveFT": ("WaveFTConfig", plain | dict(n_frequency=10)),
        "DeLoRA": ("DeloraConfig", plain | dict(r=4)), "GraLoRA": ("GraloraConfig", plain | dict(r=4, gralora_k=2)),
        "OSF": ("OSFConfig", plain | dict(effective_rank=4)), "PSOFT": ("PsoftConfig", plain | dict(r=4)),
        "TinyLoRA": ("TinyLoraConfig", plain | dict(r=2)), "trainable tokens": ("TrainableTokensConfig",
            dict(token_indices=[3, 5], target_modules=["embed_tokens"])),
        "prompt tuning": ("PromptTuningConfig", prompts), "P-tuning": ("PromptEncoderConfig",
            prompts | dict(encoder_hidden_size=16)),
        "prefix tuning": ("PrefixTuningConfig", prompts), "adaption prompt": ("AdaptionPromptConfig", dict(adapter_len=3,
            adapter_layers=1)),
        "CPT": ("CPTConfig", dict(cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4])),
    }  # fmt: skip

    def adapt(name: str) -> nn.Module:
        kind, options = configs[name]
        if not hasattr(peft, kind):
            raise CannotBuild(f"peft {peft.__version__} has no {kind}")
        model = build("llama")
        try:
            return perturbed(peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **options)).eval())
        except Exception as error:
            raise CannotBuild(reason(error)) from error

    return dict.fromkeys(configs, adapt)


# ------------------------------------------------------------------------------------------------------------ the table


def figure(value: Any, row: dict[str, Any] | None = None, name: str = "") -> str:
    """A figure, in bold where it is wrong, with those of float64 where it is rounding; what was raised as it is."""
    if isinstance(value, float) and value >= BOUND and row is not None and is_rounding(row, name):
        of = row["float64"]
        return f"{value:.1e} (in float64 {of[name]:.0e}; naive float32 is {of['naive'][name]:.1e} from it)"
    if isinstance(value, float):
        return f"{value:.1e}" if value < BOUND else f"**{value:.1e}**"
    return "" if value is None else f"**{value}**".replace("|", "\\|")


def rules_of(row: dict[str, Any]) -> str:
    """How many tensors went by which rule."""
    return ", ".join(f"{n} {rule}" for rule, n in sorted(row.get("rules", {}).items(), key=lambda x: -x[1])).replace("|", "\\|")


def table(rows: dict[str, dict[str, Any]], what: str) -> list[str]:
    """The rows as Markdown: those that ran, then those that did not."""
    ran = {name: row for name, row in rows.items() if "seconds naive" in row}
    lines = [
        f'| {what} | matrix | reduce="update" | reduce="observe" | tensors by rule | s, naive | s, all three |',
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in ran.items():
        figures = " | ".join(figure(row.get(x), row, x) for x in FIGURES)
        noisy = f" (does not repeat itself: {row['repeats']:.0e})" if row.get("repeats", 0) > BOUND else ""
        lines.append(f"| {name}{noisy} | {figures} | {rules_of(row)} | {row['seconds naive']} | {row['seconds']} |")
    for title, key in (("Fails, also with one gradient per token:", "failed"), ("Not built tiny:", "not built")):
        some = {name: row[key] for name, row in rows.items() if key in row}
        if some:
            lines += ["", title, "", f"| {what} | reason |", "|---|---|"]
            lines += [f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in some.items()]
    return lines


def markdown(found: dict[str, Any]) -> str:
    """docs/families.md from what a run left."""
    families, adapters = found.get("kinds", {}), found.get("peft", {})
    right = sum(map(is_right, families.values()))
    ran = sum("seconds naive" in row for row in families.values())
    of, trees = (
        found["versions"],
        Counter(row.get("commit", "earlier ones") for row in [*families.values(), *adapters.values()]),
    )
    measured = "Rows were measured on commit " + ", ".join(f"{tree} ({n})" for tree, n in trees.most_common()) + "."
    text = f"""# Families and adapters

Written by `make sweep` (benchmarks/families.py) from benchmarks/results/families.json; not by hand. transformers
{of["transformers"]}, PEFT {of["peft"]}, torch {of["torch"]}, float32 on a CPU.

Each row is a random model of two layers and width 32: the error of `td.forces` against `method="naive"`, one autograd gradient
per token, relative to the norm of the matrix, of a reduction relative to the sums of magnitudes. **Bold is wrong**, or what was
raised. The bound is {BOUND:.0e}, as in tests/exact/test_architectures.py. "One direction per token" is exact, and slower.

What is known of the bold ones: models that are not causal (CPM-Ant, XLNet), or whose backward pass is not the derivative of
their forward pass (HRM runs cycles without gradients), are refused by name. Above the bound by rounding alone is
what is below {IN_FLOAT64:.0e} in float64 and no further from the naive matrix than twice what lies between that and float64's:
two results as good as it may lie that far apart (RandLoRA, scaled by 160 as PEFT has it, saturates its attention).
AXK2, GLM-MoE-DSA and HY-V4 have two index heads here, so that many of the scores that they take the largest of are equal:
which is taken depends on the length of a text, so each of their texts stands alone. {measured}

{len(families)} kinds of {len(kinds())} were tried: {ran} ran, {right} of them with all three figures right;
{len(families) - ran} did not run.

## Kinds of causal LM
"""
    lines = [text, *table(families, "kind"), "", "## Methods of PEFT", ""]
    lines += ["On a Llama, away from the adapter's start.", "", *table(adapters, "method"), ""]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """What the figures are of."""
    import peft
    import transformers

    return {
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "torch": str(torch.__version__).partition("+")[0],
    }


def commit() -> str:
    """The commit that a row is measured on, with a + where files differ from it; "" outside a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() if done.returncode == 0 else ""

    return git("rev-parse", "--short=7", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no", "../tokdyn"))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="families.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/families.json"))
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--peft", action="store_true", help="PEFT's methods instead of kinds")
    parser.add_argument("--again", action="store_true", help="also what is in the file already, and was right")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    found = json.loads(options.json.read_text()) if options.json.exists() else {}
    found["versions"] = versions()
    rows = found.setdefault("peft" if options.peft else "kinds", {})
    make = methods() if options.peft else dict.fromkeys(kinds(), build)
    end, tree = time.monotonic() + 60 * options.minutes, commit()
    for name in options.names or make:
        if time.monotonic() > end:
            print("out of time: run it again to go on")
            break
        if name in rows and not options.again and not options.names:
            continue
        rows[name] = row_of(name, make[name]) | {"commit": tree}
        print(name, rows[name], flush=True)
        found["peft" if options.peft else "kinds"] = {key: rows[key] for key in make if key in rows}
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(found))


if __name__ == "__main__":
    main()
