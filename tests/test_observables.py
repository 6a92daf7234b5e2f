"""Forces on what else is watched: entropy, margin, mass, a logit, a function; against autograd, closed forms and real steps."""

import math

import pytest
import torch
from engines import assert_rules

import tokdyn as td
from tokdyn.exact import Asked, Scope, UnscoredProblem, engines
from tokdyn.model.trace import trace
from tokdyn.objective import GTerm
from tokdyn.objectives import DPO, GRPO, PPO, SFT
from tokdyn.observables import Custom, Entropy, Logit, LogProb, Margin, Mass, observable
from tokdyn.testing import float64, random_chis, relative_error, tiny

FAMILIES = ("llama", "gpt2", "gemma2", "opt", "mamba")  # gated, tied with biases, softcapped, projected, no attention
FP64 = 1e-9
SET = (1, 4, 7)


def margin_to_best(z, y):
    return z.gather(1, y[:, None]).squeeze(1) - z.scatter(1, y[:, None], -torch.inf).max(1).values


PLAIN = {  # what is watched as a plain function of logits and the tokens that stand there
    "log-prob": (LogProb(), lambda z, y: z.log_softmax(1).gather(1, y[:, None]).squeeze(1)),
    "entropy": (Entropy(), lambda z, y: -(z.softmax(1) * z.log_softmax(1)).sum(1)),
    "margin": (Margin(), margin_to_best),
    "margin to a token": (Margin(5), lambda z, y: z.gather(1, y[:, None]).squeeze(1) - z[:, 5]),
    "mass": (Mass(SET), lambda z, y: z.softmax(1)[:, list(SET)].sum(1).log()),
    "logit": (Logit(3), lambda z, y: z[:, 3]),
    "own": (Custom(lambda z: z.square().mean(1).sqrt()), lambda z, y: z.square().mean(1).sqrt()),
}


def rollouts(seed=5):
    made = zip(random_chis([(2, 5), (2, 4), (2, 3)], seed=seed), (1.0, -1.0, 0.5), strict=True)
    return [chi.with_(group=0, advantage=advantage) for chi, advantage in made]


def gradients(model, chis, of):
    """∇θ of a function of each scored token's logits and the token, [N, P], by plain autograd of the untouched model."""
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for chi in chis:
        z = model(chi.ids[None], use_cache=False).logits[0]
        at = chi.scored.nonzero().flatten()
        for value in of(z[at - 1], chi.ids[at]):
            grads = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(params, grads, strict=True)]
                )
            )
    return torch.stack(rows)


def by_engine(tracer, sides, what, scope="full", reduce=None, method="tangent"):
    """Matrix or reduction of a traced model: td.forces without tracing it again."""
    unscored = UnscoredProblem.about(Asked(*sides, SFT(), observable=what), Scope.named(tracer, scope))
    if reduce:
        return engines.reduce(unscored, method, reduce)[0]
    problem = unscored.scored()
    F = problem.empty()
    assert_rules(engines.choose(problem, method)(problem, F))
    return F


@pytest.mark.parametrize("family", FAMILIES)
def test_forces_are_products_of_the_observables_gradients(family):
    """<∇ O_m, -∇ L_l> by autograd of O and of the loss -log pi(y_l), for three observables; scopes and sums of one in turns."""
    model, n = tiny(family, tied=None).double(), FAMILIES.index(family)
    sides = U, O = random_chis([(3, 3)], seed=1), random_chis([(4, 2), (1, 2)], seed=2)  # noqa: E741
    names = ["entropy", *[name for name in PLAIN if name != "entropy"][n : n + 2]]  # each in one or more of the families
    with float64():
        step = gradients(model, U, PLAIN["log-prob"][1])
        truth = {name: gradients(model, O, PLAIN[name][1]) @ step.T for name in names}
        with trace(model) as tracer:
            for name in names:
                assert relative_error(by_engine(tracer, sides, PLAIN[name][0]), truth[name]) < FP64, name
            if n < 2:
                every_scope_and_sum(tracer, sides, PLAIN[("entropy", "own")[n]][0])


def every_scope_and_sum(tracer, sides, what):
    """The readout alone, and reductions of it and of all, against one gradient a token."""
    matrices = {scope: by_engine(tracer, sides, what, scope, method="naive") for scope in ("full", "readout")}
    assert relative_error(by_engine(tracer, sides, what, "readout"), matrices["readout"]) < FP64
    for scope, matrix in matrices.items():
        for reduce, axis in (("update", 1), ("observe", 0)):
            vector = by_engine(tracer, sides, what, scope, reduce)
            assert float((vector - matrix.sum(axis)).norm()) < FP64 * float(matrix.abs().sum())


