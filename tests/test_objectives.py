"""Objectives against the closed forms of docs/theory.md, Objectives, and against autograd through dense logits, in float64."""

from types import SimpleNamespace

import pytest
import torch
from losses import U, V, close, each, problem, read
from torch import sigmoid

from tokdyn import Chi, dynamics
from tokdyn import objectives as td
from tokdyn.objective import GTerm
from tokdyn.objectives import Scores
from tokdyn.objectives.parts import log1mexp

ALL = [
    td.SFT(), td.SFT(label_smoothing=0.1), td.DPO(beta=0.3), td.CDPO(beta=0.3, epsilon=0.2), td.IPO(beta=0.4),
    td.IPO(beta=0.4, by_length=True), td.SLiC(),
    td.SPPO(eta=0.7), td.SPIN(beta=0.2), td.SimPO(beta=1.5, gamma=0.4), td.ORPO(lam=0.6),
    td.KTO(beta=0.4, z0=0.3, desirable=1.5, undesirable=0.5), td.DPOP(beta=0.3, lam=2.0), td.REINFORCE(), td.PPO(),
    td.PPO(entropy=0.05), td.PPO(dual_clip=1.3), td.GRPO(), td.GRPO(dual_clip=1.3),
    td.GRPO(beta=0.3), td.DrGRPO(max_tokens=9, beta=0.3), td.DAPO(beta=0.3),
    td.GSPO(clip=0.05, clip_high=0.08, beta=0.1), td.SimKO(quantile=0.5, alpha=0.3, beta=0.1), td.LLDS(),
    td.EXO(beta=0.3, epsilon=0.01), td.NCA(beta=0.3), td.RobustDPO(beta=0.3, epsilon=0.2), td.BCO(beta=0.3, delta=0.2),
    td.AOT(beta=0.3, epsilon=0.1), td.APOZero(beta=0.3), td.APODown(beta=0.3), td.DiscoPOP(beta=0.3, tau=0.5),
    td.DPONorm(beta=1.3), td.BNPO(beta=0.3), td.CISPO(clip_high=1.1, beta=0.3), td.SAPO(tau_neg=1.5, beta=0.3),
    td.LUSPO(clip=0.05, clip_high=0.08), td.VESPO(beta=0.3), td.GMPO(clip=0.1, beta=0.3), td.ClipCov(low=0.1, fraction=0.2),
    td.KLCov(fraction=0.2, kl=0.5),
]  # fmt: skip
everyone = pytest.mark.parametrize("objective", ALL, ids=repr)


# ---------------------------------------------------------------- theorems of every objective


def test_every_objective_of_the_library_is_in_the_list():
    assert {type(objective).__name__ for objective in ALL} == set(td.__all__)


@everyone
def test_G_rebuilt_from_the_gterm_is_the_gradient_of_the_loss_at_the_logits(objective):
    chis, z = problem(objective.reads)
    z.requires_grad_()
    log_probs, scores = read(z, chis)
    (truth,) = torch.autograd.grad(objective.loss(log_probs, chis, scores), z)
    gterm = objective.g_terms(log_probs, chis, scores)
    G = dynamics.G(z.detach(), gterm)
    rounding = 100 * V * U * float(gterm.c.abs().max())
    assert truth.abs().max() > 1e-3
    assert (G - truth).abs().max() <= rounding
    assert G.sum(1).abs().max() <= rounding  # 1ᵀG = 0: a softmax loss does not see a common shift of the logits


HELD = (td.CISPO, td.VESPO)  # their weight of log pi is held constant, and moves the value: closed forms and TRL below


@pytest.mark.parametrize("objective", [o for o in ALL if not isinstance(o, HELD)], ids=repr)
def test_c_is_the_finite_difference_of_the_loss(objective):
    chis, z = problem(objective.reads)
    log_probs, scores = read(z, chis)
    step = U ** (1 / 3)
    slopes = []
    for e in torch.eye(len(z), dtype=z.dtype):
        up, down = (objective.loss(log_probs + s * step * e, chis, scores) for s in (1, -1))
        slopes.append((up - down) / (2 * step))
    # SimKO's candidates enter as sg(γ/γₙ)γₙ: the value moves with γ alone, and their c is a part of its slope
    c = objective.g_terms(log_probs, chis, scores).c.reshape(len(z), -1).sum(1)
    size = 1 + float(objective.loss(log_probs, chis, scores).abs()) + float(c.abs().max())
    assert (c + torch.stack(slopes)).abs().max() <= 100 * U ** (2 / 3) * size  # truncation step² and rounding U/step alike


