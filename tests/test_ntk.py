"""The kernel's size and drift against dense Jacobians, Hutchinson's estimates against their own theory, LBK on a real step."""

import copy
import sys
from itertools import product

import pytest
import real_steps
import torch

import tokdyn as td
from tokdyn import dynamics
from tokdyn.exact import select
from tokdyn.model.trace import trace
from tokdyn.objective import GTerm
from tokdyn.testing import float64, random_chis, relative_error, tiny

EPS = torch.finfo(torch.float64).eps
V_SMALL = 7
U, O = (random_chis(x, seed=s, vocabulary=V_SMALL) for x, s in (([(2, 2)], 1), ([(2, 2), (3, 1)], 2)))  # noqa: E741


def jacobian(model, chis, scope="full"):
    """∂z/∂θ [N, V, P] by reverse mode over a dictionary of tensors, each once however many uses it has."""
    with trace(model) as tracer:
        uses = select(tracer, scope)
        firsts = {tensor: tracer.params[tensor] for tensor in uses.values()}
        (batch,) = tracer.batches(chis)
        J = torch.func.jacrev(lambda p: tracer.logits(batch, {use: p[tensor] for use, tensor in uses.items()}))(firsts)
    return torch.cat([j.flatten(2) for j in J.values()], 2)


def dense(model, update=U, observe=O, scope="full", P=None):
    J_o, J_u = (jacobian(model, chis, scope) for chis in (observe, update))
    return dynamics.K(J_o, J_u if P is None else J_u * P)


def sizes(K):
    return K.diagonal(dim1=2, dim2=3).sum(-1), K.flatten(2).norm(dim=2)


def band(J_o, J_u):
    """One rounding for each product of an inner product over P parameters, scaled by the sizes that meet."""
    sizes = (J.flatten(1).norm(dim=1) for J in (J_o, J_u))
    return J_o.shape[2] * EPS * torch.outer(*sizes)


@pytest.mark.parametrize("scope", ["full", "readout", "backbone"])
@pytest.mark.parametrize("family, tied", [("gpt2", True), ("gpt2", False), ("llama", True), ("llama", False)])
def test_trace_and_norm_are_those_of_the_dense_kernel(family, tied, scope):
    with float64():
        model = tiny(family, tied=tied, vocabulary=V_SMALL).double()
        trace_, norm = sizes(dense(model, scope=scope))
        within = band(jacobian(model, O, scope), jacobian(model, U, scope))
        found = td.kernel(model, U, O, scope=scope)
    assert found.trace.shape == (3, 2) and found.observed.num_rows == 3 and found.updated.num_rows == 2
    assert bool(((found.trace - trace_).abs() <= within).all())
    assert bool(((found.norm - norm).abs() <= within).all())
    assert not found.trace_error.any() and not found.norm_error.any()


def test_the_shorter_side_is_looped_over_and_nothing_else_changes():
    with float64():
        model = tiny("gpt2", vocabulary=V_SMALL).double()
        there, back = td.kernel(model, U, O), td.kernel(model, O, U)
        within = band(jacobian(model, O), jacobian(model, U))
    assert bool(((there.trace - back.trace.T).abs() <= within).all())
    assert bool(((there.norm - back.norm.T).abs() <= within).all())


def test_float32_is_as_good_as_dense_autograd():
    """Within twice the error of the dense Jacobian in float32, beside the rounding of a sum over the parameters."""
    model = tiny("gpt2", vocabulary=V_SMALL)
    found, naive = td.kernel(model, U, O), sizes(dense(model))
    truth = sizes(dense(copy.deepcopy(model).double()))
    for value, same, exact in zip((found.trace, found.norm), naive, truth, strict=True):
        floor = V_SMALL * torch.finfo(torch.float32).eps
        assert relative_error(value, exact) <= 2 * relative_error(same, exact) + floor


