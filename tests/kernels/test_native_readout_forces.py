"""The C++ readout_forces against its specification in float64: every term of the loss, every route, every instruction set."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from tokdyn.kernels.readout_forces import cpp, reference
from tokdyn.kernels.readout_forces.reference import logit_force, readout_logits

_C = pytest.importorskip("tokdyn._C")  # test_native_token_stats.py fails where it should have been built
LEVELS = _C.simd_levels()
EPS = 2.0**-24  # half an ulp of float32, relative


def case(M: int, L: int, V: int, d: int, K: int, dtype: torch.dtype = torch.float32, spread: float = 1.5):
    """Arguments; targets that coincide across and within rows where there are enough of them."""
    g = torch.Generator().manual_seed(1000 * M + V)
    h_o, h_u, W, b = (torch.randn(*s, generator=g).to(dtype) for s in ((M, d), (L, d), (V, d), (V,)))
    y, targets = torch.randint(0, V, (M,), generator=g), torch.randint(0, V, (L, K), generator=g)
    c, v, uniform = (torch.randn(*s, generator=g) for s in ((L, K), (L,), (L,)))
    if M > 2 and L > 2:
        targets[0], targets[1, -1], y[2] = y[0], y[1], y[1]
        h_u[2] = h_o[2]
    W = (W.float() * spread / math.sqrt(d)).to(dtype)
    return (h_o, y, h_u, targets, c, W), dict(bias=b, scale=0.8, v=v, uniform=uniform)


def double(x):
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def single(x):
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


def check(args: tuple[Tensor, ...], options: dict, reduce: str | None = None, levels=LEVELS) -> None:
    """Error against float64 at most twice the largest of torch in float32, plus a band scaled by what is added up.

    With delta twice the largest error of a float32 logit, a probability carries 2 delta of itself, a force, which sums terms
    of the size of `parts`, 2 delta of those. The band is that on both sides, and 16 EPS for the rest, of Σ_v |g| |parts|.
    """
    h_o, y, h_u, targets, c, W = args
    exact, wide = ({key: f(value) for key, value in options.items()} for f in (double, single))
    plain = {key: exact.get(key) for key in ("bias", "softcap")} | dict(scale=exact.get("scale", 1.0))
    z_o, z_u = (readout_logits(double(h), double(W), **plain) for h in (h_o, h_u))
    z_32 = readout_logits(single(h_o), single(W), **{key: single(value) for key, value in plain.items()})
    finite = z_o.isfinite()
    delta = 2 * (z_32 - z_o)[finite].abs().max()
    g = logit_force(z_o, y, torch.ones(len(y), dtype=torch.float64)).abs()
    v, u = (exact.get(key) for key in ("v", "uniform"))
    pi, K = z_u.softmax(1), targets.reshape(len(h_u), -1)
    parts = logit_force(z_u, K, double(c).reshape(K.shape).abs()).abs() + pi * double(c).abs().reshape(K.shape).sum(1)[:, None]
    if v is not None:
        parts = parts + v.abs()[:, None] * pi * (1 + torch.where(pi > 0, pi.log(), 0.0).abs())
    if u is not None:
        parts = parts + u.abs()[:, None] * (pi + 1 / len(W))
    hh = double(h_o).abs() @ double(h_u).abs().T + 1
    size = plain["scale"] ** 2 * hh * (g @ parts.T)

    truth = reference.readout_forces(*map(double, args), **exact)
    torch_32 = reference.readout_forces(*map(single, args), **wide)
    if reduce:
        axis = {"update": 1, "observe": 0}[reduce]
        truth, torch_32, size = truth.sum(axis), torch_32.sum(axis), size.sum(axis)
    allowed = 2 * (torch_32 - truth).abs().nan_to_num().max() + (4 * delta + 16 * EPS) * size
    for simd in levels:
        ours = cpp.readout_forces(*args, **options, reduce=reduce, simd=simd)
        assert ours.dtype == torch.float32 and ours.shape == truth.shape
        assert torch.equal(ours.isnan(), truth.isnan()), simd
        assert ((ours - truth).abs().nan_to_num() <= allowed).all(), (
            f"{simd}: {(ours - truth).abs().max()} of {truth.abs().max()}"
        )


TERMS = list(product((None, 4.0), (False, True), (False, True), (False, True)))  # softcap, train_bias, v, uniform


def chosen(options: dict, softcap: float | None, train_bias: bool, v: bool, uniform: bool) -> dict:
    kept = {key: value for key, value in options.items() if not (key == "v" and not v or key == "uniform" and not uniform)}
    return kept | dict(softcap=softcap, train_bias=train_bias)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("M", "L", "V", "d", "K"), [(1, 1, 2, 3, 1), (5, 4, 11, 6, 2), (33, 17, 3001, 40, 3)])
def test_agrees_with_the_specification(M, L, V, d, K, dtype, terms):
    args, options = case(M, L, V, d, K, dtype)
    check(args, chosen(options, *terms))


@pytest.mark.parametrize("V", [50257, 151936])
def test_real_vocabularies(V: int):
    args, options = case(4, 3, V, 8, 1)
    check(args, chosen(options, None, False, False, True), levels=[""])
    check(args, chosen(options, 4.0, True, True, True), levels=[""])


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("reduce", ["update", "observe"])
def test_reductions_are_the_sums_by_either_route(reduce, terms, monkeypatch: pytest.MonkeyPatch):
    """Through tiles of the matrix and, once rows outnumber 4 d, through the summed direction of the weight."""
    routes = []
    for name in ("gram", "through_weight"):
        route = getattr(cpp.Stream, name)
        monkeypatch.setattr(cpp.Stream, name, lambda *a, name=name, route=route: (routes.append(name), route(*a))[1])
    args, options = case(20, 23, 1201, 64, 2)
    check(args, chosen(options, *terms), reduce)
    assert set(routes) == {"gram"}
    routes.clear()
    args, options = case(90, 70, 1201, 4, 2)
    check(args, chosen(options, *terms), reduce)
    assert set(routes) == {"through_weight"}


@pytest.mark.parametrize("reduce", [None, "update", "observe"])
def test_tiles_blocks_and_chunks(reduce, monkeypatch: pytest.MonkeyPatch):
    """Ragged tiles of 3 to 7 rows, 256 tokens at a time, blocks of 5 rows on the way through the weight."""
    monkeypatch.setattr(cpp, "SIDE", 7)
    monkeypatch.setattr(cpp, "ROOM", 1024)
    monkeypatch.setattr("tokdyn.kernels.native.ROWS", 5)
    for d, K, dtype in ((64, 1, torch.float32), (64, 3, torch.bfloat16), (3, 2, torch.float32), (3, 2, torch.bfloat16)):
        args, options = case(23, 19, 1100, d, K, dtype)
        check(args, chosen(options, None, True, False, True), reduce)
        check(args, chosen(options, 4.0, True, True, True), reduce)


def test_a_uniform_target_alone_on_a_nearly_uniform_row():
    """u (1/V - pi) is small against its two terms; the stream never adds 1/V, since the other side sums to zero."""
    args, options = case(9, 8, 2000, 16, 1, spread=0.01)
    args = (*args[:4], torch.zeros_like(args[4]), args[5])
    options = dict(uniform=options["uniform"])
    check(args, options)


@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize("gap", [3.0, 10.0, 20.0, 30.0])
def test_confident_tokens_keep_their_digits(gap: float, simd: str):
    """One token leads by `gap` on both sides: F = h·h c ((1-p)² + (V-1) q²), right relative to itself however small.

    1 - p = (V-1) q leads, with 4 EPS of an exponential, 1.5 of ln2 in float32 and √(128/3) of a lane's sum: squared, 24 EPS.
    Sums of 30 such rows add √30.
    """
    V, d, c = 3000, 4, torch.tensor([-0.3])
    W = torch.zeros(V, d)
    W[1234, 0] = gap
    h, y = torch.tensor([[1.0, 2.0, 0.0, 1.0]]), torch.tensor([1234])
    e = math.exp(-gap)
    q = e / (1 + (V - 1) * e)
    expected = float(c) * 6.0 * (((V - 1) * q) ** 2 + (V - 1) * q**2)
    for reduce, ours in ((r, cpp.readout_forces(h, y, h, y, c, W, reduce=r, simd=simd)) for r in (None, "update", "observe")):
        assert float(ours.flatten()) == pytest.approx(expected, rel=64 * EPS), reduce
    # through the weight, too: many rows that are all this one
    many = cpp.readout_forces(
        h.expand(20, d), y.expand(20), h.expand(30, d), y.expand(30), c.expand(30), W, reduce="update", simd=simd
    )
    assert torch.allclose(many.double(), torch.full((20,), 30 * expected, dtype=torch.float64), rtol=64 * EPS, atol=0)


def test_rising_maxima_rescale_what_came_before():
    """Logits that rise along the vocabulary raise every row's maximum in every chunk, by up to e^60 in all."""
    args, options = case(6, 5, 9000, 8, 1)
    options = dict(bias=torch.linspace(-60, 0, 9000))
    check(args, options)
    check(args, dict(bias=options["bias"].flip(0)))


