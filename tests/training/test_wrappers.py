"""Models as trainings wrap them: checkpointing, adapters, torch.compile; what cannot be captured is refused by name."""

import pytest
import torch
import torch.distributed as dist
import transformers
from captures import ROUNDING, captured, data, one
from loops import EPS
from torch.nn.functional import cross_entropy

from tokdyn.model import readout
from tokdyn.model.readout import readout_of
from tokdyn.model.readout_scale import Scaling, measured_scaling
from tokdyn.model.unwrap import unwrap
from tokdyn.testing import FAMILIES, tiny, tiny_lora
from tokdyn.training.capture import Capture
from tokdyn.training.diagnosis import failed_self_check


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_one_pass(reentrant):
    ids, labels = data()
    model = tiny("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = captured(model, lambda m: m(ids, labels=labels).loss)
    assert len(found.forwards) == 1 and found.forwards[0].residual < ROUNDING


@pytest.mark.parametrize("how", ["lora", "lora on the head", "modules_to_save", "frozen backbone"])
def test_adapters(how):
    """Adapted heads are part of the readout; a frozen backbone sends no gradient to h, so the check is made at the logits."""
    import peft

    ids, labels = data()
    if how == "lora":
        model = tiny_lora("llama")
    elif how == "frozen backbone":
        model = tiny("llama", tied=False)
        for name, p in model.named_parameters():
            p.requires_grad = "lm_head" in name
    else:
        more = (
            dict(target_modules=["q_proj", "lm_head"])
            if "head" in how
            else dict(modules_to_save=["lm_head"], target_modules=["q_proj"])
        )
        config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **more)
        model = peft.get_peft_model(tiny("llama", tied=False), config)
    found = captured(model, lambda m: m(input_ids=ids, labels=labels).loss)
    (forward,) = found.forwards
    assert found.seen == 1 and forward.residual < ROUNDING
    torch.testing.assert_close(forward.c, torch.full((15,), 1 / 15), rtol=100 * EPS, atol=0)


def test_a_peft_that_calls_forward_directly():
    """PEFT up to 0.20 calls model.forward, so the causal LM's own hooks never fire; the wrapper's does."""

    class Wrapper(torch.nn.Module):
        def __init__(self, lm):
            super().__init__()
            self.lm = lm

        def get_base_model(self):
            return self.lm

        def forward(self, **kwargs):
            return self.lm.forward(**kwargs)

    ids, labels = data()
    found = captured(Wrapper(tiny("llama")), lambda m: m(input_ids=ids, labels=labels).loss)
    assert len(found.forwards) == 1 and found.seen == 1 and found.forwards[0].residual < ROUNDING


def test_compiled_models():
    """Outer hooks fire; a loss outside is captured, one inside is out of sight and said to be."""
    ids, labels = data()
    torch._dynamo.reset()
    model = torch.compile(tiny("llama"), backend="aot_eager")
    forward = one(model, lambda m: cross_entropy(m(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    assert forward.residual < ROUNDING
    torch.testing.assert_close(forward.c, torch.full((15,), 1 / 15), rtol=100 * EPS, atol=0)
    with pytest.raises(AssertionError, match="inside the compiled model.*compute it outside"):
        captured(model, lambda m: m(ids, labels=labels).loss)


@pytest.mark.parametrize(
    "kind, shape, scale", [("MiniCPM3", dict(dim_model_base=4), 0.125), ("HyperCLOVAX", dict(logits_scaling=4.0), 4.0)]
)
def test_c_where_hidden_states_or_logits_are_scaled(kind, shape, scale):
    """c of a mean over 15 tokens is 1/15; MiniCPM3 scales before its head, by a configuration that reads like Granite's."""
    ids, labels = data()
    model = built(kind, **shape)
    before = scale if kind == "MiniCPM3" else 1.0
    measured = measured_scaling(model)
    assert (
        measured.softcap is None
        and measured.before == pytest.approx(before)
        and measured.scale == pytest.approx(scale / before)
    )
    forward = one(model, lambda m: m(ids, labels=labels).loss)
    torch.testing.assert_close(forward.c, torch.full((15,), 1 / 15), rtol=100 * EPS, atol=0)
    assert forward.residual < ROUNDING and forward.readout_error < ROUNDING and failed_self_check([forward]) is None
    whole = readout_of(model, False)  # of the backbone's output, as a fused loss takes it
    with torch.no_grad():
        h = model.model(ids).last_hidden_state
        torch.testing.assert_close(whole.logits(h.flatten(0, 1)), model(ids).logits.flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_a_scale_that_is_not_the_models_fails_the_self_check(monkeypatch):
    """With nearly uniform logits c off by 8 explains the gradient: Wᵀ(e_y - pi) hardly depends on the logits' scale."""
    ids, labels = data()
    model = built("MiniCPM3", dim_model_base=4)
    for p in model.parameters():
        p.data.mul_(1e-3 if p.dim() == 2 else 1.0)
    monkeypatch.setattr(readout, "measured_scaling", lambda lm: Scaling(1.0, 0.125, None))
    forward = one(model, lambda m: m(ids, labels=labels).loss)
    assert forward.residual < forward.eps**0.5  # passes, and c is wrong
    assert float((forward.c - 1 / 15).abs().min()) > 0.05
    assert "logits differ" in failed_self_check([forward])[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_and_softcap_are_measured_in_every_family(family):
    """The logits of every family, from its configuration: what is measured gives them from the head's input."""
    found = measured_scaling(tiny(family, tied=None))
    config = tiny(family, tied=None).config
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    assert found == Scaling(1.0, pytest.approx(scale), getattr(config, "final_logit_softcapping", None))


def built(kind, **shape):
    """A tiny model of a kind beyond FAMILIES."""
    ranks = (
        dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8) if kind == "MiniCPM3" else {}
    )
    sizes = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
    sizes |= dict(intermediate_size=48, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config = getattr(transformers, f"{kind}Config")(tie_word_embeddings=False, **sizes, **ranks, **shape)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def test_nothing_is_set_on_a_model_that_is_measured():
    model = tiny("gemma2")
    before = {name: (dict(vars(module)), dict(module._modules)) for name, module in model.named_modules()}
    measured_scaling(model)
    assert all(before[name] == (vars(module), module._modules) for name, module in model.named_modules())


def test_a_model_without_readout_is_refused():
    with pytest.raises(ValueError, match="no output embeddings"):
        unwrap(torch.nn.Linear(2, 2))


def test_copies_of_a_model_on_several_devices_are_refused():
    with pytest.raises(ValueError, match="DataParallel runs copies of the model"):
        Capture(torch.nn.DataParallel(tiny("llama")))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.parametrize("what", ["whole", "layer"])
def test_fsdp1_is_refused(what):
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = tiny("llama")
        if what == "whole":
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        else:
            model.model.layers[0] = FullyShardedDataParallel(model.model.layers[0], device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="FSDP1 .* use FSDP2"):
            Capture(model)
    finally:
        dist.destroy_process_group()
