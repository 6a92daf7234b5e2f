"""What a traced model must satisfy is looked at before a number is computed: its own logits, causal, one derivative.

The truth is the model itself, never traced: one sequence at a time through its own forward pass and autograd.
"""

import contextlib
import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from untouched import FP32, O, U, build, gradients, gram, log_probs

import tokdyn as td
from tokdyn.model import checks
from tokdyn.model.attention import ATTENTION, NotComputed, tracing_attention
from tokdyn.model.trace import trace
from tokdyn.testing import relative_error, tiny

# ---------------------------------------------------------------- same logits


@pytest.mark.parametrize("name", ["dsa", "doge", "git", "bert as decoder"])
def test_forces_are_those_of_the_untouched_model(name):
    model = build(name)
    truth = gram(model)
    assert relative_error(td.forces(model, U, O).matrix, truth) < FP32
    whole = td.forces(model, U, O, reduce="update").vector
    assert float((whole - truth.sum(1)).norm()) < FP32 * float(truth.abs().sum(1).norm())


def test_a_family_that_is_another_model_under_eager_attention_too_is_traced_with_torchs_own():
    """transformers adds Falcon's ALiBi to the mask, and under eager attention a second time to the scores."""
    model = tiny("falcon_alibi")
    model.set_attn_implementation("sdpa")
    truth = gram(model)
    found = td.forces(model, U, O)
    assert relative_error(found.matrix, truth) < FP32 and "outer product" in found.coverage.values()
    whole = td.forces(model, U, O, reduce="update").vector
    assert float((whole - truth.sum(1)).norm()) < FP32 * float(truth.abs().sum(1).norm())


@pytest.mark.parametrize("name", ["dsa", "doge"])
def test_a_probe_measures_the_untouched_model(name):
    model = build(name)
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch.no_grad():
        before = torch.cat([log_probs(model, chi) for chi in O]).double()
    with td.Monitor(model, opt, probe=O, on_error="raise") as monitor:
        ids = torch.stack([torch.cat([chi.ids, chi.ids])[:8] for chi in U])
        model(input_ids=ids, labels=ids).loss.backward()
        opt.step()
        step = monitor.step_end()
    with torch.no_grad():
        after = torch.cat([log_probs(model, chi) for chi in O]).double()
    band = 100 * torch.finfo(torch.float32).eps * float(before.norm())  # of float32 logits before and after
    assert float((step.actual - (after - before)).norm()) < band + FP32 * float((after - before).norm())


class ByName(nn.Module):
    """A block that is another one under any attention that can be traced."""

    def __init__(self, block, config):
        super().__init__()
        self.block, self.config = block, config

    def forward(self, *args, **kwargs):
        out = self.block(*args, **kwargs)
        return out if self.config._attn_implementation == "its own" else 1.1 * out


def test_a_model_that_is_another_one_when_traced_is_refused_by_name():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("its own", sdpa_attention_forward)
    model = tiny("llama")
    model.config._attn_implementation_internal = "its own"
    model.model.layers[1].mlp = ByName(model.model.layers[1].mlp, model.config)
    for ask in (td.forces, td.kernel, td.verify):
        with pytest.raises(ValueError, match="LlamaForCausalLM gives other logits when it is traced .* attn_implementation"):
            ask(model, U, O)
    assert model.config._attn_implementation == "its own"


@pytest.mark.parametrize("family", td.testing.FAMILIES)
def test_every_family_in_half_precision_passes(family):
    """What rounding does in bfloat16 is no other model: else a check would keep users from what is right."""
    with trace(tiny(family, tied=None).bfloat16()) as tracer:
        assert not tracer.why_not_tangents(tracer.owner)


class Draws(nn.Module):
    """Draws random numbers in every pass, whatever for."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 0 * torch.rand(())


def test_checks_leave_the_random_state_and_are_a_constant_number_of_short_passes():
    model, lengths = tiny("llama"), []
    model.model.layers[0].mlp = Draws(model.model.layers[0].mlp)
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    before = torch.get_rng_state()
    with trace(model) as tracer:
        assert len(lengths) == checks.PASSES_AT_ENTRY
        assert torch.equal(torch.get_rng_state(), before)
        for _ in range(2):
            assert not tracer.why_not_tangents(tracer.owner)
        assert len(lengths) == checks.PASSES_AT_ENTRY + checks.PASSES_OF_ADJOINT
    with trace(model, tracer.found) as again:
        assert not again.why_not_tangents(again.owner)
    assert len(lengths) == checks.PASSES_AT_ENTRY + checks.PASSES_OF_ADJOINT and max(lengths) <= checks.PIECE


def test_an_attention_that_does_not_run_here_is_compared_by_eager(monkeypatch):
    """As flash attention in float32: only its training's autocast lets it run."""
    from transformers import AttentionInterface

    def refuses(*args, **kwargs):
        raise RuntimeError("flash attention takes half precision alone")

    AttentionInterface.register("refuses", refuses)
    model = tiny("llama")
    truth = td.forces(model, U, O).matrix
    model.config._attn_implementation_internal = "refuses"
    assert torch.equal(td.forces(model, U, O).matrix, truth)


