"""Stacks of experts and routers: their rules are recognised by what they compute, and give the Gram of the gradients.

float64 (testing.float64): both engines agree with one gradient per token to rounding, whatever the form of the stack, the
length that a sequence is unrolled at, the sequences beside it and the tokens that it is padded with.
"""

import engines
import pytest
import torch
import transformers
from engines import counted
from torch import nn

from tokdyn.exact.modules.choose import rule_for
from tokdyn.exact.modules.experts import Experts
from tokdyn.exact.modules.local import Local
from tokdyn.exact.modules.router import Router
from tokdyn.exact.modules.routes import Stack
from tokdyn.exact.sweep import strips
from tokdyn.model.attention import ATTENTION
from tokdyn.model.calls import Call
from tokdyn.model.trace import trace
from tokdyn.testing import float64, random_chis, relative_error, tiny, tiny_lora

U, O = random_chis([(3, 5), (2, 3)], seed=1), random_chis([(4, 4), (1, 2)], seed=2)  # noqa: E741
FP64 = 1e-9  # tests/exact/test_architectures.py
ENGINES = ["sweep", "tangents"]
STACK, ROUTER = "outer product by expert", "outer product"

WIDE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
            num_experts_per_tok=2, max_position_embeddings=64, vocab_size=61, bos_token_id=None, eos_token_id=None,
            pad_token_id=None)  # fmt: skip
DEEP = dict(n_routed_experts=6, n_group=2, topk_group=1, moe_intermediate_size=12, first_k_dense_replace=0, n_shared_experts=1)
FAMILIES = {
    "qwen3_moe": dict(num_experts=5, moe_intermediate_size=12, head_dim=8),
    "mixtral": dict(num_local_experts=4, sliding_window=None),
    "deepseek_v3": DEEP | dict(num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4,
                               v_head_dim=8),
    "gpt_oss": dict(num_local_experts=4, head_dim=8, sliding_window=4),
    "glm4_moe": DEEP | dict(head_dim=8, partial_rotary_factor=0.5),
}  # fmt: skip


def model(family):
    """A random model in float64, its weights and the biases of its choices (buffers) away from what they begin as."""
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **WIDE | FAMILIES[family]))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.15 * torch.randn_like(p))
        for name, b in made.named_buffers():
            if "correction" in name:
                b.copy_(0.1 * torch.randn_like(b))
    return made.eval().double()


def rules_of(by, part):
    return {rule for name, rule in by.items() if part in name}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_forces_are_those_of_one_gradient_per_token(family, engine):
    """The sequences of a side are one padded batch, in the sweep all but gpt-oss's, whose sinks are module-local.

    The attention keeps no scores for any of them: DeepSeek's heads have two widths, gpt-oss's have sinks.
    """
    made = model(family)
    with float64(), counted() as counts:
        naive, fast, by = engines.matrices(made, update=U, observe=O, engine=engine)
        with trace(made) as tracer:
            assert tracer.found.attention == ATTENTION
    assert relative_error(fast, naive) < FP64
    assert engine == "tangents" or counts["strip"] == (4 if family == "gpt_oss" else 2)
    assert rules_of(by, ".experts.") == {STACK}
    assert rules_of(by, ".router." if family == "gpt_oss" else "mlp.gate.") == {ROUTER}
    assert "module-local" not in {rule for name, rule in by.items() if not name.endswith("sinks")}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_sequence_is_unrolled_at_several_lengths(family, monkeypatch):
    """Which tokens an expert has, and in which order, changes with the length; what the stack returns for a token does not."""
    monkeypatch.setattr(strips, "SHORTEST", 3)
    long = dict(update=random_chis([(1, 14)], seed=1), observe=random_chis([(2, 9), (1, 1)], seed=2))
    with float64(), counted() as counts:
        naive, fast, _ = engines.matrices(model(family), engine="sweep", **long)
    assert relative_error(fast, naive) < FP64
    assert counts["strip"] == len(strips.in_strips(14)) + len(strips.in_strips(9)) + (family == "gpt_oss") > 3


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scope", ["experts.down_proj$", "experts.gate_up_proj_bias", "router", "full"])
def test_parts_and_a_preconditioner(scope, engine):
    """A stack of transposed matrices with biases, of which some move, each number at a rate of its own."""

    def rates(tracer):
        generator = torch.Generator().manual_seed(5)
        return {name: torch.rand(tracer.params[name].shape, generator=generator).double() for name in tracer.trainable}

    with float64():
        for P in (None, rates):
            naive, fast, by = engines.matrices(model("gpt_oss"), scope, P=P, update=U[:1], observe=O, engine=engine)
            assert relative_error(fast, naive) < FP64
            assert "module-local" not in by.values() or scope == "full"


