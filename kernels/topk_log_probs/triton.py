"""topk_log_probs on a GPU: one read keeps the largest of every 32 logits (the leader), then only k groups are read again.

The k largest tokens of a row lie in the k groups with the largest leaders: if one lay outside, k leaders would rank before it.
The order (larger logit first, of equals the lower id) is that of one int64 key: the logit's bits, made monotone, above the
complement of the id. Leaders are grouped by 32 in turn (the chiefs), so that three lists of a few hundred keys are searched
instead of one of V.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import DTYPES, adjacent, factors, on_device_of, products, require_logits, require_readout
from ..token_stats.triton import BYTES, _exp, _finite_or_zero, _logit, aligned
from ..variant import Variant

MOST = 128  # largest k
GROUP = tl.constexpr(32)  # adjacent tokens per leader
BUFFER = 64 << 20  # most bytes of the leaders, and of the float32 products
NOTHING = tl.constexpr(-(1 << 63))  # smaller than every key
ROWS = 16384  # hidden states that are multiplied with a chunk at a time
SCAN = dict(LANES=128, num_warps=4, num_stages=1)


@triton.jit
def _key(z, id):
    """Return an int64 key, larger for larger z and, of equal z, for the lower id; NaN is the largest, as in torch.sort."""
    bits = z.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)  # -0 equals 0
    bits = tl.where(bits < 0, bits ^ 2147483647, bits)
    bits = tl.where(z != z, 2147483647, bits)
    return (bits.to(tl.int64) << 32) + (2147483647 - id).to(tl.int64)


@triton.jit
def _id(key):
    """Return the id in a key; larger than every id if the key is NOTHING."""
    return tl.where(key == NOTHING, 2147483647, 2147483647 - (key & 4294967295).to(tl.int32))


@triton.jit
def _value(key):
    """Return the logit in a key."""
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 2147483647, bits).to(tl.float32, bitcast=True)


@triton.jit
def _first(keys, more, k, K: tl.constexpr):
    """Return the k largest of `keys` and `more` in descending order, [K], by taking out one at a time; keys are distinct."""
    o = tl.arange(0, K)
    found = tl.full([K], NOTHING, tl.int64)
    for i in range(0, k):
        top = tl.maximum(tl.max(keys, 0), tl.max(more, 0))
        found = tl.where(o == i, top, found)
        keys = tl.where(keys == top, NOTHING, keys)
        more = tl.where(more == top, NOTHING, more)
    return found


@triton.jit
def _of_group(x, LANES: tl.constexpr, E: tl.constexpr):
    """Return the largest of every group of a tile x [LANES, E], repeated in all lanes that hold the group: [LANES]."""
    lanes: tl.constexpr = GROUP // E
    largest = tl.max(tl.reshape(tl.max(x, 1), [LANES // lanes, lanes]), 1)
    return tl.reshape(tl.broadcast_to(largest[:, None], [LANES // lanes, lanes]), [LANES])


@triton.jit
def _lead(leader, turn, LEADERS, kept, LANES: tl.constexpr, E: tl.constexpr):
    """Write the leaders [LANES] of the row's turn-th tile where `kept`, by the first lane of each group."""
    lane = tl.arange(0, LANES)
    group = turn * (LANES * E // GROUP) + lane // (GROUP // E)
    tl.store(LEADERS + group, leader, mask=kept & (lane % (GROUP // E) == 0))


@triton.jit(do_not_specialize=["T", "G", "V", "stride", "lead", "v0"])
def _scan_kernel(
    X, BIAS, LEADERS, SUMS, T, G, V, stride, lead, v0, scale, cap, LANES: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """LEADERS [T, G] of columns v0 to v0 + V and, in SUMS [2, T], max z and Σ e^{z-max} over the columns so far."""
    row = tl.program_id(0).to(tl.int64)
    start = lead + row * stride
    shift = (start % E).to(tl.int32)
    end = shift + V
    X += start // E * E
    LEADERS += row * G
    WIDTH: tl.constexpr = LANES * E
    BLOCK: tl.constexpr = 4 * WIDTH
    one = (tl.arange(0, LANES) * E)[:, None] + tl.arange(0, E)[None, :]
    always = tl.arange(0, LANES) >= 0
    m = tl.full([LANES], -float("inf"), tl.float32)
    s = tl.zeros([LANES], tl.float32)
    whole = end // BLOCK
    first = tl.where(shift > 0, 1, 0)
    for block in range(first, whole):
        p = block * BLOCK + one
        c = v0 + p - shift
        z0 = _logit(tl.load(X + p).to(tl.float32), BIAS, c, None, scale, cap)
        z1 = _logit(tl.load(X + p + WIDTH).to(tl.float32), BIAS, c + WIDTH, None, scale, cap)
        z2 = _logit(tl.load(X + p + 2 * WIDTH).to(tl.float32), BIAS, c + 2 * WIDTH, None, scale, cap)
        z3 = _logit(tl.load(X + p + 3 * WIDTH).to(tl.float32), BIAS, c + 3 * WIDTH, None, scale, cap)
        _lead(_of_group(z0, LANES, E), block * 4, LEADERS, always, LANES, E)
        _lead(_of_group(z1, LANES, E), block * 4 + 1, LEADERS, always, LANES, E)
        _lead(_of_group(z2, LANES, E), block * 4 + 2, LEADERS, always, LANES, E)
        _lead(_of_group(z3, LANES, E), block * 4 + 3, LEADERS, always, LANES, E)
        top = tl.maximum(tl.maximum(tl.max(z0, 1), tl.max(z1, 1)), tl.maximum(tl.max(z2, 1), tl.max(z3, 1)))
        higher = tl.maximum(m, top)
        base = _finite_or_zero(higher)
        s = _exp(m - base) * s
        s += tl.sum(_exp(z0 - base[:, None]), 1) + tl.sum(_exp(z1 - base[:, None]), 1)
        s += tl.sum(_exp(z2 - base[:, None]), 1) + tl.sum(_exp(z3 - base[:, None]), 1)
        m = higher
    head = tl.minimum(first, whole) * 4
    for edge in range(0, head + G * GROUP // WIDTH - whole * 4):
        turn = tl.where(edge < head, edge, whole * 4 + edge - head)
        p = turn * WIDTH + one
        inside = (p >= shift) & (p < end)
        x = tl.load(X + p, mask=inside, other=-float("inf")).to(tl.float32)
        z = tl.where(inside, _logit(x, BIAS, v0 + p - shift, inside, scale, cap), -float("inf"))
        _lead(_of_group(z, LANES, E), turn, LEADERS, always, LANES, E)
        higher = tl.maximum(m, tl.max(z, 1))
        base = _finite_or_zero(higher)
        s = _exp(m - base) * s + tl.sum(_exp(z - base[:, None]), 1)
        m = higher

    m0 = tl.load(SUMS + row, mask=v0 > 0, other=-float("inf"))
    s0 = tl.load(SUMS + T + row, mask=v0 > 0, other=0.0)
    M = tl.maximum(tl.max(m, 0), m0)
    base = _finite_or_zero(M)
    S = tl.sum(_exp(m - base) * s, 0)
    tl.store(SUMS + row, M)
    tl.store(SUMS + T + row, S + _exp(m0 - base) * s0)
    if S != S:  # tl.max ignores NaN, which should rank first
        tl.debug_barrier()
        for turn in range(0, tl.cdiv(end, WIDTH)):
            p = turn * WIDTH + one
            inside = (p >= shift) & (p < end)
            x = tl.load(X + p, mask=inside, other=0.0).to(tl.float32)
            z = _logit(x, BIAS, v0 + p - shift, inside, scale, cap)
            broken = _of_group((inside & (z != z)).to(tl.int32), LANES, E)
            _lead(broken * float("nan"), turn, LEADERS, broken > 0, LANES, E)


@triton.jit(do_not_specialize=["T", "G", "V", "stride", "lead", "v0", "k", "last"])
def _select_kernel(
    X, BIAS, CHIEFS, LEADERS, SUMS, BEST, VALUES, IDS, T, G, V, stride, lead, v0, k, scale, cap, last,
    E: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Take the k largest of CHIEFS [T, G/32], of their leaders, then of the leaders' tokens and BEST [T, K] so far."""
    row = tl.program_id(0).to(tl.int64)
    start = lead + row * stride
    shift = (start % E).to(tl.int32)
    end = shift + V
    X += start // E * E
    o = tl.arange(0, K)
    none = tl.full([K], NOTHING, tl.int64)
    under = tl.arange(0, GROUP)[None, :]

    chief = tl.arange(0, N)
    key = _key(tl.load(CHIEFS + row * (G // GROUP) + chief, mask=chief < G // GROUP, other=0.0), chief)
    chief = _id(_first(tl.where(chief < G // GROUP, key, NOTHING), none, k, K))
    leader = tl.minimum(chief, G // GROUP)[:, None] * GROUP + under  # [K, GROUP]
    key = _key(tl.load(LEADERS + row * G + leader, mask=leader < G, other=0.0), leader)
    leader = _id(_first(tl.reshape(tl.where(leader < G, key, NOTHING), [K * GROUP]), none, k, K))
    p = tl.minimum(leader, G)[:, None] * GROUP + under
    inside = (p >= shift) & (p < end)
    x = tl.load(X + p, mask=inside, other=0.0).to(tl.float32)
    key = _key(_logit(x, BIAS, v0 + p - shift, inside, scale, cap), v0 + p - shift)
    before = tl.load(BEST + row * K + o, mask=o < v0, other=NOTHING)  # a chunk is wider than K
    best = _first(tl.reshape(tl.where(inside, key, NOTHING), [K * GROUP]), before, k, K)
    tl.store(BEST + row * K + o, best)
    if last:
        m = tl.load(SUMS + row)
        s = tl.load(SUMS + T + row)
        log_S = tl.where(s != s, s, tl.where(tl.abs(m) == float("inf"), 0.0, tl.log(s)))
        tl.store(VALUES + row * k + o, (_value(best) - m) - log_S, mask=o < k)
        tl.store(IDS + row * k + o, _id(best).to(tl.int64), mask=o < k)


def topk_log_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest log-probabilities of every row, in descending order, and their tokens; equal logits by id.

    logits [T, V], float32, bfloat16 or float16, any row stride, adjacent columns -> values [T, k] float32, ids [T, k] int64.
    A row with a NaN gives NaN, with the ids of NaN first, as torch.sort has them. It has no derivative. torch.compile keeps it
    as one node, torch.ops.tokdyn.topk_log_probs_triton.

    Raises ValueError for another dtype, device or layout and for k outside [1, min(V, 128)]. Cost: T·V logits read once; their
    leaders, 4 bytes for every 32 logits, written and read once through at most 64 MiB.
    """
    return _topk_log_probs(logits, k)


def linear_topk_log_probs(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """topk_log_probs of softcap(scale (W h + b)); the [T, V] logits never exist as a whole.

    hidden [T, d], weight [V, d] of one dtype, bias [V] -> values [T, k], ids [T, k], from float32 logits, by
    torch.ops.tokdyn.linear_topk_log_probs_triton. Raises as topk_log_probs. Cost: 2 T V d flops, and T V products written and
    read once, through a buffer of 64 MiB.
    """
    return _linear_topk_log_probs(hidden, weight, k, bias, scale, softcap)


@torch.library.custom_op("tokdyn::topk_log_probs_triton", mutates_args=(), schema="(Tensor logits, int k) -> (Tensor, Tensor)")
def _topk_log_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return values and ids, in blocks of rows whose leaders fit the buffer."""
    require_logits("topk_log_probs", logits)
    _require_k("topk_log_probs", k, logits.shape[1])
    values, ids = _empty_lists(logits, k)
    rows = max(1, BUFFER // (4 * triton.cdiv(logits.shape[1] + BYTES, GROUP.value)))
    with on_device_of("topk_log_probs", logits):
        for first in range(0, len(logits), rows):
            some = slice(first, first + rows)
            state = _state(logits[some], k)
            _launch(logits[some], None, 0, None, None, k, True, state, values[some], ids[some])
    return values, ids


@_topk_log_probs.register_fake
def _empty_lists(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    T = logits.shape[0]
    return logits.new_empty((T, k), dtype=torch.float32), logits.new_empty((T, k), dtype=torch.int64)


@torch.library.custom_op(
    "tokdyn::linear_topk_log_probs_triton",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, int k, Tensor? bias, float scale, float? softcap) -> (Tensor, Tensor)",
)
def _linear_topk_log_probs(
    hidden: Tensor, weight: Tensor, k: int, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return values and ids, chunk by chunk of the vocabulary, with the best keys and the sums so far kept in between."""
    require_readout("linear_topk_log_probs", hidden, weight, bias, softcap)
    _require_k("linear_topk_log_probs", k, len(weight))
    values, ids = _empty_linear_lists(hidden, weight, k, bias, scale, softcap)
    with on_device_of("linear_topk_log_probs", hidden, weight, bias):
        hidden, weight = adjacent(hidden), adjacent(weight)
        factor, cap = factors(scale, softcap)
        for first in range(0, len(hidden), ROWS):
            some = slice(first, first + ROWS)
            state = _state(hidden[some], k)
            for v0, z in products(hidden[some], weight, BUFFER):
                last = v0 + z.shape[1] == len(weight)
                _launch(z, bias, v0, factor, cap, k, last, state, values[some], ids[some])
    return values, ids


@_linear_topk_log_probs.register_fake
def _empty_linear_lists(hidden, weight, k, bias, scale, softcap) -> tuple[Tensor, Tensor]:
    return _empty_lists(hidden, k)


def _state(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return uninitialised SUMS [2, T] and BEST [T, K], which the rows keep from chunk to chunk."""
    T, K = len(rows), _list_length(k)
    return rows.new_empty((2, T), dtype=torch.float32), rows.new_empty((T, K), dtype=torch.int64)


def _launch(
    x: Tensor, bias: Tensor | None, v0: int, factor: float | None, cap: float | None, k: int, last: bool,
    state: tuple[Tensor, Tensor], values: Tensor, ids: Tensor,
) -> None:  # fmt: skip
    """Launch both kernels on logits or products x [T, n], columns v0 to v0 + n."""
    (T, n), (sums, best) = x.shape, state
    E = BYTES // x.element_size()
    G = GROUP.value * triton.cdiv(n + E, GROUP.value**2)
    leaders = sums.new_empty(T, G)
    view, lead = aligned(x)
    where = (T, G, n, x.stride(0), lead, v0)
    _scan_kernel[(T,)](view, bias, leaders, sums, *where, factor, cap, E=E, **SCAN)
    chiefs = leaders.unflatten(1, (-1, GROUP.value)).amax(2)  # NaN ranks first
    _select_kernel[(T,)](
        view, bias, chiefs, leaders, sums, best, values, ids, *where, k, factor, cap, int(last), E=E, **_select_shape(k, G)
    )


def _list_length(k: int) -> int:
    return max(2, triton.next_power_of_2(k))


def _select_shape(k: int, G: int) -> dict[str, int]:
    return dict(K=_list_length(k), N=max(32, triton.next_power_of_2(G // GROUP.value)), num_warps=4, num_stages=1)


def _require_k(op: str, k: int, V: int) -> None:
    if not 1 <= k <= min(V, MOST):
        raise ValueError(f'{op}: impl="triton" needs k in [1, min(V, {MOST})]=[1, {min(V, MOST)}], got {k}')


def variants() -> list[Variant]:
    """Both kernels on logits for k = 10 and the largest k, and the scan of a readout's products with a bias."""
    found = []
    sizes = dict(T="i32", G="i32", V="i32", stride="i32", lead="i32", v0="i32")
    rows = dict(LEADERS="*fp32:16", SUMS="*fp32:16") | sizes
    lists = dict(BEST="*i64:16", VALUES="*fp32:16", IDS="*i64:16", k="i32", last="i32")
    plain = dict(BIAS=None, scale=None, cap=None)
    for dtype in (torch.bfloat16, torch.float32):
        name, E = DTYPES[dtype], BYTES // dtype.itemsize
        scan = dict(LANES=SCAN["LANES"], E=E)
        found.append(
            Variant(f"scan {name}", _scan_kernel, dict(X=f"*{name}:16") | rows, scan | plain, SCAN["num_warps"],
                    SCAN["num_stages"], elements=4 * scan["LANES"] * E, budget=9.0)
        )  # fmt: skip
        for k in (10, MOST) if dtype == torch.bfloat16 else ():
            shape = _select_shape(k, 4768)  # V = 151936
            warps, stages = shape.pop("num_warps"), shape.pop("num_stages")
            signature = dict(X=f"*{name}:16", CHIEFS="*fp32:16") | rows | lists
            found.append(Variant(f"select k={k}", _select_kernel, signature, shape | dict(E=E) | plain, warps, stages))
    readout = dict(X="*fp32:16", BIAS="*bf16:16", scale="fp32") | rows
    found.append(
        Variant("scan, bias", _scan_kernel, readout, dict(LANES=SCAN["LANES"], E=4, cap=None), SCAN["num_warps"],
                SCAN["num_stages"], elements=16 * SCAN["LANES"], budget=16.0)
    )  # fmt: skip
    return found
