"""Interventions: identities of their scores; weights change the gradient of each token as they say, and nothing else."""

import pytest
import real_steps
import torch
from intervened import EPS, PAIR, PROTECT, ROLLOUTS, gradient, group, token_gradients

import tokdyn as td
from tokdyn.interventions import both_answers, force_weights, loss, nthr, nthr_scores, spare, weigh, weighted
from tokdyn.objectives import DPO, GRPO, LLDS, SFT, DrGRPO, SimKO
from tokdyn.sequences import collate
from tokdyn.testing import float64, relative_error, tiny, tiny_lora

# ---------------------------------------------------------------- NTHR


@pytest.mark.parametrize("tied", [False, True])
def test_nthr_is_the_readout_gradient_of_right_answers_on_wrong_tokens(tied):
    """s_k = <∇_W Σ log pi(y⁺), ∇_W log pi(y⁻_k)>, W the readout (held apart from a tied lookup), to 1e-12 relative."""
    with float64():
        model = tiny("llama", tied=tied).double()
        found = nthr_scores(model, ROLLOUTS).double()
        batch = collate(ROLLOUTS)
        h = model.model(batch.ids).last_hidden_state.flatten(0, 1)[batch.rows].detach()
        W = model.lm_head.weight.detach().clone().requires_grad_()
        log_probs = (h @ W.T).log_softmax(1).gather(1, batch.targets[:, None]).squeeze(1)
        right = sum(len(chi) for chi in ROLLOUTS[:2])
        (plus,) = torch.autograd.grad(log_probs[:right].sum(), W, retain_graph=True)
        truth = torch.stack([(torch.autograd.grad(lp, W, retain_graph=True)[0] * plus).sum() for lp in log_probs])
    assert relative_error(found, truth) < 1e-12


def test_nthr_over_all_parameters_is_their_gradient():
    with float64():
        model = tiny("llama").double()
        found = nthr_scores(model, ROLLOUTS, scope="full").double()
        J = token_gradients(model, ROLLOUTS)
    truth = J @ J[: sum(len(chi) for chi in ROLLOUTS[:2])].sum(0)
    assert relative_error(found, truth) < 1e-12


def test_nthr_is_the_rate_at_which_a_push_on_the_readout_moves_the_right_answers():
    """A real step on W along -∇ log pi(y⁻_k) lowers Σ log pi(y⁺) by h s_k, to second order in h."""
    with float64():
        model = tiny("llama", tied=False).double()
        s = nthr_scores(model, ROLLOUTS).double()
        k = int(s[sum(map(len, ROLLOUTS[:2])) :].argmax()) + sum(map(len, ROLLOUTS[:2]))
        batch = collate(ROLLOUTS)

        def right():
            z = model(batch.ids).logits.flatten(0, 1)[batch.rows].log_softmax(1)
            return z.gather(1, batch.targets[:, None]).squeeze(1)

        lp = right()
        (g,) = torch.autograd.grad(lp[k], model.lm_head.weight)
        n = sum(map(len, ROLLOUTS[:2]))
        errors = []
        for h in (1e-3, 5e-4):
            with torch.no_grad():
                model.lm_head.weight.sub_(h * g)
                errors.append(float((right()[:n] - lp[:n]).sum() + h * s[k]))
                model.lm_head.weight.add_(h * g)
    assert s[k] > 0 and 3.8 < errors[0] / errors[1] < 4.2


def test_nthr_spares_the_wrong_tokens_above_the_threshold_and_no_others():
    model, two = tiny("llama"), [*ROLLOUTS, *group((-1.0, 1.0), seed=7, number=1)]
    s, w = nthr_scores(model, two), nthr(model, two, beta=0.4, scale=0.25)
    at, spared = 0, 0
    parts = []
    for chi in two:
        parts.append((chi, s[at : at + len(chi)], w[at : at + len(chi)]))
        at += len(chi)
    for number in (0, 1):
        tau = 0.4 * min(float(own.mean()) for chi, own, _ in parts if chi.group == number and chi.advantage > 0)
        for chi, own, weight in parts:
            if chi.group == number:
                shared = (own > tau) & (chi.advantage < 0)
                assert torch.equal(weight, torch.where(shared, 0.25, 1.0))
                spared += int(shared.sum())
    assert 0 < spared < sum(len(chi) for chi in two if chi.advantage < 0)
    # groups do not see one another
    torch.testing.assert_close(s[: at - 9], nthr_scores(model, ROLLOUTS), rtol=0, atol=100 * EPS * float(s.abs().max()))


