"""softmax_jvp on a GPU: the kernel of apply_A with a factor pi."""

from __future__ import annotations

import torch
from torch import Tensor

from ..apply_A.triton import empty_like_both, jacobian, jacobian_variants
from ..variant import Variant


def softmax_jvp(logits: Tensor, x: Tensor) -> Tensor:
    """pi ⊙ (x - pi·x) as reference.softmax_jvp defines it, for one column or k of them.

    Arguments, result and errors are those of apply_A.triton; logits are read twice. torch.compile keeps it as one node,
    torch.ops.tokdyn.softmax_jvp_triton.
    """
    return _softmax_jvp(logits, x)


@torch.library.custom_op("tokdyn::softmax_jvp_triton", mutates_args=(), schema="(Tensor logits, Tensor x) -> Tensor")
def _softmax_jvp(logits: Tensor, x: Tensor) -> Tensor:
    return jacobian("softmax_jvp", logits, x, pi=True)


_softmax_jvp.register_fake(empty_like_both)


def variants() -> list[Variant]:
    """The kernel for one column and for eight."""
    return jacobian_variants("softmax_jvp", pi=True)
