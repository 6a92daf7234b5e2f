"""Every way to compute a force gives the same force, on every family; and the model is left as it was."""

import copy

import pytest
import torch
from engines import forces
from pairs import OBSERVED, pair

import tokdyn as td
from tokdyn.model import checks
from tokdyn.model.trace import Tracer, trace
from tokdyn.objectives import DPO, GRPO, PPO, SFT, SimKO
from tokdyn.testing import random_chis, relative_error, tiny

FAMILIES = ["gpt2", "gpt_neox", "llama", "llama_bias", "qwen2", "gemma2"]
# On the way of a gradient lie some 30 sums of up to V = 61 terms (two layers, there and back), each off by √V eps of its terms:
# √(30 V) eps = 5e-6 in either factor of a force
FP32 = 1e-5


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_methods_agree_with_one_gradient_per_token(family, tied):
    model, update = tiny(family, tied=tied), pair()
    naive = forces(model, update, OBSERVED, DPO(), method="naive").matrix
    assert relative_error(forces(model, update, OBSERVED, DPO()).matrix, naive) < FP32
    for reduce, axis in (("update", 1), ("observe", 0)):
        truth = naive.sum(axis)
        assert relative_error(forces(model, update, OBSERVED, DPO(), reduce=reduce).vector, truth) < FP32
        steps = forces(model, update, OBSERVED, DPO(), reduce=reduce, method="fd").vector
        assert (
            relative_error(steps, truth) < 1e-3
        )  # float32 rounding of logits of size 5 over a move of 0.05, and its extrapolation: 5 · 1.2e-7/0.05 · few


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_readout_in_closed_form_is_the_kernel_of_the_readout_weight_alone(family, tied):
    model, update = tiny(family, tied=tied), pair()
    naive = forces(model, update, OBSERVED, DPO(), scope="readout", method="naive").matrix
    closed = forces(model, update, OBSERVED, DPO(), scope="readout")
    assert relative_error(closed.matrix, naive) < FP32
    for reduce, axis in (("update", 1), ("observe", 0)):
        vector = forces(model, update, OBSERVED, DPO(), scope="readout", reduce=reduce).vector
        assert torch.allclose(
            vector, closed.matrix.sum(axis), rtol=1e-4, atol=1e-5 * float(closed.matrix.abs().sum(axis).max())
        )


@pytest.mark.parametrize("family", ["gpt2", "llama_bias"])
def test_untied_forces_are_readout_plus_backbone(family):
    model, update = tiny(family, tied=False), pair()
    parts = [forces(model, update, OBSERVED, DPO(), scope=scope).matrix for scope in ("readout", "backbone")]
    assert relative_error(sum(parts), forces(model, update, OBSERVED, DPO(), method="naive").matrix) < FP32


def test_tied_forces_have_cross_terms_between_lookup_and_readout():
    model, update = tiny("llama", tied=True), pair()
    full = forces(model, update, OBSERVED, DPO(), method="naive").matrix
    parts = sum(forces(model, update, OBSERVED, DPO(), scope=scope).matrix for scope in ("readout", "backbone"))
    assert relative_error(parts, full) > 1e-3


def test_the_kernel_adds_up_over_tensors():
    model, update = tiny("qwen2"), pair()
    full = forces(model, update, OBSERVED, SFT(), method="naive").matrix
    names = [r"embed_tokens", r"layers\.0\.", r"layers\.1\.", r"^model\.norm"]
    parts = sum(forces(model, update, OBSERVED, SFT(), scope=name).matrix for name in names)
    assert relative_error(parts, full) < FP32


def test_forces_between_log_probs_are_symmetric():
    model, a, b = tiny("gemma2"), random_chis([(2, 4)], seed=5), random_chis([(3, 5)], seed=6)
    assert relative_error(forces(model, a, b, SFT()).matrix, forces(model, b, a, SFT()).matrix.T) < FP32


def test_weights_of_the_observed_tokens_enter_linearly():
    model, update = tiny("gpt2"), pair()
    w = torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0, 0.0, 1.0])
    for scope in ("full", "readout"):
        matrix = forces(model, update, OBSERVED, DPO(), method="naive", scope=scope).matrix
        vector = forces(model, update, OBSERVED, DPO(), scope=scope, reduce="observe", weights=w).vector
        assert relative_error(vector, w @ matrix) < 4 * FP32


