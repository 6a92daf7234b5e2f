"""The cases: for every operator its sizes, who computes it, what it must move and multiply, and the bars it is held to.

A side is a function of the case's inputs. "eager" is what one would write in plain torch, "compile" the same through
torch.compile; sides called "..., loss only" compute less than we do. Sides are listed wherever they might run; one that does
not is reported with the reason. Forms of an operator take the operator's own arguments, and makers of a case its device, sizes
and dtype, some more than five.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops

Side = Callable[..., Any]
FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Bar:
    """A number to meet: `measure` of a side against `limit`.

    speedup: time of `other` by that of the side, at least; floor: share of the floor, at least; ms and mib: time and peak
    memory, at most; memory: peak memory by that of `other`, at most; times: time by that of `other`, at most.
    """

    side: str
    measure: str
    limit: int | float
    other: str = ""


@dataclass(frozen=True)
class Case:
    """One measurement: inputs made on a device, and sides that take them."""

    name: str
    op: str
    dtype: torch.dtype
    sizes: dict[str, int]
    make: Callable[[torch.device], tuple]
    sides: dict[str, Side]
    moved: int | float = 0
    flops: int | float = 0
    bars: list[Bar] = field(default_factory=list)
    main: Callable[[Any], Tensor] = lambda result: result  # what the sides are compared by
    timed: bool = True  # else only memory is of interest


def random(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every run."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, device=device, dtype=dtype).normal_(0, scale, generator=generator)


def tokens(device: torch.device, V: int, *shape: int, seed: int = 0) -> Tensor:
    """Token ids."""
    return torch.randint(V, shape, device=device, generator=torch.Generator(device).manual_seed(seed))


def native(op: Side, device: torch.device, *, cuda: bool = False, **options: Any) -> dict[str, Side]:
    """Our implementations of an operator for this device, by the name that `impl` takes."""
    names = ["cpp"] if device.type == "cpu" else ["triton"] + ["cuda"] * cuda
    return {name: (lambda *x, name=name: op(*x, impl=name, **options)) for name in names}


def compiled(function: Side) -> Side:
    """The function through torch.compile, at its first call."""
    made: list[Side] = []

    def call(*inputs: Any) -> Any:
        if not made:
            made.append(torch.compile(function, dynamic=False))
        return made[0](*inputs)

    return call


def eager_token_stats(z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """token_stats in plain torch, from all log-probabilities."""
    log_pi = z.float().log_softmax(-1)
    pi = log_pi.exp()
    at_y = log_pi.gather(1, y[:, None])
    top, argmax = log_pi.max(1)
    collision = pi.square().sum(1)
    p_y = at_y[:, 0].exp()
    entropy = -(pi * log_pi).sum(1)
    g_norm = (collision - 2 * p_y + 1).clamp(min=0).sqrt()
    logsumexp = z.gather(1, y[:, None])[:, 0].float() - at_y[:, 0]
    return logsumexp, at_y[:, 0], entropy, collision, g_norm, (log_pi > at_y).sum(1), argmax, top


def eager_linear(h: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """linear_token_stats in plain torch, with all logits in memory."""
    return eager_token_stats(h @ W.T, y)


def eager_topk(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """topk_log_probs in plain torch."""
    return z.float().log_softmax(-1).topk(k)


def eager_apply_A(z: Tensor, x: Tensor) -> Tensor:
    """apply_A in plain torch: x - pi·x."""
    return x - (z.float().softmax(-1) * x).sum(-1, keepdim=True).to(x.dtype)


def eager_softmax_jvp(z: Tensor, x: Tensor) -> Tensor:
    """softmax_jvp in plain torch: pi ⊙ (x - pi·x)."""
    pi = z.float().softmax(-1)
    return (pi * (x - (pi * x).sum(-1, keepdim=True))).to(x.dtype)


def eager_readout_forces(h_o: Tensor, y_o: Tensor, h_u: Tensor, y_u: Tensor, c: Tensor, W: Tensor) -> Tensor:
    """readout_forces in plain torch: both residual matrices [M, V], then two products."""
    ones = torch.ones_like(c)[:, None]
    g = -(h_o @ W.T).float().softmax(-1)
    g.scatter_add_(1, y_o[:, None], torch.ones_like(h_o[:, :1], dtype=g.dtype))
    gamma = -(h_u @ W.T).float().softmax(-1)
    gamma.scatter_add_(1, y_u[:, None], ones)
    gamma *= c[:, None]
    return (h_o @ h_u.T).float() * (g.to(W.dtype) @ gamma.to(W.dtype).T).float()


def eager_dual_gram(a1: Tensor, a2: Tensor, d1: Tensor, d2: Tensor) -> Tensor:
    """dual_gram in plain torch: (a1 a2ᵀ) ⊙ (d1 d2ᵀ)."""
    return (a1 @ a2.T) * (d1 @ d2.T)


def eager_segments(a1: Tensor, a2: Tensor, d1: Tensor, d2: Tensor, rows: Tensor, columns: Tensor, S: int) -> Tensor:
    """dual_gram over segments in plain torch: the whole matrix, then its sums over pairs of segments."""
    gram = eager_dual_gram(a1, a2, d1, d2).float()
    by_row = gram.new_zeros(S, len(a2)).index_add_(0, rows, gram)
    return gram.new_zeros(S, S).index_add_(1, columns, by_row)


def liger_loss(z: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of every row."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    _needs_gpu(z)
    return LigerCrossEntropyLoss(reduction="none")(z, y)


def liger_linear_loss(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of every row from hidden states."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    _needs_gpu(h)
    return LigerFusedLinearCrossEntropyLoss(reduction="none")(W, h, y)


def trl_stats(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and log-probability by TRL, from logits; its fused kernel on a GPU, what that is tested against elsewhere."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    log_prob, entropy = selective_log_softmax_and_entropy(z[None], y[None], entropy_requires_grad=False)
    return entropy[0], log_prob[0]


def trl_linear(h: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor | None, ...]:
    """Entropy, log-probability, log Σπ², mean logit and whether the target is the argmax, by TRL's chunked_logprob."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    log_prob, entropy, *others = ChunkedLogProbFunction.apply(h, W, None, y, 1.0, CHUNK)
    return entropy, log_prob, *others


