"""The identities of docs/theory.md, The decomposition, in float64; all of td.forces against the paper's dense A K G."""

import pytest
import torch

import tokdyn as td
from tokdyn import dynamics
from tokdyn.model.trace import trace
from tokdyn.objective import GTerm
from tokdyn.objectives import DPO, SFT
from tokdyn.testing import random_chis, relative_error, tiny

EPS = torch.finfo(torch.float64).eps


@pytest.fixture
def logits():
    return 3 * torch.randn(5, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_A_kills_constants_and_is_killed_by_pi(logits):
    A, pi = dynamics.A(logits), logits.softmax(-1)
    assert A.sum(-1).abs().max() < 17 * EPS
    assert torch.einsum("mv,mvw->mw", pi, A).abs().max() < 17 * EPS


def test_squared_norm_of_A_is_V_minus_2_plus_V_collision(logits):
    A, pi = dynamics.A(logits), logits.softmax(-1)
    expected = 17 - 2 + 17 * pi.square().sum(-1)
    assert torch.allclose(A.square().sum((-1, -2)), expected, rtol=100 * EPS, atol=0)


def test_A_is_the_jacobian_of_log_softmax(logits):
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda z: z.log_softmax(-1), row) for row in logits])
    assert torch.allclose(dynamics.A(logits), jacobian, atol=10 * EPS)


def test_G_sums_to_zero_for_every_kind_of_term(logits):
    g = torch.Generator().manual_seed(1)
    term = GTerm(
        torch.randint(0, 17, (5, 3), generator=g),
        torch.randn(5, 3, dtype=torch.float64, generator=g),
        torch.randn(5, dtype=torch.float64, generator=g),
        torch.randn(5, dtype=torch.float64, generator=g),
    )
    G = dynamics.G(logits, term)
    assert G.sum(1).abs().max() < 17 * EPS * G.abs().sum(1).max()


@pytest.fixture(scope="module")
def dense():
    """A tiny GPT-2 in float64 (its forward pass is pure float64) with the logits' dense Jacobians on both sides."""
    model = tiny("gpt2", vocabulary=23).double()
    u = [
        c.with_(role=r, group=0)
        for c, r in zip(random_chis([(2, 3), (2, 2)], seed=1, vocabulary=23), ("chosen", "rejected"), strict=True)
    ]
    o = random_chis([(3, 4)], seed=2, vocabulary=23)
    jacobians, logits = [], []
    with trace(model) as tracer:
        names = {use: owner for use, owner in tracer.owner.items()}
        firsts = {owner: tracer.params[owner] for owner in names.values()}
        for chis in (o, u):
            (batch,) = tracer.batches(chis)

            def f(p, batch=batch):
                return tracer.logits(batch, {use: p[owner] for use, owner in names.items()})

            J = torch.func.jacrev(f)(firsts)
            jacobians.append(torch.cat([j.flatten(2) for j in J.values()], 2))
            logits.append(f(firsts).detach())
    return model, u, o, jacobians, logits


def test_K_is_symmetric_under_exchange_of_the_tokens(dense):
    J_o = dense[3][0]
    K = dynamics.K(J_o, J_o)
    assert torch.allclose(K, K.permute(1, 0, 3, 2), rtol=0, atol=1e-12 * float(K.abs().max()))


@pytest.mark.parametrize("objective", [SFT(), DPO(beta=0.5)], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("method", ["naive", "tangent"])
def test_forces_are_the_papers_A_K_G_and_first_order_conserves_probability(dense, objective, method):
    model, u, o, (J_o, J_u), (z_o, z_u) = dense
    y_o = o[0].ids[o[0].scored]
    y_u = torch.cat([chi.ids[chi.scored] for chi in u])
    log_probs = z_u.log_softmax(-1).gather(1, y_u[:, None]).squeeze(1)
    G = dynamics.G(z_u, objective.g_terms(log_probs, u))
    A, K = dynamics.A(z_o), dynamics.K(J_o, J_u)
    F = dynamics.F(A, K, G, y_o)
    result = td.forces(model, u, o, objective, method=method)
    assert relative_error(result.matrix, F) < 1e-12

    delta = dynamics.delta_log_pi(A, K, G, eta=1.0)
    assert torch.allclose(delta.gather(1, y_o[:, None]).squeeze(1), result.predict(1.0), rtol=1e-10)
    assert (z_o.softmax(-1) * delta).sum(1).abs().max() < 1e-12 * delta.abs().max()


def test_vocabulary_view_is_the_row_of_A_K_G(dense):
    model, u, o, (J_o, J_u), (z_o, z_u) = dense
    G = dynamics.G(z_u, SFT().g_terms(torch.zeros(5, dtype=torch.float64), u))
    A, K = dynamics.A(z_o), dynamics.K(J_o, J_u)
    result = td.forces(model, u, o, SFT(), reduce="update")
    whole = dynamics.delta_log_pi(A, K, G, 1.0)
    single = dynamics.delta_log_pi(A, K[:, 3:4], G[3:4], 1.0)
    for view, truth in ((result.vocabulary(k=4), whole), (result.vocabulary(l=3, k=4), single)):
        assert torch.equal(view.rising, truth.topk(4).indices)
        assert torch.equal(view.falling, (-truth).topk(4).indices)
        assert torch.allclose(view.rise, truth.topk(4).values, rtol=1e-10)
    one = result.vocabulary(2, 3, k=4)
    assert torch.equal(one.falling, (-single[2]).topk(4).indices)
    assert torch.allclose(one.fall, -(-single[2]).topk(4).values, rtol=1e-10)


def test_true_residual_falls_fourfold_when_eta_halves(dense):
    model, u, o = dense[:3]
    check = td.verify(model, u, o, SFT(), move=1e-3)
    assert 1.98 < check.order < 2.02  # in float64 a step this small leaves only the second order
    assert abs(check.linearity - 1) < 2e-2
