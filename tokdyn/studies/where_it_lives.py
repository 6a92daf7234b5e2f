"""Which layers and kinds of parameters carry the force of one prompt's tokens on another's, and how much of it is the readout?

Estimates that use hidden states alone, NTHR (Deng et al., arXiv 2505.18830) and CHES (Razin et al., arXiv 2410.08847), take
the readout's force for the whole one. The exact force is a sum over layers and over kinds of parameters, so that the
assumption can be weighed: the share of a part is <F_p, F>/<F, F> over all tokens of a prompt and the tokens of other prompts
that push them. The shares add up to one. At random weights, as the demo model is shipped, and after SFT on the very answers.

Asserted: parts add up to the whole. Measured, over seeds with texts and random weights of their own: shares by layer and
kind, whether training moves them, and how often the readout's force has the whole one's sign.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokdyn as td

from ..runs.explain import group
from . import texts, training
from .answers import Row, column, matrix, over
from .figures import COLOURS, figure
from .parts import Keep, unkept
from .result import Claim, Estimate, Result, above, below, both, told

NTHR, CHES = "arXiv 2505.18830", "arXiv 2410.08847"
STAGES = RANDOM, SHIPPED, TUNED = "random", "as shipped", "after SFT"
STEADY = 0.1  # change of a share that counts as none


def run(
    quick: bool = False, seed: int = 0, model: str = "demo", data: str | Path | None = None, keep: Keep = unkept,
    runs: int | None = None,
) -> Result:  # fmt: skip
    """Shares of the force between prompts by layer and kind, at three stages of training.

    Args:
        quick: one seed of 3 prompts; else five seeds of 8.
        seed: of the first run.
        model: a folder or a hub name.
        data: texts instead of the shipped pairs (`texts.pairs`).
        keep: where finished seeds are kept (`parts`).
        runs: how many, each with a seed of its own; as above when absent.
    """
    seeds = range(seed, seed + (runs or (1 if quick else 5)))
    return conclude(texts.of_seeds(_seed, model, data, quick, seeds, keep))


def _seed(model: Any, tokenizer: Any, rows: list[texts.Row], quick: bool, seed: int) -> list[Row]:
    """A row for each stage and observed prompt."""
    chis = texts.chis(tokenizer, texts.drawn(rows, 3 if quick else 8, seed), "chosen")
    torch.manual_seed(seed)
    fresh, tuned = type(model)(copy.deepcopy(model.config)).to(next(model.parameters()).dtype).eval(), copy.deepcopy(model)
    training.sft(tuned, chis, epochs=4 if quick else 8, lr=2e-4, seed=seed)
    stages = zip(STAGES, (fresh, model, tuned), strict=True)
    return [{"seed": seed, "stage": stage} | row for stage, at in stages for row in _shares(at, chis)]


def _shares(model: Any, chis: list[td.Chi]) -> list[Row]:
    """A row for each observed prompt: every part's share of the force of other prompts' tokens on it."""
    parts: dict[str, Tensor] = {}
    for by in ("layer", "kind"):
        found = td.forces(model, chis, chis, td.objectives.SFT(), by=by)
        assert found.parts is not None
        parts |= {f"{by} {name}": torch.as_tensor(part).double() for name, part in found.parts.items()}
    F, sequence = matrix(td.forces(model, chis, chis, td.objectives.SFT())), column(found.observed, "sequence")
    gap = max(
        float((sum((part for key, part in parts.items() if key.startswith(by)), -F)).norm() / F.norm())
        for by in ("layer", "kind")
    )
    readout, rows = parts["kind readout"], []
    for prompt in sequence.unique():
        here = (sequence == prompt)[:, None] & (sequence != prompt)
        share = {name: float((part[here] * F[here]).sum() / F[here].square().sum()) for name, part in parts.items()}
        rows.append({"prompt": int(prompt), "gap": gap, "sign": td.sign_delta(readout[here], F[here])} | share)
    return rows


def conclude(rows: list[Row]) -> Result:
    """The study's claims and figure, from a row for each seed, stage and observed prompt."""
    import pyarrow as pa

    kinds = list(dict.fromkeys(group(key.removeprefix("kind ")) for key in rows[0] if key.startswith("kind ")))
    for row in rows:
        row |= {f"group {name}": sum(share for key, share in row.items() if key.startswith("kind ")
                                     and group(key.removeprefix("kind ")) == name) for name in kinds}  # fmt: skip
    of = {stage: [row for row in rows if row["stage"] == stage] for stage in STAGES}
    readout, sign = ({stage: over(some, key) for stage, some in of.items()} for key in ("kind readout", "sign"))
    gap = max(row["gap"] for row in rows)
    most = sorted(kinds, key=lambda name: -over(of[SHIPPED], f"group {name}").mean)[:3]
    named = ", ".join(f"{name} {100 * over(of[SHIPPED], f'group {name}').mean:.0f}%" for name in most)
    return Result(
        f"The readout carries {100 * readout[SHIPPED].mean:.0f}% of the force between prompts; most is carried by {named}",
        [
            Claim(
                "The exact force is the sum over layers, and over kinds of parameters (identity; docs/explain.md)",
                "‖F - Σ F_p‖ / ‖F‖ = 0 up to float32 rounding",
                f"at most {gap:.1e} at {len(rows)} prompts and stages",
                told(gap < 1e-4),
            ),
            Claim(
                f"The readout carries the force between prompts (assumed by NTHR, {NTHR}, and CHES, {CHES})",
                "its share of the exact force is above one half at every stage, its interval too",
                _each(readout),
                both(*(above(value, 0.5) for value in readout.values())),
            ),
            Claim(
                f"and its sign tells the sign of the whole (assumed by NTHR, {NTHR})",
                "share of token pairs of different prompts with the same sign above 0.75 at every stage, its interval too",
                _each(sign),
                both(*(above(value, 0.75) for value in sign.values())),
            ),
            _steady(of, kinds),
        ],
        {"shares": pa.Table.from_pylist(rows)},
        {"where_it_lives": _figure(of, kinds)},
        notes="Shares as shipped, by kind: " + "; ".join(_words(of[SHIPPED], "kind ")) + ". By layer: "
        + "; ".join(_words(of[SHIPPED], "layer ")) + ".",
    )  # fmt: skip


