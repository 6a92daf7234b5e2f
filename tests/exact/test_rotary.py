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


@pytest.mark.parametrize("order", ["q, k, cos, sin", "x, sin, cos", "x, cos, sin, unsqueeze_dim", "keywords", "interleaved",
                                   "no cos, sin", "more tensors"])  # fmt: skip
def test_a_call_is_closed_where_it_fits_and_the_familys_own_elsewhere(order):
    """Whatever the order of the arguments, one tensor or two, by keyword or not; what is turned otherwise keeps its own."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 5, 8, generator=g, requires_grad=True) for _ in range(2))
    cos, sin = torch.randn(2, 1, 5, 8, generator=g)

    def rotated(x, cos, sin):
        return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin

    def pair(q, k, cos, sin, unsqueeze_dim=1):
        return rotated(q, cos[:, None], sin[:, None]), rotated(k, cos[:, None], sin[:, None])

    def turned_about(x, sin, cos):
        return rotated(x, cos[:, None], sin[:, None])

    def heads_last(x, cos, sin, unsqueeze_dim=1):
        return rotated(x, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))

    def interleaved(q, k, cos, sin):
        return q * cos[:, None] + torch.stack([-q[..., 1::2], q[..., ::2]], -1).flatten(-2) * sin[:, None], k

    def by_angle(x, angle):
        return rotated(x, angle.cos()[:, None], angle.sin()[:, None])

    def with_values(q, k, v, cos, sin):
        return (*pair(q, k, cos, sin), v, v + q)

    plain, call, fits = {
        "q, k, cos, sin": (pair, lambda f: f(q, k, cos, sin), 2),
        "x, sin, cos": (turned_about, lambda f: f(q, sin, cos), 1),
        "x, cos, sin, unsqueeze_dim": (heads_last, lambda f: f(q.transpose(1, 2), cos, sin, unsqueeze_dim=2), 1),
        "keywords": (pair, lambda f: f(k=k, q=q, sin=sin, cos=cos), 2),
        "interleaved": (interleaved, lambda f: f(q, k, cos, sin), 0),
        "no cos, sin": (by_angle, lambda f: f(q, cos), 0),
        "more tensors": (with_values, lambda f: f(q, k, q, cos, sin), 0),
    }[order]
    expected, found = call(plain), call(rotary._closed(plain))
    expected, found = (y if isinstance(y, tuple) else (y,) for y in (expected, found))
    assert [type(y.grad_fn).__name__ for y in found].count("_TurnedBackward") == fits
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
        v = torch.randn(a.shape, generator=g)
        grads = [torch.autograd.grad(y, (q, k), v, retain_graph=True, allow_unused=True) for y in (a, b)]
        for x, y in zip(*grads, strict=True):
            assert (x is None and y is None) or relative_error(y, x) < 1e-6  # sums of two products, a few roundings