@everyone
def test_absent_reference_and_old_log_probs_are_the_policy_itself(objective):
    chis, z = problem(objective.reads)
    log_probs, scores = read(z, chis)
    absent = [chi.with_(reference_log_probs=None, old_log_probs=None) for chi in chis]
    given = [chi.with_(reference_log_probs=lp, old_log_probs=lp) for chi, lp in zip(chis, each(log_probs, chis), strict=True)]
    assert torch.equal(objective.g_terms(log_probs, absent, scores).c, objective.g_terms(log_probs, given, scores).c)


@everyone
def test_float32_log_probs_are_read_in_float64_and_c_is_rounded_once(objective):
    chis, z = problem(objective.reads)
    log_probs, scores = read(z, chis)
    c = objective.g_terms(log_probs.float(), chis, scores).c
    assert c.dtype == torch.float32
    assert torch.equal(c, objective.g_terms(log_probs.float().double(), chis, scores).c.float())


@everyone
def test_name_and_constants_rebuild_the_objective(objective):
    described = objective.describe()
    assert td.by_name(described["name"].upper(), **described["arguments"]) == objective


# ---------------------------------------------------------------- closed forms: supervised and preferences


def test_sft_pulls_every_token_with_one():
    chis, z = problem("completion")
    assert close(td.SFT().g_terms(read(z, chis)[0], chis).c, torch.ones(len(z)))


def test_label_smoothing_is_the_target_of_one_minus_eps_on_y_and_eps_on_all():
    chis, z = problem("completion")
    log_probs, scores = read(z, chis)
    y = torch.cat([chi.ids[chi.scored] for chi in chis])
    target = 0.9 * torch.eye(V, dtype=z.dtype)[y] + 0.1 / V
    assert close(dynamics.G(z, td.SFT(label_smoothing=0.1).g_terms(log_probs, chis, scores)), z.softmax(1) - target)


def odds_slope(mean):
    return 1 / (1 - mean.exp())


def orpo(o, p):
    pull = o.lam * (1 - sigmoid(torch.logit(p.mean_plus.exp()) - torch.logit(p.mean_minus.exp())))
    return (1 + pull * odds_slope(p.mean_plus)) / p.n_plus, -pull * odds_slope(p.mean_minus) / p.n_minus


def simpo(o, p):
    pull = o.beta * (1 - sigmoid(o.beta * (p.mean_plus - p.mean_minus) - o.gamma))
    return pull / p.n_plus, -pull / p.n_minus


def both(c):
    return c, -c


def dpop(o, p):
    pull = o.beta * (1 - sigmoid(o.beta * (p.h - o.lam * max(0, -p.r_plus))))
    return pull * (1 + o.lam * (p.r_plus < 0)), -pull


def kto(o, p):
    k_plus, k_minus = sigmoid(o.beta * p.r_plus - o.z0), sigmoid(o.z0 - o.beta * p.r_minus)
    return o.desirable * o.beta * k_plus * (1 - k_plus), -o.undesirable * o.beta * k_minus * (1 - k_minus)


def cdpo(o, p):
    a = sigmoid(o.beta * p.h)
    return both(o.beta * ((1 - o.epsilon) * (1 - a) - o.epsilon * a))


def ipo(o, p):
    if not o.by_length:
        return both(2 * (1 / (2 * o.beta) - p.h))
    pull = 2 * (1 / (2 * o.beta) - (p.r_plus / p.n_plus - p.r_minus / p.n_minus))
    return pull / p.n_plus, -pull / p.n_minus


def exo(o, p):
    """x σ'(x) + the derivative of the entropy part: d/dx [σ(x)(log σ(x) - a) + σ(-x)(log σ(-x) - b)] = σ'(x)(x - a + b)."""
    x, odds = o.beta * p.h, torch.tensor(o.epsilon / (1 - o.epsilon), dtype=torch.float64).log()
    return both(-o.beta * slope(x) * (x + odds))


def slope(x):
    return sigmoid(x) * (1 - sigmoid(x))


def robust(o, p):
    a = sigmoid(o.beta * p.h)
    return both(o.beta * ((1 - o.epsilon) * (1 - a) + o.epsilon * a) / (1 - 2 * o.epsilon))


