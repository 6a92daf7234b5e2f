"""The Triton matrix kernels compiled and launched, against float64; tests/kernels/interpreted holds what needs no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokdyn import ops

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def close(ours: Tensor, plain: Tensor, exact: Tensor, size: Tensor | float) -> None:
    """Error at most twice the largest of torch at the same dtype, plus `size`: the rounding of what the result is made of."""
    error = (ours.double() - exact).abs()
    allowed = 2 * (plain.double() - exact).abs().max() + size
    assert (error <= allowed).all(), f"{float(error.max()):.2e} where {float((error - allowed).max()):.2e} too much"


def masks(B: int, T: int) -> dict[str, Tensor | None]:
    t = torch.arange(T, device="cuda")
    causal = t[:, None] >= t
    padded = causal.expand(B, 1, T, T).clone()
    padded[-1, :, :, :37] = False  # the first rows of the last sequence see nothing
    window, packed = causal & (t[:, None] - t < 70), causal & (t[:, None] // 100 == t // 100)
    return {
        "none": None,
        "causal": causal[None, None],
        "window": window[None, None],
        "padded": padded,
        "packed": packed[None, None],
    }


MASKED = [("causal", None), ("window", 20.0), ("padded", None), ("packed", 5.0), ("none", None)]
WIDTHS = [(80, 80), (128, 128), (192, 128), (256, 256), (20, 12)]
ATTENTIONS = [(*masked, 64, 64, dtype) for masked in MASKED for dtype in DTYPES]
ATTENTIONS += [(*masked, *width, dtype) for masked in MASKED[2:4] for width in WIDTHS for dtype in DTYPES[:2]]


@pytest.mark.parametrize(("mask", "softcap", "D", "E", "dtype"), ATTENTIONS)
def test_attention(mask: str, softcap: float | None, D: int, E: int, dtype: torch.dtype):
    """In half precision both sides round the softmax and its derivative before they multiply; torch, the difference."""
    B, Hk, G, T, n = 2, 2, 2, 333, 3
    g = torch.Generator("cuda").manual_seed(0)

    def heads(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda").to(dtype).transpose(-2, -3)

    q, dq, do = heads(B, T, Hk * G, D), heads(n, B, T, Hk * G, D), heads(n, B, T, Hk * G, E)
    q, dq, do = q.unflatten(1, (Hk, G)), dq.unflatten(2, (Hk, G)), do.unflatten(2, (Hk, G))
    k, dk, v, dv = heads(B, T, Hk, D), heads(n, B, T, Hk, D), heads(B, T, Hk, E), heads(n, B, T, Hk, E)
    last = (masks(B, T)[mask], D**-0.5, softcap)

    def everything(impl: str | None, *x: Tensor) -> list[Tensor]:
        q, k, v, dq, dk, dv, do = x
        moved = ops.tangent_attention(q, k, v, dq, dk, dv, *last, impl=impl)
        return [ops.attention(q, k, v, *last, impl=impl), moved, *ops.cotangent_attention(q, k, v, do, *last, impl=impl)]

    args = (q, k, v, dq, dk, dv, do)
    wide = [x.double() for x in args]
    exact = everything("reference", *wide)
    for ours, plain, truth in zip(everything("triton", *args), everything("reference", *args), exact, strict=True):
        close(ours, plain, truth, 4 * torch.finfo(dtype).eps * float(truth.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize(("softcap", "general"), [(None, False), (20.0, True)])
def test_readout_forces(softcap: float | None, general: bool, K: int, dtype: torch.dtype, monkeypatch):
    from tokdyn.kernels.readout_forces import triton

    monkeypatch.setattr(triton, "BUFFER", 8 << 20)  # several chunks
    M, L, V, d = 150, 200, 50257, 64
    g = torch.Generator("cuda").manual_seed(0)
    h_o, h_u, weight, bias = (torch.randn(*s, generator=g, device="cuda").to(dtype) for s in ((M, d), (L, d), (V, d), (V,)))
    weight = weight * d**-0.5
    y_o, targets = (
        torch.randint(0, V, (M,), generator=g, device="cuda"),
        torch.randint(0, V, (L, K), generator=g, device="cuda"),
    )
    c, v, uniform = (torch.randn(*s, generator=g, device="cuda") for s in ((L, K), (L,), (L,)))
    options = dict(scale=1.5, softcap=softcap, train_bias=general) | (dict(v=v, uniform=uniform) if general else {})
    wide = options | {name: x.double() for name, x in options.items() if isinstance(x, Tensor)}
    for reduce in (None, "update", "observe"):
        args = (h_o, y_o, h_u, targets, c, weight)
        exact = ops.readout_forces(
            *(x.double() if x.is_floating_point() else x for x in args),
            bias=bias.double(),
            **wide,
            reduce=reduce,
            impl="reference",
        )
        plain = ops.readout_forces(*args, bias=bias, **options, reduce=reduce, impl="reference")
        rounding = 2.0**-8 if dtype != torch.float32 else 64 * 2.0**-24
        close(
            ops.readout_forces(*args, bias=bias, **options, reduce=reduce, impl="triton"),
            plain,
            exact,
            4 * rounding * exact.abs().max(),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "q"), [(64, 64), (20, 9), (3000, 1500)])
def test_dual_gram(p: int, q: int, dtype: torch.dtype, monkeypatch):
    from tokdyn.kernels.dual_gram import triton

    M, L = 333, 500
    g = torch.Generator("cuda").manual_seed(0)
    factors = [torch.randn(*s, generator=g, device="cuda").to(dtype) for s in ((M, p), (L, p), (M, q), (L, q))]
    segments = torch.arange(M, device="cuda") // 50, torch.randint(0, 9, (L,), generator=g, device="cuda")
    wide = [x.double() for x in factors]
    eps = (p + q) * 2.0**-24
    size = ops.dual_gram(*(x.abs() for x in wide), impl="reference")
    exact, plain = (ops.dual_gram(*x, impl="reference") for x in (wide, factors))
    close(ops.dual_gram(*factors, impl="triton"), plain, exact, eps * size)
    out = torch.ones(L, M, device="cuda").T
    close(ops.dual_gram(*factors, out=out, impl="triton") - 1, plain, exact, eps * size + 2.0**-23)
    sums = ops.dual_gram(*(x.abs() for x in wide), segments=segments, impl="reference")
    exact, plain = (ops.dual_gram(*x, segments=segments, impl="reference") for x in (wide, factors))
    for room in (0, triton.ROOM):
        monkeypatch.setattr(triton, "ROOM", room)
        close(ops.dual_gram(*factors, segments=segments, impl="triton"), plain, exact, (eps + (M + L) * 2.0**-24) * sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_readouts(softcap: float | None, dtype: torch.dtype, monkeypatch):
    """The band of token_stats, and what products of width d may be off by: d eps Σ |h w|, of which a result takes up at most
    four times as much."""
    from tokdyn.kernels.linear_token_stats import triton

    T, V, d = 300, 50257, 320
    g = torch.Generator("cuda").manual_seed(0)
    h, W, b = (torch.randn(*shape, generator=g, device="cuda").to(dtype) for shape in ((T, d), (V, d), (V,)))
    W /= d**0.5
    y = torch.randint(0, V, (T,), generator=g, device="cuda")
    readout = dict(scale=2.0, softcap=softcap)
    exact = ops.linear_token_stats(h.double(), W.double(), y, bias=b.double(), temperature=0.7, **readout)
    bound = d * 2.0**-24 * 4 * float((h.double().abs() @ W.double().abs().T).max()) * 2.0 / 0.7
    monkeypatch.setattr(triton, "BUFFER", 8 << 20)  # several chunks
    for fused in (False, True):
        ours = triton.linear_token_stats(h, W, y, bias=b, temperature=0.7, fused=fused, **readout)
        for name, value, truth in zip(exact._fields, ours, exact, strict=True):
            if name == "rank":  # two logits may differ by less than their rounding
                assert ((value - truth).abs() <= 2).all()
            elif name != "argmax":
                torch.testing.assert_close(value.double(), truth, rtol=256 * 2.0**-24, atol=bound)
    values, _ = ops.linear_topk_log_probs(h, W, 10, bias=b, **readout)
    exact_values, _ = ops.linear_topk_log_probs(h.double(), W.double(), 10, bias=b.double(), **readout)
    torch.testing.assert_close(values.double(), exact_values, rtol=256 * 2.0**-24, atol=bound)