def test_an_optimizer_makes_it_J_P_Jt():
    model = tiny("gpt2", vocabulary=V_SMALL).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(O[0].ids[None]).logits.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    g = real_steps.gradients_of(model, -real_steps.log_probs(model, U).sum())
    moved = real_steps.own_part(optimizer, dict(model.named_parameters()), g)
    P = {name: torch.where(g[name] == 0, 0, moved[name] / (-1e-3 * g[name])) for name in g}  # of the optimizer's own step
    with trace(model) as tracer:
        flat = torch.cat([P[tensor].flatten() for tensor in dict.fromkeys(select(tracer, "full").values())])
    trace_, norm = sizes(dense(model, P=flat))
    found = td.kernel(model, U, O, optimizer=optimizer)
    within = band(jacobian(model, O), jacobian(model, U) * flat)
    assert bool(((found.trace - trace_).abs() <= within).all()) and bool(((found.norm - norm).abs() <= within).all())
    assert relative_error(td.kernel(model, U, O).trace, trace_) > 0.1  # P does something


# ---------------------------------------------------------------- Hutchinson


@pytest.fixture
def all_signs(monkeypatch):
    """Every probe of {-1, 1}^4 once, in place of a sample: means over it are expectations."""
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    monkeypatch.setattr(sys.modules["tokdyn.ntk"], "_probes", lambda tracer, samples, seed: lambda: signs)
    return len(signs)


@pytest.fixture
def four():
    """A model with four tokens, its dense kernel, one updated and two observed tokens."""
    model = tiny("gpt2", vocabulary=4).double()
    u, o = (random_chis([x], seed=s, vocabulary=4) for x, s in (((2, 1), 3), ((2, 2), 4)))
    return model, u, o, dense(model, u, o)


def test_the_estimates_are_unbiased_and_their_errors_are_hutchinsons(all_signs, four):
    """Over all 16 sign vectors the means are exact, and with C the symmetric part Var ε·Xε = 2 Σ_{v≠w} C_vw²."""
    model, u, o, K = four
    found, n = td.kernel(model, u, o, samples=all_signs), all_signs
    trace_, norm = sizes(K)
    within = band(jacobian(model, o), jacobian(model, u))
    assert bool(((found.trace - trace_).abs() <= within).all()) and bool(((found.norm - norm).abs() <= within).all())

    def variance(X):
        C = (X + X.mT) / 2
        return 2 * (C.square().sum((2, 3)) - C.diagonal(dim1=2, dim2=3).square().sum(2))

    # the spread of n values has n - 1 degrees of freedom: s²/n = Var/(n - 1) when the sample is the population
    assert relative_error(found.trace_error, (variance(K) / (n - 1)).sqrt()) < 1e3 * EPS
    assert relative_error(found.norm_error, (variance(K.mT @ K) / (n - 1)).sqrt() / (2 * norm)) < 1e3 * EPS


def test_a_sample_lies_within_four_standard_errors_and_follows_its_seed():
    model = tiny("gpt2", vocabulary=V_SMALL).double()
    exact, found = td.kernel(model, U, O), td.kernel(model, U, O, samples=32, seed=5)
    assert bool(((found.trace - exact.trace).abs() <= 4 * found.trace_error).all())
    low = found.norm_error.square() / (2 * found.norm)  # the root of an unbiased square
    assert bool(((found.norm + low - exact.norm).abs() <= 4 * found.norm_error).all())
    assert 0 < float(found.trace_error.max()) < float(exact.trace.max())
    one, again, other = (td.kernel(model, U, O, samples=2, seed=s) for s in (5, 5, 6))
    assert torch.equal(one.trace, again.trace) and torch.equal(one.norm_error, again.norm_error)
    assert not torch.equal(one.trace, other.trace)


def test_samples_without_a_spread_are_refused():
    with pytest.raises(ValueError, match="samples must be at least 2"):
        td.kernel(tiny("gpt2"), U, O, samples=1)
    with pytest.raises(ValueError, match="samples must be at least 2"):
        td.kernel_drift(tiny("gpt2"), tiny("gpt2"), U, O, samples=0)


# ---------------------------------------------------------------- drift


