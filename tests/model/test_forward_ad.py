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


@pytest.fixture
def model(monkeypatch):
    """Two modules from two files, both of which hold the functions."""
    parts = []
    for name in ("first_file", "second_file"):
        file = ModuleType(name)
        file.Product, file.Square = Product, Square
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


def test_functions_are_put_back_also_when_two_files_share_them_and_after_an_error(model):
    for error in (None, ZeroDivisionError):
        try:
            with traceable(model):
                assert "apply" in vars(Product) and "apply" in vars(Square)
                if error:
                    raise error
        except ZeroDivisionError:
            pass
        assert "apply" not in vars(Product) and "apply" not in vars(Square)


def test_implementations_are_chosen_and_put_back():
    model = tiny("mixtral")
    before = (model.config._attn_implementation, model.config._experts_implementation)
    with pytest.raises(ZeroDivisionError), traceable(model):
        assert (model.config._attn_implementation, model.config._experts_implementation) == (ATTENTION, "eager")
        raise ZeroDivisionError
    assert (model.config._attn_implementation, model.config._experts_implementation) == before


def test_attention_with_sinks_is_eager(caplog):
    model = tiny("llama")
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))
    model.__class__ = type("LlamaWithSinks", (type(model),), {})  # what is said is said once for a kind of model
    with traceable(model):
        assert model.config._attn_implementation == "eager"
    assert "LlamaWithSinks has attention sinks" in caplog.text


def test_a_config_that_is_no_object_is_left_alone():
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(hidden_size=2)
    with traceable(model):
        assert vars(model.config) == {"hidden_size": 2}
