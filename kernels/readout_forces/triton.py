"""readout_forces on a GPU: products by cuBLAS in chunks of the vocabulary, turned into exponentials or forces.

In one read of the logits a chunk becomes e^{z - m}, m each row's largest logit so far, without the targets' columns; the
softmax is normalised at the end. README.md beside this file derives it, and says when two reads are needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import adjacent, factors, on_device_of, product, products, require_readout
from ..token_stats.triton import FLOOR, _exp, _finite_or_zero, _logit
from ..variant import Variant

BUFFER = 1 << 30  # most bytes of both sides' float32 products
ROOM = 64 << 20  # the same with reduce, which has no [M, L] array, and in _finish_kernel
ROW = dict(BLOCK=1024, num_warps=4, num_stages=1)
TILE = dict(BM=16, BL=128, num_warps=8, num_stages=1)


@triton.jit
def _slope(z, cap):
    """Derivative of cap tanh(x / cap) in terms of its value z; 1 without a cap."""
    if cap is None:
        slope = 1.0
    else:
        t = z / cap
        slope = (1.0 - t) * (1.0 + t)
    return slope


@triton.jit(do_not_specialize=["v0"])
def _absorb_kernel(
    Z, Y, E, TOP, SUM, MIX, OWN, F, BIAS, n, v0, K, scale, cap, BLOCK: tl.constexpr, STORE: tl.constexpr
):  # fmt: skip
    """Fold a chunk of products Z [T, n], columns v0 to v0 + n, into the rows' running sums, leaving out the targets Y [T, K].

    With z the logits: TOP the largest so far, SUM = Σ e^{z - TOP}, MIX = Σ e^{z - TOP} (z - TOP), F the factor by which a new
    maximum rescaled the older sums; OWN [T, K] the targets' logits; with STORE, E [T, n] = e^{z - TOP} dz/dx, 0 at the targets.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    for first in range(0, n, BLOCK):
        inside = first + c < n
        z = _logit(tl.load(Z + row * n + first + c, mask=inside, other=0.0), BIAS, v0 + first + c, inside, scale, cap)
        top = tl.maximum(top, tl.where(inside, z, -float("inf")))
    old = tl.load(TOP + row, mask=v0 > 0, other=-float("inf"))
    higher = tl.maximum(old, tl.max(top, 0))
    base = _finite_or_zero(higher)
    sum = tl.zeros([BLOCK], tl.float32)
    mix = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        inside = first + c < n
        z = _logit(tl.load(Z + row * n + first + c, mask=inside, other=0.0), BIAS, v0 + first + c, inside, scale, cap)
        e = tl.where(inside, _exp(z - base), 0.0)
        for k in range(0, K):
            e = tl.where(v0 + first + c == tl.load(Y + row * K + k), 0.0, e)
        sum += e
        mix += e * tl.maximum(z - base, FLOOR)
        if STORE:
            tl.store(E + row * n + first + c, e * _slope(z, cap), mask=inside)
    for k in range(0, K):
        y = tl.load(Y + row * K + k)
        here = (y >= v0) & (y < v0 + n)
        z = _logit(tl.load(Z + row * n + y - v0, mask=here, other=0.0), BIAS, y, here, scale, cap)
        tl.store(OWN + row * K + k, z, mask=here)
    f = _exp(old - base)
    s = tl.load(SUM + row, mask=v0 > 0, other=0.0)
    t = tl.load(MIX + row, mask=v0 > 0, other=0.0)
    tl.store(TOP + row, higher)
    tl.store(SUM + row, f * s + tl.sum(sum, 0))
    tl.store(MIX + row, f * (t + tl.maximum(old - base, FLOOR) * s) + tl.sum(mix, 0))
    tl.store(F + row, f)


