"""The tracing attention is softmax attention, and its derivatives are that function's derivatives."""

import pytest
import torch
from torch import nn
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokdyn import ops
from tokdyn.kernels.cotangent_attention import reference as cotangent
from tokdyn.kernels.tangent_attention import fused
from tokdyn.kernels.tangent_attention import reference as tangent
from tokdyn.model import attention, forward_ad
from tokdyn.model.attention import ATTENTION, _Attention, register
from tokdyn.model.trace import trace
from tokdyn.testing import random_chis, relative_error, tiny

B, Hk, G, T, D = 2, 2, 3, 7, 4


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, Hk, G, T, D, dtype=torch.float64, generator=g)
    return q, *(torch.randn(B, Hk, T, D, dtype=torch.float64, generator=g) for _ in range(2))


def masks():
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    padded = causal.expand(B, 1, T, T).clone()
    padded[1, :, :, :2] = False  # left padding: the first rows of the second sequence see nothing
    packed = causal & (torch.arange(T)[:, None] // 3 == torch.arange(T)[None] // 3)
    return {
        "none": None,
        "causal": causal[None, None],
        "window": (causal & causal.triu(-2).bool())[None, None],
        "padded": padded,
        "packed": packed[None, None],
    }


def plain(q, k, v, mask, scale, softcap):
    s = torch.einsum("bhgtd,bhsd->bhgts", q, k) * scale
    s = s if softcap is None else softcap * (s / softcap).tanh()
    if mask is not None:
        s = s.masked_fill(~mask[:, :, None], -1e30)
    P = s.softmax(-1)
    if mask is not None:
        P = P * mask[:, :, None].any(-1, keepdim=True)
    return torch.einsum("bhgts,bhsd->bhgtd", P, v)


@pytest.fixture(params=[1, 1 << 23], ids=["row by row", "whole"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(tangent, "ELEMENTS", request.param)
    monkeypatch.setattr(tangent, "ROWS", 1)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("name", masks())
def test_values_tangents_and_cotangents_are_those_of_softmax_attention(name, softcap, blocks):
    args, mask = inputs(), masks()[name]

    def f(q, k, v):
        return plain(q, k, v, mask, 0.6, softcap)

    assert torch.allclose(tangent.attention(*args, mask, 0.6, softcap), f(*args), atol=1e-13)
    many = [torch.stack([inputs(s)[i] for s in (1, 2, 3)]) for i in range(3)]
    truth = vmap(lambda *d: jvp(f, args, d)[1])(*many)
    assert torch.allclose(tangent.tangent_attention(*args, *many, mask, 0.6, softcap), truth, atol=1e-12)
    _, pull = torch.func.vjp(f, *args)
    for value, gradient in zip(
        cotangent.cotangent_attention(*args, many[0], mask, 0.6, softcap), vmap(pull)(many[0]), strict=True
    ):
        assert torch.allclose(value, gradient, atol=1e-12)


@pytest.mark.parametrize("name", masks())
def test_the_fused_kernel_computes_the_same_attention(name):
    """What `ops` takes on the CPU for values and a single cotangent; rows that see nothing give 0 and take nothing back."""
    args, mask, do = inputs(), masks()[name], inputs(5)[0]
    value, pull = torch.func.vjp(lambda *x: plain(*x, mask, 0.6, None), *args)
    assert torch.allclose(ops.attention(*args, mask, 0.6), value, atol=1e-13)
    for found, gradient in zip(ops.cotangent_attention(*args, do[None], mask, 0.6), pull(do), strict=True):
        assert torch.allclose(found[0], gradient, atol=1e-12)


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_only_the_causal_mask_is_named_to_the_fused_kernel(block, monkeypatch):
    """One entry turned, wherever it stands, and the mask is written out; a kernel told "causal" would not see it."""
    monkeypatch.setattr(fused, "BLOCK", block)
    assert [name for name, mask in masks().items() if mask is not None and fused.is_causal(mask)] == ["causal"]
    causal = masks()["causal"].expand(B, 1, T, T)
    assert fused.is_causal(causal) and not fused.is_causal(causal[..., 1:, :]) and not fused.is_causal(causal[..., :-1, :])
    for place in range(causal.numel()):
        turned = causal.clone()
        turned.view(-1)[place] ^= True
        assert not fused.is_causal(turned)


@pytest.mark.parametrize("widths", [(4, 2), (2, 4)])
def test_the_fused_kernel_takes_heads_of_two_widths(widths):
    """Of queries and values (MLA), without the form that keeps scores."""
    (q, k, v), mask = inputs(), masks()["padded"]
    args = q[..., : widths[0]].contiguous(), k[..., : widths[0]].contiguous(), v[..., : widths[1]].contiguous()
    value, pull = torch.func.vjp(lambda *x: plain(*x, mask, 0.6, None), *args)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # or an error
        assert torch.allclose(ops.attention(*args, mask, 0.6), value, atol=1e-13)
        found = ops.cotangent_attention(*args, value[None], mask, 0.6)
    assert all(torch.allclose(a[0], b, atol=1e-12) for a, b in zip(found, pull(value), strict=True))


def with_sinks(q, k, v, sinks, mask, scale):
    """transformers' eager form (gpt-oss): a column of the softmax that takes probability and gives nothing."""
    s = (torch.einsum("bhgtd,bhsd->bhgts", q, k) * scale).masked_fill(~mask[:, :, None], -1e30)
    s = torch.cat([s, sinks.reshape(1, Hk, G, 1, 1).expand(B, -1, -1, T, -1)], -1)
    return torch.einsum("bhgts,bhsd->bhgtd", s.softmax(-1)[..., :-1], v)


@pytest.mark.parametrize("name", ["causal", "window", "padded"])
def test_a_sink_is_one_more_column_of_the_softmax(name, blocks):
    """Values, tangents and cotangents of queries, keys, values and sinks, many at a time."""
    args, mask = (*inputs(), torch.randn(Hk * G, dtype=torch.float64)), masks()[name]

    def ours(q, k, v, sinks):
        given = (q.flatten(1, 2), k, v, mask)
        return (
            attention.tracing_attention(nn.Module(), *given, scaling=0.6, s_aux=sinks)[0].transpose(1, 2).unflatten(1, (Hk, G))
        )

    def theirs(*x):
        return with_sinks(*x, mask, 0.6)

    assert torch.allclose(ours(*args), theirs(*args), atol=1e-13)
    many = tuple(torch.stack([(*inputs(seed), args[3] + seed)[i] for seed in (1, 2, 3)]) for i in range(4))
    found, truth = (vmap(lambda *d, f=f: jvp(f, args, d)[1])(*many) for f in (ours, theirs))
    assert torch.allclose(found, truth, atol=1e-12)
    found, truth = (vmap(torch.func.vjp(f, *args)[1])(many[0]) for f in (ours, theirs))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, truth, strict=True))


def test_tangents_and_cotangents_are_transposes(blocks):
    args, mask = inputs(), masks()["window"]
    d = [x[None] for x in inputs(4)]
    do = inputs(5)[0][None]
    forward = (do * tangent.tangent_attention(*args, *d, mask, 0.6, 1.5)).sum()
    backward = sum((a * b).sum() for a, b in zip(d, cotangent.cotangent_attention(*args, do, mask, 0.6, 1.5), strict=True))
    assert float(forward / backward - 1) == pytest.approx(0, abs=1e-12)


def test_the_backward_pass_is_derived_again_in_its_cotangent_alone():
    """Linear in it; second derivatives in q, k and v, which nobody makes, are NaN and not zero."""
    args, mask = [x.requires_grad_() for x in inputs()], masks()["padded"]
    do, weights = inputs(5)[0].requires_grad_(), inputs(4)
    again = []
    for f in (lambda *x: _Attention.apply(*x, mask, 0.6, 1.5), lambda *x: plain(*x, mask, 0.6, 1.5)):
        pulled = torch.autograd.grad(f(*args), args, do, create_graph=True)
        again.append(torch.autograd.grad(pulled, (do, *args), weights))
    assert torch.allclose(again[0][0], again[1][0], atol=1e-12)
    assert all(bool(x.isnan().all()) for x in again[0][1:])


def test_transforms_reach_the_batched_rules(monkeypatch):
    """vmap of jvp and of vjp with one primal, and with a batch of primals, equal the plain function's.

    Three directions at one primal are one call of the operator; where the primals are three, so are the calls.
    """
    args, mask, directions = inputs(), masks()["causal"], []
    for name, of in (("tangent_attention", 3), ("cotangent_attention", 3)):
        run = getattr(ops, name)
        monkeypatch.setattr(attention, name, lambda *x, run=run, of=of: directions.append(len(x[of])) or run(*x))

    def f(*x):
        return _Attention.apply(*x, mask, 0.6, None)

    def g(*x):
        return plain(*x, mask, 0.6, None)

    many = tuple(torch.stack([inputs(s)[i] for s in (1, 2, 3)]) for i in range(3))
    for h in (lambda f: vmap(lambda *d: jvp(f, args, d)[1])(*many), lambda f: vmap(lambda *x: jvp(f, x, args)[1])(*many)):
        assert torch.allclose(h(f), h(g), atol=1e-12)
    for h in (
        lambda f: vmap(torch.func.vjp(f, *args)[1])(many[0]),
        lambda f: vmap(lambda *x: torch.func.vjp(f, *x)[1](args[0]))(*many),
    ):
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(h(f), h(g), strict=True))
    assert directions == [3, 1, 1, 1, 3, 1, 1, 1]
    assert torch.allclose(vmap(f)(*many), vmap(g)(*many), atol=1e-13)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gemma2"])
