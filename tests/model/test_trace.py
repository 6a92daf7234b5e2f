"""A traced model is a function of its parameters; it is left as it was, and says what it cannot be traced with."""

import copy

import pytest
import torch

from tokdyn.model.trace import Tracer, finite_stats, trace
from tokdyn.sequences import Chi
from tokdyn.testing import random_chis, relative_error, tiny

CHIS = random_chis([(3, 4), (1, 9), (2, 2), (2, 3)], seed=1)
FP32 = 1e-5  # about twenty sums of at most 64 numbers follow one another: 20 · √64 · 2⁻²⁴ as roundings add up


def state(model):
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes = [(m.training, getattr(getattr(m, "config", None), "_attn_implementation", None)) for m in model.modules()]
    return parameters, modes, [p.requires_grad for p in model.parameters()], torch.get_rng_state()


def same(a, b):
    return all(torch.equal(a[0][name], b[0][name]) for name in a[0]) and a[1:3] == b[1:3] and torch.equal(a[3], b[3])


@pytest.mark.parametrize("shared", [False, True])
def test_other_parameters_give_what_a_model_with_them_gives(shared):
    """Also by the second name of a tensor, and where one module has two names."""
    model = tiny("llama", tied=False)
    if shared:
        model.model.layers[1].mlp = model.model.layers[0].mlp
    name = "model.layers.1.mlp.gate_proj.weight"
    W = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(model)
    other.get_parameter(name).data.copy_(W)
    before = state(model)
    with trace(model) as tracer, trace(other) as truth:
        batch = tracer.batches(CHIS)[0]
        moved = W.clone().requires_grad_()
        z = tracer.logits(batch, {name: moved})
        assert relative_error(z.detach(), truth.logits(batch).detach()) < FP32
        assert relative_error(z.detach(), tracer.logits(batch).detach()) > 1e-3
        assert torch.autograd.grad(z.sum(), moved)[0].norm() > 0
        assert (tracer.owner[name] == "model.layers.0.mlp.gate_proj.weight") == shared
    assert same(state(model), before)


def test_a_tied_weight_moves_under_each_of_its_names_alone():
    """dz for the readout's name plus dz for the lookup's is dz for the tensor, in the limit of a small step."""
    model = tiny("llama", tied=True).double()
    names = ("lm_head.weight", "model.embed_tokens.weight")
    with trace(model) as tracer:
        assert tracer.owner[names[0]] == tracer.owner[names[1]]
        batch, W = tracer.batches(CHIS)[0], tracer.params[names[0]]
        z = tracer.logits(batch, {name: W.clone() for name in names}).detach()
        parts = [W.clone().requires_grad_() for _ in names]
        v = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(0))
        apart = torch.autograd.grad((v * tracer.logits(batch, dict(zip(names, parts, strict=True)))).sum(), parts)
        one = W.clone().requires_grad_()
        (whole,) = torch.autograd.grad((v * tracer.logits(batch, dict.fromkeys(names, one))).sum(), one)
    assert all(part.norm() > 0 for part in apart)
    assert relative_error(sum(apart), whole) < FP32  # transformers computes norms in float32 whatever the model is in


@pytest.mark.parametrize("tokens", [1, 12, 1 << 12])
def test_batches_hold_every_sequence_in_order_and_score_the_same(tokens):
    with trace(tiny("llama")) as tracer:
        batches = tracer.batches(CHIS, tokens)
        assert torch.cat([b.sequence for b in batches]).unique_consecutive().tolist() == [0, 1, 2, 3]
        assert all(b.ids.numel() <= tokens or len(b.ids) == 1 for b in batches)
        found = torch.cat([tracer.logits(b).detach() for b in batches])
        alone = torch.cat([tracer.logits(b).detach() for chi in CHIS for b in tracer.batches([chi])])
    assert relative_error(found, alone) < FP32


def test_hidden_states_are_what_the_readout_is_given():
    model = tiny("llama")
    with trace(model) as tracer, torch.no_grad():
        batch = tracer.batches(CHIS)[0]
        assert relative_error(model.lm_head(tracer.hidden(batch)), tracer.logits(batch)) < FP32


def test_a_step_is_made_in_a_precision_that_holds_it():
    model = tiny("llama", tied=False).bfloat16()
    with trace(model) as tracer:
        name = "model.norm.weight"
        one = torch.ones_like(tracer.params[name], dtype=torch.float32)
        moved = tracer.stepped({name: one}, {name: name}, 2.0**-20)
        assert torch.equal(moved[name] - tracer.params[name].float(), 2.0**-20 * one)  # θ < 2: float32 holds both exactly
        assert {p.dtype for p in moved.values()} == {torch.float32} and moved.keys() == tracer.params.keys()


def test_a_model_in_training_is_in_evaluation_inside_and_as_it_was_after_an_error():
    model = tiny("llama").train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    before = state(model)
    with pytest.raises(ZeroDivisionError), trace(model) as tracer:
        assert not any(module.training for module in model.modules())
        tracer.logits(tracer.batches(CHIS)[0])
        raise ZeroDivisionError
    assert same(state(model), before)


def test_what_cannot_be_traced_is_named():
    model = tiny("llama")
    with pytest.raises(ValueError, match="sequence 1 holds token ids from 3 to 99, the model's vocabulary is"):
        Tracer(model).batches([CHIS[0], Chi(torch.tensor([3, 99]), torch.tensor([False, True]))])
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="parameter model.norm.weight holds NaN or inf"), trace(model):
        pass


def test_logits_that_are_no_distribution_are_named():
    batch = Tracer(tiny("llama")).batches(CHIS)[0]
    z = torch.zeros(len(batch.targets), 61)
    assert torch.allclose(finite_stats(batch, z).log_prob, -torch.tensor(61.0).log().expand(len(z)))
    z[5, 7] = torch.nan
    where = f"sequence {int(batch.sequence[5])} at position {int(batch.position[5])} hold NaN"
    with pytest.raises(ValueError, match=where):
        finite_stats(batch, z)
