"""How well the cheap estimates predict the exact force over all parameters, and the real change: by layer and training stage.

The literature looks at forces through estimates that need forward passes only: the readout's force (h·h)<g,g>, its sum over a
correct answer NTHR (Deng et al., arXiv 2505.18830, §4), CHES, the same without <g,g> (Razin et al., arXiv 2410.08847, §4.2),
and CH2, which puts hidden states of all layers in place of the backbone's kernel (Ren, Deng, Hong, Lyle, Gal, 2026). Each
rests on an assumption about what moves. Here they are set against F = <∇ log pi(y_m), -∇L_l> over ALL parameters, layer by
layer, and against real steps; no paper reports this.

Identity, asserted: the layers' exact forces add up to the whole. Measured, with intervals over prompts and pairs (one of them
left out at a time): that the exact force predicts a real step of 0.2 nats nearly perfectly and better than any estimate, and
everything about the estimates.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokdyn as td

from ..exact.groups import group_labels
from ..loading import load_model
from ..objectives import Objective
from . import texts, training
from .figures import COLOURS, GREY, figure
from .parts import Keep, unkept
from .result import Claim, Estimate, Result, above, both, estimate, jackknife, told

ESTIMATES = ("readout", "ch2", "readout + ch2")
PREDICTORS = ("exact", "readout", "ch2", "-CHES", "-CHES, length-normalised")
MORE = "ch2 minus readout"
SMALL, LARGE = 0.2, 4.0  # nats that the step moves the token it moves most, to first order


def run(quick: bool = False, seed: int = 0, model: str = "demo", data: str | Path | None = None, keep: Keep = unkept) -> Result:
    """Estimates against exact forces: between tokens, over pairs, and (full form) between sentences of 1,000-token dialogues.

    Args:
        quick: one stage, few tokens, 8 pairs and small steps only.
        seed: of the texts, and of the training that makes the later stages.
        model: a folder or a hub name.
        data: texts instead of the shipped pairs (`texts.pairs`).
        keep: where finished stages are kept (`parts`).
    """
    start, tokenizer = load_model(model)
    rows = texts.drawn(texts.pairs(data, tokenizer=tokenizer, longest=128), 64, seed)
    stages = _stages(start, tokenizer, rows, seed, quick)
    parts = {
        name: keep(name.replace(" ", "-"), partial(_stage, staged, tokenizer, rows, quick)) for name, staged in stages.items()
    }
    tables: dict[str, list[dict[str, Any]]] = {}
    for name, part in parts.items():
        for key, table in part["tables"].items():
            tables.setdefault(key, []).extend({"stage": name} | row for row in table)
    return conclude(tables, max(part["gap"] for part in parts.values()))


def _stage(model: Any, tokenizer: Any, rows: list[texts.Row], quick: bool) -> dict[str, Any]:
    """All tables of one stage, and how far the layers' forces are from the whole."""
    short = sorted(rows, key=lambda row: len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]))
    tokens, layers, gap = _tokens(model, tokenizer, short[: 2 if quick else 7])
    pairs, scores = _pairs(model, tokenizer, rows[: 8 if quick else 40], ("small",) if quick else ("small", "large"))
    tables = {"tokens": tokens, "layers": layers, "pairs": pairs, "nthr": scores}
    return {"tables": tables if quick else tables | {"sentences": _sentences(model, tokenizer, rows)}, "gap": gap}


def conclude(tables: dict[str, list[dict[str, Any]]], gap: float) -> Result:
    """The claims and figure, from one row for each token estimate, layer, pair, NTHR score and sentence estimate of a stage.

    `gap` is ‖F - Σ F_layer‖ / ‖F‖, the largest over stages.
    """
    import pyarrow as pa

    by_token, by_layer, by_pair, by_nthr = (tables[name] for name in ("tokens", "layers", "pairs", "nthr"))
    stages = list(dict.fromkeys(row["stage"] for row in by_token))
    small = {(stage, key): _rank(by_pair, stage, key, "real_small") for stage in stages for key in PREDICTORS}
    own = [small[stage, "readout"].mean for stage in stages]
    spread = sorted(_of(by_token, stage, "readout").mean for stage in stages)
    return Result(
        f"The readout ranks a pair's own step with correlation {min(own):.2f} or more, but the forces between prompts with "
        f"{spread[0]:.2f} to {spread[-1]:.2f} only",
        [*_of_exact(by_pair, small, gap), _of_nthr(by_nthr, stages), *_of_ches(by_pair, small), *_of_tokens(by_token, stages)],
        {name: pa.Table.from_pylist(table) for name, table in tables.items()},
        {"readout_vs_exact": _figure(by_token, by_layer, small, stages)},
        notes=_notes(by_layer, tables.get("sentences", []), stages),
    )