@pytest.mark.parametrize("objective", [PPO(entropy=0.3), SimKO(), SFT(label_smoothing=0.2)], ids=lambda o: type(o).__name__)
def test_objectives_with_entropy_candidates_or_smoothing_go_through_every_method(objective):
    model = tiny("llama")
    update = [c.with_(advantage=a, group=0) for c, a in zip(random_chis([(3, 5), (2, 6)], seed=1), (1.0, -1.0), strict=True)]
    naive = forces(model, update, OBSERVED, objective, method="naive")
    assert relative_error(forces(model, update, OBSERVED, objective).matrix, naive.matrix) < FP32
    assert relative_error(forces(model, update, OBSERVED, objective, reduce="update").vector, naive.matrix.sum(1)) < 4 * FP32
    closed = forces(model, update, OBSERVED, objective, scope="readout").matrix
    assert relative_error(closed, forces(model, update, OBSERVED, objective, scope="readout", method="naive").matrix) < FP32


class MeanSFT(SFT):
    """A loss in which sequences meet."""

    def loss(self, log_probs, chis, scores=None):
        return super().loss(log_probs, chis) / len(log_probs)


@pytest.mark.parametrize("objective", [SFT(), SFT(label_smoothing=0.2), DPO(), PPO(entropy=0.3), MeanSFT()], ids=str)
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("reduce", ["update", "observe"])
def test_a_reduction_makes_no_pass_for_c_that_another_makes_anyway(objective, batches, reduce, monkeypatch):
    """One pass over each batch of a side, and one more where c needs sequences of two batches; c is what the matrix has.

    Besides, the checks of tokdyn/model/checks.py: a constant number of passes over a short piece.
    """
    model, passes = tiny("gpt2"), []
    update = [chi.with_(advantage=1.0) for chi in pair()]
    want = forces(model, update, OBSERVED, objective, method="naive")
    if batches == 2:
        whole = Tracer.batches
        monkeypatch.setattr(Tracer, "batches", lambda tracer, chis, tokens: whole(tracer, chis, tokens=1))
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    got = forces(model, update, OBSERVED, objective, reduce=reduce)
    at_entry = checks.PASSES_AT_ENTRY + checks.PASSES_OF_ADJOINT
    assert len(passes) == at_entry + 2 * batches + (2 if batches == 2 and isinstance(objective, DPO | MeanSFT) else 0)
    assert relative_error(got.vector, want.matrix.sum(1 if reduce == "update" else 0)) < FP32
    for mine, theirs in ((got.updated, want.updated), (got.observed, want.observed)):
        assert mine.column_names == theirs.column_names
        for name in ("sequence", "token_id", "log_prob", "entropy"):
            assert mine[name].to_pylist() == pytest.approx(theirs[name].to_pylist(), rel=1e-5)
    assert torch.allclose(got.c, want.c, rtol=1e-5, atol=0)


def test_naive_blocks_do_not_matter():
    model, update = tiny("llama"), pair()
    whole = forces(model, update, OBSERVED, DPO(), method="naive").matrix
    assert relative_error(forces(model, update, OBSERVED, DPO(), method="naive", memory=1).matrix, whole) < FP32


def test_a_sequence_does_not_feel_its_batch():
    model = tiny("llama")
    alone = torch.cat([forces(model, pair(), [chi], DPO(), reduce="update").vector for chi in OBSERVED])
    assert relative_error(forces(model, pair(), OBSERVED, DPO(), reduce="update").vector, alone) < FP32


def test_reference_model_enters_c_and_nothing_else():
    model, other = tiny("llama"), tiny("llama", seed=3)
    with_model = forces(model, pair(), OBSERVED, DPO(beta=1.0), reference=other, method="naive")
    at_start = forces(model, pair(), OBSERVED, DPO(beta=1.0), method="naive")
    ratio = with_model.c / at_start.c
    assert float((ratio - ratio[0]).abs().max()) < 1e-5 and abs(float(ratio[0]) - 1) > 1e-3
    assert relative_error(with_model.matrix, float(ratio[0]) * at_start.matrix) < FP32


def test_frozen_parameters_contribute_nothing_and_are_reported():
    model = tiny("llama", tied=False)
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    result = forces(model, pair(), OBSERVED, SFT())
    for p in model.parameters():
        p.requires_grad_(True)
    assert relative_error(result.matrix, forces(model, pair(), OBSERVED, SFT(), scope=r"layers\.1").matrix) < FP32
    assert {rule for name, rule in result.coverage.items() if "layers.1" not in name} == {"frozen"}
    assert {rule for name, rule in result.coverage.items() if "layers.1" in name} == {"outer product", "elementwise gain"}


