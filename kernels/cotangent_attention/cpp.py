"""cotangent_attention on the CPU in C++: a block of scores stays in the cache from one product to the next (csrc/README.md)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import checks
from ..native import address, extension
from ..tangent_attention.reference import blocks

LANES = 16  # head widths must be a multiple of it
ROWS = 64  # queries per block


def takes(*tensors: Tensor) -> bool:
    """Whether all are float32 on the CPU with a head width that is a multiple of LANES."""
    return all(x.shape[-1] % LANES == 0 and x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)


def cotangent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    *,
    simd: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV for n cotangents, as reference.cotangent_attention defines them.

    q [B, Hk, G, T, D], k [B, Hk, S, D], v [B, Hk, S, E], do [n, B, Hk, G, T, E], float32 on the CPU with D and E multiples of
    16 -> like q, k and v with n in front, in memory with positions before heads, as the projections' backward reads them.
    It has no derivative. `simd` as in token_stats.

    Raises ValueError for shapes, dtypes and devices that do not fit, RuntimeError without the extension.

    Cost: 8 T S D flops per head and cotangent (half of that under a causal mask), and one softmax for all of them; memory
    besides the result: 256 KiB per thread and 3 B H 64 S numbers.
    """
    return _cotangent_attention(q, k, v, do, mask, scale, softcap, simd)


@torch.library.custom_op(
    "tokdyn::cotangent_attention_cpp",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor d_o, Tensor? mask, float scale, float? softcap, str simd) "
    "-> (Tensor, Tensor, Tensor)",
)
def _cotangent_attention(
    q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, mask: Tensor | None, scale: float, softcap: float | None, simd: str
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _empty(q, k, v, d_o, mask, scale, softcap, simd)
    d_o = d_o if d_o.stride(-1) == 1 else d_o.contiguous()
    n, (B, Hk, G, _, D), (S, E) = len(d_o), q.shape, v.shape[2:]
    reached = 0  # dk and dv are written for the keys before it
    for rows, keys, P, slope in blocks(q, k, mask, scale, softcap, rows=ROWS):
        near, seen = k[:, :, keys].contiguous(), keys.stop - keys.start
        padding = (0, -seen % LANES)
        _zero_keys(dk, dv, reached, keys.start)
        P = P.contiguous()
        held = (
            pad(P, padding), pad(P * slope, padding), q[..., rows, :].contiguous(), near,
            pad(v[:, :, keys].mT, padding).contiguous(), (P @ v[:, :, None, keys]).contiguous(),
        )  # fmt: skip
        sizes = (n, B, Hk, G, rows.stop - rows.start, seen, max(0, reached - keys.start), seen + padding[1], D, E)
        sides = (d_o[..., rows, :], dq[..., rows, :], dk[..., None, keys, :], dv[..., None, keys, :])
        extension().cotangent_attention(
            sizes, [address(x) for x in held], *(_rows(x) for x in sides), threads=torch.get_num_threads(), simd=simd
        )
        reached = max(reached, keys.stop)
    _zero_keys(dk, dv, reached, S)
    return dq, dk, dv


@_cotangent_attention.register_fake
def _empty(q, k, v, d_o, mask, scale, softcap, simd) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments, then return uninitialised results; also the op's fake for torch.compile."""
    if not takes(q, k, v, d_o):
        given = ", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in (q, k, v, d_o))
        raise ValueError(f"cotangent_attention: float32 on the CPU with heads of a multiple of {LANES}, got {given}")
    shapes = dict(q=(q, "B Hk G T D"), k=(k, "B Hk S D"), v=(v, "B Hk S E"), do=(d_o, "n B Hk G T E"), mask=(mask, "#B 1 T S"))
    checks.shapes("cotangent_attention", shapes)
    n, (B, Hk, G, T, D) = len(d_o), q.shape
    dq = q.new_empty(n, B, T, Hk, G, D).permute(0, 1, 3, 4, 2, 5)
    dk, dv = (x.new_empty(n, B, x.shape[2], Hk, x.shape[-1]).transpose(2, 3) for x in (k, v))
    return dq, dk, dv


def _zero_keys(dk: Tensor, dv: Tensor, start: int, stop: int) -> None:
    """Set dK and dV to zero for keys in [start, stop), which no query sees."""
    for x in (dk, dv):
        x[..., start : max(start, stop), :] = 0


def _rows(x: Tensor) -> tuple[int, ...]:
    """Address and strides of n, B, Hk, G and rows, as the extension takes them."""
    return address(x), *x.stride()[:5]
