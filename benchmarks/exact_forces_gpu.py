"""The exact force matrix and a reduction of a model of Qwen2.5-0.5B's shape on a GPU, and how far bfloat16 is off.

    python benchmarks/exact_forces_gpu.py [--length 4096] [--reduced 32768] [--rows pairs experts] [--json FILE]
    python benchmarks/exact_forces_gpu.py --quick --device cpu               a small model, to see that it runs

Random weights, bfloat16, float32 forces, all parameters. The matrix is that of one sequence on another, --length tokens each;
the reduction of --reduced tokens in sequences of 2048 on as many. Each is timed once, after the same on 64 tokens, which loads
and compiles what it needs. `error` is |F - F'| / |F'|: of the bfloat16 model at 256 tokens against the same weights in float32,
and of float32 at 32 tokens against one gradient per token per side (method="naive"), two layers of the model. The rows "pairs"
and "experts" are matrices of four pairs on themselves and two more (prompts of 256 tokens, answers of 64) under a model of
Qwen2.5-7B's shape, and of 2 x 512 tokens under eight layers of Qwen3-30B-A3B's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tokdyn as td
from tokdyn.bench.measure import machine, peak_memory, versions
from tokdyn.testing import random_chis, relative_error

MIB = 2**20
BAR = {"matrix": "4096 x 4096 in 300 s", "reduction": "32768 tokens in 10 s"}
ROWS = ("matrix", "reduction", "pairs", "experts")


def qwen(layers: int, device: torch.device, quick: bool) -> torch.nn.Module:
    """Qwen2.5-0.5B's shape with random weights in bfloat16; `quick` much smaller."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    small = dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64, vocab_size=199)
    large = dict(hidden_size=896, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864, vocab_size=151936)
    config = Qwen2Config(
        **(small if quick else large), num_hidden_layers=layers, tie_word_embeddings=True, max_position_embeddings=32768,
        bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval().to(device, torch.bfloat16)


def large(name: str, device: torch.device, quick: bool) -> torch.nn.Module:
    """A model for the row "pairs" (Qwen2.5-7B) or "experts" (eight layers of Qwen3-30B-A3B), random weights in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = dict(max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=False)
    size = dict(hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944, vocab_size=152064,
                num_hidden_layers=28)  # fmt: skip
    if name == "experts":
        size = dict(hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128, intermediate_size=6144,
                    vocab_size=151936, num_hidden_layers=8, num_experts=128, num_experts_per_tok=8,
                    moe_intermediate_size=768)  # fmt: skip
    if quick:
        size |= dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64, vocab_size=199,
                     num_hidden_layers=2)  # fmt: skip
        size |= dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16) if name == "experts" else {}
    torch.manual_seed(0)
    with torch.device(device):
        family = "qwen2" if name == "pairs" else "qwen3_moe"
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **common, **size))
    return model.eval().to(torch.bfloat16)


def of_shape(name: str, device: torch.device, args: argparse.Namespace) -> tuple[Callable[[], Any], str]:
    """The matrix of the row "pairs" or "experts", after a small one, and its size in tokens."""
    model = large(name, device, args.quick)
    prompt, answer = (3, 4) if args.quick else (256, 64)

    def pairs(n: int, seed: int) -> list[td.Chi]:
        chis = random_chis([(prompt, answer)] * (2 * n), seed=seed, vocabulary=model.config.vocab_size)
        return [chi.with_(ids=torch.cat([chis[i - i % 2].ids[:prompt], chi.ids[prompt:]])) for i, chi in enumerate(chis)]

    u, o = both(model, 8, 4) if args.quick else both(model, 1024, 512)
    if name == "pairs":
        u = pairs(4, 1)
        o = u + pairs(2, 2)
    td.forces(model, u[:2], o[:2], memory=args.memory)
    return lambda: td.forces(model, u, o, memory=args.memory), f"{sum(map(len, o))} x {sum(map(len, u))}"


def both(model: torch.nn.Module, tokens: int, length: int) -> tuple[list[td.Chi], list[td.Chi]]:
    """Update and observed sequences of `length` tokens behind one of prompt, the last one shorter; `tokens` scored a side."""
    V = model.config.vocab_size
    each = [(1, min(length, tokens - first)) for first in range(0, tokens, length)]
    return random_chis(each, seed=1, vocabulary=V), random_chis(each, seed=2, vocabulary=V)


def timed(call: Any, device: torch.device) -> tuple[float, float]:
    """Seconds and MiB of one call; on a CPU no memory is measured."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    synchronize()
    began = time.perf_counter()
    if device.type == "cuda":
        peak = peak_memory(call, device) / MIB
    else:
        call()
        peak = 0.0
    synchronize()
    return time.perf_counter() - began, peak


def main() -> None:
    """Compute both errors, then time matrix and reduction, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="tokens on each side of the matrix")
    parser.add_argument("--reduced", type=int, default=32768, help="tokens on each side of the reduction")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS[:2], help="which matrices, beside the errors")
    parser.add_argument("--memory", default="40GiB", help="that the forces may take")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: take --quick --device cpu")
    layers, length, reduced, sequence, some, few = (
        (2, 12, 24, 12, 8, 6) if args.quick else (24, args.length, args.reduced, 2048, 256, 32)
    )
    model = qwen(layers, device, args.quick)
    rows: list[dict[str, Any]] = []

    def add(what: str, seconds: float, peak: float, error: float | None, bar: str) -> None:
        rows.append(dict(what=what, seconds=seconds, peak_mib=peak, error=error, bar=bar))
        print(f"{what}: {seconds:.2f} s, {peak:.0f} MiB" + ("" if error is None else f", error {error:.1e}"), flush=True)

    def matrix(model: torch.nn.Module, tokens: int, **options: Any) -> torch.Tensor:
        return td.forces(model, *both(model, tokens, tokens), memory=args.memory, **options).matrix

    def reduction(tokens: int) -> torch.Tensor:
        return td.forces(model, *both(model, tokens, sequence), reduce="update", memory=args.memory).vector

    shallow = qwen(2, device, args.quick).float()
    began = time.perf_counter()
    error = relative_error(matrix(shallow, few), matrix(shallow, few, method="naive"))
    add(f"float32 against one gradient per token, 2 layers, {few} tokens", time.perf_counter() - began, 0.0, error, "1e-5")
    del shallow
    began = time.perf_counter()
    rough = matrix(model, some)
    error = relative_error(rough, matrix(qwen(layers, device, args.quick).float(), some))
    add(f"bfloat16 against float32, {some} tokens", time.perf_counter() - began, 0.0, error, "")
    if "matrix" in args.rows:
        matrix(model, min(64, some))
        add(f"matrix {length} x {length}", *timed(lambda: matrix(model, length), device), None, BAR["matrix"])
    if "reduction" in args.rows:
        reduction(min(64, some))
        add(f"reduction over {reduced} tokens", *timed(lambda: reduction(reduced), device), None, BAR["reduction"])
    for name in sorted({"pairs", "experts"} & set(args.rows)):
        call, tokens = of_shape(name, device, args)
        add(f"{name}: {tokens} tokens", *timed(call, device), None, "")
    if args.json:
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        about = f"Qwen2 shape, {parameters:.0f} M parameters, {layers} layers, random weights, bfloat16, budget {args.memory}."
        found = dict(about=about, machine=machine(device), versions=versions(), rows=rows)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if rows[0]["error"] > 1e-5:
        raise SystemExit(f"the forces disagree with one gradient per token: relative error {rows[0]['error']:.1e}")


if __name__ == "__main__":
    main()
