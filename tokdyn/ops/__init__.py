"""The operators, one dispatcher each: shapes are the contract, `impl` says who computes.

impl=None takes the form of the tensors' device, "cpp" on the CPU and "triton" on a GPU, where it is installed, knows the dtype
and no gradient is wanted; else "reference", the plain torch specification in kernels/<op>/reference.py. A name given explicitly
never falls back: it raises where it cannot run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import _native
from ..kernels.apply_A import reference as _apply_A
from ..kernels.cotangent_attention import cpp as _cotangent_attention_cpp
from ..kernels.cotangent_attention import reference as _cotangent_attention
from ..kernels.dual_gram import cpp as _dual_gram_cpp
from ..kernels.dual_gram import reference as _dual_gram
from ..kernels.linear_token_stats import cpp as _linear_token_stats_cpp
from ..kernels.linear_token_stats import reference as _linear_token_stats
from ..kernels.readout_forces import cpp as _readout_forces_cpp
from ..kernels.readout_forces import reference as _readout_forces
from ..kernels.softmax_jvp import reference as _softmax_jvp
from ..kernels.tangent_attention import fused as _fused_attention
from ..kernels.tangent_attention import reference as _tangent_attention
from ..kernels.token_stats import cpp as _token_stats_cpp
from ..kernels.token_stats import cuda as _token_stats_cuda
from ..kernels.token_stats import reference as _token_stats
from ..kernels.topk_log_probs import cpp as _topk_log_probs_cpp
from ..kernels.topk_log_probs import cuda as _topk_log_probs_cuda
from ..kernels.topk_log_probs import reference as _topk_log_probs

TRITON_MOST_K = 128  # of topk_log_probs; for more, impl=None takes the reference
TRITON_WIDEST_HEAD = 256  # of attention and its derivatives; likewise


class TokenStats(NamedTuple):
    """Statistics of pi at each position, each [T]; nats, probabilities and counts."""

    logsumexp: Tensor
    log_prob: Tensor
    entropy: Tensor
    collision: Tensor
    g_norm: Tensor
    rank: Tensor
    argmax: Tensor
    argmax_log_prob: Tensor

    @classmethod
    def joined(cls, parts: Iterable[TokenStats]) -> TokenStats:
        """The positions of several, one after the other."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))


def _require_reference(op: str, impl: str | None) -> None:
    if impl not in (None, "reference"):
        raise ValueError(f"{op}: impl={impl!r} is not built for this operator")


def token_stats(logits: Float[Tensor, "T V"], targets: Int[Tensor, " T"], *, impl: str | None = None) -> TokenStats:
    """Log-sum-exp, target log-prob, entropy, collision ‖pi‖², ‖pi - e_y‖, rank and argmax of every row.

    Args:
        logits: [T, V], fp32, bf16 or fp64.
        targets: [T], in [0, V).
        impl: None, "reference", "cpp" (CPU, fp32 and bf16, no gradient), "triton" (GPU, also fp16, no gradient) or "cuda"
            (GPU, fp32 and bf16, no gradient). None takes cpp or triton, by the tensors' device, where it is there and applies.

    Raises:
        ValueError: an impl that is not built, or a target outside the vocabulary; Triton, which does not wait for the GPU to
            look at targets, gives NaN, rank 0 and argmax -1 for such a row, and so does cuda.
        RuntimeError: impl="triton" without the package triton, impl="cuda" where the CUDA part was not built.
    """
    if impl == "cuda":
        return TokenStats(*_token_stats_cuda.token_stats(logits, targets))
    if impl == "triton" or (impl is None and _takes_triton(logits) and _adjacent(logits)):
        _require_triton("token_stats")
        from ..kernels.token_stats import triton

        return TokenStats(*triton.token_stats(logits, targets))
    _check_targets(targets, logits.shape[-1])
    if impl == "cpp" or (impl is None and _takes_cpp(logits) and _adjacent(logits)):
        return TokenStats(*_token_stats_cpp.token_stats(logits, targets))
    _require_reference("token_stats", impl)
    return TokenStats(*_token_stats.token_stats(logits, targets))