def test_infinite_and_offset_logits():
    args, options = case(6, 5, 5000, 8, 2)
    args[1][0], args[3][1, 0] = 3, 17  # impossible tokens as targets
    for bias in (torch.full((5000,), -120.0), torch.zeros(5000)):
        bias[:3000:2], bias[1:2600] = -math.inf, -math.inf  # the first chunk of 2048 holds nothing else
        check(args, dict(bias=bias))
        check(args, dict(bias=bias, v=options["v"], uniform=options["uniform"]))


@pytest.mark.parametrize("v", [False, True])
def test_undefined_rows_stay_alone(v: bool):
    args, options = case(7, 6, 2500, 8, 2)
    options = chosen(options, None, False, v, True)
    clean = cpp.readout_forces(*args, **options)
    h_o, h_u = args[0].clone(), args[2].clone()
    h_o[2], h_u[4, 1] = math.nan, math.nan
    ours = cpp.readout_forces(h_o, args[1], h_u, *args[3:], **options)
    assert ours[2].isnan().all() and ours[:, 4].isnan().all()
    ours[2], ours[:, 4] = clean[2], clean[:, 4]
    assert torch.equal(ours, clean)
    plus = torch.zeros(2500)
    plus[77] = math.inf
    assert cpp.readout_forces(*args, **(options | dict(bias=plus))).isnan().all()