def _of_exact(by_pair: list[dict[str, Any]], small: dict[tuple[str, str], Estimate], gap: float) -> list[Claim]:
    """Claims about the exact force itself; `small` is {(stage, predictor): rank correlation with the real change}."""
    stages = list(dict.fromkeys(stage for stage, _ in small))
    better = {stage: _rank(by_pair, stage, "exact", "real_small", less="readout") for stage in stages}
    return [
        Claim(
            "The exact force is the sum over layers (identity)",
            "‖F - Σ F_layer‖ / ‖F‖ = 0 up to float32 rounding",
            f"at most {gap:.1e}",
            told(gap < 1e-4),
        ),
        Claim(
            "First order is right: the exact force predicts a real step (docs/theory.md, The decomposition)",
            f"rank correlation with the real change of each chosen answer, step of {SMALL} nats: above 0.95 at every stage, "
            "and above the readout's, intervals too",
            "; ".join(f"{stage}: exact {small[stage, 'exact'].words()}, readout {small[stage, 'readout'].words()}, difference "
                      f"{better[stage].words()}" for stage in stages),
            both(*(above(small[s, "exact"], 0.95) for s in stages), *map(above, better.values())),
        ),
    ]  # fmt: skip


def _of_nthr(by_nthr: list[dict[str, Any]], stages: list[str]) -> Claim:
    """Claim about NTHR's score of a rejected token against its exact force on the chosen answer."""
    nthr = {stage: estimate([row["rank"] for row in by_nthr if row["stage"] == stage], "pairs") for stage in stages}
    return Claim(
        "NTHR finds the tokens whose penalty hurts the correct answer (arXiv 2505.18830 §4, with only the readout moving)",
        "rank correlation of the readout's score with the exact force of each rejected token on the chosen answer: above 0",
        "; ".join(f"{stage} {nthr[stage].words()}" for stage in stages),
        both(*map(above, nthr.values())),
    )


def _of_ches(by_pair: list[dict[str, Any]], small: dict[tuple[str, str], Estimate]) -> list[Claim]:
    """Claims about CHES against the real change of the chosen answer; large steps in the full form only."""
    stages = list(dict.fromkeys(stage for stage, _ in small))
    quick = "real_large" not in by_pair[0]
    large = {} if quick else {(stage, "-CHES"): _rank(by_pair, stage, "-CHES", "real_large") for stage in stages}
    return [
        Claim(
            "CHES ranks pairs by how far the chosen answer is displaced (arXiv 2410.08847 §4.2)",
            "rank correlation of -CHES with the real change of the chosen answer above 0 at every stage, intervals too",
            _against(small, "-CHES", SMALL) + (_against(large, "-CHES", LARGE) if large else ""),
            both(*(above(small[stage, "-CHES"]) for stage in stages)),
        ),
        Claim(
            "and not because both grow with the answer's length (arXiv 2410.08847 §4.2, its length-normalised form)",
            "rank correlation of -CHES, length-normalised, with that change above 0 at every stage, intervals too",
            _against(small, "-CHES, length-normalised", SMALL),
            both(*(above(small[stage, "-CHES, length-normalised"]) for stage in stages)),
        ),
    ]


