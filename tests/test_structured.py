"""The structured engine: chunks, sides, rules and shared modules do not change the matrix; what it cannot cover it says."""

import pytest
import torch

import tokdyn as td
from tokdyn import exact, rules, structured
from tokdyn.forces import prepare
from tokdyn.objectives import SFT
from tokdyn.testing import random_chis, relative_error, tiny
from tokdyn.trace import trace

U, O = random_chis([(3, 5), (2, 6)], seed=1), random_chis([(3, 4), (1, 3), (5, 2)], seed=2)  # noqa: E741
FP32 = 1e-5


def matrices(model, scope="full", **options):
    """The naive matrix, the structured one, and its rules."""
    with trace(model) as tracer:
        sides = prepare(tracer, U, O, SFT())
        uses = exact.select(tracer, scope)
        naive, fast = torch.full((9, 11), torch.nan), torch.full((9, 11), torch.nan)
        exact.naive_matrix(tracer, sides.o, sides.u, uses, None, naive)
        by = structured.structured_matrix(tracer, sides.o, sides.u, uses, fast, **options)
        assert set(by) == set(uses)  # every parameter took part
        return naive, fast, by


@pytest.mark.parametrize("chunk", [1, 2, 5, None])
def test_chunks_do_not_matter(chunk):
    naive, fast, _ = matrices(tiny("qwen2"), chunk=chunk)
    assert relative_error(fast, naive) < FP32


def test_memory_sets_the_chunk_and_nothing_else():
    naive, fast, _ = matrices(tiny("qwen2"), memory=1)
    assert relative_error(fast, naive) < FP32


@pytest.mark.parametrize("scope", ["full", "backbone", "readout"])
def test_sides_may_be_exchanged(scope):
    model = tiny("gemma2")
    with trace(model) as tracer:
        sides = prepare(tracer, U, O, SFT())
        uses = exact.select(tracer, scope)
        there, back = torch.empty(9, 11), torch.empty(11, 9)
        structured.structured_matrix(tracer, sides.o, sides.u, uses, there)
        structured.structured_matrix(tracer, sides.u, sides.o, uses, back)
    assert relative_error(back.T, there) < FP32


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_local_rule_agrees_with_the_special_ones(family, monkeypatch):
    naive, _, by = matrices(tiny(family, tied=False))
    assert {"outer product", "lookup", "elementwise gain"} <= set(by.values())
    monkeypatch.setattr(structured, "rule_for", rules.Local)
    _, local, by = matrices(tiny(family, tied=False))
    assert "module-local" in by.values() and "outer product" not in by.values()
    assert relative_error(local, naive) < FP32


def test_written_directions_agree_with_inner_products():
    """Two sequences of more than six widths: the direction is written down instead of S (rules.Linear)."""
    chis = random_chis([(212, 6)], seed=3)
    model = tiny("llama", intermediate_size=16, max_position_embeddings=256)
    naive = td.forces(model, chis, chis, SFT(), method="naive").matrix
    assert relative_error(td.forces(model, chis, chis, SFT()).matrix, naive) < FP32


def test_a_module_called_twice_moves_twice():
    model = tiny("llama", tied=False)
    model.model.layers[1] = model.model.layers[0]
    naive = td.forces(model, U, O, SFT(), method="naive").matrix
    result = td.forces(model, U, O, SFT())
    assert relative_error(result.matrix, naive) < FP32
    assert "outer product" in result.coverage.values()


def test_a_tensor_in_two_modules_takes_the_slower_exact_way_and_says_so():
    model = tiny("llama", tied=False)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    naive = td.forces(model, U, O, SFT(), method="naive").matrix
    result = td.forces(model, U, O, SFT())
    assert relative_error(result.matrix, naive) < FP32
    assert all("one direction per token" in rule and "one tensor in two modules" in rule for rule in result.coverage.values())


def test_a_gain_is_recognised_by_what_it_does():
    class Odd(torch.nn.Module):
        """One 1-D weight, but not a gain."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(32))

        def forward(self, x):
            return x + self.weight.sigmoid() * x.roll(1, -1)

    model = tiny("llama", tied=False)
    model.model.norm = Odd()
    naive, fast, by = matrices(model)
    assert by["model.norm.weight"] == "module-local"
    assert by["model.layers.0.input_layernorm.weight"] == "elementwise gain"
    assert relative_error(fast, naive) < FP32