def test_nthr_leaves_groups_without_right_or_wrong_answers():
    model = tiny("llama")
    assert torch.equal(nthr(model, group((-1.0, -1.0))), torch.ones(9)) and not nthr_scores(model, group((-1.0, -1.0))).any()
    assert torch.equal(nthr(model, group((1.0, 1.0))), torch.ones(9))


def test_nthr_lessens_what_the_wrong_rollouts_take_from_the_right_ones():
    """Reweighting lowers the displacement: each spared token's force on the right answers was negative."""
    model, objective = tiny("llama", tied=False), GRPO()
    w = nthr(model, ROLLOUTS, beta=0.1, scale=0.0)
    F = td.forces(model, ROLLOUTS, ROLLOUTS[:2], objective, scope="readout", reduce="observe").vector
    assert bool((w == 0).any()) and bool((F[w == 0] < 0).all())
    assert float((w * F).sum()) > float(F.sum())


# ---------------------------------------------------------------- force-weighted tokens


@pytest.mark.parametrize("make", [tiny, tiny_lora], ids=["full", "LoRA"])
@pytest.mark.parametrize(("objective", "update"), [(DPO(), PAIR), (GRPO(), ROLLOUTS), (SFT(), PAIR)])
def test_the_protected_probe_is_predicted_to_do_better_by_dense_forces(make, objective, update):
    """Σ_l w_l F_l >= Σ_l F_l by the matrix of one gradient per token, by exactly what the spared tokens would have taken."""
    model = make("llama")
    w = force_weights(model, update, PROTECT, objective, share=0.3)
    F = td.forces(model, update, PROTECT, objective, method="naive").matrix.sum(0)
    spared = w == 0
    assert 0 < int(spared.sum()) <= int(0.3 * len(F)) and bool(((w == 0) | (w == 1)).all())
    assert bool((F[spared] < 0).all()) and float(F[spared].max()) <= float(F[~spared].min()) + 100 * EPS * float(F.abs().max())
    F = F.double()  # what remains is an identity
    assert float((w * F).sum()) - float(F.sum()) == pytest.approx(float(-F[spared].sum()), rel=1e-12)


def test_the_weighted_step_does_to_the_probe_what_the_weighted_forces_say():
    """A real gradient step on the weighted loss moves the protected log-prob at the rate Σ_l w_l F_l, in float64."""
    with float64():
        model = tiny("llama").double()
        w = force_weights(model, PAIR, PROTECT, DPO(), share=0.4, scale=0.2)
        F = td.forces(model, PAIR, PROTECT, DPO(), reduce="observe").vector
        g = gradient(model, loss(model, PAIR, DPO(), weights=w))
        observed = gradient(model, loss(model, PROTECT, SFT()))
    assert relative_error(g @ observed, (w * F).sum()) < 1e-10
    assert float((w * F).sum()) > float(F.sum())


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.RMSprop], ids=lambda make: make.__name__)
def test_under_an_optimizer_the_tokens_spared_are_the_worst_of_its_real_step(make, steps):
    """Σ_l F_l is what its own step() does to the probe, Σ_l w_l F_l the weighted gradient's part along that step's diagonal.

    What the real step on the weighted loss does is another matter: its v' is its own.
    """
    lr = 1e-3
    with float64():
        model = tiny("llama", tied=False).double()
        optimizer = make(model.parameters(), lr=lr, weight_decay=0.0)
        named = dict(model.named_parameters())
        for past in ROLLOUTS[:steps]:
            real_steps.step(optimizer, named, real_steps.gradients_of(model, loss(model, [past], SFT())))
        w = force_weights(model, PAIR, PROTECT, DPO(), share=0.4, scale=0.2, optimizer=optimizer)
        F = td.forces(model, PAIR, PROTECT, DPO(), reduce="observe", optimizer=optimizer).vector
        g, g_w = (real_steps.gradients_of(model, loss(model, PAIR, DPO(), weights=x)) for x in (None, w))
        change = real_steps.first_order_change(model, optimizer, g, PROTECT).sum()
        observed = real_steps.gradients_of(model, real_steps.log_probs(model, PROTECT).sum())
        moved = real_steps.own_part(optimizer, named, g)
        along = sum((torch.where(g[n] == 0, 0, moved[n] * g_w[n] / g[n]) * observed[n]).sum() for n in g)
    size = float(F.abs().sum())
    assert abs(float(lr * F.sum() - change)) < 1e-6 * lr * size  # of second order in a step of 1e-3 of lr
    # moved is a difference of weights of size 1: off by eps/lr of Adam's steps, which are of size lr
    assert abs(float(lr * (w * F).sum() - along)) < 1e-8 * lr * size
    assert bool((F[w < 1] < 0).all()) and float((w * F).sum()) > float(F.sum())


