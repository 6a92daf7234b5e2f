"""Every kernel once at small odd sizes, its result against float64 on the CPU: what gpu.sh runs under compute-sanitizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tokdyn import _native, ops
from tokdyn.kernels.linear_token_stats import reference as linear_reference

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

T, L, V, d, k = 5, 7, 1031, 37, 3
SCALE = 0.4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(9))


def linear(*x: Tensor, impl: str, fused: bool = False) -> tuple[Tensor, ...]:
    from tokdyn.kernels.linear_token_stats import triton

    if impl == "reference":
        return linear_reference.linear_token_stats(*x, softcap=20.0)[:5]
    return triton.linear_token_stats(*x, softcap=20.0, fused=fused)[:5]


def forces(*x: Tensor, impl: str, **options: Any) -> Tensor:
    *x, extra = x
    return ops.readout_forces(*x, impl=impl, **options, **({"v": extra} if options.get("train_bias") else {}))


def gram(*x: Tensor, impl: str, segments: bool = False) -> Tensor:
    *x, rows, columns = x
    return ops.dual_gram(*x, impl=impl, segments=(rows, columns) if segments else None)


def masked(op: Callable, *x: Tensor, impl: str) -> Any:
    *x, mask = x
    return op(*x, mask, SCALE, 5.0, impl=impl)


HEADS = [random(1, 2, 2, 35, 20), random(1, 2, 35, 20, seed=1), random(1, 2, 35, 12, seed=2)]
MOVES = [random(3, *x.shape, seed=3 + i) for i, x in enumerate(HEADS)]
MASK = torch.ones(35, 35, dtype=torch.bool).tril()[None, None]
Z, Y, H, W = random(T, V), tokens(T), random(T, d), random(V, d, seed=1)
READOUT = [H, Y, random(L, d, seed=2), tokens(L, k), random(L, k, seed=3), W, random(L, seed=4)]
GRAM = [
    random(40, 19),
    random(33, 19, seed=1),
    random(40, 9, seed=2),
    random(33, 9, seed=3),
    torch.arange(40) // 15,
    torch.arange(33) // 9,
]
CASES: dict[str, tuple[Callable, list[Tensor]]] = {
    "token_stats": (ops.token_stats, [Z, Y]),
    "topk": (lambda z, impl: ops.topk_log_probs(z, k, impl=impl), [Z]),
    "linear": (linear, [H, W, Y]),
    "linear, fused": (functools.partial(linear, fused=True), [H, W, Y]),
    "linear topk": (lambda h, w, impl: ops.linear_topk_log_probs(h, w, k, impl=impl)[0], [H, W]),
    "apply_A": (ops.apply_A, [Z, random(T, V, k, seed=1)]),
    "softmax_jvp": (ops.softmax_jvp, [Z, random(T, V, seed=1)]),
    "forces": (forces, READOUT),
    "forces, two reads": (functools.partial(forces, train_bias=True), READOUT),
    "forces, summed": (functools.partial(forces, reduce="observe"), READOUT),
    "gram": (gram, GRAM),
    "gram, segments": (functools.partial(gram, segments=True), GRAM),
    "attention": (functools.partial(masked, ops.attention), [*HEADS, MASK]),
    "tangents": (functools.partial(masked, ops.tangent_attention), [*HEADS, *MOVES, MASK]),
    "cotangents": (functools.partial(masked, ops.cotangent_attention), [*HEADS, random(3, 1, 2, 2, 35, 12, seed=6), MASK]),
}


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "impl"), [*((name, "triton") for name in CASES), ("token_stats", "cuda"), ("topk", "cuda")])
def test_small(agree, name: str, impl: str, dtype: torch.dtype):
    if impl == "cuda" and not hasattr(_native.load()[0], "cuda_token_stats"):
        pytest.skip(f"the CUDA kernels are {_native.parts()['cuda']}")
    call, inputs = CASES[name]
    rounded = [cast(x, dtype) for x in inputs]
    ours = call(*(x.cuda() for x in rounded), impl=impl)
    plain, exact = call(*rounded, impl="reference"), call(*(cast(x, torch.float64) for x in rounded), impl="reference")
    band = 4 * torch.finfo(dtype).eps + d * torch.finfo(torch.float32).eps
    for one, same, truth in zip(*([x] if isinstance(x, Tensor) else x for x in (ours, plain, exact)), strict=True):
        agree(name, one.cpu(), same, truth, band=band, size=truth.abs().amax() + 1)
