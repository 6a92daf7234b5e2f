"""The Triton attention, its tangents and cotangents, interpreted: against dense float64 and the bounds of its rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from tokdyn import ops
from tokdyn.kernels.cotangent_attention import reference as cotangent_reference
from tokdyn.kernels.cotangent_attention import triton as cotangent
from tokdyn.kernels.tangent_attention import reference as tangent_reference
from tokdyn.kernels.tangent_attention import triton as tangent
from tokdyn.model import attention as tracing
from tokdyn.ops import dispatch

EPS = 2.0**-24
SCALE = 0.4


def problem(B: int, Hk: int, G: int, T: int, S: int, D: int, E: int, n: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, dq, dk, dv, do, as a model makes them: heads and positions transposed."""
    g = torch.Generator().manual_seed(0)

    def heads(*shape: int) -> Tensor:  # [.., positions, heads, width] -> [.., heads, positions, width]
        return torch.randn(*shape, generator=g).to(dtype).transpose(-2, -3)

    q, dq, do = heads(B, T, Hk * G, D), heads(n, B, T, Hk * G, D), heads(n, B, T, Hk * G, E)
    k, dk, v, dv = heads(B, S, Hk, D), heads(n, B, S, Hk, D), heads(B, S, Hk, E), heads(n, B, Hk, S, E).transpose(-2, -3)
    return [q.unflatten(1, (Hk, G)), k, v, dq.unflatten(2, (Hk, G)), dk, dv, do.unflatten(2, (Hk, G))]


