"""A step's record against dense tensors: a softmax of the pass's own logits and ∂L/∂z by autograd, both in float64."""

import pytest
import torch
from loops import EPS, PROMPT, V, data

import tokdyn as td
from tokdyn.testing import tiny

T = 0.7  # the loss's temperature
LENGTHS = torch.tensor([5, 3, 4, 5])  # answers; those of the pair (0, 2) share three tokens, those of (1, 3) none
SCORED = torch.arange(5) < LENGTHS[:, None]
CLIP = (0.1, 0.15)


def weights(seed):
    """Of both signs and unequal."""
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)) * SCORED


C, W, A = weights(1), 0.3 * weights(2), torch.tensor([1.0, -1.0, 2.0, -0.5])


def ids_of():
    ids = data()
    ids[2, : PROMPT + 3], ids[3, :PROMPT] = ids[0, : PROMPT + 3], ids[1, :PROMPT]
    ids[2, PROMPT + 3], ids[3, PROMPT] = (ids[0, PROMPT + 3] + 1) % V, (ids[1, PROMPT] + 1) % V
    return ids


def terms(z, ids):
    """log pi of the answers at the temperature, [4, 5, V], and log pi(y) and H."""
    log_pi = (z / T).log_softmax(-1)[:, PROMPT - 1 : -1]
    return log_pi, log_pi.gather(-1, ids[:, PROMPT:, None]).squeeze(-1), -(log_pi.exp() * log_pi).sum(-1)


def loss_of(z, ids, bonus):
    _, lp, H = terms(z, ids)
    if bonus:
        td.tap(lp, ids[:, PROMPT:], SCORED, temperature=T, entropy=H)
    return -(C * lp).sum() + ((W * H).sum() if bonus else 0.0)


def recorded(bonus):
    """The record of a step, what its columns should hold, {column: [N]}, and the logits over the temperature, [N, V]."""
    model, ids, kept = tiny("llama"), ids_of(), []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: kept.append(args[0].detach()))
    with torch.no_grad():
        old = terms(model(ids).logits, ids)[1] + torch.linspace(-0.4, 0.4, 20).reshape(5, 4).T
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    about = dict(advantages=A, old_log_probs=old, clip=CLIP, mask=SCORED, roles=["chosen"] * 2 + ["rejected"] * 2)
    with td.Monitor(model, opt, temperature=T, on_error="raise") as monitor:
        with monitor.micro_batch(groups=[0, 1, 0, 1], **about):
            z = model(ids).logits
            loss_of(z, ids, bonus).backward()
        opt.step()
        step = monitor.step_end()
    handle.remove()
    leaf = z.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(leaf, ids, bonus), leaf)
    G = -gradient[:, PROMPT - 1 : -1][SCORED]
    log_pi, lp, _ = (x.detach()[SCORED] for x in terms(leaf, ids))
    pi, y, c, n = log_pi.exp(), ids[:, PROMPT:][SCORED], C[SCORED].double(), torch.arange(len(G))
    e_y = torch.zeros_like(pi).index_put((n, y), torch.ones(len(n), dtype=torch.float64))
    top, collision = pi.max(1).values, pi.square().sum(1)
    rest = pi[n, y]
    advantage, ratio = A[:, None].expand(4, 5)[SCORED], (lp - old[SCORED].double()).exp()
    scaled = leaf.detach()[:, PROMPT - 1 : -1][SCORED] / T
    sequence, place = SCORED.nonzero(as_tuple=True)
    own = c[:, None] * (e_y - pi) / T  # without the bonus
    lost = torch.zeros(len(n), dtype=torch.float64)
    for t in range(3):
        a, b = (int(((sequence == s) & (place == t)).nonzero()) for s in (0, 2))
        lost[[a, b]] = (own[a].norm() + own[b].norm() - (own[a] + own[b]).norm()) / 2
    h = kept[-1][:, PROMPT - 1 : -1][SCORED].double()
    expected = dict(
        micro_batch=0 * n, sequence=sequence, position=PROMPT + place, token_id=y, step=0 * n + 1, rank=0 * n,
        group=sequence % 2,
        c=c, v=W[SCORED].double() if bonus else 0 * c, u=0 * c, force=G.norm(dim=1), p_target=rest, p_argmax=top,
        squeezing=top * (top - collision + rest) * (pi.argmax(1) != y) * (c < 0), h_square=h.square().sum(1),
        logsumexp=scaled.logsumexp(1), log_prob=lp, entropy=-(pi * log_pi).sum(1), collision=collision,
        g_norm=(pi - e_y).norm(dim=1), token_rank=(scaled > scaled[n, y][:, None]).sum(1), argmax=pi.argmax(1),
        argmax_log_prob=log_pi.max(1).values, advantage=advantage, ratio=ratio, cancelled=lost,
        clipped=((advantage > 0) & (ratio > 1 + CLIP[1])) | ((advantage < 0) & (ratio < 1 - CLIP[0])),
    )  # fmt: skip
    return step, expected, scaled