def test_what_the_tracing_attention_does_not_compute_it_refuses():
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    own = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    module, least = nn.Module(), torch.finfo(torch.float32).min
    added = torch.zeros(1, 1, 5, 5).masked_fill(~own, least)
    for mask in (own, added, None):
        assert torch.allclose(tracing_attention(module, q, k, k, mask)[0], tracing_attention(module, q, k, k, own)[0])
    for mask, options in ((added + 0.1, {}), (own.expand(1, 4, 5, 5), {}), (own, dict(position_bias=torch.zeros(1, 4, 5, 5)))):
        with pytest.raises(NotComputed):
            tracing_attention(module, q, k, k, mask, **options)


def test_which_families_the_tracing_attention_serves():
    """All but those that make their own attention: a check must not cost users the faster way."""
    eager = set()
    for family in td.testing.FAMILIES:
        with trace(tiny(family)) as tracer:
            if tracer.found.attention != ATTENTION:
                eager.add(family)
    assert eager == {"falcon", "falcon_new", "falcon_alibi", "bloom"}


# ---------------------------------------------------------------- causal


@pytest.mark.parametrize("name", ["bert", "xlnet", "cpmant"])
def test_a_model_that_sees_later_tokens_is_refused_by_name(name):
    model = build(name)
    with pytest.raises(ValueError, match=rf"{type(model).__name__} is not causal: .*is_decoder=True"):
        td.forces(model, U, O)
    with pytest.raises(ValueError, match="is not causal"):
        td.forces(model, U, O, method="naive")


class ByLength(nn.Module):
    """Is causal, but knows how long the sequence is."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * (1 + 0.01 * x.shape[1])


def test_a_model_that_knows_its_length_is_refused():
    model = tiny("llama")
    model.model.layers[0].mlp = ByLength(model.model.layers[0].mlp)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not causal: other tokens behind, or none"):
        td.forces(model, U, O)


class LooksAhead(nn.Module):
    """Takes the largest among positions, as sparse attention does, and adds what stands at later ones."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        _, at = x.sum(-1).topk(1, -1)
        return self.inner(x) + 0 * at[..., None] + 0.1 * x.flip(1).cumsum(1).flip(1)


def test_a_model_that_selects_among_positions_is_asked_about_later_tokens_too():
    """There another length is another model by itself, and cannot be the question."""
    model = tiny("llama")
    model.model.layers[0].mlp = LooksAhead(model.model.layers[0].mlp)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not causal: other tokens behind, or none"):
        td.forces(model, U, O)


# ---------------------------------------------------------------- adjoint


class NoGrad(nn.Module):
    """Keeps autograd out of a part of the model, every time or the first time of two."""

    def __init__(self, inner, twice):
        super().__init__()
        self.inner, self.twice = inner, twice

    def forward(self, x):
        with torch.no_grad():
            y = self.inner(x)
        return y + self.inner(x) if self.twice else y


@pytest.mark.parametrize("name", ["hrm", "all", "once"])
def test_a_backward_pass_that_is_not_the_derivative_is_refused_by_name(name):
    """Forward mode sees through no_grad; one gradient per token is what it is, and stays to be had."""
    model = build("hrm") if name == "hrm" else tiny("llama")
    if name != "hrm":
        model.model.layers[0].mlp = NoGrad(model.model.layers[0].mlp, twice=name == "once")
    for options in (dict(), dict(reduce="update"), dict(reduce="observe"), dict(groups="sequence")):
        with pytest.raises(ValueError, match=rf"backward pass of {type(model).__name__} is not the derivative .*no_grad"):
            td.forces(model, U, O, **options)
    assert relative_error(td.forces(model, U, O, method="naive").matrix, gram(model)) < FP32
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    with td.Monitor(model, opt, probe=O) as monitor:
        ids = torch.stack([torch.cat([chi.ids, chi.ids])[:8] for chi in U])
        model(input_ids=ids, labels=ids).loss.backward()
        with pytest.warns(UserWarning, match="is not the derivative"):
            opt.step()
        assert monitor.step_end().predicted is None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(W)
        return x @ W.T

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.saved_tensors[0], None


