"""Triton kernels by its interpreter, on the CPU; tests/kernels/test_interpreter.py runs this folder in a process of its own.

By hand: TRITON_INTERPRET=1 .venv/bin/pytest --confcutdir tests/kernels/interpreted tests/kernels/interpreted
(the parent's hook, which checks types, would stand between torch.compile and the functions).
"""

import os

import pytest
import torch
from torch import Tensor

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def _agree(name: str, ours: Tensor, plain: Tensor, exact: Tensor, band: Tensor | float) -> None:
    """Error against float64 at most twice the largest of torch at the same dtype, plus the band; NaN and inf as in torch."""
    assert ours.shape == exact.shape, name
    if not ours.is_floating_point():
        assert ours.dtype == torch.int64 and torch.equal(ours, exact), f"{name}: {ours.tolist()} is not {exact.tolist()}"
        return
    finite = exact.isfinite()
    assert torch.equal(ours.isnan(), exact.isnan()), name
    infinite = exact.isinf()
    assert torch.equal(ours[infinite].double(), exact[infinite]), name
    error = (ours.double() - exact).abs()[finite]
    if len(error):
        allowed = 2 * (plain.double() - exact).abs()[finite].max() + (band * torch.ones_like(exact))[finite]
        assert (error <= allowed).all(), f"{name}: {error[error > allowed].tolist()} > {allowed[error > allowed].tolist()}"


@pytest.fixture
def agree():
    return _agree
