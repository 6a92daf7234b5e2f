"""The CUDA part of the extension where there is no GPU: it loads, says what it is, and refuses in one clear sentence."""

from __future__ import annotations

import pytest
import torch

from tokdyn import _native, ops
from tokdyn.kernels.topk_log_probs import cuda

_C, reason = _native.load()
if _C is None:
    pytest.skip(f"tokdyn._C is optional where there is no C++ compiler: {reason}", allow_module_level=True)

BUILT = hasattr(_C, "cuda_token_stats")
logits, targets = torch.zeros(2, 5), torch.tensor([0, 4])


def test_an_installation_without_it_says_so():
    if BUILT:
        assert _native.parts()["cuda"].startswith("built: sm_80") and "device" in _native.parts()["cuda"]
    else:
        assert _native.parts()["cuda"].startswith("not built: ")
        for call in (lambda: ops.token_stats(logits, targets, impl="cuda"), lambda: ops.topk_log_probs(logits, 2, impl="cuda")):
            with pytest.raises(RuntimeError, match="the CUDA kernels are not built: .*; install where nvcc is found"):
                call()


@pytest.mark.skipif(not BUILT, reason="the CUDA part was not built")
def test_tensors_elsewhere_are_refused():
    with pytest.raises(ValueError, match='token_stats: impl="cuda" needs logits on a CUDA device, got cpu'):
        ops.token_stats(logits, targets, impl="cuda")
    with pytest.raises(ValueError, match='topk_log_probs: impl="cuda" needs logits on a CUDA device, got cpu'):
        ops.topk_log_probs(logits, 2, impl="cuda")
    assert cuda.MAX_K == _C.CUDA_MAX_K


@pytest.mark.skipif(not BUILT, reason="the CUDA part was not built")
def test_bad_arguments_never_reach_the_device():
    where = dict(device=0, stream=0)
    for arguments, message in (
        ((0, "float32", 1, 5, 5, 64, [64] * 8), "null address"),
        ((64, "float16", 1, 5, 5, 64, [64] * 8), "float32 or bfloat16, got float16"),
        ((64, "float32", 0, 5, 5, 64, [64] * 8), "T must lie in"),
        ((64, "float32", 1, 2**30 + 1, 5, 64, [64] * 8), "V must lie in"),
        ((64, "float32", 1, 5, 5, 64, [64] * 7 + [0]), "null address"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.cuda_token_stats(*arguments, **where)
    with pytest.raises(ValueError, match="k must lie in"):
        _C.cuda_topk_log_probs(64, "float32", 1, 50, 50, 33, 64, 64, **where)


@pytest.mark.skipif(not BUILT or torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_driver_a_launch_is_an_error_and_not_a_result():
    assert _native.parts()["cuda"].count("no device: ") == 1
    with pytest.raises(RuntimeError, match=r"CUDA error \d+: \w+"):
        _C.cuda_token_stats(64, "float32", 1, 5, 5, 64, [64] * 8, device=0, stream=0)
    with pytest.raises(RuntimeError, match=r"CUDA error \d+: \w+"):
        _C.cuda_topk_log_probs(64, "float32", 1, 5, 5, 2, 64, 64, device=0, stream=0)