def discopop(o, p):
    x = o.beta * p.h
    s, ds = sigmoid(x / o.tau), slope(x / o.tau) / o.tau
    return both(o.beta * ((1 - s) * (1 - sigmoid(x)) - ds * sigmoid(x).log() - ds * (-x).exp() + s * (-x).exp()))


def dpo_norm(o, p):
    pull = o.beta * (1 - sigmoid(o.beta * (p.r_plus / p.n_plus - p.r_minus / p.n_minus)))
    return pull / p.n_plus, -pull / p.n_minus


def nca(o, p):
    plus, minus = o.beta * p.r_plus, o.beta * p.r_minus
    return o.beta * (1 - sigmoid(plus) - 0.5 * sigmoid(plus)), -o.beta * 0.5 * sigmoid(minus)


def apo_down(o, p):
    pull = o.beta * slope(o.beta * p.h)
    return pull - o.beta * slope(o.beta * p.r_plus), -pull


PAIR_FORMS = {
    "EXO": exo,
    "NCA": nca,
    "RobustDPO": robust,
    "BCO": lambda o, p: (o.beta * (1 - sigmoid(o.beta * p.r_plus - o.delta)), -o.beta * sigmoid(o.beta * p.r_minus - o.delta)),
    "APOZero": lambda o, p: (o.beta * slope(o.beta * p.r_plus), -o.beta * slope(o.beta * p.r_minus)),
    "APODown": apo_down,
    "DiscoPOP": discopop,
    "DPONorm": dpo_norm,
    "DPO": lambda o, p: both(o.beta * (1 - sigmoid(o.beta * p.h))),
    "SPIN": lambda o, p: both(o.beta * (1 - sigmoid(o.beta * p.h))),
    "CDPO": cdpo,
    "IPO": ipo,
    "SPPO": lambda o, p: (2 * (o.eta / 2 - p.r_plus), -2 * (p.r_minus + o.eta / 2)),
    "SLiC": lambda o, p: both(1.0 * (p.gap < o.delta)),
    "SimPO": simpo,
    "ORPO": orpo,
    "KTO": kto,
    "DPOP": dpop,
}


def pairs(chis, log_probs):
    """Facts of each pair (means, log-ratios) and where its two responses lie in the list."""
    lps = each(log_probs, chis)
    for group in {chi.group for chi in chis}:
        at = {chi.role: i for i, chi in enumerate(chis) if chi.group == group}
        plus, minus = at["chosen"], at["rejected"]
        r_plus, r_minus = ((lps[i] - chis[i].reference_log_probs).sum() for i in (plus, minus))
        yield plus, minus, SimpleNamespace(
            r_plus=r_plus, r_minus=r_minus, h=r_plus - r_minus, gap=lps[plus].sum() - lps[minus].sum(),
            mean_plus=lps[plus].mean(), mean_minus=lps[minus].mean(), n_plus=len(lps[plus]), n_minus=len(lps[minus]),
        )  # fmt: skip


