"""Triton kernels with one fault each, and one without: what the ahead-of-time gate has to tell apart."""

from __future__ import annotations

import triton
import triton.language as tl

from tokdyn.kernels.variant import Variant


@triton.jit
def spilling_kernel(X, OUT, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)  # 256 numbers a thread, all needed again after the sum
    tl.store(OUT + i, x / tl.sum(x, 0))


@triton.jit
def product_kernel(X, G, OUT, K, stride, B: tl.constexpr, BK: tl.constexpr, EXPONENTIAL: tl.constexpr):
    i, j, k = tl.arange(0, B), tl.arange(0, B), tl.arange(0, BK)
    total = tl.zeros((B, B), tl.float32)
    for k0 in range(0, K, BK):
        x = tl.load(X + i[:, None] * stride + (k0 + k)[None, :])  # [B, BK]
        g = tl.load(G + j[:, None] * stride + (k0 + k)[None, :])  # [B, BK]
        if EXPONENTIAL:
            x = tl.exp(x.to(tl.float32)).to(tl.bfloat16)  # computed in registers, and multiplied from there
        total = tl.dot(x, g.T, total)
    tl.store(OUT + i[:, None] * B + j[None, :], total)


@triton.jit
def sum_kernel(X, OUT, V, N: tl.constexpr):
    i = tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for start in range(0, V, N):
        total += tl.exp(tl.load(X + start + i))
    tl.store(OUT + i, total)


@triton.jit
def forgotten_kernel(OUT):
    tl.store(OUT, 0.0)


def variants() -> list[Variant]:
    product = dict(X="*bf16:16", G="*bf16:16", OUT="*fp32:16", K="i32:16", stride="i64:16")
    total = dict(X="*fp32:16", OUT="*fp32:16", V="i32:16")
    found = [
        Variant("spills", spilling_kernel, dict(X="*fp32:16", OUT="*fp32:16"), dict(N=32768), 4, 1),
        Variant("register factor", product_kernel, product, dict(B=128, BK=64, EXPONENTIAL=True), 8, 3),
        Variant("shared memory", product_kernel, product, dict(B=128, BK=128, EXPONENTIAL=False), 8, 8),
        Variant("over budget", sum_kernel, total, dict(N=1024), 4, 1, elements=1024, budget=1.5),
        Variant("no loop", spilling_kernel, dict(X="*fp32:16", OUT="*fp32:16"), dict(N=1024), 4, 1, elements=1024, budget=9.0),
        Variant("sound sum", sum_kernel, total, dict(N=1024), 4, 1, elements=1024, budget=9.0),
        Variant("sound product", product_kernel, product, dict(B=128, BK=64, EXPONENTIAL=False), 8, 3),
    ]
    return [variant._replace(architectures=(90,)) for variant in found]
