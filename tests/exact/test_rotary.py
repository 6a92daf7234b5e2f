"""Rotary embeddings are recognised by their form, and their closed derivative is that of autograd."""

import sys

import pytest
import torch

from tokdyn.exact.modules import rotary
from tokdyn.testing import relative_error, tiny


def gradients(model, ids):
    """Of the loss by every parameter: through both of a rotary embedding's tensors in every layer."""
    model.zero_grad()
    model(ids, use_cache=False).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("family", "closed"),
    [("llama", 4), ("qwen2", 4), ("qwen3", 4), ("gemma3", 4), ("phi3", 4), ("gpt_neox", 0), ("cohere", 0), ("gpt2", 0)],
)
def test_closed_form_is_the_derivative(family, closed, monkeypatch):
    """Queries and keys of two layers each; GPT-NeoX turns a part of a head, Cohere neighbours and not halves, GPT-2 nothing."""
    count, take = [], rotary._Turned.apply
    monkeypatch.setattr(rotary._Turned, "apply", lambda *args: count.append(1) or take(*args))
    model, ids = tiny(family), torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    plain = gradients(model, ids)
    with rotary.turned(model):
        found = gradients(model, ids)
    assert len(count) == closed
    assert all(relative_error(found[name], plain[name]) < 1e-5 for name in plain)


def test_functions_are_put_back_after_an_error():
    model = tiny("llama")
    names = vars(sys.modules[type(model).__module__])
    before = names[rotary.FUNCTION]
    with pytest.raises(KeyError), rotary.turned(model):
        assert names[rotary.FUNCTION] is not before
        raise KeyError
    assert names[rotary.FUNCTION] is before


def test_another_form_keeps_its_own_derivative():
    """A factor on what is turned, as scaled embeddings have in their cosines, is not this form where it is not in them."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 5, 8, generator=g, requires_grad=True)
    cos, sin = torch.randn(2, 1, 5, 8, generator=g)
    y = x * cos[:, None] + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin[:, None]
    assert rotary._turned(x, y, cos, sin) is not y
    for other in (2 * y, y + 0.01, y[..., :-1]):
        assert rotary._turned(x, other, cos, sin) is other