@pytest.mark.parametrize("objective", [o for o in ALL if o.reads == "preference" and type(o) is not td.AOT], ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_preference_c_has_its_closed_form(objective, seed):
    chis, z = problem("preference", seed)
    log_probs, _ = read(z, chis)
    c = each(objective.g_terms(log_probs, chis).c, chis)
    for plus, minus, facts in pairs(chis, log_probs):
        c_plus, c_minus = PAIR_FORMS[type(objective).__name__](objective, facts)
        assert close(c[plus], c_plus.expand(facts.n_plus))
        assert close(c[minus], c_minus.expand(facts.n_minus))


def test_aot_compares_the_batch_and_not_the_pair():
    """The i-th smallest margin with the i-th smallest of the reference: a pair's c is that of its margin's rank."""
    chis, z = problem("preference", 2)
    chis = [chi.with_(reference_log_probs=-chi.reference_log_probs) for chi in chis]  # which turns the order around
    log_probs, _ = read(z, chis)
    found = list(pairs(chis, log_probs))
    margins = torch.stack([facts.gap for *_, facts in found])
    theirs = torch.stack([facts.gap - facts.h for *_, facts in found])
    x = 0.3 * (margins.sort().values - theirs.sort().values)
    pull = 0.3 * (0.9 * (1 - sigmoid(x)) - 0.1 * sigmoid(x))[margins.argsort().argsort()]
    assert not torch.equal(margins.argsort(), theirs.argsort())  # or it would be a DPO
    c = each(td.AOT(beta=0.3, epsilon=0.1).g_terms(log_probs, chis).c, chis)
    for (plus, minus, _), own in zip(found, pull, strict=True):
        assert close(c[plus], own.expand(len(c[plus]))) and close(c[minus], -own.expand(len(c[minus])))


def test_slic_acts_on_one_side_of_its_hinge_only_and_always_on_the_reference_response():
    chis, z = problem("preference")
    log_probs, _ = read(z, chis)
    gaps = sorted(float(facts.gap) for *_, facts in pairs(chis, log_probs))
    between = td.SLiC(delta=(gaps[1] + gaps[2]) / 2, lam=0.25)
    kept = chis[0].with_(role="reference", group=99)
    c = each(between.g_terms(torch.cat([log_probs, log_probs[: len(kept)]]), [*chis, kept]).c, [*chis, kept])
    for plus, minus, facts in pairs(chis, log_probs):
        active = float(float(facts.gap) < between.delta)
        assert (c[plus] == active).all() and (c[minus] == -active).all()
    assert sum(bool(part.any()) for part in c[:-1]) == 4  # two pairs inside the hinge, one outside
    assert close(c[-1], torch.full((len(kept),), 0.25))


@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.1])
def test_dpop_pays_for_a_lowered_chosen_answer_only(shift):
    chis, z = problem("preference")
    log_probs, _ = read(z, chis)
    raised = [chi.with_(reference_log_probs=lp - shift) for chi, lp in zip(chis, each(log_probs, chis), strict=True)]
    c = each(td.DPOP(lam=2.0).g_terms(log_probs, raised).c, chis)
    for plus, minus, _ in pairs(raised, log_probs):
        assert close(c[plus][0] / -c[minus][0], 3.0 if shift < 0 else 1.0)


# ---------------------------------------------------------------- closed forms: policy gradients


def clipped(A, ratio, low, high, dual=None):
    """Tokens whose surrogate is flat: moved further than the clip the way A wants, or beyond the dual clip against it."""
    flat = ((A > 0) & (ratio > 1 + high)) | ((A < 0) & (ratio < 1 - low))
    return flat if dual is None else flat | ((A < 0) & (ratio > dual))


def rollouts(chis, log_probs):
    for chi, lp in zip(chis, each(log_probs, chis), strict=True):
        group = [other for other in chis if other.group == chi.group]
        yield SimpleNamespace(
            A=torch.tensor(chi.advantage, dtype=lp.dtype), n=len(chi), G=len(group), tokens=sum(map(len, chis)),
            ratio=(lp - chi.old_log_probs).exp(), rho=chi.reference_log_probs - lp,
        )  # fmt: skip


def surrogate(o, t, ratio, high=None):
    return t.A * ratio * ~clipped(t.A, ratio, o.clip, o.clip if high is None else high, o.dual_clip)


def kl(o, t):
    return o.beta * (1 - t.rho.exp())


def sapo(o, t):
    tau = torch.where(t.A > 0, o.tau_pos, o.tau_neg)
    return 4 * slope(tau * (t.ratio - 1)) * t.ratio * t.A


def vespo(o, t):
    """w^k e^{λ(1 - w)} A."""
    k, lam = (o.k_pos, o.lam_pos) if t.A >= 0 else (o.k_neg, o.lam_neg)
    w = t.ratio.prod()
    return w**k * (lam * (1 - w)).exp() * t.A.expand(t.n)


def gmpo(o, t):
    """The mean's own value on the tokens that are not clipped."""
    held = torch.where(t.A > 0, t.ratio.log().clamp(max=o.clip), t.ratio.log().clamp(min=-o.clip))
    return held.mean().exp() * t.A * (held == t.ratio.log())