@pytest.mark.parametrize(("scope", "adam"), [("full", True), ("backbone", False), (r"\.mlp\.", True)])
def test_the_answer_over_the_vocabulary_holds_the_force_on_the_observed_token(scope, adam):
    """Its entry at y_m is F[m,l], in whichever sequence m lies, and summed over l for the whole step."""
    model, optimizer = tiny("qwen2"), None
    if adam:
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.randint(0, 61, (2, 9))).logits.square().mean().backward()
        optimizer.step()
    found = forces(model, pair(), OBSERVED, DPO(), scope=scope, optimizer=optimizer)
    V, tokens = model.config.vocab_size, found.observed["token_id"].to_pylist()
    size = float(found.matrix.abs().max())
    for m in (0, len(tokens) // 2, len(tokens) - 1):
        for l in (0, found.matrix.shape[1] - 1, None):  # noqa: E741
            answer = found.vocabulary(m=m, l=l, k=V)
            own = answer.rise[(answer.rising == tokens[m]).nonzero()[0, 0]]
            expected = found.matrix[m].sum() if l is None else found.matrix[m, l]
            assert abs(own - expected) <= FP32 * found.matrix.shape[1] * size


def test_the_model_is_left_bit_identical_also_after_an_error():
    model = tiny("llama").train()
    model.model.layers[0].eval()
    model.set_attn_implementation("sdpa")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    forces(model, pair(), OBSERVED, DPO(), reduce="update").vocabulary(0)
    td.verify(model, pair(), OBSERVED, DPO())
    with pytest.raises(ValueError, match="token ids from"):
        forces(model, random_chis([(2, 3)], vocabulary=900), OBSERVED)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(p.grad, torch.ones_like(p)) and p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(random, torch.get_rng_state())


def test_attention_in_the_trace_is_the_models_own_attention():
    model = tiny("qwen2")
    model.set_attn_implementation("sdpa")
    chi = random_chis([(3, 6)], seed=7)[0]
    own = model(chi.ids[None]).logits[0][:-1][chi.scored[1:]]
    with trace(model) as tracer:
        traced = tracer.logits(tracer.batches([chi])[0])
    assert torch.allclose(own, traced, atol=1e-5)


def test_a_model_that_moved_is_not_asked_again():
    model = tiny("gpt2")
    result = forces(model, pair(), OBSERVED, DPO(), reduce="update")
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="changed since"):
        result.vocabulary(0)


def test_tables_and_folder_hold_what_was_computed(tmp_path):
    import pyarrow.parquet as pq
    from safetensors.torch import load_file

    result = forces(tiny("gpt2"), pair(), OBSERVED, DPO())
    result.save(tmp_path / "f")
    tensors = load_file(tmp_path / "f" / "forces.safetensors")
    assert torch.equal(tensors["matrix"], result.matrix) and torch.equal(tensors["c"], result.c)
    table = pq.read_table(tmp_path / "f" / "tokens.parquet").to_pylist()
    assert [r["token_id"] for r in table if r["side"] == "observed"] == torch.cat([c.ids[c.scored] for c in OBSERVED]).tolist()
    assert len(result.to_dataframe()) == result.matrix.numel()
    assert float(result.to_dataframe().query("m == 2 and l == 3").force.iloc[0]) == float(result.matrix[2, 3])
    with pytest.raises(FileExistsError):
        result.save(tmp_path / "f")


MISTAKES = [
    (dict(scope="no_such_parameter"), "holds no trainable parameter"),
    (dict(scope="("), "regular expression"),
    (dict(reduce="rows"), "reduce must be"),
    (dict(method="magic"), "method must be"),
    (dict(method="fd"), "add reduce"),
    (dict(weights=torch.ones(7)), "weights belong to"),
    (dict(weights=torch.ones(3), reduce="observe"), r"\[M\]=\(7,\)"),
]


@pytest.mark.parametrize("options, message", MISTAKES, ids=lambda x: str(x)[:30])
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        forces(tiny("gpt2"), pair(), OBSERVED, DPO(), **options)