def masks(B: int, T: int, S: int) -> dict[str, Tensor | None]:
    causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    t, s = torch.arange(T)[:, None] + S - T, torch.arange(S)[None]
    padded = causal.expand(B, 1, T, S).clone()
    padded[-1, :, :, : S - T + 2] = False  # the first rows of the last sequence see nothing
    holes = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(1)) < 0.3
    window, packed = (causal & (t - s < 9))[None, None], (causal & (t // 18 == s // 18))[None, None]
    return {"none": None, "causal": causal[None, None], "window": window, "padded": padded, "packed": packed, "holes": holes}


def dense(q, k, v, dq, dk, dv, do, mask, softcap):
    """In float64 the values, and what rounding may add to each: a multiple of the sum of the absolute values behind it."""
    q, k, v, dq, dk, dv, do = (x.double() for x in (q, k, v, dq, dk, dv, do))
    k, v, dk, dv = k[:, :, None], v[:, :, None], dk[:, :, :, None], dv[:, :, :, None]
    z = SCALE * (q @ k.mT)
    slope = SCALE * (1 - (z / softcap).tanh().square()) if softcap else SCALE * torch.ones_like(z)
    z = softcap * (z / softcap).tanh() if softcap else z
    if mask is not None:
        z = z.masked_fill(~mask[:, :, None], -torch.inf)
    P = z.softmax(-1).nan_to_num(0.0)
    dS, dP = slope * (dq @ k.mT + q @ dk.mT), do @ v.mT
    W, R = P * dS, slope * P * (dP - (P * dP).sum(-1, keepdim=True))
    values = dict(o=P @ v, do=P @ dv + W @ v - W.sum(-1, keepdim=True) * (P @ v), dq=R @ k)
    values |= dict(dk=(R.mT @ q).sum(-3), dv=(P.mT @ do).sum(-3))
    aW = P * slope * (dq.abs() @ k.abs().mT + q.abs() @ dk.abs().mT)
    adP = do.abs() @ v.abs().mT
    aR = slope * P * (adP + (P * adP).sum(-1, keepdim=True))
    sizes = dict(o=P @ v.abs(), do=P @ dv.abs() + aW @ v.abs() + aW.sum(-1, keepdim=True) * (P @ v.abs()), dq=aR @ k.abs())
    sizes |= dict(dk=(aR.mT @ q.abs()).sum(-3), dv=(P.mT @ do.abs()).sum(-3))
    # a score is off by D EPS Σ|q k|, which changes e^score by as much; then come sums of S terms
    score = 1 + float((SCALE * (q.abs() @ k.abs().mT)).max())
    unit = 2 * (q.shape[-1] * score + P.shape[-1] * P.shape[-3]) * EPS
    return values, {name: unit * size for name, size in sizes.items()}


CASES = [  # mask, softcap, dtype, B, Hk, G, T, S, D, E, n
    ("none", None, torch.float32, 1, 1, 2, 20, 37, 20, 12, 3),
    ("padded", 1.5, torch.float32, 2, 1, 1, 20, 20, 8, 16, 2),
    ("holes", None, torch.float32, 1, 2, 1, 17, 33, 8, 8, 1),
    ("causal", 1.5, torch.bfloat16, 1, 1, 2, 35, 35, 20, 12, 3),
    ("causal", None, torch.bfloat16, 2, 2, 2, 3, 3, 4, 4, 2),
    ("window", None, torch.bfloat16, 1, 1, 1, 40, 40, 16, 16, 2),
    ("packed", None, torch.bfloat16, 1, 1, 2, 40, 40, 16, 8, 1),
    ("causal", None, torch.float16, 1, 1, 1, 1, 1, 1, 1, 1),
]


@pytest.mark.parametrize(("name", "softcap", "dtype", "B", "Hk", "G", "T", "S", "D", "E", "n"), CASES)
def test_agrees_with_the_definition(name, softcap, dtype, B, Hk, G, T, S, D, E, n, agree):
    q, k, v, dq, dk, dv, do = args = problem(B, Hk, G, T, S, D, E, n, dtype)
    mask = masks(B, T, S)[name]
    exact, band = dense(*args, mask, softcap)
    last = (mask, SCALE, softcap)
    ours = dict(o=ops.attention(q, k, v, *last, impl="triton"))
    ours["do"] = ops.tangent_attention(q, k, v, dq, dk, dv, *last, impl="triton")
    ours |= zip(("dq", "dk", "dv"), ops.cotangent_attention(q, k, v, do, *last, impl="triton"), strict=True)
    plain = dict(o=tangent_reference.attention(q, k, v, *last))
    plain["do"] = tangent_reference.tangent_attention(q, k, v, dq, dk, dv, *last)
    plain |= zip(("dq", "dk", "dv"), cotangent_reference.cotangent_attention(q, k, v, do, *last), strict=True)
    for what, value in ours.items():
        assert value.dtype == dtype
        agree(what, value, plain[what], exact[what], band[what] + torch.finfo(dtype).eps * exact[what].abs())


def test_what_nobody_sees_is_not_read():
    """Blocks of keys that a mask hides from a block of queries are skipped: NaN in them stays there, on every pass."""
    q, k, v, dq, dk, dv, do = problem(1, 1, 1, 40, 40, 16, 16, 2, torch.bfloat16)
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[:, 16:32] = torch.ones(40, 16, dtype=torch.bool).tril()
    for x in (k, v, dk, dv):
        x[..., :16, :] = x[..., 32:, :] = torch.nan
    last = (mask[None, None], SCALE, None)
    assert ops.tangent_attention(q, k, v, dq, dk, dv, *last, impl="triton").isfinite().all()
    found = ops.cotangent_attention(q, k, v, do, *last, impl="triton")
    assert all(x.isfinite().all() for x in found)
    assert not found[1][..., :16, :].any() and not found[2][..., 32:, :].any()


@pytest.mark.parametrize("by_key", [False, True])
def test_spans_hold_what_is_seen_and_promise_no_more(by_key):
    B, T, S, rows, columns = 2, 34, 46, 16, 8
    all_masks = [x.expand(B, 1, T, S) for x in masks(B, T, S).values() if x is not None]
    for mask in [*all_masks, torch.zeros(B, 1, T, S, dtype=torch.bool), torch.ones(1, 1, T, S, dtype=torch.bool)]:
        (_, met), _ = tangent.spans(mask, rows, columns, by_key=by_key)
        side = (mask.mT if by_key else mask)[:, 0]
        for b, table in enumerate(met.tolist()):
            for i, (low, full, rest, high) in enumerate(table):
                assert 0 <= low <= full <= rest <= high <= -(-side.shape[2] // columns)
                strip = side[b, i * rows : (i + 1) * rows]
                assert not strip[:, : low * columns].any() and not strip[:, high * columns :].any()
                inner = strip[:, full * columns : rest * columns]
                assert inner.all() and inner.shape[1] == (rest - full) * columns
                if strip.any():
                    assert strip[:, low * columns : (low + 1) * columns].any()
    causal = torch.ones(50, 50, dtype=torch.bool).tril()[None, None]
    (_, met), _ = tangent.spans(causal, 16, 8)
    assert met[0].tolist() == [[0, 2, 2, 2], [0, 0, 2, 4], [0, 0, 4, 6], [0, 0, 6, 7]]


def test_offsets_pass_two_to_the_31():
    storage = torch.empty((1 << 31) + 4096, dtype=torch.bfloat16)  # pages that nobody touches are not there
    first = iter(range(0, 4096, 256))

    def far(x: Tensor) -> Tensor:
        """The same numbers, two entries of the first axis further apart than 32 bits."""
        spread = storage.as_strided(x.shape, ((1 << 31) + 7, *x[0].contiguous().stride()), next(first))
        return spread.copy_(x)

    q, k, v, dq, dk, dv, do = problem(2, 1, 1, 5, 5, 4, 4, 2, torch.bfloat16)
    last = (None, SCALE)
    assert torch.equal(ops.attention(q, far(k), v, *last, impl="triton"), ops.attention(q, k, v, *last, impl="triton"))
    moved = ops.tangent_attention(q, k, v, far(dq), far(dk), far(dv), *last, impl="triton")
    assert torch.equal(moved, ops.tangent_attention(q, k, v, dq, dk, dv, *last, impl="triton"))
    ours = ops.cotangent_attention(far(q), far(k), far(v), far(do), *last, impl="triton")
    for a, b in zip(ours, ops.cotangent_attention(q, k, v, do, *last, impl="triton"), strict=True):
        assert torch.equal(a, b)


def test_nan_stays_in_its_row():
    """A query that is NaN spoils its own row and what its keys collect; the other rows have the same bits."""
    q, k, v, dq, dk, dv, do = problem(1, 1, 1, 20, 20, 8, 8, 1, torch.float32)
    last = (masks(1, 20, 20)["causal"], SCALE, None)
    row = torch.arange(20) == 11

    def everything() -> list[Tensor]:
        moved = ops.tangent_attention(q, k, v, dq, dk, dv, *last, impl="triton")
        return [
            ops.attention(q, k, v, *last, impl="triton"),
            moved,
            *ops.cotangent_attention(q, k, v, do, *last, impl="triton"),
        ]

    clean = everything()
    q[..., 11, 0] = torch.nan
    broken = everything()
    for ours, before in zip(broken[:3], clean[:3], strict=True):
        assert ours[..., row, :].isnan().all() and torch.equal(ours[..., ~row, :], before[..., ~row, :])
    assert all(x[..., :12, :].isnan().all() for x in broken[3:])
    assert torch.equal(broken[4][..., 12:, :], clean[4][..., 12:, :]), "values that it does not see"


def test_scores_far_from_zero_and_equal_ones():
    """What every key adds alike cancels: scores near -120 and -3000 give what scores near 0 give, and equal keys their mean."""
    q, k, v, dq, dk, dv, do = problem(1, 1, 1, 7, 9, 8, 8, 2, torch.float32)
    q[..., 0], dq[..., 0], k[..., 0], dk[..., 0] = 1.0, 0.0, 0.0, 0.0
    near, _ = dense(q, k, v, dq, dk, dv, do, None, None)
    for offset in (-120.0, -3000.0):
        k[..., 0] = offset / SCALE
        ours = ops.tangent_attention(q, k, v, dq, dk, dv, None, SCALE, impl="triton")
        back = ops.cotangent_attention(q, k, v, do, None, SCALE, impl="triton")
        rounding = 16 * abs(offset) * EPS  # of a score, to which every result is proportional
        torch.testing.assert_close(ours.double(), near["do"], rtol=rounding, atol=rounding * float(near["do"].abs().max()))
        torch.testing.assert_close(back[2].double(), near["dv"], rtol=rounding, atol=rounding * float(near["dv"].abs().max()))
    k[:] = k[..., :1, :]
    o = ops.attention(q, k, v, None, SCALE, impl="triton")
    mean = v.double().mean(-2, keepdim=True)[:, :, None].expand(o.shape)
    torch.testing.assert_close(o.double(), mean, rtol=0, atol=32 * EPS * float(v.abs().max()))


def test_transforms_take_the_kernels(monkeypatch):
    """vmap of jvp and vjp of the tracing attention, whose primals want gradients, gives what the kernels give."""
    q, k, v, dq, dk, dv, do = problem(1, 1, 2, 18, 18, 8, 8, 2, torch.float32)
    mask = masks(1, 18, 18)["causal"]
    last = (mask, SCALE, None)
    tangents = ops.tangent_attention(q, k, v, dq, dk, dv, *last, impl="triton")
    cotangents = ops.cotangent_attention(q, k, v, do, *last, impl="triton")
    monkeypatch.setattr(
        dispatch, "takes_triton", lambda *tensors: not any(x.requires_grad for x in tensors) or not torch.is_grad_enabled()
    )
    monkeypatch.delattr(tangent_reference, "blocks")  # the references would need it
    monkeypatch.delattr(cotangent_reference, "blocks")
    primals = [x.requires_grad_() for x in (q, k, v)]

    def f(*x):
        return tracing._Attention.apply(*x, *last)

    assert torch.equal(vmap(lambda *d: jvp(f, tuple(primals), d)[1])(dq, dk, dv), tangents)
    for a, b in zip(vmap(vjp(f, *primals)[1])(do), cotangents, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(torch.autograd.grad(f(*primals), primals, do[0]), cotangents, strict=True):
        torch.testing.assert_close(a, b[0], rtol=0, atol=0)


def test_declarations_hold_and_torch_compile_keeps_one_graph():
    q, k, v, dq, dk, dv, do = problem(1, 1, 2, 5, 5, 4, 4, 2, torch.bfloat16)
    mask = masks(1, 5, 5)["causal"]
    for operator, args in (
        (tangent._attention, (q, k, v, mask, SCALE, None)),
        (tangent._tangent_attention, (q, k, v, dq, dk, dv, mask, SCALE, None)),
        (cotangent._cotangent_attention, (q, k, v, do, mask, SCALE, None)),
    ):
        torch.library.opcheck(operator, args)

    def everything(q, k, v, dq, dk, dv, do):
        moved = ops.tangent_attention(q, k, v, dq, dk, dv, mask, SCALE, impl="triton")
        return moved + 1, *ops.cotangent_attention(q, k, v, do + moved, mask, SCALE, impl="triton")

    args = (q, k, v, dq, dk, dv, do)
    for a, b in zip(torch.compile(everything, fullgraph=True, backend="aot_eager")(*args), everything(*args), strict=True):
        assert torch.equal(a, b)


def test_nothing_to_do_and_mistakes():
    q, k, v, dq, dk, dv, do = problem(1, 1, 1, 5, 5, 4, 4, 2, torch.float32)
    assert ops.tangent_attention(q, k, v, dq[:0], dk[:0], dv[:0], None, SCALE, impl="triton").shape == (0, 1, 1, 1, 5, 4)
    none = ops.cotangent_attention(q[..., :0, :], k, v, do[..., :0, :], None, SCALE, impl="triton")
    assert not none[1].any() and none[1].shape == (2, 1, 1, 5, 4)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    for match, call in (
        ("share float32, bfloat16 or float16", lambda: tangent.attention(q.double(), k.double(), v.double(), None, SCALE)),
        ("do not fit together", lambda: tangent.attention(q, k[..., :3], v, None, SCALE)),
        (
            r"mask must be bool \[B or 1, 1, T, S\]=\[1 or 1, 1, 5, 5\]",
            lambda: tangent.attention(q, k, v, mask[..., :4], SCALE),
        ),
        ("softcap must be above 0", lambda: tangent.attention(q, k, v, mask, SCALE, 0.0)),
        (
            "heads may be 1 to 256 wide",
            lambda: tangent.attention(torch.zeros(1, 1, 1, 2, 300), *2 * [torch.zeros(1, 1, 2, 300)], None, SCALE),
        ),
        (r"dk must be \[2, 1, 1, 5, 4\]", lambda: tangent.tangent_attention(q, k, v, dq, dk[:1], dv, None, SCALE)),
        ("do must be", lambda: cotangent.cotangent_attention(q, k, v, do[..., :3], None, SCALE)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
