"""How far forces in bfloat16 are from those in float32, ours and one gradient per token, on answers of the demo pairs.

    python benchmarks/bf16.py [--pairs 4] [--json FILE]

The figure is ‖F_bf16 - F_float32‖ / ‖F_float32‖ of the matrix between the first tokens of a pair's two answers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import tokdyn as td
from tokdyn.data import read
from tokdyn.loading import DEMO_PAIRS, load_model


def main() -> None:
    """Print and write one row a pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8, help="of each answer")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "exact-bf16.json")
    options = parser.parse_args()
    (whole, tokenizer), (half, _) = load_model(), load_model(dtype=torch.bfloat16)
    rows = []
    for row in sorted(read(DEMO_PAIRS), key=lambda row: len(row["prompt"]) + len(row["chosen"]))[: options.pairs]:
        pair = td.preference(tokenizer, row["prompt"], row["chosen"], row["rejected"])
        pair = [chi.with_(scored=chi.scored & (chi.scored.cumsum(0) <= options.tokens)) for chi in pair]
        truth = matrix(whole, pair, "tangent")
        rows.append({name: float((matrix(half, pair, name) - truth).norm() / truth.norm()) for name in ("tangent", "naive")})
        print({name: f"{100 * value:.1f} %" for name, value in rows[-1].items()}, flush=True)
    told = dict(tokens=options.tokens, rows=rows, versions=dict(torch=torch.__version__, tokdyn=td.__version__))
    options.json.write_text(json.dumps(told, indent=1) + "\n")


def matrix(model: torch.nn.Module, pair: list[td.Chi], method: str) -> torch.Tensor:
    """F [M, L] of both answers on both, in float64."""
    F = td.forces(model, pair, pair, td.objectives.SFT(), method=method).matrix
    assert F is not None
    return F.double()


if __name__ == "__main__":
    main()
