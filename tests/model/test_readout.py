"""The readout that a trace finds is the model's: its formula gives the logits, its vjp is theirs, adapters included."""

import pytest
import torch

from tokdyn.model.readout import Readout, output_embeddings, readout_of
from tokdyn.model.trace import Tracer, trace
from tokdyn.testing import FAMILIES, float64, random_chis, tiny

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("family", FAMILIES)
def test_the_formula_gives_the_logits(family):
    with float64(), trace(tiny(family, tied=None).double()) as tracer:
        batch = tracer.batches(random_chis([(3, 4), (2, 2)], seed=1))[0]
        h, z, readout = tracer.hidden(batch), tracer.logits(batch), tracer.readout
        found = readout.logits(h)
        # each logit is a sum of d products, rounded once more by bias, scale and (with a slope of at most 1) softcap
        d = h.shape[1]
        size = abs(readout.scale) * (h.abs() @ readout.weight.abs().T + (0 if readout.bias is None else readout.bias.abs()))
        assert bool(((found - z).abs() <= 2 * (d + 6) * EPS * size).all())
        assert tracer.readout_residual(batch) < tracer.readout_bound
        assert torch.equal(readout.cap(readout.uncapped(h)), found)


def test_a_readout_that_does_something_else_is_seen():
    """Logits 1% too large leave a residual of 0.01/1.01, which no rounding does."""
    model = tiny("llama").double()
    with float64(), trace(model) as tracer:
        batch = tracer.batches(random_chis([(3, 4)], seed=1))[0]
        handle = model.lm_head.register_forward_hook(lambda module, args, output: 1.01 * output)
        try:
            residual = tracer.readout_residual(batch)
        finally:
            handle.remove()
        assert residual == pytest.approx(0.01 / 1.01, rel=1e-9)  # cancellation of two digits in float64, and slack
        assert residual > tracer.readout_bound


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_pull_back_is_the_vjp_of_scale_and_softcap(softcap):
    g = torch.Generator().manual_seed(0)
    W, h, force = (torch.randn(*shape, dtype=torch.float64, generator=g) for shape in ((11, 6), (5, 6), (5, 11)))
    readout = Readout(W, None, 0.7, softcap, "", None, ())
    z, vjp = torch.func.vjp(lambda x: readout.cap(0.7 * x), h @ W.T)
    assert torch.allclose(readout.logits(h), z, rtol=0, atol=16 * EPS * float((h.abs() @ W.abs().T).max()))
    # slope = 0.7 (1 - (z / cap)²): a few roundings of numbers of size 1
    assert torch.allclose(readout.pull_back(z, force), vjp(force)[0], rtol=0, atol=16 * EPS * float(force.abs().max()))


def test_names_and_ties():
    tied, untied = (Tracer(tiny("llama", tied=tied)).readout for tied in (True, False))
    assert (tied.weight_name, tied.bias_name, tied.tied) == ("lm_head.weight", None, ("model.embed_tokens.weight",))
    assert (untied.weight_name, untied.tied) == ("lm_head.weight", ())
    own = tiny("llama", tied=False)
    own.lm_head = torch.nn.Linear(32, 61)
    assert Tracer(own).readout.bias_name == "lm_head.bias" and Tracer(own).readout.bias is not None


def test_models_without_a_readout_of_their_own_are_refused():
    with pytest.raises(ValueError, match="Linear has no output embeddings"):
        output_embeddings(torch.nn.Linear(2, 2))
    model = tiny("llama")
    model.get_output_embeddings = lambda: torch.nn.Linear(32, 61)
    with pytest.raises(ValueError, match="not one of its modules"):
        output_embeddings(model)


@pytest.fixture
def adapted():
    """A model with LoRA on its output embeddings, away from its start at zero."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny("llama", tied=False), config).eval()
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn_like(p))
    return model


def test_an_adapter_on_the_readout_counts_where_the_pass_calls_it(adapted):
    lm, h = adapted.get_base_model(), torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    rounding = 1e-5  # float32: products over 32 and 2 numbers of size 1, 32 · 2⁻²⁴ ≈ 2e-6, twice and on both sides

    def agrees(readout):
        return torch.allclose(readout.logits(h), lm.lm_head(h), rtol=0, atol=rounding * float(lm.lm_head(h).abs().max()))

    with torch.no_grad():
        assert agrees(readout_of(lm, True)) and not agrees(readout_of(lm, False))
        assert torch.equal(readout_of(lm, False).weight, lm.lm_head.base_layer.weight)
        adapted.merge_adapter()
        assert agrees(readout_of(lm, True))
        adapted.unmerge_adapter()
        with adapted.disable_adapter():
            assert agrees(readout_of(lm, True))
    with pytest.raises(ValueError, match="no weight of its own"):
        Tracer(lm)


def test_a_readout_that_is_kept_elsewhere_is_refused():
    model = tiny("llama")
    model.lm_head.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match="ZeRO-3"):
        readout_of(model, False)
