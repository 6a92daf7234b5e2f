"""The operators' references against definitions in float64; they are the specification of every fast form."""

import pytest
import torch

from tokdyn import ops
from tokdyn.objective import GTerm

EPS = torch.finfo(torch.float64).eps


def rows(T=6, V=23, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(T, V, dtype=torch.float64, generator=g), torch.randint(0, V, (T,), generator=g)


def test_token_stats_are_their_definitions():
    z, y = rows()
    pi = z.softmax(1)
    e_y = torch.nn.functional.one_hot(y, 23)
    stats = ops.token_stats(z, y)
    assert torch.allclose(stats.logsumexp, z.logsumexp(1), rtol=10 * EPS)
    assert torch.allclose(stats.log_prob, pi.log()[torch.arange(6), y], rtol=1e-13)
    assert torch.allclose(stats.entropy, torch.distributions.Categorical(logits=z).entropy(), rtol=1e-13)
    assert torch.allclose(stats.collision, pi.square().sum(1), rtol=1e-13)
    assert torch.allclose(stats.g_norm, (pi - e_y).norm(dim=1), rtol=1e-13)
    assert torch.equal(stats.rank, (z > z.gather(1, y[:, None])).sum(1))
    assert torch.equal(stats.argmax, z.argmax(1))
    assert torch.allclose(stats.argmax_log_prob, pi.max(1).values.log(), rtol=1e-13)


@pytest.mark.parametrize("gap", [5.0, 15.0, 30.0])
@pytest.mark.parametrize("offset", [0.0, -120.0, 1e4])
def test_peaked_rows_keep_their_digits(gap, offset):
    """One token leads by `gap`: entropy and ‖pi - e_y‖ are of size e^-gap and must be right relative to that."""
    V = 9
    z = torch.full((1, V), offset, dtype=torch.float64)
    z[0, 4] += gap
    stats = ops.token_stats(z, torch.tensor([4]))
    # closed form with q = e^-gap: 1 - p = (V-1) q / (1 + (V-1) q)
    q = torch.tensor(-gap, dtype=torch.float64).exp()
    rest = (V - 1) * q / (1 + (V - 1) * q)
    other = q / (1 + (V - 1) * q)
    entropy = torch.log1p((V - 1) * q) + gap * rest
    # adding gap to the offset rounds the gap itself by eps · offset
    slack = 20 * EPS * (1 + abs(offset))
    assert float(stats.entropy / entropy - 1) == pytest.approx(0, abs=slack)
    assert float(stats.g_norm / (rest.square() + (V - 1) * other.square()).sqrt() - 1) == pytest.approx(0, abs=slack)


def test_minus_infinity_nan_ties_and_empty_batches():
    z, y = rows()
    z[0, 3] = -torch.inf
    z[1, 2] = torch.nan
    z[2] = 0.0
    stats = ops.token_stats(z, y)
    kept = torch.cat([z[0, :3], z[0, 4:]])
    assert torch.allclose(stats.entropy[0], torch.distributions.Categorical(logits=kept).entropy())
    assert bool(stats.entropy[1].isnan()) and int(stats.argmax[1]) == -1 and bool(stats.entropy[2:].isfinite().all())
    assert int(stats.argmax[2]) == 0 and int(stats.rank[2]) == int(y[2])  # of equal logits the lower id comes first
    assert all(len(column) == 0 for column in ops.token_stats(z[:0], y[:0]))


def test_ranks_are_a_permutation_also_with_ties():
    z = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]]).expand(5, 5)
    assert sorted(ops.token_stats(z, torch.arange(5)).rank.tolist()) == [0, 1, 2, 3, 4]


def test_topk_agrees_with_rank():
    z, _ = rows()
    z[0, 5] = z[0, 7] = z[0].max()
    values, ids = ops.topk_log_probs(z, 4)
    for k in range(4):
        stats = ops.token_stats(z, ids[:, k])
        assert torch.equal(stats.rank, torch.full((6,), k))
        assert torch.allclose(stats.log_prob, values[:, k], rtol=1e-13)


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0])
def test_force_on_a_confident_token_keeps_its_digits(gap):
    """Γ_y = c (1 - pi_y), of size e^-gap, is right relative to that, and the row still sums to zero."""
    from tokdyn.kernels.readout_forces.reference import logit_force

    V, c = 9, torch.tensor([-0.3], dtype=torch.float64)
    z = torch.zeros(1, V, dtype=torch.float64)
    z[0, 4] = gap
    q = torch.tensor(-gap, dtype=torch.float64).exp()
    force = logit_force(z, torch.tensor([4]), c)
    assert float(force[0, 4] / (c * (V - 1) * q / (1 + (V - 1) * q)) - 1) == pytest.approx(0, abs=20 * EPS)
    assert abs(float(force.sum())) <= 20 * EPS * float(force.abs().sum())


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_linear_forms_are_the_logit_forms_of_the_readout(softcap):
    g = torch.Generator().manual_seed(0)
    h, W, b = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((300, 8), (23, 8), (23,)))
    y = torch.randint(0, 23, (300,), generator=g)
    z = 0.5 * (h @ W.T + b)
    z = z if softcap is None else softcap * (z / softcap).tanh()
    options = dict(bias=b, scale=0.5, softcap=softcap)
    for a, c in zip(ops.linear_token_stats(h, W, y, temperature=0.7, **options), ops.token_stats(z / 0.7, y), strict=True):
        assert torch.allclose(a.double(), c.double(), rtol=1e-12)
    for a, c in zip(ops.linear_topk_log_probs(h, W, 3, **options), ops.topk_log_probs(z, 3), strict=True):
        assert torch.allclose(a.double(), c.double(), rtol=1e-12)


