"""Models beyond the families of tests: what they do that others do not, and the matrix and reductions that come out of it."""

import numpy
import peft
import pytest
import torch
import transformers
from engines import assert_rules
from torch import nn

import tokdyn as td
from tokdyn.exact.modules.lookup import is_lookup
from tokdyn.model.calls import Call
from tokdyn.model.trace import trace
from tokdyn.testing import float64, random_chis, relative_error, tiny, tiny_lora

U, O = random_chis([(5, 3), (2, 4)], seed=1), random_chis([(4, 4), (1, 2)], seed=2)  # noqa: E741
FP32 = 1e-5  # tests/exact/test_architectures.py

WIDE = dict(vocab_size=61, bos_token_id=None, eos_token_id=None, pad_token_id=None)
KINDS = {
    "GPTJ": dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, n_inner=48),  # rotary of (x, sin, cos)
    "CodeGen": dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, n_ctx=64, n_inner=48),
    "Gemma3nText": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                        intermediate_size=[48, 48], vocab_size_per_layer_input=61, hidden_size_per_layer_input=8, laurel_rank=4,
                        num_kv_shared_layers=0, altup_num_inputs=2, layer_types=["sliding_attention", "full_attention"],
                        activation_sparsity_pattern=[0.0, 0.0]),  # (x, cos, sin, unsqueeze_dim=2)
    "CTRL": dict(n_embd=32, n_layer=2, n_head=4, dff=48, n_positions=64),  # writes to its lookup's output
}  # fmt: skip


def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def assert_right(model, objective=td.objectives.SFT()):  # noqa: B008
    """The matrix and both reductions are those of one gradient per token; the coverage of the matrix."""
    naive = td.forces(model, U, O, objective, method="naive").matrix
    found = td.forces(model, U, O, objective)
    assert relative_error(found.matrix, naive) < FP32
    for reduce, axis in (("update", 1), ("observe", 0)):
        vector = td.forces(model, U, O, objective, reduce=reduce).vector
        assert float((vector - naive.sum(axis)).norm()) < FP32 * float(naive.abs().sum(axis).norm())
    return found.coverage


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**WIDE, **KINDS[kind])
    assert_rules(assert_right(moved(transformers.AutoModelForCausalLM.from_config(config))))


TARGETS = dict(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
ADAPTERS = {
    "dora": lambda: peft.LoraConfig(use_dora=True, r=4, **TARGETS),  # an identity runs through it for a norm that is constant
    "loha": lambda: peft.LoHaConfig(r=4, **TARGETS),  # its backward gives None for its scale
    # a sparse tensor of its weights, of which torch has neither a forward derivative nor a second backward
    "shira": lambda: peft.ShiraConfig(r=4, **TARGETS),
    "vera": lambda: peft.VeraConfig(r=4, **TARGETS),  # all layers share two frozen matrices; vectors are trained
    "ia3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **TARGETS),  # gains of outputs, and of one layer's inputs
}


@pytest.mark.parametrize("how", ADAPTERS)
def test_adapters(how):
    torch.manual_seed(0)
    assert_rules(assert_right(moved(peft.get_peft_model(tiny("llama"), ADAPTERS[how]()))))


def test_prompt_tuning_is_refused_by_name():
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="virtual tokens"):
        td.forces(peft.get_peft_model(tiny("llama"), config).eval(), U, O)


def test_a_model_that_gives_the_last_places_logits_alone_is_refused_by_name():
    model = tiny("llama")
    own = model.forward
    model.forward = lambda ids, **options: own(ids, logits_to_keep=1, **options)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM gives logits \[1, 1, 61\] for 16 tokens"):
        td.forces(model, U, O)


def test_gradient_checkpointing_of_adapters():
    """TRL's default hooks requires_grad_() onto the embedding's output, which torch.func refuses."""
    model = tiny_lora("llama")
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert_rules(assert_right(model))


def test_outputs_that_the_model_writes_to():
    """The recorded output is the module's own, and its cotangent that of the value written over it, pulled back."""
    model = tiny("llama", tied=False)
    own = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: own(x).mul_(2).sin_()
    up = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = nn.Sequential(up, nn.SiLU(inplace=True))
    with trace(model) as tracer:
        (batch, *_), names = tracer.batches(U), ["model.layers.0.mlp.up_proj.0", "model.layers.0.mlp.down_proj", "model.norm"]
        assert tracer.overwritten(batch, names) == frozenset(names[:2])
    assert_right(model)