def test_models_give_the_same_logits_and_gradients_as_with_eager_attention(family):
    register()
    model = tiny(family)
    chi = random_chis([(4, 6)], seed=1)[0]
    found = []
    for name in ("eager", ATTENTION):
        model.set_attn_implementation(name)
        z = model(chi.ids[None]).logits
        found.append((z.detach(), torch.autograd.grad(z.square().sum(), list(model.parameters()))))
    assert relative_error(found[1][0], found[0][0]) < 1e-5
    for a, b in zip(*(grads for _, grads in found), strict=True):
        assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max() + 1))


@pytest.mark.parametrize(
    ("family", "own"),
    [("llama", True), ("gemma2", True), ("gpt2", True), ("falcon", False), ("bloom", False)],
)
def test_a_traced_model_runs_the_tracing_attention_or_says_that_it_does_not(family, own, monkeypatch, caplog):
    """Once in every layer; what is said is said once for a kind of model."""
    forward_ad._say_eager.cache_clear()
    calls, run = [], _Attention.apply
    monkeypatch.setattr(_Attention, "apply", lambda *args: calls.append(1) or run(*args))
    model = tiny(family)
    for _ in range(2):
        with trace(model) as tracer:
            tracer.logits(tracer.batches(random_chis([(2, 3)], seed=1))[0])
    passes = 1 + 2  # the check at the entry of the first trace, which the second remembers, and the pass of each
    assert len(calls) == (passes * model.config.num_hidden_layers if own else 0)
    assert [("eager attention" in message) for message in caplog.messages] == ([] if own else [True])