POLICY_FORMS = {
    "BNPO": lambda o, t: (surrogate(o, t, t.ratio) - kl(o, t)) / t.tokens,
    "CISPO": lambda o, t: (t.ratio.clamp(max=o.clip_high) * t.A - kl(o, t)) / t.tokens,
    "SAPO": lambda o, t: (sapo(o, t) - kl(o, t)) / (t.G * t.n),
    "LUSPO": lambda o, t: (surrogate(o, t, t.ratio.log().mean().exp(), o.clip_high) / t.G).expand(t.n),
    "VESPO": lambda o, t: (vespo(o, t) - kl(o, t)) / t.tokens,
    "GMPO": lambda o, t: (gmpo(o, t) - kl(o, t)) / (t.G * t.n),
    "REINFORCE": lambda o, t: t.A.expand(t.n),
    "PPO": lambda o, t: surrogate(o, t, t.ratio),
    "GRPO": lambda o, t: (surrogate(o, t, t.ratio) - kl(o, t)) / (t.G * t.n),
    "DrGRPO": lambda o, t: (surrogate(o, t, t.ratio) - kl(o, t)) / (t.G * o.max_tokens),
    "DAPO": lambda o, t: (surrogate(o, t, t.ratio, o.clip_high) - kl(o, t)) / t.tokens,
    "GSPO": lambda o, t: (surrogate(o, t, t.ratio.log().mean().exp(), o.clip_high) - kl(o, t)) / (t.G * t.n),
}


@pytest.mark.parametrize("objective", [o for o in ALL if type(o).__name__ in POLICY_FORMS], ids=repr)
def test_policy_gradient_c_has_its_closed_form(objective):
    flat = 0
    for seed in range(3):
        chis, z = problem("rollouts", seed)
        log_probs, scores = read(z, chis)
        c = objective.g_terms(log_probs, chis, scores).c
        facts = list(rollouts(chis, log_probs))
        assert close(c, torch.cat([POLICY_FORMS[type(objective).__name__](objective, t) for t in facts]))
        flat += sum(int(clipped(t.A, t.ratio, 0.2, 0.2).sum()) for t in facts)
    assert 0 < flat < 3 * len(z)  # both sides of the clip were met


def test_tokens_of_the_largest_covariance_lose_their_gradient_or_are_held():
    """Clip-Cov: 0 at the first tokens between its bounds; KL-Cov: γA - k sign(log γ) at the largest, γA elsewhere; over L."""
    met = 0
    for seed in range(3):
        chis, z = problem("rollouts", seed)
        log_probs, _ = read(z, chis)
        A = torch.cat([torch.full((len(chi),), chi.advantage, dtype=z.dtype) for chi in chis])
        ratio = torch.cat([t.ratio for t in rollouts(chis, log_probs)])
        covariance, L = (A - A.mean()) * (log_probs - log_probs.mean()), len(A)
        clip, kl_cov = td.ClipCov(low=0.1, fraction=0.2), td.KLCov(fraction=0.2, kl=0.5)
        flat = clipped(A, ratio, 0.2, 0.2)
        between = (covariance > 0.1) & (covariance < 5) & ~flat
        drawn = between & (between.cumsum(0) <= int(0.2 * L))
        assert close(clip.g_terms(log_probs, chis).c, ratio * A * ~(flat | drawn) / L)
        largest = covariance >= covariance.sort(descending=True).values[int(0.2 * L) - 1]
        assert close(kl_cov.g_terms(log_probs, chis).c, (ratio * A - 0.5 * largest * ratio.log().sign()) / L)
        met += int(drawn.sum())
    assert met > 3


def one_token(ratio, advantage):
    """One response of one token with pi/pi_old = ratio, and its log-prob."""
    lp = torch.tensor([-1.5], dtype=torch.float64)
    old = lp - torch.tensor([ratio], dtype=torch.float64).log()
    return lp, [Chi(torch.tensor([0, 1]), torch.tensor([False, True]), advantage=float(advantage), old_log_probs=old)]


@pytest.mark.parametrize(
    "objective, ratio, advantage, moves",
    [(td.GRPO(), 1.19, 1, 1), (td.GRPO(), 1.21, 1, 0), (td.GRPO(), 1.21, -1, 1), (td.GRPO(), 0.79, -1, 0),
     (td.GRPO(), 0.79, 1, 1), (td.DAPO(), 1.27, 1, 1), (td.DAPO(), 1.29, 1, 0), (td.DAPO(), 0.79, -1, 0),
     (td.DAPO(), 0.81, -1, 1)],
)  # fmt: skip
def test_the_clip_stops_only_what_has_already_moved_as_wanted(objective, ratio, advantage, moves):
    lp, chis = one_token(ratio, advantage)
    assert close(objective.g_terms(lp, chis).c, [moves * advantage * ratio])


