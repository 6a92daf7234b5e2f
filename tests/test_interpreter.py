"""The Triton kernels without a GPU: tests/interpreted, in a process where Triton interprets them, and who is sent to them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokdyn import ops

FOLDER = Path(__file__).parent / "interpreted"
Z, Y, W = torch.zeros(2, 5), torch.tensor([0, 1]), torch.zeros(7, 5)
HEADS = Z[None, None, None], Z[None, None], Z[None, None]
CALLS = {
    "token_stats": lambda: ops.token_stats(Z, Y, impl="triton"),
    "linear_token_stats": lambda: ops.linear_token_stats(Z, W, Y, impl="triton"),
    "topk_log_probs": lambda: ops.topk_log_probs(Z, 2, impl="triton"),
    "linear_topk_log_probs": lambda: ops.linear_topk_log_probs(Z, W, 2, impl="triton"),
    "apply_A": lambda: ops.apply_A(Z, Z, impl="triton"),
    "softmax_jvp": lambda: ops.softmax_jvp(Z, Z, impl="triton"),
    "readout_forces": lambda: ops.readout_forces(Z, Y, Z, Y, torch.ones(2), W, impl="triton"),
    "dual_gram": lambda: ops.dual_gram(Z, Z, Z, Z, impl="triton"),
    "attention": lambda: ops.attention(*HEADS, None, 1.0, impl="triton"),
    "tangent_attention": lambda: ops.tangent_attention(*HEADS, *(x[None] for x in HEADS), None, 1.0, impl="triton"),
    "cotangent_attention": lambda: ops.cotangent_attention(*HEADS, HEADS[0][None], None, 1.0, impl="triton"),
}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_triton_kernels_agree_with_their_references_when_interpreted():
    versions = [tuple(map(int, importlib.metadata.version(name).split(".")[:2])) for name in ("triton", "numpy")]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 cannot loop to a run-time bound with numpy 2.4")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--durations=5", f"--confcutdir={FOLDER}", str(FOLDER)]
    run = subprocess.run(
        command, cwd=FOLDER.parents[1], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize("op", CALLS)
def test_an_explicit_name_never_falls_back(op: str):
    with pytest.raises(ValueError, match=f'{op}: impl="triton" needs tensors on a GPU, got cpu'):
        CALLS[op]()


@pytest.mark.parametrize("op", CALLS)
def test_without_triton_that_is_said(op: str, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it fails
    with pytest.raises(RuntimeError, match=f'{op}: impl="triton" needs the package triton'):
        CALLS[op]()


def test_triton_is_imported_when_first_needed():
    program = "import sys, tokdyn; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", program]).returncode == 0


def test_a_gpu_tensor_goes_to_triton_unless_something_else_is_asked(monkeypatch):
    """The rule alone, on stand-ins for tensors of a GPU; where one is present the kernels' results are compared below."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype).as_subclass(OnGpu)

    monkeypatch.setattr(ops, "_has_triton", lambda: True)
    assert ops._takes_triton(on_gpu(2, 3), None, on_gpu(3, dtype=torch.float16))
    assert not ops._takes_triton(on_gpu(2, 3), torch.zeros(3))
    assert not ops._takes_triton(on_gpu(2, 3, dtype=torch.float64))
    assert not ops._takes_triton(on_gpu(2, 3).requires_grad_())
    with torch.no_grad():
        assert ops._takes_triton(on_gpu(2, 3).requires_grad_())
    monkeypatch.setattr(ops, "_has_triton", lambda: False)
    assert not ops._takes_triton(on_gpu(2, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 1003, 50257, 151936])
def test_on_a_gpu(V: int, dtype: torch.dtype):
    """Compiled and launched, against float64. The band of tests/interpreted is at most 100 eps for these rows; a lane's sum of
    a thousand terms adds as much again."""
    eps, T = 2.0**-24, 600
    g = torch.Generator("cuda").manual_seed(0)
    z = (3 * torch.randn(T, V, generator=g, device="cuda")).to(dtype)
    y = torch.randint(0, V, (T,), generator=g, device="cuda")
    for rows in (slice(None), slice(0, 3)):
        exact = ops.token_stats(z[rows].double(), y[rows])
        for name, ours, truth in zip(exact._fields, ops.token_stats(z[rows], y[rows]), exact, strict=True):
            if name in ("rank", "argmax"):
                assert torch.equal(ours, truth), name
            else:
                torch.testing.assert_close(ours.double(), truth, rtol=256 * eps, atol=64 * eps)
    k = min(V, 64)
    values, ids = ops.topk_log_probs(z, k)
    exact_values, exact_ids = ops.topk_log_probs(z.double(), k)
    assert torch.equal(ids, exact_ids)
    torch.testing.assert_close(values.double(), exact_values, rtol=256 * eps, atol=64 * eps)
    for op in (ops.apply_A, ops.softmax_jvp):
        for x in (torch.randn(8, V, generator=g, device="cuda"), torch.randn(8, V, 3, generator=g, device="cuda")):
            torch.testing.assert_close(op(z[:8], x).double(), op(z[:8].double(), x.double()), rtol=256 * eps, atol=64 * eps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_readouts_on_a_gpu(softcap: float | None, dtype: torch.dtype, monkeypatch):
    """The band of token_stats, and what products of width d may be off by: d eps Σ |h w|, of which a result takes up at most
    four times as much."""
    from tokdyn.kernels.linear_token_stats import triton

    T, V, d = 300, 50257, 320
    g = torch.Generator("cuda").manual_seed(0)
    h, W, b = (torch.randn(*shape, generator=g, device="cuda").to(dtype) for shape in ((T, d), (V, d), (V,)))
    W /= d**0.5
    y = torch.randint(0, V, (T,), generator=g, device="cuda")
    readout = dict(scale=2.0, softcap=softcap)
    exact = ops.linear_token_stats(h.double(), W.double(), y, bias=b.double(), temperature=0.7, **readout)
    bound = d * 2.0**-24 * 4 * float((h.double().abs() @ W.double().abs().T).max()) * 2.0 / 0.7
    monkeypatch.setattr(triton, "BUFFER", 8 << 20)  # several chunks
    for fused in (False, True):
        ours = triton.linear_token_stats(h, W, y, bias=b, temperature=0.7, fused=fused, **readout)
        for name, value, truth in zip(exact._fields, ours, exact, strict=True):
            if name == "rank":  # two logits may differ by less than their rounding
                assert ((value - truth).abs() <= 2).all()
            elif name != "argmax":
                torch.testing.assert_close(value.double(), truth, rtol=256 * 2.0**-24, atol=bound)
    values, _ = ops.linear_topk_log_probs(h, W, 10, bias=b, **readout)
    exact_values, _ = ops.linear_topk_log_probs(h.double(), W.double(), 10, bias=b.double(), **readout)
    torch.testing.assert_close(values.double(), exact_values, rtol=256 * 2.0**-24, atol=bound)
