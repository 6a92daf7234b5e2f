"""Every architecture, with and without adapters, in both precisions: the structured engine gives the Gram of the gradients.

float32: two gradients of the same model agree to some 1e-6; the bound is that of the issue. float64: with the casts to float32
inside transformers' modules taken away (testing.float64) every family agrees to rounding; with them, to those casts.
"""

import contextlib
import copy

import pytest
import torch
from engines import assert_local, counted, forces
from torch import nn

from tokdyn.model.trace import trace
from tokdyn.objectives import SFT
from tokdyn.testing import FAMILIES, float64, random_chis, relative_error, tiny, tiny_lora

U, O = random_chis([(5, 3), (2, 4)], seed=1), random_chis([(4, 4), (1, 2)], seed=2)  # noqa: E741
FP32, FP64 = 1e-5, 1e-9

pytestmark = pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")


def build(family, lora):
    return tiny_lora(family, tied=None) if lora else tiny(family, tied=None)


def force(model, **options):
    return forces(model, U, O, SFT(), **options)


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forces_are_those_of_one_gradient_per_token(family, lora):
    model = build(family, lora)
    naive = force(model, method="naive").matrix
    with counted() as counts:
        full = force(model)
    assert relative_error(full.matrix, naive) < FP32
    assert counts["sweep"] and counts["alone"]  # the other way: tests/exact/test_engines.py
    for reduce, axis in (("update", 1), ("observe", 0)):
        vector = force(model, reduce=reduce).vector
        # rounding of a sum is relative to the sum of magnitudes
        assert float((vector - naive.sum(axis)).norm()) < FP32 * float(naive.abs().sum(axis).norm())
    assert relative_error(force(model, scope="backbone").matrix, force(model, scope="backbone", method="naive").matrix) < FP32
    if lora:
        with pytest.raises(ValueError, match="scope 'readout' holds no trainable parameter"):
            force(model, scope="readout")
    else:
        readout = force(model, scope="readout").matrix
        assert relative_error(readout, force(model, scope="readout", method="naive").matrix) < FP32

    trainable = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert {name for name, rule in full.coverage.items() if rule != "frozen"} == trainable
    assert_local(full.coverage, family, lora)


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float64_is_exact_to_rounding(family, lora):
    model = build(family, lora).double()
    with float64():
        for scope in ("full",) if lora else ("full", "readout", "backbone"):  # an adapter leaves the readout frozen
            naive = force(model, scope=scope, method="naive").matrix
            assert naive.dtype == torch.float64
            assert relative_error(force(model, scope=scope).matrix, naive) < FP64


def test_a_casting_float64_model_is_exact_to_its_casts():
    model = tiny("llama").double()
    error = relative_error(force(model).matrix, force(model, method="naive").matrix)
    assert error < FP32  # RMSNorm, softmax and angles are float32: 1e-7 or so
    with float64():
        exact = force(model).matrix
    assert 1e-10 < relative_error(force(model).matrix, exact) < FP32


@pytest.mark.parametrize("family", ["falcon", "mixtral", "bloom"])
def test_implementations_and_functions_are_put_back(family):
    model = tiny(family)
    before = {key: vars(model.config)[key] for key in ("_attn_implementation_internal", "_experts_implementation_internal")}
    with contextlib.suppress(KeyError), trace(model):
        raise KeyError
    assert {key: vars(model.config)[key] for key in before} == before
    if family == "bloom":
        from transformers.models.bloom.modeling_bloom import GeLUFunction

        assert "apply" not in vars(GeLUFunction)


def test_a_module_under_two_names_keeps_its_parameters():
    model = tiny("llama", tied=False)
    model.model.layers[1] = model.model.layers[0]
    before = {name: id(p) for name, p in model.named_parameters()}
    force(model, method="naive")
    assert {name: id(p) for name, p in model.named_parameters()} == before


class Reader(nn.Module):
    """Reads its projection's weight, calls it too, returns two tensors that depend on one another, and has a spare weight."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.side, self.spare = inner, nn.Linear(32, 32), nn.Parameter(torch.ones(3))

    def forward(self, *, x):
        y = self.side(x).tanh() @ self.side.weight
        return dict(first=y, both=(y.sin(), torch.zeros((), dtype=torch.long)))


@pytest.mark.parametrize("scope", ["full", "side", "up_proj"])
def test_weights_read_by_the_module_around_and_outputs_on_one_anothers_path(scope):
    model = tiny("llama", tied=False)
    mlp = model.model.layers[0].mlp
    mlp.reader = Reader(mlp.up_proj)
    own = mlp.forward
    mlp.forward = lambda x: own(x) + (lambda r: 2 * r["first"] + r["both"][0])(mlp.reader(x=x))
    naive, fast = force(model, scope=scope, method="naive").matrix, force(model, scope=scope)
    assert relative_error(fast.matrix, naive) < FP32
    if scope == "full":
        assert fast.coverage["model.layers.0.mlp.reader.side.weight"] == "module-local"
        assert fast.coverage["model.layers.0.mlp.reader.spare"] == "not used in the forward pass"
        assert fast.coverage["model.layers.0.mlp.up_proj.weight"] == "outer product"


def test_the_padding_row_has_no_gradient():
    """Of an untied lookup; a tied one is refused (test_padding_row.py)."""
    model = tiny("llama", tied=False, pad_token_id=int(U[0].ids[0]))
    chis = [U[0], O[0].with_(ids=torch.cat([U[0].ids[:1], O[0].ids[1:]]))]
    naive = forces(model, U, chis, SFT(), method="naive").matrix
    assert relative_error(forces(model, U, chis, SFT()).matrix, naive) < FP32


def test_logits_beyond_the_readouts_formula_take_the_slower_exact_way_and_say_so():
    model = tiny("llama", tied=False)
    head = model.lm_head.forward
    model.lm_head.forward = lambda h: 2 * head(h).sin()
    naive, fast = force(model, method="naive").matrix, force(model, slow="the readout's formula")
    assert relative_error(fast.matrix, naive) < FP32


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral"])
def test_half_precision_is_no_worse_than_one_gradient_per_token(family):
    model = tiny(family).to(torch.bfloat16)
    exact = force(copy.deepcopy(model).float()).matrix
    half, naive = force(model), force(model, method="naive").matrix
    assert relative_error(half.matrix, exact) < 2 * relative_error(naive, exact) < 0.5
    assert {"outer product", "lookup", "elementwise gain"} <= set(half.coverage.values())
