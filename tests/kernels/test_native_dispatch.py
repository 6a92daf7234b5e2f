"""Who computes: the C++ forms where they apply, the specification where they do not, and never one for the other by request."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokdyn import ops
from tokdyn.kernels.dual_gram import cpp as dual_gram
from tokdyn.kernels.linear_token_stats import cpp as linear_token_stats
from tokdyn.kernels.readout_forces import cpp as readout_forces
from tokdyn.kernels.token_stats import cpp as token_stats
from tokdyn.kernels.topk_log_probs import cpp as topk_log_probs
from tokdyn.testing import relative_error

_C = pytest.importorskip("tokdyn._C")  # test_native_token_stats.py fails where it should have been built


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = dict(z=(6, 50), h=(6, 8), W=(50, 8), b=(50,), c=(6,))
    found = {name: torch.randn(*shape, generator=g).to(dtype) for name, shape in shapes.items()}
    return found | dict(y=torch.randint(0, 50, (6,), generator=g))


OPS = {
    "token_stats": lambda t, **k: ops.token_stats(t["z"], t["y"], **k),
    "linear_token_stats": lambda t, **k: ops.linear_token_stats(t["h"], t["W"], t["y"], bias=t["b"], **k),
    "topk_log_probs": lambda t, **k: ops.topk_log_probs(t["z"], 3, **k),
    "linear_topk_log_probs": lambda t, **k: ops.linear_topk_log_probs(t["h"], t["W"], 3, bias=t["b"], **k),
    "readout_forces": lambda t, **k: ops.readout_forces(t["h"], t["y"], t["h"], t["y"], t["c"], t["W"], bias=t["b"], **k),
    "dual_gram": lambda t, **k: ops.dual_gram(t["h"], t["h"], t["z"], t["z"], **k),
}


def first(result) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which C++ forms were called."""
    seen: list[str] = []
    for module in (token_stats, linear_token_stats, topk_log_probs, readout_forces, dual_gram):
        for name in OPS:
            if hasattr(module, name):
                form = getattr(module, name)
                monkeypatch.setattr(module, name, lambda *a, name=name, form=form, **k: (seen.append(name), form(*a, **k))[1])
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_cpp_is_taken_where_it_applies(op: str, dtype: torch.dtype, calls: list[str]):
    result = first(OPS[op](tensors(dtype)))
    assert calls == [op] and result.dtype == torch.float32
    OPS[op](tensors(dtype), impl="reference")
    assert calls == [op]


@pytest.mark.parametrize("op", OPS)
def test_float64_and_gradients_take_the_specification(op: str, calls: list[str]):
    assert first(OPS[op](tensors(torch.float64))).dtype == torch.float64
    wanted = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in tensors().items()}
    first(OPS[op](wanted)).sum().backward()
    assert any(x.grad is not None for x in wanted.values()) and not calls
    with torch.no_grad():
        OPS[op](wanted)
    assert calls == [op], "a parameter of a model under no_grad is a plain tensor"


@pytest.mark.parametrize("op", OPS)
def test_functorch_takes_the_specification(op: str, calls: list[str]):
    for dtype, near in ((torch.float32, 1e-4), (torch.float64, 1e-12)):  # sums of some hundred products, in another order
        t = tensors(dtype)
        batched = {name: torch.stack([x, x]) for name, x in t.items() if x.is_floating_point()}

        def one(parts: dict[str, Tensor], t: dict[str, Tensor] = t) -> Tensor:
            if op in ("token_stats", "topk_log_probs", "dual_gram"):
                return first(OPS[op](t | parts))
            return first(OPS[op](t | dict(h=parts["h"])))

        result = torch.func.vmap(one)(batched)
        assert not calls
        assert relative_error(result[1], first(OPS[op](t, impl="reference"))) < near


@pytest.mark.parametrize("op", OPS)
def test_a_request_never_falls_back(op: str):
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        OPS[op](tensors(torch.float64), impl="cpp")
    with pytest.raises(ValueError, match="fortran"):
        OPS[op](tensors(), impl="fortran")


@pytest.mark.parametrize("op", ["token_stats", "topk_log_probs"])
def test_columns_that_are_not_adjacent_take_the_specification(op: str, calls: list[str]):
    t = tensors()
    t["z"] = t["z"].T.contiguous().T
    OPS[op](t)
    assert not calls
    with pytest.raises(ValueError, match="adjacent"):
        OPS[op](t, impl="cpp")


def test_gradients_are_refused_not_dropped():
    t = tensors()
    t["h"].requires_grad_()
    result = ops.linear_token_stats(t["h"], t["W"], t["y"], impl="cpp").entropy
    with pytest.raises((RuntimeError, NotImplementedError)):
        result.sum().backward()


def test_operators_are_registered_as_torch_expects():
    """Schema, mutation and shapes without data, which torch.compile and export go by."""
    t = tensors()
    cases = {
        token_stats._token_stats: (t["z"], t["y"], ""),
        linear_token_stats._linear_token_stats: (t["h"], t["W"], t["y"], t["b"], 1.0, 20.0, 0.7, ""),
        topk_log_probs._topk_log_probs: (t["z"], 3, ""),
        topk_log_probs._linear_topk_log_probs: (t["h"], t["W"], 3, None, 1.0, None, ""),
        readout_forces._readout_forces: (
            t["h"], t["y"], t["h"], t["y"], t["c"], t["W"], None, 1.0, None, None, None, False, "update", ""
        ),
        dual_gram._dual_gram: (t["h"], t["h"], t["z"], t["z"], torch.zeros(6, 6), True, None, None, ""),
    }  # fmt: skip
    for op, args in cases.items():
        torch.library.opcheck(op, args)


def test_torch_compile_keeps_them_whole():
    t = tensors()

    def f(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
        real, _ = torch.ops.tokdyn.linear_token_stats_cpp(2 * h, W, y, None, 1.0, None, 1.0, "")
        return real[2] + torch.ops.tokdyn.linear_topk_log_probs_cpp(2 * h, W, 3, None, 1.0, None, "")[0][:, 0]

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(t["h"], t["W"], t["y"]), f(t["h"], t["W"], t["y"]))