def test_experts_of_the_last_layer_are_met_token_by_token():
    """Their cotangents are at the tokens' own positions: two segments more than where a module-local rule needs all of them."""
    with counted() as counts:
        engines.matrices(tiny("mixtral"), update=U[:1], observe=O[:1], engine="sweep")
    assert counts["alone"] == counts["mixed"] == 3


class Stacked(nn.Module):
    """A stack of any form, with tokens taken expert by expert, or every other one first."""

    def __init__(self, transposed=False, bias=False, gated=True, neighbours=False, odd="", sentinel=False):
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def made(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator).double())

        E, d, i = 3, 6, 4
        wide = 2 * i if gated else i
        self.first = made(*(E, d, wide) if transposed else (E, wide, d))
        self.second = made(*(E, i, d) if transposed else (E, d, i))
        if bias:
            self.first_bias, self.second_bias = made(E, wide), made(E, d)
        self.transposed, self.bias, self.gated, self.neighbours = transposed, bias, gated, neighbours
        self.odd, self.sentinel = odd, sentinel

    def act_fn(self, h):
        return h.tanh()

    def _apply_gate(self, h):
        one, other = (h[..., ::2], h[..., 1::2]) if self.neighbours else h.chunk(2, -1)
        return one.sigmoid() * (other + 1)

    def forward(self, chosen, x, *, weight):
        out = torch.zeros_like(x)
        for e in reversed(range(len(self.first))):
            token, nth = torch.where(chosen == e)
            token, nth = torch.cat([token[::2], token[1::2]]), torch.cat([nth[::2], nth[1::2]])
            W1, W2 = (w[e] if self.transposed else w[e].T for w in (self.first, self.second))
            h = x[token] @ W1 + (self.first_bias[e] if self.bias else 0)
            g = self._apply_gate(h) if self.gated else self.act_fn(h)
            y = g @ W2 + (self.second_bias[e] if self.bias else 0)
            y = {"norm": nn.functional.normalize(y, dim=-1), "detached": y.detach()}.get(self.odd, y)
            w = weight[token, nth, None] ** (2 if self.odd == "square" else 1)
            out = out.index_add(0, token, y * w)
        return out


def called(module, seed, n=7, k=2):
    """A call of the module on random tokens; with `sentinel` some of them are another rank's."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, m, generator=generator).double() for m in (6, k))
    chosen = torch.rand(n, 3, generator=generator).argsort(1)[:, :k]
    if module.sentinel:
        chosen[::3, 0] = 3
    return Call("experts", module, (chosen, x), dict(weight=weight), module(chosen, x, weight=weight).detach())


FORMS = [dict(), dict(transposed=True, bias=True, neighbours=True), dict(gated=False), dict(bias=True),
         dict(transposed=True), dict(sentinel=True, bias=True)]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_form_of_a_stack_is_measured(form):
    """Rule, cotangents and outer products against the module's own vjp and jvp, whatever the order that it takes tokens in."""
    module = Stacked(**form)
    moves = {name for name, _ in module.named_parameters()}
    o, u = called(module, 1), called(module, 2, n=9)
    rule, plain = rule_for([o], moves), Local([o], moves)
    assert type(rule) is Experts and not rule.stack.transposed or form.get("transposed")
    delta = [[torch.randn(4, *u.output.shape, generator=torch.Generator().manual_seed(4)).double()]]
    for name, step in plain.direction([u], delta).items():
        assert relative_error(rule.direction([u], delta)[name], step) < 1e-12
    assert relative_error(rule.tangent([u], delta)[0][0], plain.tangent([u], delta)[0][0]) < 1e-12

    leaves = [x.detach().requires_grad_() for x in (o.args[1], o.kwargs["weight"])]
    closed = rule.stack(Call("", module, (o.args[0], leaves[0]), dict(weight=leaves[1]), o.output))
    v = torch.randn(5, *o.output.shape, generator=torch.Generator().manual_seed(6)).double()
    plainly = pulled(module(o.args[0], leaves[0], weight=leaves[1]), leaves, v)
    for one, other in zip(pulled(closed, leaves, v), plainly, strict=True):
        assert relative_error(one, other) < 1e-12


