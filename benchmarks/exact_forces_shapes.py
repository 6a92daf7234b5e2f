"""The shapes of exact_forces.py --shape: matrices that somebody asks for, ours beside one gradient per token, in one run.

Beside both sides a product of two 1024 x 1024 matrices is timed, in turn with them. `share` is the time that the counted
multiplications take at that product's rate, over ours. Counted are, for the linear layers of the backbone (and the experts that
a token is given to), with P weights and outputs of width q together, nothing saved by causality:

    both pulls        2 P T for a token of a sequence of T positions, on each side
    E = δᵀ(a·b)       2 q T for an update token and each position of the observed sequences
    inner products    2 q T for an update token and each observed token of a sequence of T positions
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from exact_forces_processes import measure
from exact_forces_sides import OURS, matrix_side, qwen2, tokdyn_side

PRODUCT, SQUARE, PRODUCTS = "product", 1024, 8  # the side that gives the rate: its width, and how many in one turn


class Shape(NamedTuple):
    """Sequences of `prompt` + `response` tokens on a model of some width; the responses are scored.

    family: "qwen2", "deepseek_v3" or "qwen3_moe".
    batch: sequences of the update; in pairs when `shared`.
    held_out: further sequences that are observed besides the update; without any, the observed side has `batch` others.
    shared: tokens that the two responses of a pair begin with; 0 for sequences that have nothing in common.
    """

    name: str
    prompt: int
    response: int
    batch: int
    width: int
    family: str = "qwen2"
    layers: int = 2
    vocabulary: int = 2048
    held_out: int = 0
    shared: int = 0

    def model(self) -> Any:
        """A random model of the family."""
        if self.family == "qwen2":
            return qwen2(self.vocabulary, self.width, self.layers)
        return experts(self)

    def texts(self) -> list[Any]:
        """Update and observed sequences."""
        import torch

        from tokdyn.testing import random_chis

        def draw(n: int, seed: int) -> list[Any]:
            chis = random_chis([(self.prompt, self.response)] * n, seed=seed, vocabulary=self.vocabulary)
            same = self.prompt + self.shared if self.shared else 0
            return [chi.with_(ids=torch.cat([chis[i - i % 2].ids[:same], chi.ids[same:]])) for i, chi in enumerate(chis)]

        update = draw(self.batch, 1)
        return [update, update + draw(self.held_out, 2) if self.held_out else draw(self.batch, 2)]

    def small(self) -> Shape:
        """What a side warms up with."""
        return self._replace(prompt=2, response=4, batch=2, held_out=min(2, self.held_out), shared=min(2, self.shared))

    def quick(self) -> Shape:
        """A size that shows that it runs."""
        return self.small()._replace(width=32, vocabulary=101)

    def labels(self) -> dict[str, Any]:
        """Its columns in the table."""
        length = self.prompt + self.response
        return dict(shape=self.name, length=length, vocabulary=self.vocabulary, width=self.width, layers=self.layers,
                    batch=self.batch)  # fmt: skip

    def side(self, name: str, model: Any, args: argparse.Namespace, scope: str, folder: str) -> Callable:
        """The side "tangent", "naive", "product", "reduce=AXIS" or "groups=KIND"."""
        match name.partition("="):
            case ("reduce" | "groups" as option, _, value):
                return tokdyn_side(model, scope=scope, **{option: value})
        return product_side() if name == PRODUCT else matrix_side(name, model, args, scope=scope)

    def flops(self) -> float:
        """The counted multiplications, each with its addition as two."""
        P, q = weights_and_widths(self.model())
        update, observed = self.texts()
        pulls = sum(len(chi) * len(chi.ids) for chi in update + observed)  # token times positions
        made = sum(len(chi) * len(chi.ids) for chi in update) * sum(len(chi.ids) for chi in observed)
        met = sum(len(chi) for chi in update) * sum(len(chi) * len(chi.ids) for chi in observed)
        return 2.0 * (P * pulls + q * (made + met))


class Demo(NamedTuple):
    """`tokdyn profile --rows N --held-out N` from reading the model to the page."""

    name: str = "demo"
    rows: int = 8
    held_out: int = 1

    def model(self) -> None:
        """The program loads its own."""

    def texts(self) -> list[Any]:
        """The numbers of rows: of the update, and observed besides."""
        return [self.rows, self.held_out]

    def small(self) -> Demo:
        """What a side warms up with."""
        return self._replace(rows=1, held_out=0)

    quick = small

    def labels(self) -> dict[str, Any]:
        """Its columns in the table."""
        return dict(shape=self.name, batch=self.rows)

    def side(self, name: str, model: None, args: argparse.Namespace, scope: str, folder: str) -> Callable:
        """The program with --method tangent or naive."""
        return product_side() if name == PRODUCT else profile_side(name, folder)

    def flops(self) -> None:
        """Not counted: most of it is not the matrix."""


SHAPES: dict[str, list[Shape | Demo]] = {
    "pairs": [Shape("pairs", 30, 18, 8, 512, held_out=4, shared=6)],
    "wide": [Shape("wide", 30, 18, 8, 512)],
    "wider": [Shape("wider", 30, 18, 8, 1024)],
    "small": [Shape("small", 40, 24, 8, 128)],
    "text": [Shape("text", 1, 256, 1, 256, layers=4, vocabulary=V) for V in (2048, 32768)],
    "experts": [Shape("experts", 1, 50, 2, 512, "deepseek_v3")],
    "qwen-experts": [Shape("qwen-experts", 1, 50, 2, 512, "qwen3_moe")],
    "many-experts": [Shape("many-experts", 30, 18, 8, 512, "qwen3_moe")],
    "demo": [Demo()],
}


def experts(shape: Shape) -> Any:
    """A random model of DeepSeek-V3's or Qwen3-MoE's shape: 8 experts, 2 for each token."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    d = shape.width
    common = dict(
        hidden_size=d, num_hidden_layers=shape.layers, num_attention_heads=4, intermediate_size=int(2.75 * d),
        moe_intermediate_size=d // 2, num_experts_per_tok=2, vocab_size=shape.vocabulary, max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=False,
    )  # fmt: skip
    own: dict[str, Any] = dict(num_key_value_heads=2, head_dim=d // 4, num_experts=8)
    if shape.family == "deepseek_v3":
        own = dict(num_key_value_heads=4, n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=1,
                   q_lora_rank=d // 4, kv_lora_rank=d // 8, qk_nope_head_dim=d // 8, qk_rope_head_dim=d // 16,
                   v_head_dim=d // 8)  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.family, **common, **own)).eval()


def weights_and_widths(model: Any) -> tuple[float, float]:
    """Weights that multiply one position in the backbone, and the widths of their outputs, summed over layers.

    A stack [experts, outputs, inputs] counts as the experts that a token is given to.
    """
    import torch

    linear = [m.weight for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    stacks = [p for p in model.base_model.parameters() if p.dim() == 3]
    each = getattr(model.config, "num_experts_per_tok", 0)
    weights = sum(w.numel() for w in linear) + sum(each * p[0].numel() for p in stacks)
    return weights, sum(len(w) for w in linear) + sum(each * p.shape[1] for p in stacks)


def product_side() -> Callable:
    """PRODUCTS products of two square matrices."""
    import torch

    a, out = torch.randn(SQUARE, SQUARE), torch.empty(SQUARE, SQUARE)

    def run(*_: Any) -> tuple[None, int]:
        for _ in range(PRODUCTS):
            torch.mm(a, a, out=out)
        return None, 0

    return run


def profile_side(method: str, folder: str) -> Callable:
    """The command `tokdyn profile` in this process."""
    import contextlib
    import io

    import tokdyn as td
    from tokdyn.cli import app

    def run(rows: int, held_out: int) -> tuple[Any, int]:
        out = Path(folder) / "run"
        options = ["--rows", str(rows), "--held-out", str(held_out), "--method", method, "--out", str(out), "--overwrite"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            app(["profile", *options], standalone_mode=False)
        return td.load(out).matrix, 0

    return run


PARTS = {  # what a profile is divided into, by functions that do not call each other
    "forward passes": ("tokdyn/model/trace.py", "_call"),
    "backward passes of cotangents": ("~", "<method 'run_backward' of 'torch._C._EngineBase' objects>"),
    "written directions": ("tokdyn/exact/modules/linear.py", "_weight_into"),
    "E": ("tokdyn/exact/sweep/tile.py", "_tangents"),
    "inner products": ("tokdyn/exact/sweep/tile.py", "inner"),
}


def profiled(shape: Shape, args: argparse.Namespace) -> str:
    """In which parts of our side its processor time goes, in words: once more, in this process, under cProfile."""
    import cProfile
    import pstats
    import time

    import torch

    torch.set_num_threads(args.threads)
    run = shape.side(OURS, shape.model(), args, "full", "")
    run(*shape.small().texts())
    sides, profile = shape.texts(), cProfile.Profile(time.process_time)
    profile.runcall(run, *sides)
    stats = pstats.Stats(profile)
    whole, shares = stats.total_tt, dict.fromkeys(PARTS, 0.0)  # type: ignore[attr-defined]
    for (file, _, function), (_, _, _, seconds, _) in stats.stats.items():  # type: ignore[attr-defined]
        for part, (ends, name) in PARTS.items():
            shares[part] += seconds / whole if file.endswith(ends) and function == name else 0.0
    shares["the rest (choosing rules, python between operators)"] = 1 - sum(shares.values())
    return f"{shape.name}, profiled: " + ", ".join(f"{part} {share:.0%}" for part, share in shares.items())


def compare(context: Any, shape: Shape | Demo, args: argparse.Namespace) -> tuple[list[dict], str]:
    """Measure both sides and the product at one shape: two rows and a sentence."""
    import numpy as np

    (theirs, ours, product), (truth, F, _) = measure(context, ["naive", OURS, PRODUCT], shape, "full", args)
    error = float(np.linalg.norm(F - truth) / np.linalg.norm(truth))
    time = "cpu_s" if args.threads == 1 else "median_s"  # of one thread, what else runs on the machine counts less
    rate = 2.0 * PRODUCTS * SQUARE**3 / product[time]
    flops = shape.flops()
    share = flops and flops / rate / ours[time]
    theirs |= dict(ratio=theirs[time] / ours[time], share=None)
    ours |= dict(error=error, share=share)
    clock = "processor time" if args.threads == 1 else "time"
    said = f"{shape.name}: one gradient per token takes {theirs['ratio']:.2f}x the {clock}, relative error {error:.1e}"
    if share is not None:
        said += f"; {flops / 1e9:.3g} GFLOP counted, at {share:.1%} of a {SQUARE}² product's {rate / 1e9:.0f} GFLOP/s"
    return [theirs, ours], said