def _steady(of: dict[str, list[Row]], kinds: list[str]) -> Claim:
    """Whether fine-tuning moves the share of a kind of parameters."""
    moved = {name: _moved(of, f"group {name}") for name in kinds}
    return Claim(
        "Fine-tuning leaves the force where it was: a share measured before it stands after it (an estimate's calibration)",
        f"share of every kind after SFT minus as shipped within {STEADY} of 0, intervals too",
        _each(moved),
        both(*(both(above(value, -STEADY), below(value, STEADY)) for value in moved.values())),
    )


def _moved(of: dict[str, list[Row]], key: str) -> Estimate:
    """Change of a share in SFT, over seeds or over the prompts of one."""
    pairs = zip(of[SHIPPED], of[TUNED], strict=True)
    return over([{"seed": before["seed"], "x": after[key] - before[key]} for before, after in pairs], "x")


def _each(values: dict[str, Estimate]) -> str:
    return "; ".join(f"{name} {value.words()}" for name, value in values.items())


def _words(rows: list[Row], prefix: str) -> list[str]:
    names = [key for key in rows[0] if key.startswith(prefix)]
    return [f"{key.removeprefix(prefix)} {100 * over(rows, key).mean:.0f}%" for key in names]


def _figure(of: dict[str, list[Row]], kinds: list[str]) -> Any:
    made, axes = figure(1, 2, title="Where the force between prompts lives", height=3.6)
    layers = [key for key in of[SHIPPED][0] if key.startswith("layer ")]
    for axis, keys in zip(axes, (layers, [f"group {name}" for name in kinds]), strict=True):
        names = [key.partition(" ")[2] for key in keys]
        for k, (stage, rows) in enumerate(of.items()):
            values = [over(rows, key) for key in keys]
            axis.errorbar(names, [100 * value.mean for value in values], yerr=[100 * value.half for value in values],
                          fmt="o-", color=COLOURS[k], label=stage, capsize=2)  # fmt: skip
        axis.set(xlabel="part of the model", ylabel="share of the exact force (%)")
        axis.tick_params(axis="x", rotation=30)
    axes[0].set_title("by layer")
    axes[1].set_title("by kind")
    axes[0].legend()
    return made