class _ByKernel(_Product):
    """Its backward is code that autograd does not see."""

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy((g @ ctx.saved_tensors[0]).detach().numpy()), None


class Quantized(nn.Module):
    """As a 4-bit layer: a frozen weight, a product with a backward pass alone, and without gradients another one, detached."""

    def __init__(self, linear, product=_Product):
        super().__init__()
        self.register_buffer("W", linear.weight.detach().clone())
        self.product = product

    def forward(self, x):
        return self.product.apply(x, self.W) if x.requires_grad else x.detach() @ self.W.T


@pytest.mark.parametrize("product", [_Product, _ByKernel])
@pytest.mark.parametrize("place", ["mlp", "local", "beyond the rules"])
def test_where_tangents_are_wrong_both_ways_give_the_products_of_the_gradients(place, product):
    """The sweep takes vjps alone; a reduction derives the backward pass, or takes real steps, to four digits, and says so."""
    model = tiny("llama", tied=False)
    for layer in model.model.layers:
        layer.mlp.up_proj = Quantized(layer.mlp.up_proj, product)
        if place == "local":  # inside a module that moves by its own derivatives
            layer.mlp = Owner(layer.mlp)
    if place == "beyond the rules":  # one tensor in two modules
        model.model.layers[1].mlp.gate_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    truth = gram(model)
    found = td.forces(model, U, O)
    assert relative_error(found.matrix, truth) < FP32
    rules = {"mlp": "outer product", "local": "module-local"}
    one = "autograd (" if product is _ByKernel else "one direction per token, jvp by two backward passes"
    assert any(rule.startswith(rules.get(place, one)) for rule in found.coverage.values()), found.coverage
    bound, instead = (FP32, "two backward passes (") if product is _Product else (1e-3, "real steps (")
    for reduce, axis in (("update", 1), ("observe", 0)):
        part = td.forces(model, U, O, reduce=reduce)
        assert float((part.vector - truth.sum(axis)).norm()) < bound * float(truth.abs().sum(axis).norm())
        assert all(instead in rule for rule in part.coverage.values())
    grouped = td.forces(model, U, O, groups="sequence").matrix
    columns = truth.split([len(chi) for chi in U], 1)
    assert relative_error(grouped, torch.stack([x.sum(1) for x in columns], 1)) < FP32


class Owner(nn.Module):
    """Owns a weight around a block."""

    def __init__(self, block):
        super().__init__()
        self.block, self.gain = block, nn.Parameter(torch.full((32,), 1.5))

    def forward(self, x):
        return self.block(x * self.gain) * self.gain.sin()


@pytest.mark.parametrize("product", [_Product, _ByKernel])
def test_a_probe_does_without_tangents_where_they_are_wrong(product):
    model = tiny("llama", tied=False)
    for layer in model.model.layers:
        layer.mlp.up_proj = Quantized(layer.mlp.up_proj, product)
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = copy.deepcopy(model)
    with td.Monitor(model, opt, probe=O, on_error="raise") as monitor:
        ids = torch.stack([torch.cat([chi.ids, chi.ids])[:8] for chi in U])
        model(input_ids=ids, labels=ids).loss.backward()
        opt.step()
        step = monitor.step_end()
    delta = torch.cat([(p - q).detach().flatten() for p, q in zip(model.parameters(), before.parameters(), strict=True)])
    truth = gradients(before, O) @ delta.double()
    assert relative_error(step.predicted, truth) < (FP32 if product is _Product else 1e-3)


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "bloom"])
def test_sequences_of_a_left_padded_batch_are_replayed_where_the_loss_had_them(family):
    """GPT-2 counts padding as positions, the others do not."""
    model = tiny(family)
    behind = [chi.with_(padding=n) for chi, n in zip(U, (2, 4), strict=True)]
    truth = gram(model, behind)
    assert (relative_error(gram(model), truth) > 0.01) == (family == "gpt2")
    T = max(chi.ids.numel() + chi.padding for chi in behind)
    ids = torch.stack([torch.nn.functional.pad(c.ids, (c.padding, T - c.padding - c.ids.numel())) for c in behind])
    mask = torch.stack([(torch.arange(T) >= c.padding) & (torch.arange(T) < c.padding + c.ids.numel()) for c in behind]).long()
    scored = torch.stack([torch.nn.functional.pad(c.scored, (c.padding, T - c.padding - c.ids.numel())) for c in behind])
    chis = td.from_batch(ids, mask, torch.where(scored, ids, -100))
    assert [chi.padding for chi in chis] == [2, 4]
    for options in (dict(), dict(method="naive")):
        assert relative_error(td.forces(model, chis, O, **options).matrix, truth) < FP32
    for reduce, axis in (("update", 1), ("observe", 0)):
        vector = td.forces(model, chis, O, reduce=reduce).vector
        assert float((vector - truth.sum(axis)).norm()) < FP32 * float(truth.abs().sum(axis).norm())


