"""Squeezing: the toy numbers of the notebook, the lemma, and the sign rule (docs/theory.md, Squeezing)."""

import pytest
import torch

from tokdyn import squeeze
from tokdyn.studies.squeezing import toy_cases

# probabilities before and after each step of the toy experiment (arXiv 2407.10490, its notebook), beside its results in float64
TOY = toy_cases()


@pytest.mark.parametrize("name", TOY)
def test_toy_numbers_of_the_notebook(name):
    p, q, expected = TOY[name]
    assert int(p.argmax()) == expected["argmax_before"]
    assert (int((q > p).sum()), int((q < p).sum())) == (expected["up"], expected["down"])
    for value, truth in ((p, expected["entropy_before"]), (q, expected["entropy_after"])):
        assert float(-(value * value.log()).sum()) == pytest.approx(truth, rel=1e-6)
    for token, (before, later) in expected["prob"].items():
        assert float(p[int(token)]) == pytest.approx(before, rel=1e-6)
        assert float(q[int(token)]) == pytest.approx(later, rel=1e-6)


def random_rows(T=200, V=30):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(T, V, dtype=torch.float64, generator=g) * torch.linspace(0.1, 5, T, dtype=torch.float64)[:, None]
    return z, torch.randint(0, V, (T,), generator=g)


def test_ratio_of_probabilities_is_the_lemmas():
    z, y = random_rows()
    eta = 0.7
    p = z.softmax(-1)
    delta = eta * (p - torch.nn.functional.one_hot(y, 30))
    beta = (delta[:, None, :] - delta[:, :, None]).exp()  # beta_j = exp(delta_j - delta_i) for every i
    lemma = z.exp().sum(1)[:, None] / (beta * z.exp()[:, None, :]).sum(2)
    q = squeeze.step(z, y, -torch.ones(200, dtype=torch.float64), eta).softmax(-1)
    assert torch.allclose(q / p, lemma, rtol=1e-12)


def test_negative_step_lowers_its_target_and_lifts_another_argmax():
    z, y = random_rows()
    stats = squeeze.diagnose(z, y, -torch.ones(200, dtype=torch.float64), 0.5)
    assert bool((stats.target_after < stats.target_before).all())
    other = z.argmax(1) != y
    assert bool((stats.argmax_gain[other] > 0).all())


def test_sign_rule_is_the_first_order_of_the_step():
    z, y = random_rows()
    for c in (-1.0, 0.5):
        weight = torch.full((200,), c, dtype=torch.float64)
        h = 1e-6
        change = (squeeze.step(z, y, weight, h).log_softmax(-1) - squeeze.step(z, y, weight, -h).log_softmax(-1)) / (2 * h)
        assert torch.allclose(squeeze.sign_rule(z.softmax(-1), y, weight), change, atol=1e-8)  # h² and eps/h
    p = z.softmax(-1)
    rule = squeeze.sign_rule(p, y, -torch.ones(200, dtype=torch.float64)) < 0
    other = torch.nn.functional.one_hot(y, 30) == 0
    said = p < p.square().sum(1, keepdim=True) - p.gather(1, y[:, None])
    assert torch.equal(rule & other, said & other)


def test_at_fixed_p_a_less_likely_target_makes_every_other_token_fall_more():
    z = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    order = z.argsort()
    likely, unlikely = order[20], order[0]
    minus = torch.tensor(-1.0, dtype=torch.float64)
    a, b = (squeeze.step(z, y, minus, 0.1).log_softmax(-1) for y in (likely, unlikely))
    others = [i for i in range(30) if i not in (int(likely), int(unlikely))]
    assert bool((b[others] < a[others]).all())


def test_shared_prefix_of_a_pair_cannot_squeeze():
    """With shared features a pair leaves Γ = c (e₊ - e₋): zero where the tokens agree, two logits where they differ."""
    z, y = random_rows(1)
    weights = torch.tensor([[0.3, -0.3]], dtype=torch.float64)
    same = squeeze.step(z, torch.stack([y, y], 1), weights, 1.0)
    assert torch.allclose(same, z, atol=1e-15)
    other = (y + 1) % 30
    moved = squeeze.step(z, torch.stack([y, other], 1), weights, 1.0) - z
    assert sorted(moved.abs().gt(1e-12).nonzero()[:, 1].tolist()) == sorted([int(y), int(other)])


def test_dtype_is_kept_and_shapes_are_checked():
    z = torch.randn(3, 7, dtype=torch.bfloat16)
    assert squeeze.step(z, torch.tensor([0, 1, 2]), -torch.ones(3), 0.1).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="targets and c must both have shape"):
        squeeze.step(z, torch.tensor([0, 1]), torch.ones(2), 0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_diagnosis_is_what_its_definition_says(dtype):
    """Every number from both distributions as they are, in float64; shares but for tokens within rounding of the border."""
    z, y = random_rows()
    c = torch.linspace(-1, 1, 200, dtype=torch.float64).round(decimals=2)
    c[17], z[3, 5] = 0, -torch.inf
    moved = squeeze.step(z, y, c, 0.5)
    before, after = z.log_softmax(1), moved.log_softmax(1)
    p, q = before.exp(), after.exp()
    others = torch.ones_like(p, dtype=torch.bool).scatter(1, y[:, None], False)
    top = z.argmax(1, keepdim=True)
    found = squeeze.diagnose(z.to(dtype), y, c.to(dtype), 0.5)
    eps = torch.finfo(dtype).eps
    largest = z.clamp(min=0).amax(1) + 1  # a logit's own rounding is the error of its log-probability
    for ours, truth in (
        (found.target_before, p.gather(1, y[:, None])[:, 0]),
        (found.target_after, q.gather(1, y[:, None])[:, 0]),
        (found.argmax_before, p.gather(1, top)[:, 0]),
        (found.argmax_after, q.gather(1, top)[:, 0]),
        (found.argmax_gain, (q - p).gather(1, top)[:, 0]),
    ):
        assert bool(((ours - truth).abs() <= 8 * eps * largest).all())
    band = 32 * eps * largest[:, None]
    rule = squeeze.sign_rule(p, y, c)
    for ours, margin in ((found.falling, after - before), (found.predicted_falling, rule)):
        margin = torch.where(margin.isnan(), 1.0, margin)  # -inf stays -inf
        low, high = ((others & (margin < sign * band)).sum(1) / 29 * (c != 0) for sign in (-1, 1))
        assert bool(((low - 1e-6 <= ours) & (ours <= high + 1e-6)).all())
