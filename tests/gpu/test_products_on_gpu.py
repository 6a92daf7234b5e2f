"""The operators made of matrix products on a GPU, by Triton, and forces on a model that lies there."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

import tokdyn as td
from tokdyn import ops
from tokdyn.bench.cases import eager_apply_A, eager_dual_gram, eager_readout_forces, eager_softmax_jvp
from tokdyn.testing import random_chis, relative_error, tiny

DEVICE = "cuda"
if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16]


def random(dtype: torch.dtype, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    g = torch.Generator(DEVICE).manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g, device=DEVICE)).to(dtype)


def tokens(V: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, V, shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed))


def double(x):
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 37, 300])
def test_linear_token_stats(agree, T: int, dtype: torch.dtype):
    V, d = 50257, 323
    h, W, y, b = random(dtype, T, d), random(dtype, V, d, seed=1, scale=3 * d**-0.5), tokens(V, T), random(dtype, V, seed=2)
    for options in ({}, dict(bias=b, scale=2.0, softcap=30.0, temperature=0.7)):
        exact = {key: double(value) for key, value in options.items()}
        ours, plain, truth = (
            ops.linear_token_stats(*x, y, impl=impl, **o)
            for x, impl, o in (
                ((h, W), "triton", options),
                ((h, W), "reference", options),
                ((h.double(), W.double()), "reference", exact),
            )
        )
        logits = 3 * d**0.5 * 2**-24 * 8  # what a product of length d may be off by, in nats, times what a result makes of it
        for name, value, same, true in zip(truth._fields, ours, plain, truth, strict=True):
            if name in ("rank", "argmax"):  # two logits may differ by less than they are off
                assert (value == true).float().mean() > 0.9, name
            else:
                agree(name, value, same, true, size=true.abs() + logits / (64 * 2**-24))


@pytest.mark.parametrize("op", ["apply_A", "softmax_jvp"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 1003, 151936])
def test_jacobians(agree, V: int, dtype: torch.dtype, op: str):
    call, eager = {"apply_A": (ops.apply_A, eager_apply_A), "softmax_jvp": (ops.softmax_jvp, eager_softmax_jvp)}[op]
    z, x = random(dtype, 9, V, scale=3.0), random(dtype, 9, V, seed=1)
    exact = call(z.double(), x.double(), impl="reference")
    agree(op, call(z, x, impl="triton"), eager(z, x), exact, size=x.double().abs().amax(1, keepdim=True))
    many = random(dtype, 5, min(V, 1003), 3, seed=2)
    z = z[:5, : many.shape[1]]
    exact = call(z.double(), many.double(), impl="reference")
    plain = torch.stack([eager(z, many[..., i]) for i in range(3)], -1)
    agree(op, call(z, many, impl="triton"), plain, exact, size=many.double().abs().amax())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", [None, "update", "observe"])
def test_readout_forces(agree, reduce: str | None, dtype: torch.dtype):
    """bfloat16 is held to torch in bfloat16, which rounds both residual matrices before it multiplies them."""
    M, L, d, V = 70, 45, 97, 20011
    h_o, h_u, W = random(dtype, M, d), random(dtype, L, d, seed=1), random(dtype, V, d, seed=2, scale=3 * d**-0.5)
    y_o, y_u, c = tokens(V, M), tokens(V, L, seed=1), random(torch.float32, L, seed=3)
    exact = ops.readout_forces(*map(double, (h_o, y_o, h_u, y_u, c, W)), impl="reference")
    plain = eager_readout_forces(h_o, y_o, h_u, y_u, c, W)
    size = exact.abs().max()
    if reduce:
        axis = {"update": 1, "observe": 0}[reduce]
        exact, plain, size = exact.sum(axis), plain.sum(axis), exact.abs().sum(axis)
    ours = ops.readout_forces(h_o, y_o, h_u, y_u, c, W, reduce=reduce, impl="triton")
    agree("forces", ours, plain, exact, size=size)


def test_readout_forces_of_every_kind_of_loss(agree):
    M, L, K, d, V = 20, 33, 3, 64, 5003
    h_o, h_u, W = (
        random(torch.float32, M, d),
        random(torch.float32, L, d, seed=1),
        random(torch.float32, V, d, seed=2, scale=0.3),
    )
    y_o, y_u, c = tokens(V, M), tokens(V, L, K, seed=1), random(torch.float32, L, K, seed=3)
    more = dict(bias=random(torch.float32, V, seed=4), scale=1.5, softcap=20.0, train_bias=True)
    more |= dict(v=random(torch.float32, L, seed=5), uniform=random(torch.float32, L, seed=6))
    inputs = (h_o, y_o, h_u, y_u, c, W)
    exact = ops.readout_forces(*map(double, inputs), **{k: double(x) for k, x in more.items()}, impl="reference")
    plain = ops.readout_forces(*inputs, **more, impl="reference")
    agree("forces", ops.readout_forces(*inputs, **more, impl="triton"), plain, exact, size=exact.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "L", "p", "q"), [(1, 1, 1, 1), (130, 257, 64, 64), (300, 200, 517, 96)])
def test_dual_gram(agree, M: int, L: int, p: int, q: int, dtype: torch.dtype):
    factors = [random(dtype, *shape, seed=s) for s, shape in enumerate(((M, p), (L, p), (M, q), (L, q)))]
    exact, plain = eager_dual_gram(*map(double, factors)), eager_dual_gram(*[x.float() for x in factors])
    size = eager_dual_gram(*[x.double().abs() for x in factors])  # of the terms, which cancel
    agree("dual_gram", ops.dual_gram(*factors, impl="triton").float(), plain, exact, size=size)
    before = random(torch.float32, M, L, seed=9)
    ours = ops.dual_gram(*factors, out=before.clone(), impl="triton")
    agree("out", ours, before + plain, before.double() + exact, size=size + before.double().abs())
    rows, columns = (torch.sort(tokens(5, n, seed=s)).values for s, n in ((7, M), (8, L)))
    out = torch.zeros(5, 5, device=DEVICE)
    at_row, at_column = (torch.nn.functional.one_hot(ids, 5) for ids in (rows, columns))

    def sums(x: Tensor) -> Tensor:
        return at_row.T.to(x.dtype) @ x @ at_column.to(x.dtype)

    ours = ops.dual_gram(*factors, out=out, segments=(rows, columns), impl="triton")
    agree("segments", ours, sums(plain), sums(exact), size=sums(size))


ATTENTION = ("tangent_attention", "cotangent_attention")


@pytest.mark.parametrize("op", ATTENTION)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["full", "causal", "window", "capped"])
def test_attention(agree, kind: str, dtype: torch.dtype, op: str):
    n, B, Hk, G, T, D = 3, 2, 2, 2, 133, 64
    i = torch.arange(T, device=DEVICE)
    near = i[:, None] >= i
    masks = {"full": None, "causal": near, "window": near & (i[:, None] - i < 40), "capped": near}
    mask = None if masks[kind] is None else masks[kind][None, None]
    q, k, v = random(dtype, B, Hk, G, T, D), random(dtype, B, Hk, T, D, seed=1), random(dtype, B, Hk, T, D, seed=2)
    moves = [random(dtype, n, *x.shape, seed=3 + s) for s, x in enumerate((q, k, v))]
    moves = moves if op == "tangent_attention" else moves[:1]
    forms = {form: getattr(importlib.import_module(f"tokdyn.kernels.{op}.{form}"), op) for form in ("reference", "triton")}
    rest = (mask, D**-0.5, 20.0 if kind == "capped" else None)
    ours, plain = (forms[form](q, k, v, *moves, *rest) for form in ("triton", "reference"))
    exact = forms["reference"](*map(double, (q, k, v, *moves)), *rest)
    for name, *three in zip(
        ("dq", "dk", "dv"), *[x if isinstance(x, tuple) else (x,) for x in (ours, plain, exact)], strict=False
    ):
        agree(f"{op} {name}", *three, size=three[2].abs().amax())


@pytest.mark.parametrize("scope", ["full", "readout"])
def test_forces_of_a_model_on_the_gpu(scope: str):
    model = tiny("qwen2").to(DEVICE)
    update, observe = random_chis([(3, 9)], seed=1), random_chis([(2, 12)], seed=2)
    truth = td.forces(model, update, observe, scope=scope, method="naive").matrix
    assert relative_error(td.forces(model, update, observe, scope=scope).matrix, truth) < 1e-5
    summed = td.forces(model, update, observe, scope=scope, reduce="update").vector
    assert relative_error(summed, truth.sum(1)) < 1e-5
