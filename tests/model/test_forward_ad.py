"""What a trace changes so that a model has forward derivatives: the derivative is right, and all of it is put back."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import jvp, vjp, vmap

from tokdyn.model.attention import ATTENTION
from tokdyn.model.forward_ad import traceable
from tokdyn.testing import tiny


class Product(torch.autograd.Function):
    """sin(x) y, the old way: a context in forward, a backward and nothing else."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x.sin() * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * y * x.cos(), g * x.sin()


class Square(torch.autograd.Function):
    """x², likewise; its backward returns a tensor and no tuple."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Scaled(torch.autograd.Function):
    """A number times x where a mask is set: inputs that are no tensors, and a backward that gives None for what is not x."""

    @staticmethod
    def forward(ctx, x, number, mask):
        ctx.save_for_backward(mask)
        ctx.number = number
        return number * x * mask

    @staticmethod
    def backward(ctx, g):
        return ctx.number * g * ctx.saved_tensors[0], None, None


@pytest.fixture
def model(monkeypatch):
    """Two modules from two files, both of which hold the functions."""
    parts = []
    for name in ("first_file", "second_file"):
        file = ModuleType(name)
        file.Product, file.Square, file.Scaled = Product, Square, Scaled
        monkeypatch.setitem(sys.modules, name, file)
        parts.append(type("Part", (nn.Module,), {"__module__": name})())
    return nn.ModuleList(parts)


def test_functions_with_only_a_backward_get_the_jvp_that_it_transposes(model):
    g = torch.Generator().manual_seed(0)
    x, y, dx, dy = (torch.randn(5, dtype=torch.float64, generator=g) for _ in range(4))
    many = torch.randn(3, 5, dtype=torch.float64, generator=g)
    with traceable(model):
        for f, plain, args, tangents in (
            (Product, lambda x, y: x.sin() * y, (x, y), (dx, dy)),
            (Square, lambda x: x * x, (x,), (dx,)),
        ):
            # products of two numbers of size 1: a few roundings
            close = dict(rtol=0, atol=16 * torch.finfo(torch.float64).eps)
            torch.testing.assert_close(jvp(f.apply, args, tangents)[1], jvp(plain, args, tangents)[1], **close)
            torch.testing.assert_close(vjp(f.apply, *args)[1](dx), vjp(plain, *args)[1](dx), **close)
            torch.testing.assert_close(vmap(vjp(f.apply, *args)[1])(many), vmap(vjp(plain, *args)[1])(many), **close)


def test_inputs_without_a_derivative(model):
    x, dx = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([1.0, 0, 1, 1, 0], dtype=torch.float64)
    with traceable(model):
        assert torch.equal(jvp(lambda x: Scaled.apply(x, 3.0, mask), (x,), (dx,))[1], 3 * dx * mask)
        assert torch.equal(vjp(lambda x: Scaled.apply(x, 3.0, mask), x)[1](dx)[0], 3 * dx * mask)


def test_modules_that_call_attention_themselves_have_a_jvp(model):
    g = torch.Generator().manual_seed(0)
    q, k, v, dq, dk, dv = torch.randn(6, 1, 2, 5, 4, dtype=torch.float64, generator=g).unbind()

    def written_out(q, k, v):
        scores = (q @ k.mT / 2).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
        return scores.softmax(-1) @ v

    with traceable(model):
        run = lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
        value, moved = jvp(run, (q, k, v), (dq, dk, dv))
        assert value.transpose(1, 2).is_contiguous()  # models view it so
    # sums of at most five products of numbers of size 1
    torch.testing.assert_close(moved, jvp(written_out, (q, k, v), (dq, dk, dv))[1], rtol=0, atol=1e-13)


def test_requires_grad_is_set_by_transforms_and_by_nobody_inside_them(model):
    """A hook's requires_grad_() inside a jvp changes nothing; a vjp, which marks its own inputs by it, is not disturbed."""
    x, dx = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    with traceable(model):
        assert torch.equal(jvp(lambda x: (2 * x).requires_grad_(), (x,), (dx,))[1], 2 * dx)
        assert torch.equal(vjp(lambda x: (2 * x).requires_grad_(), x)[1](dx)[0], 2 * dx)
        assert (2 * x).requires_grad_().requires_grad


def test_functions_are_put_back_after_an_error(model):
    own = vars(torch.autograd.Function)["apply"]
    with pytest.raises(ZeroDivisionError), traceable(model), traceable(model):
        assert vars(torch.autograd.Function)["apply"] is not own
        raise ZeroDivisionError
    assert vars(torch.autograd.Function)["apply"] is own


class Overwriting(torch.autograd.Function):
    """x y, whose backward writes over what was saved and over the gradient it is given, as kernels do: nothing counts it."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        dx, dy = g * y, g * x
        x.data.copy_(dx)
        y.data.copy_(dy)
        g.data.zero_()
        return x, y


def test_a_backward_that_writes_over_what_was_saved_runs_twice(model):
    x, y, g = (torch.randn(5, dtype=torch.float64).requires_grad_() for _ in range(3))
    once = Overwriting.apply(x.clone(), y.clone())
    first, second = (torch.autograd.grad(once, x, g.detach().clone(), retain_graph=True)[0].clone() for _ in range(2))
    assert torch.equal(first, y * g) and not torch.equal(second, first)  # the hazard
    with traceable(model):
        h = g.detach().clone()
        out = Overwriting.apply(x, y)
        for _ in range(2):
            found = torch.autograd.grad(out, (x, y), h, retain_graph=True)
            assert torch.equal(found[0], y * g) and torch.equal(found[1], x * g) and torch.equal(h, g)


def test_implementations_are_chosen_and_put_back():
    model = tiny("mixtral")
    before = (model.config._attn_implementation, model.config._experts_implementation)
    with pytest.raises(ZeroDivisionError), traceable(model):
        assert (model.config._attn_implementation, model.config._experts_implementation) == (ATTENTION, "eager")
        raise ZeroDivisionError
    assert (model.config._attn_implementation, model.config._experts_implementation) == before


def test_a_config_that_is_no_object_is_left_alone():
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(hidden_size=2)
    with traceable(model):
        assert vars(model.config) == {"hidden_size": 2}