def linear_token_stats(
    hidden: Float[Tensor, "T d"],
    weight: Float[Tensor, "V d"],
    targets: Int[Tensor, " T"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: str | None = None,
) -> TokenStats:
    """token_stats of softcap(scale (W h + b)) / temperature; the [T, V] logits never exist as a whole."""
    if impl == "triton" or (impl is None and _takes_triton(hidden, weight, bias) and hidden.dtype == weight.dtype):
        _require_triton("linear_token_stats")
        from ..kernels.linear_token_stats import triton

        return TokenStats(
            *triton.linear_token_stats(
                hidden, weight, targets, bias=bias, scale=scale, softcap=softcap, temperature=temperature
            )
        )
    _check_targets(targets, weight.shape[0])
    if impl == "cpp" or (impl is None and _takes_cpp(hidden, weight, bias)):
        return TokenStats(
            *_linear_token_stats_cpp.linear_token_stats(
                hidden, weight, targets, bias=bias, scale=scale, softcap=softcap, temperature=temperature
            )
        )
    _require_reference("linear_token_stats", impl)
    return TokenStats(
        *_linear_token_stats.linear_token_stats(
            hidden, weight, targets, bias=bias, scale=scale, softcap=softcap, temperature=temperature
        )
    )


def topk_log_probs(logits: Float[Tensor, "T V"], k: int, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """The k most likely tokens of every row: log-probabilities [T, k], falling, and ids [T, k]."""
    _check_k(k, logits.shape[-1])
    if impl == "cuda":
        return _topk_log_probs_cuda.topk_log_probs(logits, k)
    if impl == "triton" or (impl is None and _takes_triton(logits) and _adjacent(logits) and k <= TRITON_MOST_K):
        _require_triton("topk_log_probs")
        from ..kernels.topk_log_probs import triton

        return triton.topk_log_probs(logits, k)
    if impl == "cpp" or (impl is None and _takes_cpp(logits) and _adjacent(logits)):
        return _topk_log_probs_cpp.topk_log_probs(logits, k)
    _require_reference("topk_log_probs", impl)
    return _topk_log_probs.topk_log_probs(logits, k)


def linear_topk_log_probs(
    hidden: Float[Tensor, "T d"],
    weight: Float[Tensor, "V d"],
    k: int,
    *,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """topk_log_probs of softcap(scale (W h + b)), from the hidden states."""
    _check_k(k, weight.shape[0])
    fits = k <= TRITON_MOST_K and hidden.dtype == weight.dtype
    if impl == "triton" or (impl is None and _takes_triton(hidden, weight, bias) and fits):
        _require_triton("linear_topk_log_probs")
        from ..kernels.topk_log_probs import triton

        return triton.linear_topk_log_probs(hidden, weight, k, bias=bias, scale=scale, softcap=softcap)
    if impl == "cpp" or (impl is None and _takes_cpp(hidden, weight, bias)):
        return _topk_log_probs_cpp.linear_topk_log_probs(hidden, weight, k, bias=bias, scale=scale, softcap=softcap)
    _require_reference("linear_topk_log_probs", impl)
    return _topk_log_probs.linear_topk_log_probs(hidden, weight, k, bias=bias, scale=scale, softcap=softcap)


def apply_A(logits: Float[Tensor, "T V"], x: Float[Tensor, "T V *k"], *, impl: str | None = None) -> Float[Tensor, "T V *k"]:
    """A x = x - (pi·x) 1: how log pi moves when the logits move by x, for one column or k."""
    if impl == "triton" or (impl is None and _takes_triton(logits, x) and _adjacent(logits)):
        _require_triton("apply_A")
        from ..kernels.apply_A import triton

        return triton.apply_A(logits, x)
    _require_reference("apply_A", impl)
    return _apply_A.apply_A(logits, x)


def softmax_jvp(
    logits: Float[Tensor, "T V"], x: Float[Tensor, "T V *k"], *, impl: str | None = None
) -> Float[Tensor, "T V *k"]:
    """pi ⊙ (x - pi·x): how pi moves when the logits move by x, for one column or k."""
    if impl == "triton" or (impl is None and _takes_triton(logits, x) and _adjacent(logits)):
        _require_triton("softmax_jvp")
        from ..kernels.softmax_jvp import triton

        return triton.softmax_jvp(logits, x)
    _require_reference("softmax_jvp", impl)
    return _softmax_jvp.softmax_jvp(logits, x)


def readout_forces(
    h_o: Float[Tensor, "M d"],
    y_o: Int[Tensor, " M"],
    h_u: Float[Tensor, "L d"],
    targets_u: Int[Tensor, " L"] | Int[Tensor, "L K"],
    c: Float[Tensor, " L"] | Float[Tensor, "L K"],
    weight: Float[Tensor, "V d"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    v: Float[Tensor, " L"] | None = None,
    uniform: Float[Tensor, " L"] | None = None,
    train_bias: bool = False,
    reduce: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """F[m,l] = (h_m·h_l) <g_m, Γ_l>, the force through the readout weight: [M, L], or [M] or [L] with reduce.

    Args:
        h_o, y_o: inputs of the readout at the observed tokens and those tokens.
        h_u, targets_u, c, v, uniform: the same of the update, with its GTerm (objective.GTerm).
        weight, bias, scale, softcap: z = softcap(scale (W h + b)).
        train_bias: the bias moves as well (adds 1 to h_m·h_l).
        reduce: None, "update" (sum over l) or "observe" (sum over m).
        impl: None, "reference", "cpp" (CPU, fp32 and bf16, no gradient) or "triton" (GPU, also fp16, no gradient). None takes
            the form of the tensors' device where it is installed and applies.

    Raises:
        ValueError: shapes that do not fit, or an unknown reduce or impl.
        RuntimeError: impl="triton" without the package triton.

    Cost: O((M + L) V d + M L (V + d)) flops; the reference holds [M, V] and [L, V], the others stream over V.
    """
    if c.shape != targets_u.shape:
        raise ValueError(f"c must have the shape of targets_u={list(targets_u.shape)}, got {list(c.shape)}")
    if reduce not in (None, "update", "observe"):
        raise ValueError(f'reduce must be None, "update" or "observe", got {reduce!r}')
    one_dtype = h_o.dtype == h_u.dtype == weight.dtype
    if impl == "triton" or (impl is None and one_dtype and _takes_triton(h_o, h_u, weight, bias, c, v, uniform)):
        _require_triton("readout_forces")
        from ..kernels.readout_forces import triton

        return triton.readout_forces(
            h_o, y_o, h_u, targets_u, c, weight,
            bias=bias, scale=scale, softcap=softcap, v=v, uniform=uniform, train_bias=train_bias, reduce=reduce,
        )  # fmt: skip
    if impl == "cpp" or (impl is None and _takes_cpp(h_o, h_u, weight, bias, c, v, uniform)):
        return _readout_forces_cpp.readout_forces(
            h_o, y_o, h_u, targets_u, c, weight,
            bias=bias, scale=scale, softcap=softcap, v=v, uniform=uniform, train_bias=train_bias, reduce=reduce,
        )  # fmt: skip
    _require_reference("readout_forces", impl)
    return _readout_forces.readout_forces(
        h_o, y_o, h_u, targets_u, c, weight,
        bias=bias, scale=scale, softcap=softcap, v=v, uniform=uniform, train_bias=train_bias, reduce=reduce,
    )  # fmt: skip


def dual_gram(
    a1: Float[Tensor, "M p"],
    a2: Float[Tensor, "L p"],
    d1: Float[Tensor, "M q"],
    d2: Float[Tensor, "L q"],
    *,
    out: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    impl: str | None = None,
) -> Tensor:
    """out += (a1 a2ᵀ) ⊙ (d1 d2ᵀ), [M, L], or summed over pairs of segments, [S_o, S_u].

    Args:
        a1, a2, d1, d2: what enters a linear layer at the observed and updated positions, and what its output is to move by.
        out: added to instead of a new tensor; float32 where impl is not "reference".
        segments: ids of the observed [M] and updated [L] positions.
        impl: None, "reference", "cpp" (CPU) or "triton" (GPU); the last two sum in float32 and have no gradient. None takes the
            form of the tensors' device where it is installed and applies.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown impl.
        RuntimeError: impl="triton" without the package triton.
    """
    factors = (a1, a2, d1, d2)
    one_dtype = len({x.dtype for x in factors}) == 1 and (out is None or out.dtype == torch.float32)
    if impl == "triton" or (impl is None and one_dtype and _takes_triton(*factors, out)):
        _require_triton("dual_gram")
        from ..kernels.dual_gram import triton

        return triton.dual_gram(a1, a2, d1, d2, out=out, segments=segments)
    if impl == "cpp" or (impl is None and _takes_cpp(a1, a2, d1, d2, out) and _adjacent(out)):
        return _dual_gram_cpp.dual_gram(a1, a2, d1, d2, out=out, segments=segments)
    _require_reference("dual_gram", impl)
    return _dual_gram.dual_gram(a1, a2, d1, d2, out=out, segments=segments)


def attention(
    q: Float[Tensor, "B Hk G T D"],
    k: Float[Tensor, "B Hk S D"],
    v: Float[Tensor, "B Hk S E"],
    mask: Bool[Tensor, "#B 1 T S"] | None,
    scale: float,
    softcap: float | None = None,
    *,
    impl: str | None = None,
) -> Float[Tensor, "B Hk G T E"]:
    """softmax(cap(scale q kᵀ) where mask) v, G heads of queries to every head of keys; a row that sees nothing gives 0.

    Args:
        q, k, v: queries, keys and values.
        mask: True where a key is seen, for every sequence or once for all; None sees everything.
        scale, softcap: scores are cap(x) = softcap tanh(x / softcap) of x = scale q·k, x itself without softcap.
        impl: None, "reference" or "triton" (GPU, heads up to 256 wide, no gradient). None takes triton where it is installed
            and applies, and on the CPU without softcap PyTorch's fused kernel.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown impl.
        RuntimeError: impl="triton" without the package triton.
    """
    if impl == "triton" or (impl is None and _takes_attention(q, k, v)):
        _require_triton("attention")
        from ..kernels.tangent_attention import triton

        return triton.attention(q, k, v, mask, scale, softcap)
    if impl is None and softcap is None and q.device.type == "cpu":
        return _fused_attention.attention(q, k, v, mask, scale)
    _require_reference("attention", impl)
    return _tangent_attention.attention(q, k, v, mask, scale, softcap)


def tangent_attention(
    q: Float[Tensor, "B Hk G T D"],
    k: Float[Tensor, "B Hk S D"],
    v: Float[Tensor, "B Hk S E"],
    dq: Float[Tensor, "n B Hk G T D"],
    dk: Float[Tensor, "n B Hk S D"],
    dv: Float[Tensor, "n B Hk S E"],
    mask: Bool[Tensor, "#B 1 T S"] | None,
    scale: float,
    softcap: float | None = None,
    *,
    impl: str | None = None,
) -> Float[Tensor, "n B Hk G T E"]:
    """How `attention` moves along n tangents (dq, dk, dv), nothing of size T x T kept for any of them.

    Arguments and errors as in `attention`. Cost: 8 T S D flops a head and tangent, and the softmax recomputed.
    """
    if impl == "triton" or (impl is None and _takes_attention(q, k, v, dq, dk, dv)):
        _require_triton("tangent_attention")
        from ..kernels.tangent_attention import triton

        return triton.tangent_attention(q, k, v, dq, dk, dv, mask, scale, softcap)
    _require_reference("tangent_attention", impl)
    return _tangent_attention.tangent_attention(q, k, v, dq, dk, dv, mask, scale, softcap)


def cotangent_attention(
    q: Float[Tensor, "B Hk G T D"],
    k: Float[Tensor, "B Hk S D"],
    v: Float[Tensor, "B Hk S E"],
    do: Float[Tensor, "n B Hk G T E"],
    mask: Bool[Tensor, "#B 1 T S"] | None,
    scale: float,
    softcap: float | None = None,
    *,
    impl: str | None = None,
) -> tuple[Float[Tensor, "n B Hk G T D"], Float[Tensor, "n B Hk S D"], Float[Tensor, "n B Hk S E"]]:
    """n cotangents `do` of `attention` pulled back to q, k and v; the fused kernel takes one of them.

    Arguments and errors as in `attention`. Cost: 8 T S D flops a head and cotangent, and the softmax recomputed.
    """
    if impl == "triton" or (impl is None and _takes_attention(q, k, v, do)):
        _require_triton("cotangent_attention")
        from ..kernels.cotangent_attention import triton

        return triton.cotangent_attention(q, k, v, do, mask, scale, softcap)
    if impl is None and softcap is None and len(do) == 1 and q.device.type == "cpu":
        return _fused_attention.cotangent_attention(q, k, v, do, mask, scale)
    if impl == "cpp" or (impl is None and _takes_cpp(q, k, v, do) and _cotangent_attention_cpp.takes(q, k, v, do)):
        return _cotangent_attention_cpp.cotangent_attention(q, k, v, do, mask, scale, softcap)
    _require_reference("cotangent_attention", impl)
    return _cotangent_attention.cotangent_attention(q, k, v, do, mask, scale, softcap)


def _takes_attention(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> bool:
    """What Triton takes, of one dtype and with heads that fit."""
    given = (q, k, v, *others)
    fits = max(q.shape[-1], v.shape[-1]) <= TRITON_WIDEST_HEAD and len({x.dtype for x in given}) == 1
    return fits and _takes_triton(*given)


def _takes_cpp(*tensors: Tensor | None) -> bool:
    """Float32 or bfloat16 on the CPU, outside functorch, where no gradient is wanted; None is an argument that is not there."""
    given = [x for x in tensors if x is not None]
    plain = all(x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) for x in given)
    wrapped = any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in given)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return plain and not wrapped and not wanted and _native.load()[0] is not None


def _takes_triton(*tensors: Tensor | None) -> bool:
    """On a GPU in a type of 32 or 16 bits, outside functorch, where no gradient is wanted and Triton is installed."""
    given = [x for x in tensors if x is not None]
    if not all(x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in given):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return False
    # torch.compile cannot follow the question about functorch
    wrapped = not torch.compiler.is_compiling() and any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in given)
    return not wrapped and _has_triton()


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def _require_triton(op: str) -> None:
    if not _has_triton():
        raise RuntimeError(f'{op}: impl="triton" needs the package triton, which is not installed: pip install triton')


def _adjacent(x: Tensor | None) -> bool:
    return x is None or x.stride(-1) == 1


def _check_targets(targets: Tensor, V: int) -> None:
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= V):
        raise ValueError(f"targets must lie in [0, V)=[0, {V}), got {int(targets.min())} to {int(targets.max())}")


def _check_k(k: int, V: int) -> None:
    if not 1 <= k <= V:
        raise ValueError(f"k must lie in [1, V]=[1, {V}], got {k}")