def test_broken_models_are_named():
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="transformer.h.1.mlp.c_fc.weight holds NaN"):
        forces(model, pair(), OBSERVED, DPO())
    with pytest.raises(ValueError, match="no output embeddings"):
        forces(tiny("gpt2").transformer, pair(), OBSERVED, DPO())
    huge = tiny("llama", tied=False)
    with torch.no_grad():
        huge.lm_head.weight.fill_(3e38)
    with pytest.raises(ValueError, match="logits of sequence 0 at position 3"):
        forces(huge, pair(), OBSERVED, SFT())
    for reduce in ("update", "observe"):  # seen by the passes themselves
        with pytest.raises(ValueError, match="the logits of sequence 0 at position"):
            forces(huge, pair(), OBSERVED, SFT(), reduce=reduce)


def test_real_steps_of_a_loss_without_a_gradient_are_zero():
    still = dict(reduce="observe", method="fd", weights=torch.zeros(sum(map(len, OBSERVED))))
    assert not forces(tiny("gpt2"), pair(), OBSERVED, **still).vector.any()


def test_a_clipped_update_is_said_to_move_nothing():
    model = tiny("gpt2")
    update = [c.with_(advantage=0.0, group=0) for c in random_chis([(2, 3), (2, 3)])]
    with pytest.raises(ValueError, match="moves no observed token"):
        td.verify(model, update, OBSERVED, GRPO())


def test_a_reference_model_does_not_replace_the_references_a_sequence_brings():
    model, other = tiny("llama"), tiny("llama", seed=3)
    own = [chi.with_(reference_log_probs=torch.full((len(chi),), -1.0)) for chi in pair()]
    alone = forces(model, own, OBSERVED, DPO(), reduce="update")
    assert torch.equal(forces(model, own, OBSERVED, DPO(), reduce="update", reference=other).c, alone.c)
    half = [own[0], pair()[1]]
    assert not torch.equal(forces(model, half, OBSERVED, DPO(), reduce="update", reference=other).c, alone.c)


def test_the_oracles_gram_matrix_adds_its_blocks_in_float64():
    """Whole numbers up to 32: a block of 2^14 products is below 2^24, exact in any order; all are 2^28, beyond float32."""
    from tokdyn.exact.naive import gram

    a = torch.randint(1, 33, (3, 1 << 20), generator=torch.Generator().manual_seed(0)).float()
    truth = a.double() @ a.double().T
    assert torch.equal(gram(a, a), truth) and not torch.equal(truth.float().double(), truth)


def test_a_half_precision_model_gives_float32_forces_and_steps_that_are_not_swallowed():
    model = tiny("llama")
    half = tiny("llama").to(torch.bfloat16)
    for p, q in zip(model.parameters(), half.parameters(), strict=True):
        p.data.copy_(q.data)  # the same weights, so that what differs is arithmetic
    truth = forces(model, pair(), OBSERVED, DPO(), method="naive").matrix
    # bfloat16 keeps 8 bits; a dozen roundings on the way of every number
    bound = 12 * torch.finfo(torch.bfloat16).eps
    for options in (dict(method="naive"), dict(method="tangent")):
        matrix = forces(half, pair(), OBSERVED, DPO(), **options).matrix
        assert matrix.dtype == torch.float32 and relative_error(matrix, truth) < bound
    readout = forces(model, pair(), OBSERVED, DPO(), scope="readout").matrix
    assert relative_error(forces(half, pair(), OBSERVED, DPO(), scope="readout").matrix, readout) < bound
    vector = forces(half, pair(), OBSERVED, DPO(), reduce="update").vector
    check = td.verify(half, pair(), OBSERVED, DPO())
    assert vector.dtype == torch.float32 and abs(check.linearity - 1) < bound + 0.05
    run = td.profile(half, pair(), pair())
    assert run.matrix.dtype == torch.float32 and "<html" in run.to_html()


def test_a_sequence_beyond_the_models_positions_is_named():
    with pytest.raises(ValueError, match="70 tokens is longer than the 64 positions"):
        forces(tiny("gpt2"), random_chis([(60, 10)]), OBSERVED)


def test_forces_can_be_asked_for_under_inference_mode():
    truth = forces(tiny("gpt2"), pair(), OBSERVED, DPO(), reduce="update").vector
    with torch.inference_mode():
        assert torch.equal(forces(tiny("gpt2"), pair(), OBSERVED, DPO(), reduce="update").vector, truth)