class Int8(nn.Module):
    """A frozen layer of whole numbers with one scale, and a product written as libraries of such layers do it."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, scale):
            ctx.save_for_backward(weight)
            ctx.scale = scale
            return x @ (weight.to(x) * scale).T

        @staticmethod
        def backward(ctx, g):
            (weight,) = ctx.saved_tensors
            return g @ (weight.to(g) * ctx.scale), None, None

    def __init__(self, layer):
        super().__init__()
        self.scale = float(layer.weight.abs().max()) / 127
        self.weight = nn.Parameter((layer.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return Int8.Product.apply(x, self.weight, self.scale)


Product = Int8.Product  # by this name it is found in this file


def test_a_frozen_quantised_base_under_adapters():
    model = tiny_lora("llama", tied=False)
    for layer in model.get_base_model().model.layers:
        layer.mlp.down_proj.base_layer = Int8(layer.mlp.down_proj.base_layer)
        layer.self_attn.q_proj.base_layer = Int8(layer.self_attn.q_proj.base_layer)
    coverage = assert_right(model)
    assert_rules(coverage)
    quantised = [name for name, p in model.named_parameters() if p.dtype == torch.int8]
    assert len(quantised) == 4 and {coverage[name] for name in quantised} == {"frozen"}


def test_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_lora("llama", tied=False, intermediate_size=64)  # blocks of 64 numbers lie in a row
    for layer in model.get_base_model().model.layers:
        plain = layer.mlp.down_proj.base_layer
        packed = bnb.nn.Linear4bit(plain.in_features, plain.out_features, bias=False, compute_dtype=torch.float32)
        packed.load_state_dict(plain.state_dict())
        layer.mlp.down_proj.base_layer = packed.to("cpu").requires_grad_(False)
    assert_rules(assert_right(model))


def test_torchao():
    """int8 weights, by packages' own tensor subclass, with LoRA on top: what moves has closed forms, the base none."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is among the extras of dev on Linux alone")
    torch.manual_seed(0)
    model = tiny("llama", tied=False)
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    model = moved(peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **TARGETS)))
    coverage = assert_right(model)
    assert_rules(coverage)
    quantised = [name for name, p in model.named_parameters() if type(p.data) is not torch.Tensor]
    assert len(quantised) >= 14 and {coverage[name] for name in quantised} == {"frozen"}


def over(old, new):
    """Write one tensor's numbers over another's as a kernel does: by its memory, which no transform has and nothing counts."""
    numpy.copyto(old.detach().numpy(), new.detach().numpy())
    return old


class RMSNorm(torch.autograd.Function):
    """Of Liger's shape: no jvp, no vmap; the gradient of x is written over that of the output."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return torch.from_numpy((x * scale * weight).detach().numpy())

    @staticmethod
    def backward(ctx, g):
        x, weight, scale = ctx.saved_tensors
        dweight, m = (g * x * scale).flatten(0, -2).sum(0), g * weight
        return over(g, scale * (m - x * scale.square() * (m * x).mean(-1, keepdim=True))), dweight, None


class SiLUMul(torch.autograd.Function):
    """Of Liger's shape: the gradients of both inputs are written over the inputs that were saved."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.from_numpy((a * a.sigmoid() * b).detach().numpy())

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        s = a.sigmoid()
        da, db = g * b * s * (1 + a * (1 - s)), g * a * s
        return over(a, da), over(b, db)


@pytest.mark.parametrize("how", ["plain", "LoRA"])
def test_kernels_without_forward_mode_or_vmap_that_write_over_what_they_save(how):
    """Norms and gates of Liger's shape: the sweep is exact with all its rules; a reduction's jvp is by real steps."""
    plain, fused = (tiny("llama", tied=False) if how == "plain" else tiny_lora("llama", tied=False) for _ in range(2))
    for layer in (fused if how == "plain" else fused.get_base_model()).model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(SiLUMul.apply(mlp.gate_proj(x), mlp.up_proj(x)))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = lambda x, norm=norm: RMSNorm.apply(x, norm.weight, norm.variance_epsilon)
    naive, found = td.forces(plain, U, O, method="naive").matrix, td.forces(fused, U, O)
    assert relative_error(found.matrix, naive) < FP32
    assert relative_error(td.forces(fused, U, O, method="naive").matrix, naive) < FP32
    assert_rules(found.coverage)
    reduced = td.forces(fused, U, O, reduce="update")
    assert any("real steps" in rule for rule in reduced.coverage.values())
    # central differences extrapolated: the log-probs' last digits, 6 eps, over the smallest step of about 1e-2, times 3
    assert float((reduced.vector - naive.sum(1)).norm()) < 3e-4 * float(naive.abs().sum(1).norm())


class NoForwardMode(torch.autograd.Function):
    """x, by a function that no rule makes a jvp of: it is written the new way, without one."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def jvp(ctx, dx):
        raise NotImplementedError("NoForwardMode has no forward derivative")


def test_without_a_forward_derivative_a_reduction_is_two_backward_passes_and_says_so():
    model = tiny("llama", tied=False).double()
    own = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: NoForwardMode.apply(own(x))
    with float64():
        naive = td.forces(model, U, O, method="naive").matrix
        found = td.forces(model, U, O, reduce="update")
    said = [rule for rule in found.coverage.values() if rule.startswith("autograd")]
    assert said and all("two backward passes" in r and "NoForwardMode has no forward derivative" in r for r in said)
    assert float((found.vector - naive.sum(1)).norm()) < 1e-12 * float(naive.abs().sum(1).norm())


def test_a_float32_head_on_a_half_precision_body():
    model = tiny("llama", tied=False).bfloat16()
    exact = td.forces(tiny("llama", tied=False), U, O, method="naive").matrix
    model.lm_head.float()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    naive, found = td.forces(model, U, O, method="naive").matrix, td.forces(model, U, O)
    assert relative_error(found.matrix, exact) < 2 * relative_error(naive, exact) < 0.5
    assert_rules(found.coverage)


@pytest.mark.parametrize("table", ["normed", "narrow"])
def test_an_embedding_of_another_form_is_no_lookup(table):
    class Odd(nn.Embedding):
        def forward(self, ids):
            x = super().forward(ids)
            return x / x.norm(dim=-1, keepdim=True) if table == "normed" else x.view(*ids.shape, 2, 4)

    module, ids = Odd(7, 8), torch.tensor([[1, 0, 3]])
    with torch.no_grad():
        assert not is_lookup(Call("odd", module, (ids,), {}, module(ids)))