@pytest.mark.parametrize("bonus", [False, True], ids=["log-probs alone", "with an entropy bonus"])
def test_columns_figures_and_sequences_are_those_of_dense_tensors(bonus):
    """Every column of the token table, every figure of the step, every column of the sequences; none is left out."""
    step, expected, z = recorded(bonus)
    assert step.routes == (("tap",) if bonus else ("logits",))
    rows = {name: step.tokens[name].to_pylist() for name in step.tokens.column_names}
    contexts, ids = rows.pop("context"), ids_of()
    behind = [tuple(ids[s, :t].tolist()) for s, t in zip(rows["sequence"], rows["position"], strict=True)]
    keyed = list(zip(contexts, behind, strict=True))
    assert all((x == y) == (p == q) for x, p in keyed for y, q in keyed) and len(set(behind)) == 17 - 4 - 1
    assert set(rows) == {*expected, "role"} and rows["role"] == ["chosen"] * 8 + ["rejected"] * 9
    # where the readout is computed anew, a logit is off by √d/2 roundings of its size, d = 32, the worst of hundreds by three
    # times that, and so is every log pi
    band = 20 * EPS * float(z.abs().max())
    found = {name: torch.tensor(rows[name], dtype=torch.float64) for name in expected}
    for name, truth in expected.items():
        if truth.is_floating_point():
            torch.testing.assert_close(found[name], truth.double(), rtol=band, atol=band, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(found[name], truth.double()), name

    up, moved = expected["advantage"] > 0, expected["ratio"].log()
    total = torch.zeros(4, dtype=torch.float64).index_add(0, expected["sequence"], moved)[expected["sequence"]]
    fallen = (total[up] < 0).double().mean()
    c, force, push = expected["c"], expected["force"], (-expected["c"]).clamp(min=0)
    figures = dict(
        tokens=len(c), c_up=c[c > 0].sum(), c_down=push.sum(), force=force.sum(),
        force_up_share=force[c > 0].sum() / force.sum(),
        squeezing=(push * expected["squeezing"]).sum() / push.sum(), shared_prefix=expected["cancelled"].sum() / force.sum(),
        clipped=expected["clipped"].double().mean(), fallen=fallen,
    ) | {name: expected[name].mean() for name in ("entropy", "collision", "log_prob", "p_target", "p_argmax")}  # fmt: skip
    assert step.metrics.pop("residual") < 1e-5
    assert step.metrics == pytest.approx({name: float(x) for name, x in figures.items()}, rel=band, abs=band)

    sequences, s = step.sequences(), expected["sequence"]
    expected["force_up"] = force * (c > 0)
    for name in sequences.column_names:
        column, kind = name.rpartition("_")[::2]
        if kind in ("sum", "mean"):
            parts = [getattr(expected[column][s == i].double(), kind)() for i in range(4)]
            assert sequences[name].to_pylist() == pytest.approx([float(x) for x in parts], rel=5 * band, abs=5 * band), name
    assert sequences["c_count"].to_pylist() == LENGTHS.tolist() and sequences["group"].to_pylist() == [0, 1, 0, 1]
    assert {"force_up_sum", "cancelled_sum", "clipped_mean", "p_target_mean"} < set(sequences.column_names)
    # the cases are there: both signs, clipped and not, first choices and others, places where a pair's force cancels
    assert 0 < figures["force_up_share"] < 1 and 0 < figures["clipped"] < 1 and figures["squeezing"] > 0.001
    assert len(set(rows["token_rank"])) > 1 and int((expected["cancelled"] > 0).sum()) in (2, 4, 6)
