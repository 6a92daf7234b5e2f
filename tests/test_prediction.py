"""What a profile or a scan takes, counted from shapes: against the operators that run, and by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tokdyn import prediction
from tokdyn.exact.products import jvp, vjp
from tokdyn.exact.scope import select
from tokdyn.exact.sides import Observed
from tokdyn.model.trace import trace
from tokdyn.testing import random_chis, tiny

T, N = 24, 7
CHIS = random_chis([(T - N, N)], seed=1)
FUSED = {  # torch counts fused attention on a GPU alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda do, q, k, v, *_, **__: sdpa_backward_flop_count(do, q, k, v)
    ),
}


def multiplications(call):
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        call()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_passes_are_the_products_that_run(family):
    """Weights, scores of attention and logits, each with its multiplier: everything that torch's own counter sees."""
    with trace(tiny(family)) as tracer:
        shape, side = prediction.Shape.of(tracer, longest=T), prediction.side(CHIS)
        scored, uses = Observed.of(tracer, CHIS).score(tracer), select(tracer, "full")
        with torch.no_grad():
            forward = multiplications(lambda: tracer.logits(scored.batches[0]))
        direction = vjp(tracer, scored, uses)
        jvp(tracer, scored, direction, uses)  # the tracer's own checks have run
        backward = multiplications(lambda: vjp(tracer, scored, uses))
        tangent = multiplications(lambda: jvp(tracer, scored, direction, uses))
    assert forward == pytest.approx(prediction.forward_work(shape, side), rel=0.02)
    assert backward == pytest.approx(prediction.backward_work(shape, side), rel=0.05)
    assert tangent == pytest.approx(prediction.tangent_work(shape, side), rel=0.05)


def test_a_matrix_is_counted_by_hand():
    """One layer, two sequences of 5 tokens, 3 of them scored, on each side: pulls, E, its inner products, the readout."""
    with trace(tiny("qwen2", num_hidden_layers=1)) as tracer:
        shape = prediction.Shape.of(tracer, longest=T)
    V, d, f = 61, 32, 48
    P, q = 2 * d * d + 2 * d * d // 2 + 3 * d * f, 2 * d + d + 2 * f + d
    assert (shape.weights, shape.outputs, shape.widths) == (P, q, (V, d, f))
    side, tokens, positions = [(5, 3), (5, 3)], 6, 10
    by_hand = P * 2 * tokens * 5 + q * (tokens * 5 * positions + tokens * tokens * 5) + 2 * tokens * V * d + tokens**2 * V
    assert prediction.matrix_work(shape, side, side) == by_hand


def test_experts_count_for_the_tokens_that_they_are_sent():
    """Two of five experts take a position: 2/5 of their stacks; a model without data is counted like one with it."""
    model = tiny("qwen2_moe", num_hidden_layers=1)
    with torch.device("meta"):
        empty = type(model)(model.config)
    with trace(model) as tracer:
        shape = prediction.Shape.of(tracer, longest=T)
    bare = prediction.Shape.of_modules(empty, shape.widths, shape.item, shape.kept)
    assert bare == shape
    stacks = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    dense = sum(
        p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name and "lm_head" not in name
    )
    assert stacks and shape.weights == pytest.approx(dense + 2 / 5 * stacks)