def test_a_model_that_counts_padding_and_takes_no_positions_is_refused():
    model = tiny("gpt2")
    own = model.forward

    def forward(ids, attention_mask=None, use_cache=False):
        return own(ids, attention_mask=attention_mask, use_cache=use_cache)

    model.forward = forward
    with pytest.raises(ValueError, match="behind padding on the left GPT2LMHeadModel"):
        td.forces(model, [U[0].with_(padding=3)], O)


def test_virtual_tokens_are_refused():
    import peft

    options = dict(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny("llama"), peft.PromptTuningConfig(**options)).eval()
    with pytest.raises(ValueError, match="virtual tokens"):
        td.forces(model, U, O)
    for config in (peft.PromptTuningConfig(**options), peft.PrefixTuningConfig(**options)):
        model = peft.get_peft_model(tiny("llama"), config)
        monitor = td.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), probe=O)
        with pytest.raises(ValueError, match="trains virtual tokens"):
            monitor.start()


# ---------------------------------------------------------------- remembered


def bidirectional(module, *args, **options):
    """Every place sees the next one."""
    return type(module).forward(module, *args, **options) + args[0].roll(-1, 1)


CHANGES = {
    "a forward": lambda m: setattr(m.model.layers[0].mlp, "forward", partial(bidirectional, m.model.layers[0].mlp)),
    "a module": lambda m: setattr(m.model.layers[1], "mlp", Draws(m.model.layers[1].mlp)),
    "a module of the same class": lambda m: setattr(m.model.layers[1], "mlp", copy.deepcopy(m.model.layers[1].mlp)),
    "a hook": lambda m: m.model.layers[0].register_forward_hook(lambda *_: None),
    "a number": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.1),
    "the configuration": lambda m: setattr(m.config, "attention_dropout", 0.5),
    "the attention": lambda m: m.set_attn_implementation("eager"),
    "the dtype": lambda m: m.double(),
}


def asked(monkeypatch):
    """A list that grows with every check of the same logits."""
    seen, check = [], checks.faithful_attention
    monkeypatch.setattr(checks, "faithful_attention", lambda *args: seen.append(1) or check(*args))
    return seen


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_checked_again(change, monkeypatch):
    seen, model = asked(monkeypatch), tiny("llama")
    for _ in range(2):
        with trace(model) as tracer:
            assert not tracer.why_not_tangents(tracer.owner)
    assert len(seen) == 1
    CHANGES[change](model)
    with pytest.raises(ValueError, match="not causal") if change == "a forward" else contextlib.nullcontext(), trace(model):
        pass
    assert len(seen) == 2


def test_other_weights_and_modes_need_no_check(monkeypatch):
    seen, model = asked(monkeypatch), tiny("llama")
    with trace(model):
        pass
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    model.model.norm.weight = nn.Parameter(torch.ones(32))
    model.train().requires_grad_(False)
    with trace(model):
        pass
    with trace(copy.deepcopy(model)):
        pass
    assert len(seen) == 2  # the copy is another model


def test_what_is_remembered_keeps_no_model_alive():
    model = tiny("llama")
    model.model.layers[0].mlp.forward = partial(type(model.model.layers[0].mlp).forward, model.model.layers[0].mlp)
    with trace(model):
        pass
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("V", [2, 5, 61])
def test_the_piece_that_a_model_is_asked_with(V):
    """A text, the same with another last token, its beginning behind padding; no token that stands for padding in the text."""
    piece = checks.Piece.of(tiny("llama"), V)
    whole, other, cut = piece.ids
    assert torch.equal(whole[:-1], other[:-1])
    assert bool(whole[-1] != other[-1]) or V == 2  # one token alone is no special one
    assert torch.equal(cut[: piece.short], whole[: piece.short]) and not cut[piece.short :].any()
    assert piece.short < len(whole) and bool((piece.ids[:2] > 0).all()) and bool((piece.ids < V).all())
    flat = piece.ids.flatten()[piece.rows]
    assert len(flat) == 2 * len(whole) + piece.short and torch.equal(flat[-piece.short :], whole[: piece.short])