@pytest.mark.parametrize("kind", [td.PPO, td.GRPO])
@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"), [(2.9, -2, 1), (3.1, -2, 0), (3.1, 2, 0), (1.1, 2, 1), (0.9, -2, 1), (0.7, -2, 0)]
)
def test_the_dual_clip_also_stops_a_wrong_token_that_has_risen_far(kind, ratio, advantage, moves):
    """c = Aγ but 0 where A < 0 and γ > 3 (verl's clip_ratio_c), where without it a push of 3.1 A would remain."""
    lp, chis = one_token(ratio, advantage)
    assert close(kind(dual_clip=3.0).g_terms(lp, chis).c, [moves * advantage * ratio])
    assert close(kind().g_terms(lp, chis).c, [advantage * ratio * (moves or (ratio > 1 and advantage < 0))])


def test_dapo_is_one_mean_over_the_tokens_of_all_groups():
    """Not one of each group, which would be twice as heavy for two groups of one size, and weigh groups apart."""
    lp, (chi,) = one_token(1.0, 2.0)
    chis = [chi.with_(group=i) for i in range(3)] + [chi.with_(group=9, ids=torch.tensor([0, 1, 1, 1]),
            scored=torch.tensor([False, True, True, True]), old_log_probs=lp.expand(3))]  # fmt: skip
    assert close(td.DAPO().g_terms(lp.expand(6), chis).c, [2 / 6] * 6)


def test_the_kl_term_of_grpo_pulls_towards_the_reference():
    chis, z = problem("rollouts")
    log_probs, _ = read(z, chis)
    idle = [chi.with_(advantage=0.0) for chi in chis]
    c = td.GRPO(beta=0.3).g_terms(log_probs, idle).c
    assert torch.equal(c.sign(), torch.cat([t.rho for t in rollouts(chis, log_probs)]).sign())


def test_an_entropy_bonus_is_v_of_minus_k_and_leaves_c():
    chis, z = problem("rollouts")
    log_probs, scores = read(z, chis)
    gterm, plain = (td.PPO(entropy=k).g_terms(log_probs, chis, scores) for k in (0.05, 0.0))
    assert close(gterm.v, torch.full((len(z),), -0.05)) and plain.v is None
    assert torch.equal(gterm.c, plain.c)


def forking(objective, chis, scores):
    """Which tokens lie above the entropy quantile of their own response."""
    return torch.cat([h > h.quantile(objective.quantile) for h in each(scores.entropy, chis)])


def test_simko_shares_a_positive_gradient_with_the_candidates_without_changing_the_value():
    chis, z = problem("rollouts")
    chis = [chi.with_(advantage=abs(chi.advantage)) for chi in chis]
    log_probs, scores = read(z, chis)
    objective, plain = td.SimKO(quantile=0.5, alpha=0.3), td.GRPO()
    assert abs(objective.loss(log_probs, chis, scores) - plain.loss(log_probs, chis)) <= 100 * U
    gamma = plain.g_terms(log_probs, chis).c[:, None]  # A sg(γ)/(G|y|), 0 where clipped
    e, eye = torch.eye(V, dtype=z.dtype)[torch.cat([chi.ids[chi.scored] for chi in chis])], torch.eye(V, dtype=z.dtype)
    shared = 0.7 * e + 0.3 / 3 * eye[scores.candidates].sum(1)
    gate = forking(objective, chis, scores)[:, None]
    assert 0 < gate.sum() < len(z)
    G = dynamics.G(z, objective.g_terms(log_probs, chis, scores))
    assert close(G, -gamma * (torch.where(gate, shared, e) - z.softmax(1)))


def test_simko_presses_harder_on_a_wrong_token_of_rank_one():
    chis, z = problem("rollouts")
    chis = [chi.with_(advantage=-abs(chi.advantage), old_log_probs=None) for chi in chis]
    log_probs, scores = read(z, chis)
    objective = td.SimKO(quantile=0.5, lam=1.15)
    first = z.argmax(1) == torch.cat([chi.ids[chi.scored] for chi in chis])
    gate = forking(objective, chis, scores)
    assert (first & gate).any() and (first & ~gate).any() and (~first & gate).any()
    factor = torch.where(first & gate, 1.15, 1.0)
    assert close(objective.g_terms(log_probs, chis, scores).c, factor * td.GRPO().g_terms(log_probs, chis).c)