def _of_tokens(by_token: list[dict[str, Any]], stages: list[str]) -> list[Claim]:
    """Claims about the readout's force and CH2 against the exact one, over pairs of tokens of different prompts."""
    readout, ch2, more = ({stage: _of(by_token, stage, name) for stage in stages} for name in ("readout", "ch2", MORE))
    return [
        Claim(
            "The readout's force ranks the effect of token on token like the exact one (assumed by NTHR, CHES)",
            "rank correlation over token pairs of different prompts above 0.5 at every stage, intervals too",
            "; ".join(f"{stage} {value.words()}" for stage, value in readout.items()),
            both(*(above(value, 0.5) for value in readout.values())),
        ),
        Claim(
            "CH2 adds what the backbone does (Ren, Deng, Hong, Lyle, Gal 2026; stated there as an approximation)",
            "over token pairs of different prompts CH2 correlates more with the exact force than the readout, at every stage, "
            "intervals of the differences too",
            "; ".join(f"{s} {ch2[s].mean:.2f} against {readout[s].mean:.2f}, {more[s].words()} more" for s in stages),
            both(*map(above, more.values())),
        ),
    ]


def _stages(model: Any, tokenizer: Any, rows: list[texts.Row], seed: int, quick: bool) -> dict[str, Any]:
    """The model at four stages: random weights, as shipped, after SFT on the pairs, and after DPO on them."""
    if quick:
        return {"pretrained": model}
    from transformers import AutoModelForCausalLM

    tuned = copy.deepcopy(model)
    training.sft(tuned, texts.chis(tokenizer, rows, "chosen"), epochs=4, lr=2e-4, seed=seed)
    torch.manual_seed(seed)
    fresh, aligned = AutoModelForCausalLM.from_config(model.config).eval(), copy.deepcopy(tuned)
    optimizer = training.adam(aligned, 2e-5)
    pairs = [training.with_reference(tuned, texts.preferences(tokenizer, [row])) for row in rows]
    pairs = [[chi.with_(group=i) for chi in pair] for i, pair in enumerate(pairs)]
    for batch in training.batches(pairs, 4, seed, epochs=4):
        training.step(aligned, optimizer, td.objectives.DPO(), [chi for pair in batch for chi in pair], mean_over=len(batch))
    return {"random": fresh, "pretrained": model, "after SFT": tuned, "after DPO": aligned}


def _scopes(model: Any) -> dict[str, str]:
    """Regular expressions over parameter names: disjoint parts that together are the whole model.

    A layer is what shares the first number in a parameter's name; embeddings are the input's and the readout's weights.
    """
    inner = {id(p) for part in (model.get_input_embeddings(), model.get_output_embeddings()) for p in part.parameters()}
    parts: dict[str, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):  # a tied weight by both of its names
        number = re.search(r"\.(\d+)\.", name)
        part = (
            "embeddings" if id(p) in inner else f"layer {number[1]}" if number else "last norm" if "norm" in name else "other"
        )
        parts.setdefault(part, []).append(name)
    return {part: f"^(?:{'|'.join(map(re.escape, names))})$" for part, names in parts.items()}


def _matrix(model: Any, u: list[td.Chi], o: list[td.Chi], scope: str, **options: Any) -> Tensor:
    F = td.forces(model, u, o, td.objectives.SFT(), scope=scope, **options).matrix
    assert F is not None
    return F.double()


def _vector(model: Any, u: list[td.Chi], o: list[td.Chi], objective: Objective, **options: Any) -> Tensor:
    vector = td.forces(model, u, o, objective, **options).vector
    assert vector is not None
    return vector


def _tokens(model: Any, tokenizer: Any, rows: list[texts.Row]) -> tuple[list[dict], list[dict], float]:
    """Rows of estimates (correlations with the exact force, by place of the observed token), rows of layers, and their gap."""
    chis = [chi for chi in texts.preferences(tokenizer, rows) if chi.group == 0 or chi.role == "chosen"]
    whole = td.forces(model, chis, chis, td.objectives.SFT())
    assert whole.matrix is not None
    F = whole.matrix.double()
    sequence, group = (torch.tensor(whole.observed[key].to_pylist()) for key in ("sequence", "group"))
    same, near = sequence[:, None] == sequence, group[:, None] == group
    where = {
        "same answer": same,
        "other answer, same prompt": near & ~same,
        "other prompt": ~near,
        "all": torch.ones_like(near),
    }
    guess = {name: _matrix(model, chis, chis, name) for name in ("readout", "ch2")}
    guess["readout + ch2"] = guess["readout"] + guess["ch2"]
    tokens = [
        {"estimate": name, "where": place, "pearson": _pearson(F[mask], value[mask]),
         "sign": td.sign_delta(F[mask], value[mask]), **_interval(F, {name: value}, mask, group)}
        for name, value in guess.items() for place, mask in where.items()
    ]  # fmt: skip
    tokens.append({"estimate": MORE, "where": "other prompt", **_interval(F, guess, where["other prompt"], group)})
    parts = {name: _matrix(model, chis, chis, scope) for name, scope in _scopes(model).items()}
    layers = [
        {"layer": name, "share": float((part * F).sum() / F.square().sum()),
         "share_other_prompt": float((part * F)[~near].sum() / F[~near].square().sum()),
         **{f"spearman_{key}": td.rank_correlation(part[~near], guess[key][~near]) for key in ("readout", "ch2")}}
        for name, part in parts.items()
    ]  # fmt: skip
    return tokens, layers, float((F - sum(parts.values())).norm() / F.norm())