OPTIONS = [  # the readout's closed form with a loss that has an entropy term too, and every option that a matrix has
    ("entropy", PPO(entropy=0.3), {}),
    ("margin", GRPO(), {"scope": "readout"}),
    ("entropy", PPO(entropy=0.3), {"scope": "readout"}),
    ("entropy", GRPO(), {"optimizer": True}),
    ("own", GRPO(), {"by": "layer"}),
    ("mass", GRPO(), {"groups": "sequence"}),
]


@pytest.mark.parametrize(("name", "objective", "options"), OPTIONS)
def test_every_option_takes_observables(name, objective, options):
    """More update tokens than observed ones, against one gradient a token."""
    model, what = tiny("qwen2").double(), PLAIN[name][0]
    O = random_chis([(1, 2), (2, 2)], seed=2)  # noqa: E741
    if "optimizer" in options:
        options = {"optimizer": torch.optim.Adam(model.parameters(), eps=1e-3)}
    with float64():
        naive = td.forces(model, rollouts(), O, objective, observable=what, method="naive", **options)
        found = td.forces(model, rollouts(), O, objective, observable=what, **options)
    assert relative_error(found.matrix, naive.matrix) < FP64
    for part, truth in (found.parts or {}).items():
        assert float((truth - naive.parts[part]).norm()) < FP64 * float(naive.matrix.norm())


@pytest.mark.parametrize("name", ["entropy", "margin", "mass"])
def test_a_real_step_moves_the_observable_by_its_forces(name):
    """A GRPO update: ΔO of a real step is eta Σ_l F_O[m,l] but for a term of second order."""
    found = td.verify(tiny("llama"), rollouts(), random_chis([(3, 6)], seed=3), GRPO(), observable=PLAIN[name][0], move=0.02)
    assert 1.8 < found.order < 2.2 and abs(found.linearity - 1) < 0.1


class Tabular(torch.nn.Module):
    """A softmax policy with a row of logits for each state: the state of a token is the token before it."""

    def __init__(self, S):
        super().__init__()
        self.config = type("Config", (), {"tie_word_embeddings": False})()
        self.embed = torch.nn.Embedding(S, S)
        self.embed.weight.requires_grad_(False).copy_(torch.eye(S))
        self.head = torch.nn.Linear(S, S, bias=False)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids, use_cache=False):
        return (self.head(self.embed(ids)),)


class Expectation(SFT):
    """-Σ_a w_a log pi(a), w held fixed: with w_a = pi(a) A(a) the policy gradient of a state, its expectation written out."""

    def loss(self, log_probs, chis, scores=None):
        return -(torch.tensor([chi.advantage for chi in chis], dtype=torch.float64).to(log_probs) * log_probs).sum()


def test_the_entropy_of_a_tabular_softmax_policy_moves_by_a_covariance():
    """ΔH(s) = -eta Cov_{a~pi(.|s)}(log pi(a|s), pi(a|s) A(s,a)) under policy gradient: arXiv 2505.22617, Theorem 1."""
    S, state, generator = 7, 3, torch.Generator().manual_seed(0)
    model = Tabular(S).double()
    with torch.no_grad():
        model.head.weight.copy_(2 * torch.randn(S, S, generator=generator))
    pi = model.head.weight[:, state].detach().softmax(0)
    A = torch.randn(S, generator=generator).double()
    A = A - pi @ A  # an advantage has no mean
    action = torch.tensor([False, True])
    update = [td.Chi(torch.tensor([state, a]), action, advantage=float(pi[a] * A[a])) for a in range(S)]
    F = td.forces(model, update, update[:1], Expectation(), observable=Entropy(), reduce="update").vector
    covariance = pi @ (pi.log() * pi * A) - (pi @ pi.log()) * (pi @ (pi * A))
    assert float(F[0]) == pytest.approx(-float(covariance), rel=1e-9)