@pytest.mark.parametrize("samples", [None, 3])
def test_a_model_has_not_drifted_from_itself(samples):
    model = tiny("llama", vocabulary=V_SMALL)
    drift = td.kernel_drift(model, model, U, O, samples=samples)
    assert not drift.change.any() and not drift.change_error.any()
    assert float((drift.cosine - 1).abs().max()) <= 4 * EPS + torch.finfo(torch.float32).eps
    assert float(drift.cosine_error.max()) <= 16 * EPS  # all products are the same numbers: √(A B) is rounded, and no more


def moved(model, size=0.05):
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator).to(p))
    return other


def test_drift_is_that_of_the_dense_kernels():
    a = tiny("gpt2", vocabulary=V_SMALL).double()
    b = moved(a)
    K_a, K_b = (dense(model).flatten(2) for model in (a, b))
    drift = td.kernel_drift(a, b, U, O)
    assert relative_error(drift.change, (K_b - K_a).norm(dim=2) / K_a.norm(dim=2)) < 1e-12
    assert relative_error(drift.cosine, (K_a * K_b).sum(2) / (K_a.norm(dim=2) * K_b.norm(dim=2))) < 1e-12
    swapped = td.kernel_drift(a, b, O, U)
    assert relative_error(swapped.change.T, drift.change) < 1e-12 and relative_error(swapped.cosine.T, drift.cosine) < 1e-12


def test_sampled_drift_has_the_right_expectations(all_signs, four):
    """Its inner products are means over the probes: with all signs they are the exact ones."""
    a, u, o, _ = four
    K_a, K_b = (dense(model, u, o).flatten(2) for model in (a, moved(a)))
    drift = td.kernel_drift(a, moved(a), u, o, samples=all_signs)
    assert relative_error(drift.change, (K_b - K_a).norm(dim=2) / K_a.norm(dim=2)) < 1e-12
    assert relative_error(drift.cosine, (K_a * K_b).sum(2) / (K_a.norm(dim=2) * K_b.norm(dim=2))) < 1e-12


def test_sampled_drift_lies_within_its_errors():
    a = tiny("gpt2", vocabulary=V_SMALL).double()
    exact, found = td.kernel_drift(a, moved(a), U, O), td.kernel_drift(a, moved(a), U, O, samples=32, seed=1)
    for name in ("change", "cosine"):
        error = getattr(found, f"{name}_error")
        assert bool(((getattr(found, name) - getattr(exact, name)).abs() <= 4 * error).all())
        assert 0 < float(error.min()) and float(error.max()) < float(getattr(exact, name).max())


def test_drift_needs_one_vocabulary():
    with pytest.raises(ValueError, match="the models have 7 and 9 logits"):
        td.kernel_drift(tiny("gpt2", vocabulary=7), tiny("gpt2", vocabulary=9), U, O)


# ---------------------------------------------------------------- influence between checkpoints


def test_spearman_gives_ties_their_average_rank():
    """Ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: covariance 4.5, squares 4.5 and 5. The formula without ties says 0.95."""
    a, b = torch.tensor([10.0, 20.0, 20.0, 70.0]), torch.tensor([-1.0, 5.0, 0.0, 6.0])
    assert td.rank_correlation(a, b) == pytest.approx(4.5 / 22.5**0.5, rel=4 * EPS)
    assert td.rank_correlation(a.view(2, 2), b.view(2, 2)) == td.rank_correlation(a, b) == td.rank_correlation(b, a)
    assert td.rank_correlation(a.exp(), b**3) == td.rank_correlation(a, b)  # any rising function
    assert td.rank_correlation(b, -b) == pytest.approx(-1, rel=4 * EPS)
    assert torch.tensor(td.rank_correlation(a, torch.ones(4))).isnan()


def test_sign_delta_counts_equal_signs():
    a, b = torch.tensor([[1.0, -2.0, 0.0], [3.0, -4.0, 0.0]]), torch.tensor([[0.1, 2.0, 0.0], [3.0, -0.1, 1.0]])
    assert td.sign_delta(a, b) == 4 / 6
    assert td.sign_delta(a, a) == 1 and td.sign_delta(a, -a) == 2 / 6


