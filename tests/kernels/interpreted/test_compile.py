"""The Triton row kernels as operators of torch: their declarations hold, and torch.compile keeps them in one graph."""

from __future__ import annotations

import pytest
import torch

from tokdyn import ops
from tokdyn.kernels.apply_A import triton as apply_A
from tokdyn.kernels.linear_token_stats import triton as linear_token_stats
from tokdyn.kernels.softmax_jvp import triton as softmax_jvp
from tokdyn.kernels.token_stats import triton as token_stats
from tokdyn.kernels.topk_log_probs import triton as topk_log_probs

Z, X = torch.randn(2, 90), torch.randn(2, 90, 3)
H, W, Y = torch.randn(2, 7), torch.randn(90, 7), torch.tensor([3, 4])
OPERATORS = [
    (token_stats._token_stats, (Z, Y)),
    (linear_token_stats._linear_token_stats, (H, W, Y, None, 1.0, None, 1.0, True)),
    (topk_log_probs._topk_log_probs, (Z, 3)),
    (topk_log_probs._linear_topk_log_probs, (H, W, 3, None, 1.0, None)),
    (apply_A._apply_A, (Z, X.mT.contiguous().mT)),
    (softmax_jvp._softmax_jvp, (Z, X)),
]


@pytest.mark.parametrize(("operator", "arguments"), OPERATORS, ids=[operator._name for operator, _ in OPERATORS])
def test_declaration_holds(operator, arguments):
    torch.library.opcheck(operator, arguments)


def test_one_graph():
    def everything(z, h, w, y):
        entropy = ops.token_stats(2 * z, y, impl="triton").entropy + ops.linear_token_stats(h, w, y, impl="triton").entropy
        values = ops.topk_log_probs(z, 3, impl="triton")[0] + ops.linear_topk_log_probs(h, w, 3, impl="triton")[0]
        return entropy + values.sum(1), ops.softmax_jvp(z, ops.apply_A(z, z, impl="triton"), impl="triton")

    eager = everything(Z, H, W, Y)
    for a, b in zip(torch.compile(everything, fullgraph=True, backend="aot_eager")(Z, H, W, Y), eager, strict=True):
        assert torch.equal(a, b)