@pytest.mark.parametrize("ratio", [0.72, 0.735, 0.79, 0.81, 1.0, 1.5])
def test_simko_scales_the_advantage_and_clips_the_plain_ratio(ratio):
    """c = λAγ/(G|y|) for γ >= 1 - ε. Were λγ clipped, tokens of γ in [.727, .8) would still be pushed."""
    lp, (chi,) = one_token(ratio, -1.0)
    chi = chi.with_(
        ids=torch.tensor([0, 1, 1]), scored=torch.tensor([False, True, True]), old_log_probs=chi.old_log_probs.expand(2)
    )
    lp, top = lp.expand(2), torch.tensor([[1, 0, 2]] * 2)
    scores = Scores(torch.tensor([0.1, 0.9]).double(), None, top, torch.tensor([[-1.0, -2.0, -3.0]] * 2).double())
    c = td.SimKO(quantile=0.5, lam=1.1).g_terms(lp, [chi], scores).c
    assert close(c, [-ratio * (ratio >= 0.8) / 2, -1.1 * ratio * (ratio >= 0.8) / 2])  # the second one forks


def test_llds_pulls_lost_tokens_of_right_responses_that_lost_in_sum():
    """GRPO's c + λ/N [π < π_old] where A >= 0 and Σ log π has fallen, N all tokens; wrong answers are not pulled up."""
    met = set()
    for seed in range(6):
        chis, z = problem("rollouts", seed)
        chis[2] = chis[2].with_(advantage=0.0)
        log_probs, _ = read(z, chis)
        extra = td.LLDS(lam=0.4).g_terms(log_probs, chis).c - td.GRPO().g_terms(log_probs, chis).c
        for chi, lp, pull in zip(chis, each(log_probs, chis), each(extra, chis), strict=True):
            drop = chi.old_log_probs - lp
            assert close(pull, 0.4 / len(z) * (drop > 0) * (drop.sum() > 0) * (chi.advantage >= 0))
            met.add((chi.advantage >= 0, bool(drop.sum() > 0), bool((drop > 0).any())))
    assert {(True, True, True), (True, False, True), (False, True, True)} <= met


# ---------------------------------------------------------------- mistakes


def test_an_unknown_name_is_answered_with_the_nearest_ones():
    with pytest.raises(ValueError, match="unknown objective 'grp0': did you mean GRPO"):
        td.by_name("grp0")
    with pytest.raises(ValueError, match="unknown objective 'qqq': known: SFT, DPO"):
        td.by_name("qqq")


def test_the_constants_at_which_a_formula_ends_are_refused_and_those_before_it_are_not():
    """RobustDPO divides by 1 - 2 epsilon, DiscoPOP by tau; EXO's label gives both answers a probability."""
    for epsilon in (0, 1):
        with pytest.raises(ValueError, match="EXO: epsilon must lie between 0 and 1"):
            td.EXO(epsilon=epsilon)
    for epsilon in (0.5, 0.6):
        with pytest.raises(ValueError, match="RobustDPO: epsilon must lie below 1/2"):
            td.RobustDPO(epsilon=epsilon)
    with pytest.raises(ValueError, match="DiscoPOP: tau must be positive"):
        td.DiscoPOP(tau=0)
    assert td.RobustDPO(epsilon=0.49).epsilon == 0.49 and td.DiscoPOP(tau=1e-3).tau == 1e-3


@pytest.mark.parametrize(
    "beta, message",
    [
        (-1.0, r"IPO: beta must lie in \[0, inf\], got -1.0"),
        (float("nan"), "IPO: beta must lie in"),
        (0, "IPO: beta must be positive"),
    ],
)
def test_a_beta_that_turns_ipos_target_around_is_refused(beta, message):
    """At beta < 0 the margin would be pulled to 1/(2 beta) < 0, the rejected answer above the chosen one."""
    with pytest.raises(ValueError, match=message):
        td.IPO(beta=beta)


def test_an_unknown_constant_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="DPO has no constant 'gamma': it has beta"):
        td.by_name("dpo", gamma=1.0)


@pytest.mark.parametrize("role, group", [("rejected", 2), ("chosen", 8)])
def test_a_group_without_its_pair_is_named(role, group):
    chis, z = problem("preference")
    chis[1] = chis[1].with_(role=role, group=group)
    with pytest.raises(ValueError, match=r"group [28] must hold one chosen and one rejected"):
        td.DPO().g_terms(read(z, chis)[0], chis)