def test_jacobians_applied_are_the_jacobians():
    z, _ = rows()
    x = torch.randn(6, 23, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for op, f in ((ops.apply_A, torch.log_softmax), (ops.softmax_jvp, torch.softmax)):
        for column in range(3):
            _, truth = torch.func.jvp(lambda t, f=f: f(t, 1), (z,), (x[:, :, column].contiguous(),))
            assert torch.allclose(op(z, x)[:, :, column], truth, atol=1e-14)
            assert torch.allclose(op(z, x[:, :, column]), truth, atol=1e-14)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("train_bias", [False, True])
def test_readout_forces_are_inner_products_of_readout_gradients(softcap, train_bias):
    """Against autograd: <∇_{W,b} log pi(y_m), -∇_{W,b} L_l> with every kind of term in the loss."""
    g = torch.Generator().manual_seed(0)
    M, L, V, d = 5, 4, 11, 6
    h_o, h_u, W, b = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((M, d), (L, d), (V, d), (V,)))
    y = torch.randint(0, V, (M,), generator=g)
    targets = torch.randint(0, V, (L, 2), generator=g)
    c, v, u = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((L, 2), (L,), (L,)))
    W.requires_grad_(), b.requires_grad_()

    def log_pi(h):
        z = 0.7 * (h @ W.T + b)
        return (z if softcap is None else softcap * (z / softcap).tanh()).log_softmax(1)

    def gradients(values):
        wanted = [W, b] if train_bias else [W]
        return torch.stack(
            [torch.cat([x.flatten() for x in torch.autograd.grad(v, wanted, retain_graph=True)]) for v in values]
        )

    lp = log_pi(h_u)
    loss = -(c * lp.gather(1, targets)).sum(1) - v * (lp.exp() * lp).sum(1) - u * lp.mean(1)
    truth = gradients(log_pi(h_o).gather(1, y[:, None]).squeeze(1)) @ gradients(-loss).T
    term = GTerm(targets, c, v, u)
    options = dict(bias=b.detach(), scale=0.7, softcap=softcap, v=term.v, uniform=term.uniform, train_bias=train_bias)
    args = (h_o, y, h_u, term.targets, term.c, W.detach())
    assert torch.allclose(ops.readout_forces(*args, **options), truth, atol=1e-13 * float(truth.abs().max()) * V)
    for reduce, axis in (("update", 1), ("observe", 0)):
        assert torch.allclose(ops.readout_forces(*args, **options, reduce=reduce), truth.sum(axis), atol=1e-12)


def test_dual_gram_is_the_inner_product_of_outer_products():
    g = torch.Generator().manual_seed(0)
    a1, a2, d1, d2 = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((5, 3), (4, 3), (5, 6), (4, 6)))
    outer = [torch.einsum("tp,tq->tpq", a, d).flatten(1) for a, d in ((a1, d1), (a2, d2))]
    truth = outer[0] @ outer[1].T
    assert torch.allclose(ops.dual_gram(a1, a2, d1, d2), truth, rtol=1e-13)
    out = torch.ones(5, 4, dtype=torch.float64)
    assert torch.allclose(ops.dual_gram(a1, a2, d1, d2, out=out), truth + 1, rtol=1e-13)
    rows, columns = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1, 0, 1, 1])
    segments = torch.nn.functional.one_hot(rows).double().T @ truth @ torch.nn.functional.one_hot(columns).double()
    assert torch.allclose(ops.dual_gram(a1, a2, d1, d2, segments=(rows, columns)), segments, rtol=1e-12)


def test_mistakes_are_named():
    z, y = rows()
    with pytest.raises(ValueError, match=r"\[0, V\)=\[0, 23\)"):
        ops.token_stats(z, y + 23)
    with pytest.raises(ValueError, match="k must lie"):
        ops.topk_log_probs(z, 24)
    with pytest.raises(ValueError, match="impl='cpp' is not built"):
        ops.apply_A(z, z, impl="cpp")
    with pytest.raises(ValueError, match="reduce must be"):
        ops.readout_forces(z, y, z, y, torch.ones(6, dtype=torch.float64), z, reduce="rows")
