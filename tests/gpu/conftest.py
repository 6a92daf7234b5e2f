"""The operators on a GPU against float64. benchmarks/gpu.sh runs this folder; without a GPU its tests are skipped.

By hand: pytest --confcutdir tests/gpu tests/gpu (the parent's hook, which checks types, would stand between torch.compile and
the functions).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

EPS = 2.0**-24  # half an ulp of float32, relative


def _agree(name: str, ours: Tensor, plain: Tensor, exact: Tensor, band: float = 64 * EPS, size: Tensor | None = None) -> None:
    """Error against float64 at most twice the largest of torch at the same dtype, plus `band` of the result's size.

    The size is that of every number itself, or `size` where numbers are sums that may cancel. NaN and inf as in float64.
    """
    assert ours.shape == exact.shape, name
    if not ours.is_floating_point():
        assert ours.dtype == torch.int64 and torch.equal(ours, exact), (
            f"{name}: {(ours != exact).sum()} of {ours.numel()} differ"
        )
        return
    finite = exact.isfinite()
    assert torch.equal(ours.isnan(), exact.isnan()), f"{name}: NaN elsewhere"
    infinite = exact.isinf()
    assert torch.equal(ours[infinite].double(), exact[infinite]), f"{name}: inf elsewhere"
    error = (ours.double() - exact).abs()[finite]
    if len(error):
        within = (exact.abs() if size is None else size.expand_as(exact))[finite]
        allowed = 2 * (plain.double() - exact).abs()[finite].max() + band * within + 1e-14  # float64 rounds as well
        assert (error <= allowed).all(), f"{name}: {float((error / allowed).max()):.1f} times the allowed error"


@pytest.fixture
def agree():
    return _agree