def pulled(y, leaves, v):
    return torch.func.vmap(lambda g: torch.autograd.grad(y, leaves, g, retain_graph=True))(v)


@pytest.mark.parametrize("odd", ["norm", "square", "detached"])
def test_another_form_is_no_stack(odd):
    module = Stacked(odd=odd)
    assert Stack.seen(called(module, 1)) is None


def test_tokens_in_another_order_get_the_same():
    """Permuting the tokens of either call permutes what they get, and nothing else: rounding aside."""
    module = Stacked(bias=True)
    moves = {name for name, _ in module.named_parameters()}
    o, u = called(module, 1), called(module, 2, n=9)
    delta = torch.randn(4, *u.output.shape, generator=torch.Generator().manual_seed(4)).double()
    E = rule_for([o], moves).tangent([u], [[delta]])[0][0]
    p, q = torch.randperm(7), torch.randperm(9)
    moved = rule_for([permuted(o, p)], moves).tangent([permuted(u, q)], [[delta[:, q]]])[0][0]
    assert relative_error(moved, E[:, p]) < 1e-12


def permuted(call, p):
    (chosen, x), weight = call.args, call.kwargs["weight"]
    return Call(call.name, call.module, (chosen[p], x[p]), dict(weight=weight[p]), call.output[p])


class Chosen(nn.Module):
    """A router with a bias, two outputs and its product in float32."""

    def __init__(self, twice=False):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5))
        self.twice = twice

    def forward(self, x):
        z = nn.functional.linear(x.reshape(-1, 6).double(), self.weight.double(), self.bias.double())
        value, index = torch.topk(z.softmax(-1), 2)
        return z, value * (self.weight[:2, 0] if self.twice else 1), index


def test_a_router_is_an_outer_product_of_its_input_and_what_reaches_its_product():
    module, generator = Chosen().double(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        o, u = (Call("", module, (x,), {}, module(x)) for x in torch.randn(2, 1, 8, 6, generator=generator).double())
    rule, plain = rule_for([o], {"weight", "bias"}), Local([o], {"weight", "bias"})
    assert type(rule) is Router
    delta = [[torch.randn(4, *x.shape, generator=generator).double() for x in u.outputs]]
    for name, step in plain.direction([u], delta).items():
        assert relative_error(rule.direction([u], delta)[name], step) < 1e-12
    at = torch.tensor([1, 4, 5])
    for product, other in zip(rule.outer_products(u, [x[0] for x in delta[0]], at, False), ("weight", "bias"), strict=True):
        alone = [[torch.zeros(3, *x.shape).double() for x in u.outputs]]
        for i, n in enumerate(at):
            for x, d in zip(alone[0], delta[0], strict=True):
                x[i, n] = d[0, n]
        step = plain.direction([u], alone)[other].flatten(1)
        gram = (product.a @ product.a.T) * (product.delta @ product.delta.T)
        assert relative_error(gram, step @ step.T) < 1e-12


def test_a_weight_that_acts_twice_is_no_router():
    module, x = Chosen(twice=True).double(), torch.randn(1, 8, 6, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        assert type(rule_for([Call("", module, (x,), {}, module(x))], {"weight", "bias"})) is Local


def test_adapters_beside_frozen_experts():
    with float64():
        naive, fast, _ = engines.matrices(tiny_lora("qwen2_moe").double(), update=U, observe=O, engine="sweep")
    assert relative_error(fast, naive) < FP64