@pytest.mark.parametrize("measure", [td.rank_correlation, td.sign_delta])
def test_what_cannot_be_compared_is_refused(measure):
    for a, b, message in (
        (torch.zeros(3), torch.zeros(4), "one shape"),
        (torch.zeros(0), torch.zeros(0), "at least"),
        (torch.zeros(2), torch.tensor([0.0, torch.nan]), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(a, b)


# ---------------------------------------------------------------- LBK


def log_probs(model, chis):
    with torch.no_grad():
        return torch.cat([model(c.ids[None]).logits[0].log_softmax(-1)[c.scored.nonzero().flatten() - 1] for c in chis])


def test_the_lower_bound_holds_on_a_real_step_and_is_the_papers_quotient():
    """One SGD step on one token of a copy: LBK ≤ eta² ‖K‖², and LBK is ‖A K G‖² / (‖A‖² ‖G‖²) eta² up to order eta."""
    model, eta = tiny("gpt2", vocabulary=V_SMALL).double(), 1e-7
    update = random_chis([(2, 1)], seed=1, vocabulary=V_SMALL)
    y, K = update[0].ids[-1:], dense(model, update, O)
    stepped, before = copy.deepcopy(model), log_probs(model, O)
    (-log_probs_of(stepped, update)[0, y]).backward()
    torch.optim.SGD(stepped.parameters(), lr=eta).step()
    G = dynamics.G(log_probs(model, update), GTerm(y, torch.ones(1, dtype=torch.float64)))[0]
    bound = td.kernel_lower_bound(before, log_probs(stepped, O), G)
    norm = td.kernel(model, update, O).norm[:, 0]
    assert bool((bound <= eta**2 * norm.square()).all()) and float(bound.min()) > 0

    A = dynamics.A(before)
    quotient = (A @ (K[:, 0] @ G)[..., None]).square().sum((1, 2)) / (A.square().sum((1, 2)) * G.square().sum())
    # the second order of Δ log pi is of relative size eta ‖K‖ ‖G‖, its rounding EPS log V / ‖Δ log pi‖
    size = eta * float(norm.max() * G.norm())
    assert relative_error(bound, eta**2 * quotient) < 4 * (size + EPS / size * V_SMALL)


def log_probs_of(model, chis):
    (chi,) = chis
    return model(chi.ids[None]).logits[0].log_softmax(-1)[chi.scored.nonzero().flatten() - 1]


def test_the_lower_bound_is_half_of_the_readout_kernel_with_two_tokens():
    """V = 2: A is of rank one along G, so nothing is lost there, and K = |h|² I has ‖K‖_F² = 2 ‖K‖₂²."""
    z = torch.tensor([[0.3, -1.1], [2.0, 0.5]], dtype=torch.float64)
    G, strength = torch.tensor([0.4, -0.4], dtype=torch.float64), 1e-6
    bound = td.kernel_lower_bound(z.log_softmax(1), (z - strength * G).log_softmax(1), G)
    assert relative_error(bound, torch.full_like(bound, strength**2)) < 4 * (strength + EPS / strength)


def test_the_lower_bound_wants_log_probabilities_and_a_gradient():
    z, G = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, -0.5, 0.0, 0.0, 0.0])
    log_pi = z.log_softmax(1)
    with pytest.raises(ValueError, match="before must hold log-probabilities: exp of row 0 sums to"):
        td.kernel_lower_bound(z, log_pi, G)
    with pytest.raises(ValueError, match="after must hold log-probabilities: exp of row 1 sums to nan"):
        td.kernel_lower_bound(log_pi, log_pi.index_fill(0, torch.tensor([1]), torch.nan), G)
    with pytest.raises(ValueError, match="G is zero"):
        td.kernel_lower_bound(log_pi, log_pi, 0 * G)