def test_spare_takes_the_worst_within_its_share():
    f = torch.tensor([0.5, -3.0, -1.0, 2.0, -2.0, 0.0, 1.0, -0.1, 4.0, 3.0])
    assert torch.equal(spare(f, share=0.2), torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1, 1, 1]))
    assert torch.equal(spare(f, share=1.0, scale=0.5), torch.where(f < 0, 0.5, 1.0))  # never what helps
    assert torch.equal(spare(f, share=0.0), torch.ones(10)) and torch.equal(spare(f.abs()), torch.ones(10))


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize(
    ("objective", "chis"),
    [(SFT(), PAIR), (SFT(label_smoothing=0.1), PAIR), (DPO(), PAIR), (GRPO(), ROLLOUTS), (SimKO(quantile=0.5), ROLLOUTS)],
)
def test_the_gradient_of_a_loss_is_the_force_that_was_predicted(objective, chis):
    """-<∇L, ∇ Σ log pi(protected)> = Σ_m Σ_l F[m,l], and with weights Σ_l w_l F_l."""
    with float64():
        model = tiny("llama").double()
        F = td.forces(model, chis, PROTECT, objective, reduce="observe").vector
        w = torch.rand(len(F), generator=torch.Generator().manual_seed(2)).double()
        observed = -gradient(model, loss(model, PROTECT, SFT()))
        plain, with_weights = (gradient(model, loss(model, chis, objective, weights=x)) for x in (None, w))
    assert (
        relative_error(-plain @ observed, F.sum()) < 1e-10 and relative_error(-with_weights @ observed, (w * F).sum()) < 1e-10
    )


def test_simko_as_a_loss_keeps_grpos_value_and_shares_its_gradient():
    """γ⁺ equals γ, so the loss is GRPO's; its gradient also lifts the top candidates of forking tokens."""
    model = tiny("llama").double()
    plain, shared = GRPO(), SimKO(quantile=0.5, alpha=0.3, lam=1.0)
    a, b = loss(model, ROLLOUTS, plain), loss(model, ROLLOUTS, shared)
    assert a.item() == pytest.approx(b.item(), rel=1e-12)
    assert relative_error(gradient(model, b), gradient(model, a)) > 1e-3


