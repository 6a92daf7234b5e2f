"""The Triton kernels without a GPU: interpreted/, in a process where Triton interprets them, and who is sent to them."""

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
from tokdyn.ops import dispatch

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(FOLDER.glob("test_*.py"))
LONG = [file for file in FILES if file.stem in ("test_attention", "test_dual_gram", "test_topk_log_probs", "test_compile")]
PARTS = [LONG, [file for file in FILES if file not in LONG]]  # about as long as each other
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
    runs = []
    for part in PARTS:  # at a time
        command = [sys.executable, "-P", "-m", "pytest", "-q", "--durations=5", f"--confcutdir={FOLDER}", *part]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        runs.append(
            subprocess.Popen(
                command, cwd=FOLDER.parents[1], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    said = [run.communicate()[0] for run in runs]
    assert all(run.returncode == 0 for run in runs), "\n".join(text[-6000:] for text in said)


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

    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    assert dispatch.takes_triton(on_gpu(2, 3), None, on_gpu(3, dtype=torch.float16))
    assert not dispatch.takes_triton(on_gpu(2, 3), torch.zeros(3))
    assert not dispatch.takes_triton(on_gpu(2, 3, dtype=torch.float64))
    assert not dispatch.takes_triton(on_gpu(2, 3).requires_grad_())
    with torch.no_grad():
        assert dispatch.takes_triton(on_gpu(2, 3).requires_grad_())
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert not dispatch.takes_triton(on_gpu(2, 3))
