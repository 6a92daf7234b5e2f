"""Which modules use a parameter is what the forward pass does with it, whatever its name says."""

import torch
from torch import nn

from tokdyn.model.trace import trace
from tokdyn.testing import random_chis, tiny


def usage(model):
    with trace(model) as tracer:
        return tracer.usage(tracer.batches(random_chis([(3, 4), (2, 2)], seed=1)))[0]


class Reads(nn.Module):
    """A linear layer whose weight is read without calling it, beside a parameter that is only looked at."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)
        self.looked_at = nn.Parameter(torch.ones(width))
        self.unused = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return nn.functional.linear(x.to(self.looked_at.dtype), self.inner.weight) / self.looked_at.size(0)


def test_each_parameter_is_used_by_the_chain_of_modules_around_it():
    """In a model without ties every name says its chain, and the readout's own use is left out."""
    model = tiny("llama", tied=False)
    found = usage(model)
    for name, _ in model.named_parameters():
        path = name.split(".")[:-1]
        chain = tuple(m for n in range(len(path) + 1) if (m := ".".join(path[:n])) != "model.layers")  # the list is not run
        assert found[name] == (set() if name == "lm_head.weight" else {chain}), name


def test_a_tied_weight_is_used_by_the_lookup_alone():
    found = usage(tiny("llama", tied=True))
    assert found["model.embed_tokens.weight"] == {("", "model", "model.embed_tokens")} and "lm_head.weight" not in found


def test_a_weight_that_is_read_and_not_called_belongs_to_the_reader():
    model = tiny("llama", tied=False)
    model.model.layers[1].mlp = Reads(32)
    found = usage(model)
    mlp = "model.layers.1.mlp"
    assert found[f"{mlp}.inner.weight"] == {("", "model", "model.layers.1", mlp)}
    assert not {f"{mlp}.looked_at", f"{mlp}.unused"} & found.keys(), "a dtype or a size is no use, nor is being there"


def test_a_module_in_two_places_is_used_in_two_chains():
    model = tiny("llama", tied=False)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    chains = usage(model)["model.layers.0.mlp.down_proj.weight"]
    ends = ("model.layers.0.mlp", "model.layers.0.mlp.down_proj")
    assert chains == {("", "model", layer, *ends) for layer in ("model.layers.0", "model.layers.1")}


def test_nothing_is_left_on_the_model_after_an_error():
    class Fails(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError

    model = tiny("llama", tied=False)
    model.model.layers[1].mlp = Fails()
    try:
        usage(model)
    except ZeroDivisionError:
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.overrides._get_current_function_mode() is None