def test_llds_as_a_loss_holds_on_to_what_was_lost():
    """λ mean max(0, log pi_old - log pi) adds -λ/N ∇ Σ log pi of right answers that lost likelihood, nothing where none has."""
    with float64():
        model = tiny("llama").double()
        now = td.forces(model, ROLLOUTS, ROLLOUTS, SFT(), reduce="update").observed["log_prob"].to_pylist()
        now = torch.tensor(now).double().split([len(chi) for chi in ROLLOUTS])
        lost, kept = ([chi.with_(old_log_probs=lp + d) for chi, lp in zip(ROLLOUTS, now, strict=True)] for d in (0.05, -0.05))
        grads = [gradient(model, loss(model, lost, o)) for o in (GRPO(), LLDS(lam=0.5))]
        answers = gradient(model, loss(model, [chi for chi in ROLLOUTS if chi.advantage >= 0], SFT()))
        same = [gradient(model, loss(model, kept, o)) for o in (GRPO(), LLDS(lam=0.5))]
    assert relative_error(grads[1] - grads[0], 0.5 / sum(map(len, ROLLOUTS)) * answers) < 1e-10
    assert torch.equal(*same)


def test_extended_sft_learns_both_answers():
    """c = 1 on every token of both; at a shared prefix the two add where DPO's cancel; both answers together must rise."""
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "score": 3}, {"prompt": "d", "chosen": "e", "rejected": "f"}]
    assert both_answers(rows) == [{"prompt": p, "completion": y} for p, y in (("a", "b"), ("a", "c"), ("d", "e"), ("d", "f"))]
    shared = torch.tensor([5, 9, 2])
    chosen, rejected = (chi.with_(ids=torch.cat([chi.ids[:3], shared, chi.ids[6:]])) for chi in PAIR)
    model, both = tiny("llama"), [chosen, rejected]
    c = td.forces(model, both, both, SFT(), reduce="observe").c
    assert torch.equal(c, torch.ones(11))
    G = {o: td.forces(model, both, both, o, reduce="observe").c for o in (SFT(), DPO())}
    same = [G[o][:3] + G[o][5:8] for o in (SFT(), DPO())]
    # β(1 - σ) and its negative, by two ways back: two roundings each
    assert torch.equal(same[0], torch.full((3,), 2.0)) and float(same[1].abs().max()) <= 4 * EPS * float(G[DPO()].abs().max())
    assert float(td.forces(model, both, both, SFT(), reduce="update").vector.sum()) > 0  # ‖∇ Σ log pi‖²


# ---------------------------------------------------------------- mistakes


def wrongly(weights):
    model = tiny("llama")
    with weighted(model, weights):
        model(input_ids=torch.zeros(2, 5, dtype=torch.long))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: nthr_scores(tiny("llama"), PAIR), "by their advantage: build them with td.rollouts"),
        (lambda: nthr(tiny("llama"), ROLLOUTS, scale=1.5), r"scale must lie in \[0, 1\], got 1.5"),
        (lambda: spare(torch.zeros(3), share=2.0), r"share must lie in \[0, 1\], got 2.0"),
        (lambda: both_answers([{"prompt": "a", "chosen": "b"}]), "row 1 lacks rejected"),
        (lambda: weigh(torch.zeros(3), torch.ones(2)), r"weights \[2\] do not fit log-probs \[3\]"),
        (lambda: loss(tiny("llama"), PAIR, DPO(), weights=torch.ones(3)), r"\[L\]=\(11,\), one per scored token, got \[3\]"),
        (lambda: wrongly(torch.ones(2, 6)), r"\[B, T\]=\[2, 5\], one for each token of the batch, got \[2, 6\]"),
        (lambda: loss(tiny("llama"), PAIR, DrGRPO()), "needs Chi.advantage"),
    ],
)  # fmt: skip
def test_mistakes_say_what_to_do(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_fused_loss_is_refused_and_the_hooks_are_gone():
    model = tiny("llama")

    class Lossy(torch.nn.Module):
        get_output_embeddings = staticmethod(model.get_output_embeddings)

        def forward(self, input_ids):
            return type("Output", (), {"loss": model.model(input_ids).last_hidden_state.sum()})()

    lossy = Lossy()
    with (
        pytest.raises(ValueError, match="fused with the readout.*weigh log-probs of your own"),
        weighted(lossy, torch.ones(2, 5)),
    ):
        lossy(torch.zeros(2, 5, dtype=torch.long))
    assert not lossy._forward_hooks and not model.lm_head._forward_hooks
