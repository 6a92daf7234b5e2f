"""Linear layers fused by one elementwise product go as one, and only they."""

import pytest
import torch
from engines import counted, forces

from tokdyn.exact.sweep import plan
from tokdyn.testing import float64, random_chis, relative_error, tiny

U, O = random_chis([(3, 5), (2, 6)], seed=1), random_chis([(3, 4), (5, 2)], seed=2)  # noqa: E741


@pytest.fixture
def found(monkeypatch):
    """The modules of every fusion that was found."""
    seen = []
    fusions = plan.fusions
    monkeypatch.setattr(plan, "fusions", lambda *args: seen.extend(fusions(*args)) or fusions(*args))
    return seen


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_gate_and_up_go_as_one_and_the_forces_are_those_of_one_gradient_per_token(family, found):
    model = tiny(family).double()
    with float64():
        expected = forces(model, U, O, method="naive").matrix
        with counted() as counts:
            F = forces(model, U, O)
    assert relative_error(F.matrix, expected) < 1e-9
    pairs = [f"model.layers.{i}.mlp.{name}_proj" for i in (1, 0) for name in ("gate", "up")]
    assert [name for fusion in found for name in fusion.modules] == pairs
    assert {F.coverage[f"{name}.weight"] for name in pairs} == {"outer product"}
    assert counts["sweep"] and counts["joint"]


class ReadTwice(torch.nn.Module):
    """A gated MLP whose gate acts on the output by a second way."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x):
        gate = self.gate_proj(x)
        return self.down_proj(torch.nn.functional.silu(gate) * self.up_proj(x)) + gate.mean(-1, keepdim=True)


class Mixed(ReadTwice):
    """A gated MLP that takes in something beside gate and up."""

    def forward(self, x):
        w = torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(w + x.mean(-1, keepdim=True))


class Shifted(ReadTwice):
    """A gated MLP in which up acts on the next position too."""

    def forward(self, x):
        up = self.up_proj(x)
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * (up + torch.nn.functional.pad(up, (0, 0, 1, -1))))


@pytest.mark.parametrize("kind", [ReadTwice, Mixed, Shifted])
def test_what_reaches_the_output_by_another_way_stays_by_itself(kind, found):
    model = tiny("llama").double()
    model.model.layers[0].mlp = kind(model.model.layers[0].mlp)
    with float64():
        expected = forces(model, U, O, method="naive").matrix
        with counted() as counts:
            assert relative_error(forces(model, U, O).matrix, expected) < 1e-9
    assert counts["sweep"] and counts["joint"]
    assert [fusion.modules[0] for fusion in found] == ["model.layers.1.mlp.gate_proj"]


def test_adapters_beside_frozen_layers_stay_by_themselves(found):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["gate_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny("llama"), config).double()
    with float64():
        expected = forces(model, U, O, method="naive").matrix
        with counted() as counts:
            assert relative_error(forces(model, U, O).matrix, expected) < 1e-9
    assert counts["sweep"] and not counts["joint"] and not found
