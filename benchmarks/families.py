"""Every kind of causal LM in the installed transformers, and every method of PEFT, against one gradient per token.

    python benchmarks/families.py [KIND...] [--json FILE] [--markdown FILE] [--minutes N] [--again]
    python benchmarks/families.py --peft ...

Each kind is built tiny: its own configuration with every size shrunk, two layers of width 32, random weights. A row of the
table is the error of the matrix and of both reductions against method="naive" (relative to the naive matrix, and to the sum of
magnitudes for reductions), the rules that parameters took part by, and the seconds. A run goes on where the last one stopped
(`--json` holds what is done) and ends after `--minutes`; kinds that cannot be built, or fail, are rows with their reason.
"""

from __future__ import annotations

import argparse
import contextlib
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
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # where a test loads this file

from tiny_kinds import CannotBuild, V, build, kinds, perturbed, reason  # noqa: E402

import tokdyn as td  # noqa: E402
from tokdyn.testing import random_chis, relative_error  # noqa: E402

BOUND = 1e-5  # float32: tests/exact/test_architectures.py
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
    naive = td.forces(model, UPDATE, OBSERVE, method="naive").matrix
    assert naive is not None
    row["seconds naive"] = round(time.perf_counter() - start, 2)
    if not bool(naive.isfinite().all()):
        raise ValueError("the naive matrix is not finite")
    again = td.forces(model, UPDATE, OBSERVE, method="naive").matrix
    assert again is not None
    row["repeats"] = relative_error(again, naive)
    start = time.perf_counter()
    try:
        fast = td.forces(model, UPDATE, OBSERVE)
        row["matrix"] = relative_error(fast.matrix, naive)
        row["rules"] = dict(Counter(rule for rule in fast.coverage.values() if rule != "frozen"))
    except Exception as error:
        row["matrix"] = reason(error)
    for reduce, axis in (("update", 1), ("observe", 0)):
        try:
            vector = td.forces(model, UPDATE, OBSERVE, reduce=reduce).vector
            row[reduce] = float((vector - naive.sum(axis)).norm() / naive.abs().sum(axis).norm())
        except Exception as error:
            row[reduce] = reason(error)
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def is_right(row: dict[str, Any]) -> bool:
    """Whether all three figures are there and below the bound."""
    return all(isinstance(row.get(name), float) and row[name] < BOUND for name in ("matrix", "update", "observe"))


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


def figure(value: Any) -> str:
    """A figure, in bold where it is wrong; what was raised as it is."""
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
        figures = " | ".join(figure(row.get(x)) for x in ("matrix", "update", "observe"))
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
their forward pass (HRM runs cycles without gradients), are refused by name. RandLoRA may miss the bound by
rounding (1e-13 in float64), SHiRA by finite differences. AXK2, GLM-MoE-DSA and HY-V4 have two index heads here, so that many of
the scores that they take the largest of are equal: which is taken depends on the length of a text, so each of their texts
stands alone. {measured}

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