@pytest.mark.parametrize("gap", [8.0, 20.0, 40.0, 80.0])
def test_the_entropys_force_keeps_its_digits_where_the_distribution_is_peaked(gap):
    """All other logits lie `gap` below the first: ∂H/∂z_j = -pi_j (log pi_j + H) in closed form, to float32 rounding."""
    V = 1000
    z = torch.full((1, V), -gap)
    z[0, 0] = 0
    each, S = math.exp(-gap), 1 + (V - 1) * math.exp(-gap)
    mean = (V - 1) * each * gap / S
    term = Entropy().term(z, torch.tensor([0]))
    found = term.logit_force(z)[0].double()
    expected = torch.full((V,), each / S * (gap - mean), dtype=torch.float64)
    expected[0] = -mean / S
    # an exponential of float32, and a sum of V such numbers: a few eps of a relative error each
    assert bool(((found - expected).abs() <= 32 * torch.finfo(torch.float32).eps * expected.abs()).all())


def test_the_masss_force_keeps_its_digits_where_the_set_has_all_of_it():
    z = torch.tensor([[0.0, -1.0, -30.0, -31.0]])
    found = Mass([0, 1]).term(z, torch.tensor([[0, 1]])).logit_force(z)[0].double()
    pi = z[0].double().softmax(0)
    rest = pi[2:].sum()
    expected = torch.cat([pi[:2] * rest / (1 - rest), -pi[2:]])
    assert bool(((found - expected).abs() <= 16 * torch.finfo(torch.float32).eps * expected.abs()).all())


def test_a_margin_against_the_rejected_answer_is_the_pair_where_it_parts():
    """DPO pulls y⁺ from y⁻ there: the force is that of z_{y+} - z_{y-}, and all other places have none."""
    ids = torch.tensor([3, 8, 5, 1, 9]), torch.tensor([3, 8, 5, 2, 7])
    scored = torch.arange(5) >= 2
    pair = [td.Chi(x, scored, role=role) for x, role in zip(ids, ("chosen", "rejected"), strict=True)]
    model = tiny("llama")
    found = td.forces(model, pair, pair[:1], DPO(), observable=Margin("rejected"))
    assert not found.matrix[[0, 2]].any() and found.matrix[1].any()
    with trace(model) as tracer:
        z = tracer.logits(tracer.batches(pair[:1])[0])
    assert found.observed["value"].to_pylist() == pytest.approx([0, float((z[1, 1] - z[1, 2]).detach()), 0], abs=1e-6)
    with pytest.raises(ValueError, match="no observed token has another one of the rejected"):
        td.forces(model, random_chis([(2, 3)]), random_chis([(2, 3)]), SFT(), observable=Margin("rejected"))


def test_mistakes_are_told():
    model, chis = tiny("llama"), random_chis([(2, 3)])
    for what, words in (
        (Mass([99]), r"vocabulary is \[0, 61\)"), (Logit(-1), "vocabulary"), ("entropie", "observable must be log-prob"),
        (lambda z: z.sum(), r"a number for each row of logits, \[N\]"), (lambda z: z[:, 0] + len(z), "its own row"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            td.forces(model, chis, chis, observable=what)
    for make, words in ((lambda: Mass([]), "at least one"), (lambda: Margin("chosen"), "against must be")):
        with pytest.raises(ValueError, match=words):
            make()


def test_words_of_the_command_line():
    words = {"log-prob": LogProb(), "entropy": Entropy(), "margin": Margin(), "margin:rejected": Margin("rejected"),
             "margin:17": Margin(17), "mass:3,1": Mass([1, 3]), "logit:4": Logit(4)}  # fmt: skip
    assert {text: observable(text) for text in words} == words
    assert Entropy().describe() == {"name": "Entropy", "arguments": {}, "label": "entropy", "unit": "nats"}


def test_terms_of_observables_are_weighted_and_cut():
    z = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    for what, plain in PLAIN.values():
        tokens = what.tokens([td.Chi(torch.arange(5), torch.arange(5) >= 1)])
        term = what.term(z, tokens)
        leaf = z.clone().requires_grad_()
        (truth,) = torch.autograd.grad(plain(leaf, torch.arange(1, 5)).sum(), leaf)
        assert isinstance(term, GTerm) and torch.allclose(term.logit_force(z), truth, atol=1e-6)
        some = term.times(torch.tensor([2.0, 0, 1, 3])).rows(torch.tensor([3, 0]))
        assert torch.allclose(some.logit_force(z[[3, 0]]), truth[[3, 0]] * torch.tensor([[3.0], [2.0]]), atol=1e-6)
        assert torch.allclose(what.values(z, term.targets), plain(z, torch.arange(1, 5)), atol=1e-6)
