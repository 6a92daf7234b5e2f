"""The CH2 estimate against its formula from plain hooks and autograd, and where theory makes it exact or positive."""

import pytest
import torch
from engines import scored

import tokdyn as td
from tokdyn.exact import sides
from tokdyn.exact.ch2 import ch2_matrix, streams
from tokdyn.model.trace import trace
from tokdyn.testing import V_TINY, float64, random_chis, relative_error, tiny

EPS = torch.finfo(torch.float64).eps
BAND = V_TINY * 32 * 4 * EPS  # one rounding for every product in an entry: vocabulary, width, streams
U, O = random_chis([(3, 5), (2, 6)], seed=1), random_chis([(3, 4), (1, 3), (5, 2)], seed=2)  # noqa: E741
PROJECTIONS = {
    "llama": ["model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.gate_proj"],
    "gpt2": ["transformer.h.{}.attn.c_attn", "transformer.h.{}.mlp.c_fc"],
    "gemma2": ["model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.gate_proj"],  # its logits are soft-capped
    "granite": ["model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.gate_proj"],  # its logits are scaled
}


def estimate(model, update, observe):
    with trace(model) as tracer:
        problem = scored(tracer, update, observe)
        return ch2_matrix(tracer, problem.observed, problem.updated)


def by_hand(model, chis, projections):
    """What enters the named projections, and ∂ log pi(y)/∂h, at every scored token: one plain forward pass per sequence."""
    found = []
    for chi in chis:
        kept, handles = {}, []

        def keep(name, kept=kept):
            def hook(module, args):
                kept[name] = args[0] if name else args[0].detach().requires_grad_()
                return None if name else (kept[name],)

            return hook

        for name in projections:
            handles.append(model.get_submodule(name).register_forward_pre_hook(keep(name)))
        handles.append(model.get_output_embeddings().register_forward_pre_hook(keep("")))
        try:
            log_pi = model(chi.ids[None]).logits[0].log_softmax(-1)
        finally:
            for handle in handles:
                handle.remove()
        t = chi.scored.nonzero().flatten() - 1
        (u,) = torch.autograd.grad(log_pi[t, chi.ids[chi.scored]].sum(), kept[""])
        found.append(([kept[name][0, t].detach() for name in projections], u[0, t]))
    return [torch.cat(parts) for parts in zip(*(h for h, _ in found), strict=True)], torch.cat([u for _, u in found])


@pytest.mark.parametrize("family", PROJECTIONS)
@pytest.mark.parametrize("tokens", [2048, 9])
def test_the_matrix_is_its_formula(family, tokens, monkeypatch):
    monkeypatch.setattr(sides, "BATCH", tokens)
    projections = [name.format(layer) for layer in range(2) for name in PROJECTIONS[family]]
    with float64():
        model = tiny(family).double()
        F = estimate(model, U, O)
        (h_o, u_o), (h_u, u_u) = by_hand(model, O, projections), by_hand(model, U, projections)
    expected = sum(a @ b.T for a, b in zip(h_o, h_u, strict=True)) * (u_o @ u_u.T)
    assert relative_error(F, expected) < BAND


def test_the_forces_of_both_sides_enter_linearly():
    with float64():
        model = tiny("gpt2").double()
        w, c = torch.linspace(-1, 2, 9, dtype=torch.float64), torch.linspace(2, -1, 11, dtype=torch.float64)
        plain = estimate(model, U, O)
        with trace(model) as tracer:
            problem = scored(tracer, U, O, weights=w)
            weighted = ch2_matrix(tracer, problem.observed, problem.updated.part(c))
    assert relative_error(weighted, w[:, None] * plain * c) < BAND


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_side_with_itself_is_a_kernel(family):
    """Equal sides: symmetric, and as a product of two Gram matrices positive semi-definite (Schur)."""
    with float64():
        F = estimate(tiny(family).double(), U, U)
    assert float((F - F.T).abs().max()) <= BAND * float(F.abs().max())
    assert float(torch.linalg.eigvalsh((F + F.T) / 2).min()) >= -BAND * float(F.abs().max())


class Parallel(torch.nn.Module):
    """h = x + A n(x) + B n'(x): nothing but the readout lies behind the projections, and no position sees another."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(V_TINY, 16), torch.nn.Linear(16, V_TINY, bias=False)
        self.one, self.two = torch.nn.LayerNorm(16), torch.nn.RMSNorm(16)
        self.A, self.B = (torch.nn.Linear(16, 16, bias=False) for _ in range(2))

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids, use_cache=False):
        x = self.embedding(ids)
        return (self.head(x + self.A(self.one(x)) + self.B(self.two(x))),)


def test_it_is_exact_where_only_the_readout_lies_behind_the_projections():
    torch.manual_seed(0)
    model = Parallel().double()
    exact = td.forces(model, U, O, scope="^[AB][.]", method="naive").matrix
    assert relative_error(estimate(model, U, O), exact) < BAND


def test_streams_are_found_once_each_whatever_the_layout_and_the_precision():
    """Two a layer where attention and MLP follow each other, one where one norm feeds both; inside LayerNorm and RMSNorm."""
    for family, each in (("llama", 2), ("gpt2", 2), ("gpt_neox", 2), ("cohere", 1), ("falcon", 1), ("mamba", 1)):
        for dtype in (torch.float32, torch.bfloat16):
            with trace(tiny(family, tied=None).to(dtype)) as tracer:
                found = streams(tracer, tracer.batches(O)[0])
            assert len(found) == len(set(found)) == 2 * each, (family, dtype)


def test_a_norm_that_is_called_twice_is_two_streams():
    model = tiny("llama", tied=False)
    model.model.layers[1] = model.model.layers[0]
    with trace(model) as tracer:
        found = streams(tracer, tracer.batches(O)[0])
    norms = ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"]
    assert found == [(name, nth) for nth in range(2) for name in norms]


def test_a_model_without_such_a_stream_is_refused():
    """OLMo-2 normalises what comes out of attention and MLP, not what goes in."""
    with pytest.raises(ValueError, match="scope='ch2' needs norms whose output enters a linear projection, and Olmo2"):
        estimate(tiny("olmo2"), U, O)


def test_forces_give_the_estimate():
    """scope="ch2" is ch2_matrix, its sums are the reductions, and what it cannot do it says."""
    chis = random_chis([(3, 5), (2, 4)], seed=3)
    with float64():
        model = tiny("llama").double()
        found = td.forces(model, chis, chis, scope="ch2")
        sums = [td.forces(model, chis, chis, scope="ch2", reduce=reduce).vector for reduce in ("update", "observe")]
        assert relative_error(found.matrix, estimate(model, chis, chis)) < BAND
    assert relative_error(found.matrix.T, found.matrix) < BAND
    for axis, vector in ((1, sums[0]), (0, sums[1])):
        assert bool(((vector - found.matrix.sum(axis)).abs() <= BAND * found.matrix.abs().sum(axis)).all())
    # in float32 some 15 sums of up to V terms precede either factor, each off by √V eps of its terms: √(15 V) eps = 4e-6
    model = tiny("llama")
    assert relative_error(td.forces(model, chis, chis, scope="ch2").matrix, found.matrix) < 1e-5
    with pytest.raises(ValueError, match="estimate in closed form"):
        td.forces(model, chis, chis, scope="ch2", method="naive")
    with pytest.raises(ValueError, match="needs an exact scope"):
        found.vocabulary(l=0)