def _interval(F: Tensor, guess: dict[str, Tensor], mask: Tensor, group: Tensor) -> dict[str, Any]:
    """Rank correlation of a guess with F over the marked pairs of tokens, and its interval over prompts.

    Of several guesses, that of CH2 minus that of the readout.

    Leaving a prompt out leaves out all pairs of tokens that one of its tokens is in.
    """

    def spearman(groups: Sequence[int]) -> float:
        there = torch.isin(group, torch.tensor(groups))
        some = mask & there[:, None] & there
        found = {name: td.rank_correlation(F[some], value[some]) for name, value in guess.items()}
        return found["ch2"] - found["readout"] if len(found) > 1 else next(iter(found.values()))

    marked = mask.nonzero()
    value = jackknife(sorted(set(group[marked].flatten().tolist())), spearman, "prompts")  # those that have such pairs at all
    return {"spearman": value.mean, "half": value.half, "n": value.n, "of": value.of}


def _pairs(model: Any, tokenizer: Any, rows: list[texts.Row], steps: tuple[str, ...]) -> tuple[list[dict], list[dict]]:
    """Rows of pairs (change of the chosen answer in a DPO step, predicted, real) and rows of NTHR scores against exact ones."""
    pairs, scores = [], []
    for i, row in enumerate(rows):
        pair = texts.preferences(tokenizer, [row])
        chosen, dpo = pair[:1], td.objectives.DPO()
        real = {name: td.verify(model, pair, chosen, dpo, move=SMALL if name == "small" else LARGE) for name in steps}
        found = {"exact": float(real["small"].predicted.sum() / real["small"].eta)}
        for scope in ("readout", "ch2"):
            found[scope] = float(_vector(model, pair, chosen, dpo, scope=scope, reduce="update").sum())
        plus, minus = (h.double() for h in training.hidden(model, pair))
        sums = plus.sum(0), minus.sum(0)
        found["-CHES"] = float(sums[0] @ sums[0] - sums[0] @ sums[1])
        means = plus.mean(0), minus.mean(0)
        found["-CHES, length-normalised"] = float(means[0] @ means[0] - means[0] @ means[1])
        changes = {f"real_{name}": float(v.actual.sum() / v.eta) for name, v in real.items()}
        pairs.append({"pair": i} | found | changes | {f"linearity_{name}": v.linearity for name, v in real.items()})
        exact, cheap = (_vector(model, pair[1:], chosen, td.objectives.SFT(), scope=scope, reduce="observe")
                        for scope in ("full", "readout"))  # fmt: skip
        scores.append({"pair": i, "rank": td.rank_correlation(exact, cheap), "sign": td.sign_delta(exact, cheap)})
    return pairs, scores