@triton.jit(do_not_specialize=["M"])
def _add_kernel(X, P, F_O, F_U, M, L, BM: tl.constexpr, BL: tl.constexpr):
    """X [M, L] = F_O X F_U + P: rescale the sums of earlier chunks to the new maxima of rows and columns, add a chunk's."""
    down = tl.cdiv(M, BM)
    ms = tl.program_id(0) % down * BM + tl.arange(0, BM)
    ls = tl.program_id(0) // down * BL + tl.arange(0, BL)
    inside = (ms < M)[:, None] & (ls < L)[None, :]
    at = (tl.program_id(0) % down).to(tl.int64) * BM * L + (tl.arange(0, BM)[:, None] * L + ls[None, :])
    f = tl.load(F_O + ms, mask=ms < M, other=0.0)[:, None] * tl.load(F_U + ls, mask=ls < L, other=0.0)[None, :]
    x = tl.load(X + at, mask=inside, other=0.0)
    # where a maximum was -inf, the older sum is 0 and so is its factor
    tl.store(X + at, f * x + tl.load(P + at, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _finish_kernel(
    X, H, Z_O, Z_U, Y_O, Y_U, BASE_O, INVERSE_O, OWN_O, BASE_U, INVERSE_U, OWN_U, C, BIAS, M, L, K, shift, factor, scale, cap,
    BM: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Turn X [M, L], the sums over columns that are no target of m or l, into F: normalise, and add the targets' columns.

    H [M, L] = h_m·h_l; Z_U [M, L] the products of h_l with the weights of y_m; Z_O [M, K L] of h_m with those of l's targets.
    """
    down = tl.cdiv(M, BM)
    ms = tl.program_id(0) % down * BM + tl.arange(0, BM)
    ls = tl.program_id(0) // down * BL + tl.arange(0, BL)
    m_in = ms < M
    l_in = ls < L
    inside = m_in[:, None] & l_in[None, :]
    first = (tl.program_id(0) % down).to(tl.int64) * BM
    i = tl.arange(0, BM)[:, None]
    at = first * L + (i * L + ls[None, :])
    y = tl.load(Y_O + ms, mask=m_in, other=-1)[:, None]
    total = tl.load(C + ls, mask=l_in, other=0.0)[None, :]
    base_o = tl.load(BASE_O + ms, mask=m_in, other=0.0)[:, None]
    base_u = tl.load(BASE_U + ls, mask=l_in, other=0.0)[None, :]
    inverse_o = tl.load(INVERSE_O + ms, mask=m_in, other=0.0)[:, None]
    inverse_u = tl.load(INVERSE_U + ls, mask=l_in, other=0.0)[None, :]
    x = tl.load(X + at, mask=inside, other=0.0) * inverse_o * (inverse_u * total)
    z = _logit(tl.load(Z_U + at, mask=inside, other=0.0), BIAS, y, m_in[:, None] & (y >= 0), scale, cap)
    at_y = -total * inverse_u * _exp(z - base_u) * _slope(z, cap)  # Γ_l at y_m
    for k in range(0, K):
        target = tl.load(Y_U + ls.to(tl.int64) * K + k, mask=l_in, other=-1)[None, :]
        own = tl.load(OWN_U + ls.to(tl.int64) * K + k, mask=l_in, other=0.0)[None, :]  # Γ_l at that target
        z = tl.load(Z_O + (first * K + k) * L + (i * K * L + ls[None, :]), mask=inside, other=0.0)
        z = _logit(z, BIAS, target, l_in[None, :] & (target >= 0), scale, cap)
        x -= tl.where((target == y) | (target < 0), 0.0, inverse_o * _exp(z - base_o) * _slope(z, cap) * own)
        at_y = tl.where(target == y, own, at_y)
    x += tl.load(OWN_O + ms, mask=m_in, other=0.0)[:, None] * at_y
    tl.store(X + at, x * factor * (tl.load(H + at, mask=inside, other=0.0) + shift), mask=inside)


@triton.jit(do_not_specialize=["v0"])
def _residual_kernel(
    Z, Y, R, BASE, INVERSE, OWN, C, V, ENTROPY, U, BIAS, n, v0, K, each, scale, cap, BLOCK: tl.constexpr
):  # fmt: skip
    """R [T, n] = dz/dx ⊙ Γ for a chunk of products Z; V and U are the weights of entropy and uniform target, or None.

    OWN [T, K] is the first part of Γ at the targets Y, -C pi elsewhere; `each` is one over the size of the vocabulary.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    base = tl.load(BASE + row)
    inverse = tl.load(INVERSE + row)
    total = tl.load(C + row)
    for first in range(0, n, BLOCK):
        inside = first + c < n
        z = _logit(tl.load(Z + row * n + first + c, mask=inside, other=0.0), BIAS, v0 + first + c, inside, scale, cap)
        pi = _exp(z - base) * inverse
        r = -total * pi
        for k in range(0, K):
            r = tl.where(v0 + first + c == tl.load(Y + row * K + k), tl.load(OWN + row * K + k), r)
        if V is not None:
            r += tl.load(V + row) * tl.where(pi > 0, pi * (z - base + tl.log(inverse) + tl.load(ENTROPY + row)), 0.0)
        if U is not None:
            r += tl.load(U + row) * (each - pi)
        tl.store(R + row * n + first + c, r * _slope(z, cap), mask=inside)


@triton.jit
def _weigh_kernel(R, P, SHIFT, OUT, n, BLOCK: tl.constexpr):
    """OUT [T] += Σ_v R (P + SHIFT) of two chunks [T, n]; SHIFT [n] or None."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    sum = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        inside = first + c < n
        p = tl.load(P + row * n + first + c, mask=inside, other=0.0)
        if SHIFT is not None:
            p += tl.load(SHIFT + first + c, mask=inside, other=0.0)
        sum += tl.load(R + row * n + first + c, mask=inside, other=0.0).to(tl.float32) * p
    tl.store(OUT + row, tl.load(OUT + row) + tl.sum(sum, 0))


def readout_forces(
    h_o: Tensor,
    y_o: Tensor,
    h_u: Tensor,
    targets_u: Tensor,
    c: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    v: Tensor | None = None,
    uniform: Tensor | None = None,
    train_bias: bool = False,
    reduce: str | None = None,
) -> Tensor:
    """F[m, l] = (h_m·h_l [+ 1]) <g_m, γ_l> as reference.readout_forces defines it, streaming over the vocabulary.

    h_o [M, d], y_o [M], h_u [L, d], targets_u and c [L] or [L, K], weight [V, d], bias [V], v and uniform [L] -> float32
    [M, L]; reduce="update" sums over l -> [M]; reduce="observe" over m -> [L]. Hidden states and weight share float32, bfloat16
    or float16; ids are int64; c, v and uniform are taken in float32. Logits are float32. With half-precision inputs the
    exponentials or residuals that the two sides multiply are bfloat16, summed in float32, and those at the targets float32. A
    row with a NaN, or a target outside [0, V), gives NaN there. It has no derivative. torch.compile keeps it as one node,
    torch.ops.tokdyn.readout_forces_triton.

    Raises ValueError for other shapes, dtypes or devices.

    Cost: 2 (M + L) V d + 2 M L V + 2 (K + 2) M L d flops, the products of one side only if h_o and h_u are one tensor;
    memory: the result, as much again, and about 1.5 GiB, less if M + L < 2000. With v or uniform, the logits twice.
    With reduce and M L > (M + L) d nothing of size M L is made: one side's summed gradient of the weight is, in chunks,
    6 (M + L) V d flops and about 256 MiB.
    """
    return _readout_forces(h_o, y_o, h_u, targets_u, c, weight, bias, scale, softcap, v, uniform, train_bias, reduce)


@torch.library.custom_op(
    "tokdyn::readout_forces_triton",
    mutates_args=(),
    schema="(Tensor h_o, Tensor y_o, Tensor h_u, Tensor targets_u, Tensor c, Tensor weight, Tensor? bias, float scale, "
    "float? softcap, Tensor? v, Tensor? uniform, bool train_bias, str? reduce) -> Tensor",
)
def _readout_forces(
    h_o: Tensor, y_o: Tensor, h_u: Tensor, targets_u: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, scale: float,
    softcap: float | None, v: Tensor | None, uniform: Tensor | None, train_bias: bool, reduce: str | None,
) -> Tensor:  # fmt: skip
    op = "readout_forces"
    require_readout(op, h_o, weight, bias, softcap)
    require_readout(op, h_u, weight, bias, softcap)
    M, L = len(h_o), len(h_u)
    if y_o.shape != (M,) or targets_u.shape[:1] != (L,) or targets_u.dim() > 2 or c.shape != targets_u.shape:
        got = f"{list(y_o.shape)}, {list(targets_u.shape)}, {list(c.shape)}"
        raise ValueError(f"{op}: y_o must be [M]=[{M}], targets_u and c [L]=[{L}] or [{L}, K], got {got}")
    if y_o.dtype != torch.int64 or targets_u.dtype != torch.int64:
        raise ValueError(f"{op}: y_o and targets_u must be int64, got {y_o.dtype} and {targets_u.dtype}")
    for name, x in (("v", v), ("uniform", uniform)):
        if x is not None and x.shape != (L,):
            raise ValueError(f"{op}: {name} must be [L]=[{L}], got {list(x.shape)}")
    if reduce not in (None, "update", "observe"):
        raise ValueError(f'{op}: reduce must be None, "update" or "observe", got {reduce!r}')
    out = _empty_forces(h_o, y_o, h_u, targets_u, c, weight, bias, scale, softcap, v, uniform, train_bias, reduce)
    if not (M and L):
        return out.zero_()
    with on_device_of(op, h_o, y_o, h_u, targets_u, c, weight, bias, v, uniform):
        same = h_o.data_ptr() == h_u.data_ptr() and h_o.shape == h_u.shape and h_o.stride() == h_u.stride()
        factor, cap = factors(scale, softcap)
        readout = Readout(adjacent(weight), bias, scale, factor, cap, train_bias)
        observed = Side(
            adjacent(h_o), y_o[:, None].contiguous(), torch.ones_like(y_o, dtype=torch.float32)[:, None], None, None
        )
        wide = [None if x is None else x.float().contiguous() for x in (v, uniform)]
        updated = Side(adjacent(h_u), targets_u.reshape(L, -1).contiguous(), c.float().reshape(L, -1).contiguous(), *wide)
        if reduce is not None and M * L > (M + L) * h_o.shape[1]:
            return _reduced(observed, updated, readout, reduce, same)
        matrix = _matrix if v is None and uniform is None else _matrix_of_residuals
        F = matrix(observed, updated, readout, same)
        return F if reduce is None else F.sum(1 if reduce == "update" else 0)


@_readout_forces.register_fake
def _empty_forces(
    h_o, y_o, h_u, targets_u, c, weight, bias, scale, softcap, v, uniform, train_bias, reduce
) -> Tensor:  # fmt: skip
    M, L = h_o.shape[0], h_u.shape[0]
    return h_o.new_empty({None: (M, L), "update": (M,), "observe": (L,)}[reduce], dtype=torch.float32)


class Readout(NamedTuple):
    """z = cap tanh(factor (W h + b)), or factor (W h + b) without a cap; None is 1 or no cap. `scale` is dz/d(W h) at 0."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    factor: float | None
    cap: float | None
    train_bias: bool


class Side(NamedTuple):
    """Hidden states [T, d] of one side and its GTerm: targets and c [T, K], v and uniform [T] or None."""

    hidden: Tensor
    targets: Tensor
    c: Tensor
    v: Tensor | None
    uniform: Tensor | None


class Sums(NamedTuple):
    """Running sums of every row, which _absorb_kernel updates chunk by chunk (its docstring names them)."""

    top: Tensor
    sum: Tensor
    mix: Tensor
    own: Tensor
    factor: Tensor


class Softmax(NamedTuple):
    """Every row's softmax, pi = e^{z - base} · inverse, and its GTerm: entropy, total = Σ_k c_k, targets, and Γ at them.

    own [T, K] is Γ at the targets without its entropy and uniform parts, times dz/dx. If a row names a token twice, the first
    carries the sum of their c and `targets` is -1 at the second.
    """

    base: Tensor
    inverse: Tensor
    entropy: Tensor
    total: Tensor
    targets: Tensor
    own: Tensor


def _sums(side: Side) -> Sums:
    T, K = side.targets.shape
    top, sum, mix, factor = side.c.new_empty(4, T)
    return Sums(top, sum, mix, side.c.new_full((T, K), torch.nan), factor)


def _absorb(z: Tensor, v0: int, side: Side, sums: Sums, readout: Readout, stored: Tensor | None) -> None:
    _absorb_kernel[(len(z),)](
        z, side.targets, stored, *sums, readout.bias, z.shape[1], v0, side.targets.shape[1], readout.factor, readout.cap,
        STORE=stored is not None, **ROW,
    )  # fmt: skip


def _softmax(side: Side, sums: Sums, readout: Readout, *, sloped: bool) -> Softmax:
    """Add the targets' columns to the rows' sums. 1 - pi of a target is summed over the others, so no digits are lost."""
    y, K = side.targets, side.targets.shape[1]
    equal = y[:, :, None] == y[:, None, :]  # [T, K, K]
    distinct = ~equal.tril(-1).any(2)
    base = torch.where(sums.top.isfinite(), sums.top, 0.0)
    z = sums.own - base[:, None]
    e = z.exp()
    kept = torch.where(distinct, e, 0.0)
    others = kept @ (1 - torch.eye(K, device=e.device)) if K > 1 else torch.zeros_like(e)
    sum = sums.sum + kept.sum(1)
    total = side.c.sum(1)
    rest = (sums.sum[:, None] + others) / sum[:, None]
    own = (equal * side.c[:, None, :]).sum(2) - total[:, None] + total[:, None] * rest
    if readout.cap is not None and sloped:
        t = sums.own / readout.cap
        own = own * (1 - t) * (1 + t)
    mixed = sums.mix + torch.where(kept > 0, kept * z, 0.0).sum(1)
    known = torch.where(
        distinct, y.clamp(0, len(readout.weight) - 1), -1
    )  # a row with an id outside the vocabulary is NaN already
    return Softmax(base, 1 / sum, sum.log() - mixed / sum, total, known, own)


def _chunks(observed: Side, updated: Side, readout: Readout, same: bool, bytes: int):
    """Yield first column and products [M, n], [L, n] of every chunk; one tensor for both if both sides' h are the same."""
    M = len(observed.hidden)
    hidden = observed.hidden if same else torch.cat([observed.hidden, updated.hidden])
    for v0, z in products(hidden, readout.weight, bytes):
        yield v0, *((z, z) if same else (z[:M], z[M:]))


def _matrix(observed: Side, updated: Side, readout: Readout, same: bool) -> Tensor:
    """F from one read of the logits."""
    M, L = len(observed.hidden), len(updated.hidden)
    at_o, at_u = _sums(observed), _sums(updated)
    X = None
    for v0, z_o, z_u in _chunks(observed, updated, readout, same, BUFFER):
        e_o, e_u = _residuals(z_o, observed), _residuals(z_u, updated)
        _absorb(z_o, v0, observed, at_o, readout, e_o)
        _absorb(z_u, v0, updated, at_u, readout, e_u)
        part = product(e_o, e_u.T)
        if X is None:
            X = part
        else:
            _add_kernel[_tiles(M, L)](X, part, at_o.factor, at_u.factor, M, L, **TILE)
    assert X is not None
    o, u = _softmax(observed, at_o, readout, sloped=True), _softmax(updated, at_u, readout, sloped=True)
    K, weight = u.targets.shape[1], readout.weight
    at_targets, at_y = weight[u.targets.T.flatten()], weight[o.targets[:, 0]]
    step = max(1, ROOM // (4 * L * (K + 2)))
    for first in range(0, M, step):  # as many rows as keep the last products within ROOM
        some = slice(first, first + step)
        h = observed.hidden[some]
        _finish_kernel[_tiles(len(h), L)](
            X[some], product(h, updated.hidden.T), product(h, at_targets.T), product(at_y[some], updated.hidden.T),
            o.targets[some], u.targets,
            o.base[some], o.inverse[some], o.own[some], u.base, u.inverse, u.own, u.total, readout.bias,
            len(h), L, K, float(readout.train_bias), readout.scale**2, readout.factor, readout.cap, **TILE,
        )  # fmt: skip
    return X


def _matrix_of_residuals(observed: Side, updated: Side, readout: Readout, same: bool) -> Tensor:
    """F from two reads of the logits, for Γ of which every column needs the normalised softmax."""
    X = None
    for _, r_o, r_u in _both_residuals(observed, updated, readout, same, BUFFER):
        X = product(r_o, r_u.T) if X is None else X.add_(product(r_o, r_u.T))
    assert X is not None
    gram = product(observed.hidden, updated.hidden.T)
    return gram.add_(float(readout.train_bias)).mul_(X).mul_(readout.scale**2)


def _reduced(observed: Side, updated: Side, readout: Readout, reduce: str, same: bool) -> Tensor:
    """Sum F over one side by that side's summed gradient of the weight, Σ_l γ_l h_lᵀ, in chunks of the vocabulary."""
    left, right = (observed, updated) if reduce == "update" else (updated, observed)
    half = torch.float32 if left.hidden.dtype == torch.float32 else torch.bfloat16
    left_hidden, right_hidden = left.hidden.to(half), right.hidden.to(half)
    out = left.c.new_zeros(len(left.hidden))
    for _, r_o, r_u in _both_residuals(observed, updated, readout, same, ROOM):
        r_left, r_right = (r_o, r_u) if reduce == "update" else (r_u, r_o)
        direction = product(r_right.T, right_hidden).to(half)  # [n, d]
        shift = r_right.sum(0, dtype=torch.float32) if readout.train_bias else None
        onto = product(left_hidden, direction.T)  # [T, n]
        _weigh_kernel[(len(out),)](r_left, onto, shift, out, onto.shape[1], **ROW)
    return out.mul_(readout.scale**2)


def _both_residuals(observed: Side, updated: Side, readout: Readout, same: bool, bytes: int):
    """Read the logits once for every row's softmax, then again: yield dz/dx ⊙ g and dz/dx ⊙ Γ of every chunk."""
    sides = (observed, updated)
    sums = [_sums(side) for side in sides]
    for v0, *both in _chunks(observed, updated, readout, same, bytes):
        for z, side, at in zip(both, sides, sums, strict=True):
            _absorb(z, v0, side, at, readout, None)
    found = [_softmax(side, at, readout, sloped=False) for side, at in zip(sides, sums, strict=True)]
    for v0, *both in _chunks(observed, updated, readout, same, bytes):
        made = [_residuals(z, side) for z, side in zip(both, sides, strict=True)]
        for z, side, softmax, r in zip(both, sides, found, made, strict=True):
            _residual_kernel[(len(z),)](
                z, softmax.targets, r, softmax.base, softmax.inverse, softmax.own, softmax.total, side.v, softmax.entropy,
                side.uniform, readout.bias, z.shape[1], v0, softmax.targets.shape[1], 1 / len(readout.weight),
                readout.factor, readout.cap, **ROW,
            )  # fmt: skip
        yield v0, *made


def _residuals(z: Tensor, side: Side) -> Tensor:
    return torch.empty_like(z, dtype=torch.float32 if side.hidden.dtype == torch.float32 else torch.bfloat16)


def _tiles(M: int, L: int) -> tuple[int]:
    return (triton.cdiv(M, TILE["BM"]) * triton.cdiv(L, TILE["BL"]),)


def variants() -> list[Variant]:
    """The five kernels, for a plain readout with one target, and with bias, softcap and K targets."""
    found = []
    row, tile = dict(BLOCK=ROW["BLOCK"]), dict(BM=TILE["BM"], BL=TILE["BL"])
    rows, tiles = (ROW["num_warps"], ROW["num_stages"]), (TILE["num_warps"], TILE["num_stages"])
    sizes = dict(n="i32:16", v0="i32", K="i32", scale="fp32", cap="fp32")
    sums = {key: "*fp32:16" for key in ("TOP", "SUM", "MIX", "OWN", "F")}

    def add(what: str, kernel: Any, arguments: dict[str, str], constants: dict[str, Any], shape: tuple[int, int], budget=0.0):
        signature = {key: kind for key, kind in arguments.items() if key not in constants}
        elements = constants["BLOCK"] if budget else 0
        found.append(Variant(f"readout_forces {what}", kernel, signature, constants, *shape, elements, budget))

    # Triton compiles K = 1 as a constant; for more targets it unrolls the loop over them, and each copy counts
    for name, absent, budget in (("plain", dict(BIAS=None, scale=None, cap=None, K=1), 18.0), ("bias, softcap", {}, 85.0)):
        for stored in ("*bf16:16", "*fp32:16", None):
            arguments = dict(Z="*fp32:16", Y="*i64:16", E=stored or "", BIAS="*bf16:16") | sums | sizes
            constants = row | absent | dict(STORE=stored is not None) | ({} if stored else dict(E=None))
            what = "sums" if stored is None else f"chunk {stored[1:5]}"
            add(f"{what}, {name}", _absorb_kernel, arguments, constants, rows, budget)
        matrices = {key: "*fp32:16" for key in ("X", "H", "Z_O", "Z_U")} | dict(Y_O="*i64:16", Y_U="*i64:16", BIAS="*bf16:16")
        vectors = {f"{key}_{side}": "*fp32:16" for key in ("BASE", "INVERSE", "OWN") for side in "OU"} | dict(C="*fp32:16")
        numbers = dict(M="i32", L="i32:16", K="i32", shift="fp32", factor="fp32", scale="fp32", cap="fp32")
        add(f"end, {name}", _finish_kernel, matrices | vectors | numbers, tile | absent, tiles)
    arguments = dict(X="*fp32:16", P="*fp32:16", F_O="*fp32:16", F_U="*fp32:16", M="i32", L="i32:16")
    add("added", _add_kernel, arguments, tile, tiles)
    for name in ("bf16", "fp32"):
        arguments = {key: "*fp32:16" for key in ("Z", "BASE", "INVERSE", "OWN", "C", "V", "ENTROPY", "U")} | sizes
        arguments |= dict(Y="*i64:16", R=f"*{name}:16", BIAS="*bf16:16", each="fp32")
        add(f"residuals {name}", _residual_kernel, arguments, row, rows, 100.0)
        arguments = dict(R=f"*{name}:16", P="*fp32:16", SHIFT="*fp32:16", OUT="*fp32:16", n="i32:16")
        add(f"weighed {name}", _weigh_kernel, arguments, row, rows, 8.0)
    return found
