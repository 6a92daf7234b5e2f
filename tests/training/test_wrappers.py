"""Models as trainings wrap them: checkpointing, adapters, torch.compile; what cannot be captured is refused by name."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from captures import ROUNDING, captured, data, one
from loops import EPS
from torch.nn.functional import cross_entropy

from tokdyn.model.readout import scale_and_cap
from tokdyn.model.trace import Tracer
from tokdyn.model.unwrap import unwrap
from tokdyn.testing import tiny, tiny_lora
from tokdyn.training.capture import Capture


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
    "names, scale, cap",
    [
        (dict(logit_scale=0.5), 0.5, None),
        (dict(logits_scaling=4.0, model_type="granite"), 0.25, None),
        (dict(logits_scaling=4.0, model_type="hyperclovax"), 4.0, None),
        (dict(output_multiplier=3.0), 3.0, None),
        (dict(lm_head_multiplier=3.0, final_logit_softcapping=30.0), 3.0, 30.0),
        (dict(logit_scale=None, logits_soft_cap=20.0), 1.0, 20.0),
    ],
)
def test_every_name_of_a_scale_and_a_softcap(names, scale, cap):
    """As a capture reads them and as a trace does."""
    model = tiny("llama")
    model.config = SimpleNamespace(**names)
    readout = Tracer(model).readout
    assert scale_and_cap(model) == (readout.scale, readout.softcap) == (scale, cap)


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