def test_strides_and_one_target_a_row():
    args, options = case(7, 6, 700, 8, 1)
    h_o, y, h_u, targets, c, W = args
    plain = cpp.readout_forces(*args, **options)
    flat = cpp.readout_forces(h_o, y, h_u, targets[:, 0], c[:, 0], W, **options)
    spread = cpp.readout_forces(
        h_o.T.contiguous().T, torch.stack([y, -y], 1)[:, 0], torch.stack([h_u, h_u], 2)[:, :, 1], targets.repeat(1, 2)[:, :1],
        torch.cat([c, c], 1)[:, 1:], torch.stack([W, W], 2)[:, :, 0], **options,
    )  # fmt: skip
    assert torch.equal(flat, plain)
    torch.testing.assert_close(spread, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize(("M", "L"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("K", [0, 2])
def test_empty_sides(M: int, L: int, K: int):
    args, options = case(M, L, 30, 4, max(K, 1))
    if not K:
        args = (*args[:3], args[3][:, 0], args[4][:, 0], args[5])
    assert cpp.readout_forces(*args, **options).shape == (M, L)
    assert torch.equal(cpp.readout_forces(*args, **options, reduce="update"), torch.zeros(M))
    assert torch.equal(cpp.readout_forces(*args, **options, reduce="observe"), torch.zeros(L))


def peak_of(call: Callable[[], object]) -> int:
    """KiB of resident memory that a call needed at its peak; what was freed before goes back to the system first."""

    def resident(which: str) -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(which))

    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the resident memory from /proc")
@pytest.mark.parametrize("reduce", ["update", "observe"])
def test_a_reduction_never_holds_the_matrix(reduce: str):
    """[M, L] alone would take 144 MiB, the logits of either side 188."""
    (h_o, y, h_u, targets, c, W), _ = case(6144, 6144, 8000, 8, 1)
    cpp.readout_forces(h_o[:9], y[:9], h_u[:9], targets[:9], c[:9], W)  # what BLAS and the loader keep from their first call
    assert peak_of(lambda: cpp.readout_forces(h_o, y, h_u, targets, c, W, reduce=reduce)) <= 64 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(y_o=torch.tensor([0, 5])), r"y_o must lie in \[0, V\)=\[0, 5\), got 0 to 5"),
        (dict(targets_u=torch.tensor([0, -1, 0])), "targets_u must lie in"),
        (dict(c=torch.zeros(2)), r"the shape \[L\] or \[L, K\] with L=3, got \[3\] and \[2\]"),
        (dict(y_o=torch.zeros(3, dtype=torch.int64)), r"y_o must have shape \[2\], got \[3\]"),
        (dict(v=torch.zeros(2)), r"v must have shape \[3\]"),
        (dict(h_u=torch.zeros(3, 5)), r"h_u must be \[rows, d\] with d=4 as weight has, got \[3, 5\]"),
        (dict(h_o=torch.zeros(2, 4, dtype=torch.float64)), "h_o must be float32 or bfloat16"),
        (dict(reduce="rows"), "reduce must be"),
        (dict(softcap=-1.0), "softcap must be above 0"),
    ],
)
def test_bad_input_is_named(change: dict, message: str):
    good = dict(h_o=torch.zeros(2, 4), y_o=torch.tensor([0, 1]), h_u=torch.zeros(3, 4), targets_u=torch.tensor([0, 1, 2]),
                c=torch.zeros(3), weight=torch.zeros(5, 4))  # fmt: skip
    with pytest.raises(ValueError, match=message):
        cpp.readout_forces(**(good | change))