def test_padded_and_packed_batches_reach_the_attention():
    register()
    model = tiny("llama")
    ids = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(0))
    padding = torch.ones(2, 8, dtype=torch.long)
    padding[0, :3] = 0
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    outs = []
    for name in ("eager", ATTENTION):
        model.set_attn_implementation(name)
        with torch.no_grad():
            left = model(ids, attention_mask=padding).logits
            outs.append((left[0, 3:], left[1], model(ids[:1], position_ids=packed, use_cache=False).logits))
    assert all(relative_error(b, a) < 1e-5 for a, b in zip(*outs, strict=True))


@pytest.mark.parametrize("name", ["none", "causal", "padded"])
@pytest.mark.parametrize("touched", [[], [0], [T - 1], [2, 4]])
def test_queries_that_no_cotangent_touches_are_left_out(name, touched, monkeypatch):
    """And nothing is different: a zero cotangent at a query pulls nothing back."""
    args, mask, asked = inputs(), masks()[name], []

    def heard(q, *others):
        asked.append(q.shape[-2])
        return ops.cotangent_attention(q, *others)

    monkeypatch.setattr(attention, "cotangent_attention", heard)
    do = torch.zeros(3, *args[0].shape, dtype=torch.float64)
    do[1:, ..., touched, :] = torch.stack([inputs(s)[0] for s in (1, 2)])[..., touched, :]
    found = vmap(torch.func.vjp(lambda *x: _Attention.apply(*x, mask, 0.6, None), *args)[1])(do)
    truth = vmap(torch.func.vjp(lambda *x: plain(*x, mask, 0.6, None), *args)[1])(do)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, truth, strict=True))
    assert asked == [max(touched) - min(touched) + 1 if touched else 1]