def _sentences(model: Any, tokenizer: Any, rows: list[texts.Row], length: int = 1000) -> list[dict]:
    """Rows of estimates: rank correlation with the exact force of every fourth sentence of a long text on another."""
    text = ["\n\n".join(row["prompt"] + row["chosen"] for row in half) for half in (rows[::2], rows[1::2])]
    u, o = ([td.encode(tokenizer, "Human:", part[6:], max_length=length, eos=False)] for part in text)
    sentence = group_labels("sentence", u)
    groups = torch.where(sentence % 4 == 0, sentence // 4, -1)
    F = {scope: _matrix(model, u, o, scope, groups=groups) for scope in ("full", "readout", "ch2")}
    F["readout + ch2"] = F["readout"] + F["ch2"]
    return [{"estimate": name, "tokens": len(o[0]), "sentences": F[name].shape[1],
             "spearman": td.rank_correlation(F["full"], F[name]), "sign": td.sign_delta(F["full"], F[name])}
            for name in ESTIMATES]  # fmt: skip


def _pearson(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def _rank(rows: list[dict], stage: str, a: str, b: str, less: str | None = None) -> Estimate:
    """Rank correlation of two columns over the pairs of a stage, less another column's with the second, and its interval."""

    def spearman(some: Sequence[dict]) -> float:
        def column(key: str) -> Tensor:
            return torch.tensor([row[key] for row in some], dtype=torch.float64)

        return td.rank_correlation(column(a), column(b)) - (td.rank_correlation(column(less), column(b)) if less else 0)

    return jackknife([row for row in rows if row["stage"] == stage], spearman, "pairs")


def _against(found: dict[tuple[str, str], Estimate], key: str, move: float) -> str:
    return f"step of {move:g} nats: " + ", ".join(f"{s} {x.words()}" for (s, k), x in found.items() if k == key) + ". "


def _of(rows: list[dict], stage: str, name: str) -> Estimate:
    """The rank correlation of an estimate with the exact force over tokens of different prompts."""
    row = next(row for row in rows if (row["stage"], row["estimate"], row["where"]) == (stage, name, "other prompt"))
    return Estimate(row["spearman"], row["half"], row["n"], row["of"])


def _notes(layers: list[dict], sentences: list[dict], stages: list[str]) -> str:
    said = [
        f"{stage}: " + ", ".join(f"{row['layer']} {100 * row['share_other_prompt']:.0f}% ({row['spearman_readout']:.2f}, "
                                 f"{row['spearman_ch2']:.2f})" for row in layers if row["stage"] == stage)
        for stage in stages
    ]  # fmt: skip
    text = (
        "Each layer's share of the exact force between prompts, and in brackets how the readout's force and CH2 are "
        f"rank-correlated with that layer's own. {'; '.join(said)}.\n\nOne training. The correlations between tokens are over "
        "all pairs of tokens of a few prompts; their intervals come of leaving out a prompt at a time."
    )
    if sentences:
        text += "\n\nSentences of 1,000-token dialogues, rank correlation with the exact force: " + "; ".join(
            f"{row['stage']}, {row['estimate']} {row['spearman']:.2f}" for row in sentences) + "."  # fmt: skip
    return text


def _figure(tokens: list[dict], layers: list[dict], small: dict[tuple[str, str], Estimate], stages: list[str]) -> Any:
    made, axes = figure(
        1, 3, title="The readout foretells a pair's own step, not the forces between prompts", width=11, height=3.6
    )
    for k, name in enumerate(ESTIMATES):
        values = [_of(tokens, stage, name).mean for stage in stages]
        axes[0].plot(stages, values, "o-", color=COLOURS[k], label=name)
    axes[0].set(ylabel="rank correlation with the exact force", title="token on token, between prompts", ylim=(-0.1, 1.02))
    axes[0].legend()
    for axis, label in zip(axes, ("stage of training", "part of the model", "stage of training"), strict=True):
        axis.set_xlabel(label)
    for k, stage in enumerate(stages):
        here = [row for row in layers if row["stage"] == stage]
        axes[1].plot([row["layer"] for row in here], [100 * row["share_other_prompt"] for row in here], "o-",
                     color=COLOURS[k], label=stage)  # fmt: skip
    axes[1].set(ylabel="share of the exact force (%)", title="which parameters carry it")
    axes[1].tick_params(axis="x", rotation=30)
    axes[1].legend()
    for k, key in enumerate(PREDICTORS):
        axes[2].plot(stages, [small[stage, key].mean for stage in stages], "o-", color=COLOURS[k], label=key)
    axes[2].set(ylabel="rank correlation with the real change", ylim=(-1.02, 1.02),
                title=f"chosen answer, DPO step of {SMALL} nats")  # fmt: skip
    axes[2].axhline(0, color=GREY, linewidth=0.8)
    axes[2].legend(loc="lower left", fontsize=7)
    return made