def _needs_gpu(x: Tensor) -> None:
    if not x.is_cuda:
        raise RuntimeError("its kernels are Triton, which needs a GPU")


def cce_loss(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of every row by cut-cross-entropy, whose own kernel needs a GPU."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(h, W, y, reduction="none", impl="cce" if h.is_cuda else "torch_compile")


def token_stats(device: torch.device, T: int, V: int, dtype: torch.dtype) -> Case:
    """The case of token_stats."""
    sides: dict[str, Side] = native(ops.token_stats, device, cuda=True)
    bars = [Bar("cpp", "speedup", 10, "eager"), Bar("cpp", "speedup", 2, "compile"), Bar("cpp", "floor", 0.30)]
    if device.type == "cuda":
        bars = [Bar(side, "floor", 0.85) for side in ("triton", "cuda")]
    sides |= {"eager": eager_token_stats, "compile": compiled(eager_token_stats), "liger, loss only": liger_loss}
    sides |= {"TRL, fewer statistics": trl_stats}
    return Case(
        "token_stats", "token_stats", dtype, dict(T=T, V=V),
        lambda device: (random(device, dtype, T, V, scale=3.0), tokens(device, V, T)),
        sides, moved=T * V * dtype.itemsize, bars=bars, main=loss_of,
    )  # fmt: skip


def loss_of(result: Any) -> Tensor:
    """Log-probability of the target, from the statistics or from a loss."""
    return -result if isinstance(result, Tensor) else result[1]


def linear_token_stats(device: torch.device, T: int, d: int, V: int, dtype: torch.dtype, *, large: bool = False) -> Case:
    """The case of linear_token_stats; `large` measures the memory of our own implementation alone."""
    sides: dict[str, Side] = native(ops.linear_token_stats, device)
    bars = [Bar("cpp", "times", 1.15, "bare matmul"), Bar("cpp", "mib", 64)]
    if device.type == "cuda":
        bars = [Bar("triton", "ms", 16), Bar("triton", "mib", 1024)]
    if large:
        bars = bars[1:]
    else:
        sides |= {
            "bare matmul": lambda h, W, y: h @ W.T,
            "eager": eager_linear,
            "compile": compiled(eager_linear),
            "liger, loss only": liger_linear_loss,
            "cut-cross-entropy, loss only": cce_loss,
            "TRL, fewer statistics": trl_linear,
        }
    return Case(
        "linear_token_stats" + ", memory" * large, "linear_token_stats", dtype, dict(T=T, d=d, V=V),
        lambda device: (random(device, dtype, T, d), random(device, dtype, V, d, scale=3 * d**-0.5), tokens(device, V, T)),
        sides, flops=2.0 * T * d * V, bars=bars, main=lambda r: r if isinstance(r, Tensor) and r.dim() == 2 else loss_of(r),
        timed=not large,
    )  # fmt: skip


def topk_log_probs(device: torch.device, T: int, V: int, k: int, dtype: torch.dtype) -> Case:
    """The case of topk_log_probs."""
    sides = native(lambda z, impl: ops.topk_log_probs(z, k, impl=impl), device, cuda=True)
    return Case(
        "topk_log_probs", "topk_log_probs", dtype, dict(T=T, V=V, k=k),
        lambda device: (random(device, dtype, T, V, scale=3.0),),
        sides | {"eager": lambda z: eager_topk(z, k), "compile": compiled(lambda z: eager_topk(z, k))},
        moved=T * V * dtype.itemsize, main=lambda result: result[0],
    )  # fmt: skip


def jacobian(op: str, device: torch.device, T: int, V: int, dtype: torch.dtype) -> Case:
    """The case of apply_A or softmax_jvp on one column; on the CPU the reference is our only implementation."""
    call, eager = {"apply_A": (ops.apply_A, eager_apply_A), "softmax_jvp": (ops.softmax_jvp, eager_softmax_jvp)}[op]
    ours = "reference" if device.type == "cpu" else "triton"
    sides: dict[str, Side] = {ours: lambda z, x: call(z, x, impl=ours), "eager": eager, "compile": compiled(eager)}
    return Case(
        op, op, dtype, dict(T=T, V=V),
        lambda device: (random(device, dtype, T, V, scale=3.0), random(device, dtype, T, V, seed=1)),
        sides, moved=3 * T * V * dtype.itemsize,
    )  # fmt: skip


def readout_forces(device: torch.device, M: int, d: int, V: int, dtype: torch.dtype, *, large: bool = False) -> Case:
    """The case of readout_forces, M tokens a side; `large` sums over the update and measures our own memory alone."""
    reduce = "update" if large else None
    sides: dict[str, Side] = native(ops.readout_forces, device, reduce=reduce)
    bars = [Bar("cpp", "speedup", 1.3, "eager"), Bar("cpp", "memory", 0.1, "eager")] if dtype == FP32 else []
    if device.type == "cuda":
        bars = [Bar("triton", "floor", 1 / 1.3)]
    elif dtype == BF16:
        sides["cpp on fp32"] = lambda h_o, y_o, h_u, y_u, c, W: ops.readout_forces(
            h_o.float(), y_o, h_u.float(), y_u, c, W.float(), impl="cpp"
        )
        if torch.cpu._is_amx_tile_supported():
            bars = [Bar("cpp", "speedup", 2, "cpp on fp32")]
    if large:
        bars = [Bar("cpp", "mib", 512)]
    else:
        sides |= {"eager": eager_readout_forces, "compile": compiled(eager_readout_forces)}

    def make(device: torch.device) -> tuple:
        h_o, h_u = (random(device, dtype, M, d, seed=s) for s in (1, 2))
        y_o, y_u = (tokens(device, V, M, seed=s) for s in (1, 2))
        c = random(device, FP32, M, seed=3)
        return h_o, y_o, h_u, y_u, c, random(device, dtype, V, d, scale=3 * d**-0.5)

    pairs = min(2.0 * M * M * (V + d), 4.0 * M * d * V) if large else 2.0 * M * M * (V + d)
    return Case(
        "readout_forces" + ", summed, memory" * large, "readout_forces", dtype, dict(M=M, L=M, d=d, V=V),
        make, sides, flops=4.0 * M * d * V + pairs, bars=bars, timed=not large,
    )  # fmt: skip


def dual_gram(device: torch.device, M: int, p: int, dtype: torch.dtype, *, segments: int = 0) -> Case:
    """The case of dual_gram; with `segments`, summed over pairs of that many segments a side."""
    cpu = device.type == "cpu"
    ours = "cpp" if cpu else "triton"
    flops = 4.0 * M * M * p

    def make(device: torch.device) -> tuple:
        factors = tuple(random(device, dtype, M, p, seed=s) for s in range(4))
        if not segments:
            return factors
        ids = torch.arange(M, device=device) * segments // M
        return *factors, ids, ids.clone(), segments

    if not segments:
        sides = native(ops.dual_gram, device) | {"eager": eager_dual_gram, "compile": compiled(eager_dual_gram)}
        bars = [Bar("cpp", "speedup", 1, "eager")] if cpu else [Bar(ours, "ms", 1.83)]
        return Case("dual_gram", "dual_gram", dtype, dict(M=M, L=M, p=p, q=p), make, sides, flops=flops, bars=bars)

    def summed(a1: Tensor, a2: Tensor, d1: Tensor, d2: Tensor, rows: Tensor, columns: Tensor, S: int) -> Tensor:
        out = torch.zeros(S, S, device=a1.device)
        return ops.dual_gram(a1, a2, d1, d2, out=out, segments=(rows, columns), impl=ours)

    return Case(
        "dual_gram, summed", "dual_gram", dtype, dict(M=M, L=M, p=p, q=p, segments=segments), make,
        {ours: summed, "eager": eager_segments, "compile": compiled(eager_segments)},
        flops=min(flops, 4.0 * (M + segments**2) * p * p),
        bars=[Bar("cpp", "speedup", 3, "eager"), Bar("cpp", "mib", 64)] if cpu else [Bar(ours, "ms", 0.1)],
    )  # fmt: skip


def attention(op: str, device: torch.device, n: int, T: int, H: int, D: int, dtype: torch.dtype) -> Case:
    """The case of tangent_attention or cotangent_attention: n of them, T positions, H heads of width D, no mask."""
    scale = D**-0.5

    def run(form: str, *x: Tensor) -> Any:
        import importlib

        return getattr(importlib.import_module(f"tokdyn.kernels.{op}.{form}"), op)(*x, None, scale)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, 0], k, v, scale=scale)[:, :, None]

    def by_torch(q: Tensor, k: Tensor, v: Tensor, *moves: Tensor) -> Any:
        if op == "tangent_attention":
            one = lambda *t: torch.func.jvp(plain, (q, k, v), t)[1]  # noqa: E731
            return torch.func.vmap(one)(*moves)
        back = torch.func.vjp(plain, q, k, v)[1]
        return torch.func.vmap(back)(*moves)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k[:, :, None].mT) * scale).softmax(-1) @ v[:, :, None]

    def make(device: torch.device) -> tuple:
        q, k, v = (random(device, dtype, 1, H, *[1] * (s == 0), T, D, seed=s) for s in range(3))
        if op == "cotangent_attention":
            return q, k, v, random(device, dtype, n, 1, H, 1, T, D, seed=3)
        dq, dk, dv = (random(device, dtype, n, 1, H, *[1] * (s == 0), T, D, seed=3 + s) for s in range(3))
        return q, k, v, dq, dk, dv

    sides: dict[str, Side] = {"reference": lambda *x: run("reference", *x), "torch.func": by_torch}
    bars = []
    if device.type == "cpu" and op == "cotangent_attention":
        sides = {"cpp": lambda *x: run("cpp", *x)} | sides
    if device.type == "cuda":
        sides = {"triton": lambda *x: run("triton", *x)} | sides
        sides["flash forward"] = lambda q, k, v, *moves: forward(q, k, v)
        bars = [Bar("triton", "times", 45, "flash forward")] if op == "tangent_attention" else []
    return Case(
        op, op, dtype, dict(n=n, T=T, heads=H, D=D), make, sides, flops=8.0 * n * H * T * T * D, bars=bars,
        main=lambda result: result if isinstance(result, Tensor) else result[0],
    )  # fmt: skip