def test_kto_needs_chosen_or_rejected():
    chis, z = problem("rollouts")
    with pytest.raises(ValueError, match="KTO needs the role"):
        td.KTO().g_terms(read(z, chis)[0], chis)


@pytest.mark.parametrize("objective", [o for o in ALL if o.reads == "rollouts"], ids=repr)
def test_a_missing_advantage_is_said(objective):
    chis, z = problem("preference")
    log_probs, scores = read(z, chis)
    with pytest.raises(ValueError, match="needs Chi.advantage"):
        objective.g_terms(log_probs, chis, scores)


def test_log_probs_of_the_wrong_length_are_refused():
    chis, z = problem("completion")
    with pytest.raises(ValueError, match=r"log_probs must have shape \[L\]=\(21,\), got \[20\]"):
        td.SFT().g_terms(read(z, chis)[0][1:], chis)


def test_a_sequence_without_scored_tokens_is_refused():
    chis, z = problem("completion")
    empty = chis[0].with_(scored=torch.zeros_like(chis[0].scored), reference_log_probs=None, old_log_probs=None)
    with pytest.raises(ValueError, match="sequence 6 has no scored token"):
        td.SimPO().g_terms(read(z, chis)[0], [*chis, empty])


@pytest.mark.parametrize("objective", [o for o in ALL if o.needs], ids=repr)
def test_a_needed_score_that_is_absent_is_named(objective):
    chis, z = problem(objective.reads)
    with pytest.raises(ValueError, match=f"{type(objective).__name__} needs scores.{objective.needs[0]}"):
        objective.g_terms(read(z, chis)[0], chis)


def test_that_sequences_do_not_meet_is_not_inherited():
    class Mean:
        def loss(self, log_probs, chis, scores=None):
            return super().loss(log_probs, chis) / len(log_probs)

    class Parts(td.SFT):
        by_sequence = True

        def loss(self, log_probs, chis, scores=None):
            return self.part(log_probs)

    kinds = {
        "nothing of its own": type("Named", (td.SFT,), {}),
        "a part of a loss": type("Harder", (Parts,), dict(part=lambda *_: 0)),
        "own loss": type("Own", (td.SFT,), dict(loss=lambda *_: 0)),
        "a mixin's": type("Mixed", (Mean, td.SFT), {}),
        "own weights": type("Weighted", (td.SFT,), dict(g_terms=lambda *_: 0)),
        "said again": type("Again", (td.SFT,), dict(loss=lambda *_: 0, by_sequence=True)),
        "inherited from own loss": type("Further", (type("Own", (td.SFT,), dict(loss=lambda *_: 0)),), {}),
    }
    assert [name for name, kind in kinds.items() if kind.by_sequence] == ["said again"]
    assert Parts.by_sequence and not td.DPO.by_sequence and td.PPO.by_sequence


def test_log1mexp_keeps_its_digits_and_its_gradient():
    """log(1 - e^x) from next to 0 to far below it: a branch that is not taken leaves neither a value nor a gradient."""
    x = torch.tensor([-1e-30, -1e-6, -0.3, -0.69, -0.7, -5.0, -15.0], requires_grad=True)
    value, eps = log1mexp(x), torch.finfo(torch.float32).eps
    (slope,) = torch.autograd.grad(value.sum(), x)
    exact = x.detach().double()  # a few rounded functions of well-conditioned arguments each
    torch.testing.assert_close(value.double(), (-exact.expm1()).log(), rtol=8 * eps, atol=0.0)
    torch.testing.assert_close(slope.double(), -1 / (-exact).expm1(), rtol=8 * eps, atol=0.0)


def test_terms_are_joined_and_what_only_some_have_is_zero_for_the_others():
    one = GTerm(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    other = GTerm(torch.tensor([2]), torch.tensor([3.0]), v=torch.tensor([0.5]))
    found = GTerm.joined([one, other])
    assert found.targets.tolist() == [0, 1, 2] and found.c.tolist() == [1.0, 2.0, 3.0]
    assert found.v.tolist() == [0.0, 0.0, 0.5] and found.uniform is None
    with pytest.raises(ValueError, match="terms of one temperature can be joined, got .0.5, 1.0."):
        GTerm.joined([one, GTerm(one.targets, one.c, temperature=0.5)])
