"""The operators, one dispatcher each: shapes are the contract, `impl` says who computes.

impl=None takes the form of the tensors' device, "cpp" on the CPU and "triton" on a GPU, where it is installed, knows the dtype
and no gradient is wanted; else "reference", the plain torch specification in kernels/<op>/reference.py. A name given explicitly
never falls back: it raises where it cannot run. Which form that is, is dispatch.py.

A dispatcher has the signature of its kernels, which is why some have more than five parameters.
"""

from __future__ import annotations

from .attention_derivatives import attention, cotangent_attention, tangent_attention
from .inner_products import dual_gram, readout_forces
from .softmax import apply_A, softmax_jvp
from .statistics import TokenStats, linear_token_stats, token_stats
from .topk import linear_topk_log_probs, topk_log_probs

__all__ = ["TokenStats", "apply_A", "attention", "cotangent_attention", "dual_gram", "linear_token_stats",
           "linear_topk_log_probs", "readout_forces", "softmax_jvp", "tangent_attention", "token_stats",
           "topk_log_probs"]  # fmt: skip