def cases_on(device: torch.device, quick: bool = False) -> list[Case]:
    """The cases of a device; `quick` ones take a moment and show only that everything runs."""
    if quick:
        T, V, d, k, dtypes = 6, 1003, 24, 3, [FP32, BF16]
        attend = dict(n=2, T=20, H=2, D=16, dtype=BF16 if device.type == "cuda" else FP32)
        many, gram, summed, rank, segments, wide = 8, 24, 24, 8, 3, FP32
    elif device.type == "cpu":
        T, V, d, k, dtypes = 256, 151936, 896, 10, [FP32, BF16]
        attend = dict(n=8, T=512, H=8, D=64, dtype=FP32)
        many, gram, summed, rank, segments, wide = 512, 2048, 8192, 64, 32, FP32
    else:
        T, V, d, k, dtypes = 8192, 151936, 4096, 10, [BF16]
        attend = dict(n=16, T=4096, H=16, D=64, dtype=BF16)
        many, gram, summed, rank, segments, wide = 8192, 8192, 8192, 64, 64, BF16
    linear_T = 1024 if device.type == "cpu" and not quick else T
    gram_p = 4096 if device.type == "cuda" and not quick else d
    found = [token_stats(device, T, V, dtype) for dtype in dtypes]
    found += [linear_token_stats(device, linear_T, d, V, wide)]
    found += [topk_log_probs(device, T, V, k, dtype) for dtype in dtypes[:1]]
    found += [jacobian(op, device, T, V, dtypes[0]) for op in ("apply_A", "softmax_jvp")]
    found += [readout_forces(device, many, d, V, dtype) for dtype in dtypes]
    found += [dual_gram(device, gram, gram_p, wide), dual_gram(device, summed, rank, wide, segments=segments)]
    found += [attention(op, device, **attend) for op in ("tangent_attention", "cotangent_attention")]  # type: ignore[arg-type]
    if device.type == "cpu":
        large = 16 if quick else 8192
        found += [linear_token_stats(device, large, d, V, wide, large=True)]
        found += [readout_forces(device, large, d, V, wide, large=True)]
    return found
