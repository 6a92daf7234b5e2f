"""The Triton readout_forces, interpreted: one read, two reads and the summed direction against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tokdyn import ops
from tokdyn.kernels.readout_forces import reference, triton

EPS = 2.0**-24


def problem(M: int, L: int, V: int, d: int, K: int, dtype: torch.dtype = torch.float32, peak: float = 1.0) -> dict[str, Any]:
    """Arguments in order; some updated targets are observed tokens, and with K > 1 every row names its first target twice."""
    g = torch.Generator().manual_seed(M)
    h_o, h_u, weight = (torch.randn(*shape, generator=g) for shape in ((M, d), (L, d), (V, d)))
    y_o, targets, c = (
        torch.randint(0, V, (M,), generator=g),
        torch.randint(0, V, (L, K), generator=g),
        torch.randn(L, K, generator=g),
    )
    targets[:2, 0] = y_o[:2]
    targets[:, -1] = targets[:, 0]
    y_o[-1], targets[-1, 0] = 0, V - 1
    if K == 1:
        targets, c = targets[:, 0], c[:, 0]
    hidden = ((peak * h).to(dtype) for h in (h_o, h_u))
    return dict(zip(("h_o", "h_u"), hidden, strict=True), y_o=y_o, targets_u=targets, c=c, weight=weight.to(dtype))


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in arguments.items()}


def size(h_o, y_o, h_u, targets_u, c, weight, *, bias=None, scale=1.0, softcap=None, v=None, uniform=None, train_bias=False,
         reduce=None):  # fmt: skip
    """The definition with absolute values in every sum, and the largest Σ |h w| + |b| behind a logit."""

    def force(h: Tensor, *term: Tensor | None) -> Tensor:
        z = reference.readout_logits(h, weight, bias=bias, scale=scale, softcap=softcap)
        slope = scale * (1 - (z / softcap).square()) if softcap else scale
        return (slope * reference.logit_force(z, *term)).abs()

    g, gamma = force(h_o, y_o, torch.ones(len(y_o), dtype=h_o.dtype)), force(h_u, targets_u, c, v, uniform)
    F = (h_o.abs() @ h_u.abs().T + float(train_bias)) * (g @ gamma.T)
    products = max(float((h.abs() @ weight.abs().T).max()) for h in (h_o, h_u))
    largest = scale * (products + (0.0 if bias is None else float(bias.abs().nan_to_num(posinf=0.0).max())))
    return F if reduce is None else F.sum({"update": 1, "observe": 0}[reduce]), largest


@pytest.fixture
def check(agree):
    def check(arguments: dict[str, Any]) -> Tensor:
        """Logits are off by d EPS Σ |h w|, residuals by as much times themselves, sums over V and rows by their length; of half
        precision two residuals and, with reduce, the direction are rounded to 8 bits."""
        ours = ops.readout_forces(**arguments, impl="triton")
        assert ours.dtype == torch.float32
        wide = widened(arguments)
        exact = reference.readout_forces(**wide)
        bound, largest = size(**wide)
        d, V, rows = arguments["h_o"].shape[1], len(arguments["weight"]), len(arguments["h_o"]) + len(arguments["h_u"])
        unit = (4 * d * (1 + largest) + V + rows) * EPS
        if arguments["weight"].dtype != torch.float32:
            unit += 3 * 2.0**-8
        agree("readout_forces", ours, reference.readout_forces(**arguments), exact, unit * bound)
        return ours

    return check


def options(L: int, V: int, *names: str) -> dict[str, Any]:
    g = torch.Generator().manual_seed(7)
    every = dict(bias=torch.randn(V, generator=g), v=torch.randn(L, generator=g), uniform=torch.randn(L, generator=g))
    return {k: x for k, x in every.items() if k in names}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(triton, "BUFFER", 1)  # chunks of 1024 columns
    monkeypatch.setattr(triton, "ROOM", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reads", [1, 2])
def test_agrees_with_the_definition(reads: int, dtype: torch.dtype, check):
    plain = problem(4, 3, 2100, 16, 1, dtype)
    check(plain | (options(3, 2100, "v") if reads == 2 else {}))
    everything = options(4, 1030, "bias", *(("v", "uniform") if reads == 2 else ()))
    check(problem(3, 4, 1030, 9, 3, dtype) | everything | dict(scale=0.7, softcap=2.0, train_bias=True))


def test_several_tiles_of_pairs(check):
    assert (triton.TILE["BM"], triton.TILE["BL"]) == (16, 128)
    check(problem(17, 129, 70, 5, 2))


@pytest.mark.parametrize(
    ("reduce", "dtype"), [("update", torch.float32), ("update", torch.bfloat16), ("observe", torch.float32)]
)
def test_reductions(reduce: str, dtype: torch.dtype, check):
    """With M L above (M + L) d from the summed direction of the weight, else from the matrix."""
    wide, narrow = problem(9, 8, 1030, 3, 2, dtype), problem(9, 8, 70, 40, 1, dtype)
    check(wide | options(8, 1030, "bias", "v", "uniform") | dict(reduce=reduce, softcap=3.0, train_bias=True))
    check(narrow | dict(reduce=reduce, train_bias=True))


@pytest.mark.parametrize("reads", [1, 2])
def test_one_tensor_on_both_sides_is_multiplied_once(reads: int, monkeypatch, check):
    arguments = problem(5, 5, 1030, 8, 2) | options(5, 1030, "bias", *(("uniform",) if reads == 2 else ()))
    rows = []
    multiply = triton.products
    monkeypatch.setattr(triton, "products", lambda hidden, *rest: rows.append(len(hidden)) or multiply(hidden, *rest))
    check(arguments | dict(h_u=arguments["h_o"]))
    assert rows == reads * [5]


@pytest.mark.parametrize(("V", "reads"), [(50257, 1), (151936, 1), (50257, 2)])
def test_large_vocabularies_far_below_zero(V: int, reads: int, monkeypatch, check):
    """One token on each side, a bias of -120 everywhere and -inf at every 7th token that is no target."""
    monkeypatch.setattr(triton, "BUFFER", 1 << 30)
    arguments = problem(1, 1, V, 3, 1)
    bias = torch.full((V,), -120.0).index_fill(0, torch.arange(3, V, 7), -torch.inf)
    bias[arguments["y_o"]] = bias[arguments["targets_u"]] = -120.0
    check(arguments | dict(bias=bias) | ({} if reads == 1 else options(1, V, "uniform")))


@pytest.mark.parametrize("reduce", [None, "update"])
def test_strides(reduce: str | None, check):
    """Every second hidden state and target, transposed weights."""
    plain = problem(4, 5, 40, 6, 2)
    strided = {key: torch.stack([plain[key], plain[key]], -1)[..., 0] for key in ("h_o", "targets_u", "c", "y_o")}
    strided["weight"] = plain["weight"].T.contiguous().T
    assert not any(x.is_contiguous() for x in strided.values())
    check(plain | strided | dict(reduce=reduce))


@pytest.mark.parametrize("gap", [10.0, 25.0])
def test_confident_tokens_keep_their_digits(gap: float):
    """One token leads by `gap` on both sides: F is of size e^-2gap there and right relative to that."""
    V = 1500
    weight = torch.zeros(V, 1)
    weight[1200] = 1.0
    h, y = torch.full((2, 1), gap), torch.tensor([1200, 1200])
    F = ops.readout_forces(h, y, h.clone(), y, torch.ones(2), weight, impl="triton").double()
    q = torch.tensor(-gap, dtype=torch.float64).exp()
    other = q / (1 + (V - 1) * q)
    exact = gap**2 * (((V - 1) * other).square() + (V - 1) * other.square())
    assert float((F / exact - 1).abs().max()) <= 16 * (1 + gap) * EPS


def test_nan_minus_infinity_and_unknown_targets_stay_in_their_rows():
    arguments = problem(4, 5, 1100, 8, 1)
    bias = torch.zeros(1100)
    bias[[3, 1050]] = -torch.inf  # no target
    whole = ops.readout_forces(**arguments, bias=bias, impl="triton")
    finite = torch.zeros(1100).index_fill(0, torch.tensor([3, 1050]), -200.0)
    torch.testing.assert_close(whole, ops.readout_forces(**arguments, bias=finite, impl="triton"), rtol=0, atol=0)
    arguments["h_o"][1, 0] = torch.nan
    arguments["targets_u"][2] = 1100
    arguments["y_o"][3] = -1
    F = ops.readout_forces(**arguments, bias=bias, impl="triton")
    broken = torch.zeros(4, 5, dtype=torch.bool)
    broken[[1, 3]] = broken[:, 2] = True
    assert F[broken].isnan().all() and torch.equal(F[~broken], whole[~broken])


def test_declaration_holds_and_torch_compile_keeps_one_graph():
    a = problem(3, 2, 40, 4, 1)
    order = [a[name] for name in ("h_o", "y_o", "h_u", "targets_u", "c", "weight")]
    for reduce in (None, "update"):
        torch.library.opcheck(triton._readout_forces, (*order, None, 1.0, None, None, None, False, reduce))

    def f(h_o, y_o, h_u, targets_u, c, weight):
        return ops.readout_forces(2 * h_o, y_o, h_u, targets_u, c, weight, impl="triton") + 1

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(*order), f(*order))


def test_nothing_to_do_and_mistakes():
    a = problem(3, 2, 40, 4, 1)
    none = a | dict(h_u=a["h_u"][:0], targets_u=a["targets_u"][:0], c=a["c"][:0])
    assert torch.equal(ops.readout_forces(**none, reduce="update", impl="triton"), torch.zeros(3))
    nobody = a | dict(h_o=a["h_o"][:0], y_o=a["y_o"][:0])
    assert ops.readout_forces(**nobody, impl="triton").shape == (0, 2)
    assert torch.equal(ops.readout_forces(**nobody, reduce="update", impl="triton"), torch.zeros(0))
    assert torch.equal(ops.readout_forces(**nobody, reduce="observe", impl="triton"), torch.zeros(2))
    for match, wrong in (
        ("must share float32, bfloat16 or float16", dict(weight=a["weight"].double())),
        (r"y_o must be \[M\]=\[3\]", dict(y_o=a["y_o"][:2])),
        ("must be int64", dict(targets_u=a["targets_u"].int())),
        (r"uniform must be \[L\]=\[2\]", dict(uniform=torch.ones(3))),
        ("softcap must be above 0", dict(softcap=0.0)),
        ("reduce must be None", dict(reduce="rows")),
    ):
        with pytest.raises(ValueError, match=match):
            triton.readout_forces(**(a | wrong))
