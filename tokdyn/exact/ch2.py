"""The CH2 estimate: a force matrix from forward passes alone, approximate, to compare the exact one with.

    F_CH2[m,l] = <Wᵀ g_m, Wᵀ γ_l> · Σ_streams <h̃_m, h̃_l>

h̃ are the normalised inputs of the attention and MLP projections at the tokens' own positions. The force on a weight that reads
a stream is an outer product of h̃ and the cotangent behind it; CH2 takes the readout's cotangent Wᵀγ for all of those and
leaves out what reaches a token through other positions (Ren, Deng, Hong, Lyle, Gal, Learning Dynamics of Continual Learning).

A stream is found by what the model does: a norm whose output enters a linear projection. The authors' code takes norms by
their names in Llama, input_layernorm and post_attention_layernorm. Where the attention's output is normed before it joins the
residual stream (Gemma-2) the second name is that norm, whose output enters no projection; here the norm before the MLP is
meant (pre_feedforward_layernorm), and the two estimates differ there. Their further term K_embd, of the input embedding,
couples tokens that read the same id. It is not in this estimate; the exact force has it, by the rule "lookup".
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import ops
from ..model.calls import Call
from ..model.trace import Tracer
from ..sequences import Batch
from .errors import NotReplayable
from .modules.choose import rule_for
from .modules.linear import Linear
from .modules.norms import Norm
from .problem import MEMORY, Coverage, Problem
from .progress import Progress
from .readout import forces_at_readout
from .sides import Side

Stream = tuple[str, int]  # a norm and which of its calls


def fill(problem: Problem, out: Float[Tensor, "M L"], *, memory: int = MEMORY, progress: Progress | None = None) -> Coverage:
    """F_CH2 [M, L] into out; no parameter takes part by a rule."""
    out.copy_(ch2_matrix(problem.tracer, problem.observed, problem.updated))
    return {}


@torch.no_grad()
def ch2_matrix(tracer: Tracer, o: Side, u: Side) -> Float[Tensor, "M L"]:
    """F_CH2[m,l] = <Wᵀ g_m, Wᵀ γ_l> · Σ_streams <h̃_m, h̃_l>, g and γ the forces pulled back through softcap and scale.

    The streams are found by what the model does (`streams`). Which parameters are trainable plays no part.

    Args:
        tracer, o, u: the model and both sides.

    Raises:
        ValueError: a model without a norm whose output enters a linear projection.

    Cost: two forward passes of the first batch and one of each other, (M + L) V d flops for the forces, M L S d for the matrix
    with S streams. Memory: (M + L) S d numbers besides the matrix.
    """
    found = streams(tracer, o.batches[0])
    (h_o, d_o), (h_u, d_u) = (_features(tracer, side, found) for side in (o, u))
    return ops.dual_gram(h_o, h_u, d_o, d_u)  # streams lie side by side: their inner products add up


@torch.no_grad()
def streams(tracer: Tracer, batch: Batch) -> list[Stream]:
    """The norms whose output enters a linear projection as it is, in the order they are called, each once.

    Which module is a norm is seen by its derivative (`Norm.of`), which one a projection by what it computes (`rule_for`). The
    readout is no projection, nor is a stack of experts with its router; one between the last norm and the readout (OPT's) is.

    Raises:
        ValueError: there is none.
    """
    names = [name for name, module in tracer.model.named_modules() if "weight" in dict(module.named_parameters(recurse=False))]
    _, calls = tracer.record(batch, names)
    count: dict[str, int] = {}
    normed: dict[tuple[int, int], Stream] = {}  # where a norm's output lies in memory; all of them are alive in `calls`
    found: dict[Stream, None] = {}
    for call in calls:
        nth = count[call.name] = count.get(call.name, -1) + 1
        stream = normed.get(_place(call.inputs[0])) if call.inputs else None
        if _is_norm(call):
            normed[_place(call.output)] = (call.name, nth)
        elif stream is not None and stream not in found and _is_projection(call):
            found[stream] = None
    if not found:
        raise ValueError(
            f"scope='ch2' needs norms whose output enters a linear projection, and {type(tracer.model).__name__} has none (its "
            "norms come after the projections, or are not recognised): use scope='full' or scope='readout'"
        )
    return sorted(found, key=list(normed.values()).index)


def _place(x: Tensor) -> tuple[int, int]:
    """A key shared by a tensor and its views over the same contiguous storage."""
    return (x.data_ptr() if x.is_contiguous() else -id(x)), x.numel()


def _is_norm(call: Call) -> bool:
    """Whether a norm; in half precision, by its derivative in float32."""
    x, weight = call.inputs[0] if call.inputs else None, call.module.weight
    if x is None or len(call.inputs) != 1 or weight.shape != x.shape[-1:]:
        return False
    if x.dtype in (torch.float16, torch.bfloat16):
        module, x = copy.deepcopy(call.module).float(), x.float()
        return Norm.of(replace(call, module=module, args=(x,), kwargs={}, output=module(x))) is not None
    return Norm.of(call) is not None


def _is_projection(call: Call) -> bool:
    moves = {name for name, _ in call.module.named_parameters(recurse=False)}
    if not isinstance(call.module, nn.Linear) and any(call.module.get_parameter(name).dim() > 2 for name in moves):
        return False  # a convolution or a stack: replaying it is expensive, and it is never a projection
    try:
        return isinstance(rule_for([call], moves), Linear)
    except NotReplayable:
        return False


def _features(tracer: Tracer, side: Side, found: list[Stream]) -> tuple[Float[Tensor, "N S"], Float[Tensor, "N d"]]:
    """All streams of each token of a side, one beside the other, and Wᵀ Γ."""
    weight, norms = tracer.readout.weight.to(tracer.precision), list(dict.fromkeys(name for name, _ in found))
    normed, pulled = [], []
    for batch, term in zip(side.batches, side.terms, strict=True):
        h, calls = tracer.record(batch, norms)
        of: dict[str, list[Tensor]] = {}
        for call in calls:
            of.setdefault(call.name, []).append(call.output.flatten(0, -2)[batch.rows.to(h.device)])
        normed.append(torch.cat([of[name][nth] for name, nth in found], 1).to(tracer.precision))
        pulled += [part.pulled @ weight for part in forces_at_readout(tracer, h, term)]
    return torch.cat(normed), torch.cat(pulled)
