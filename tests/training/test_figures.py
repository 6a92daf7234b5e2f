"""Figures of a monitored step against closed forms: c, what is clipped, squeezing, and what a wrong temperature gives."""

import pytest
import torch
from chats import MORE, assistant, tokenizer_of
from loops import EPS, PROMPT, V, answers, data, dpo, grpo, one_record, sft, train

import tokdyn as td
from tokdyn.squeeze import step as readout_step
from tokdyn.testing import tiny
from tokdyn.training.fallen import ALARM


def test_c_of_dpo_is_its_closed_form_and_shared_prefixes_cancel():
    """c± = ±β(1 - σ(βh))/B; where the answers begin alike, all of the pair's force there cancels."""
    ids = data()
    ids[2, :7], ids[3, :PROMPT] = ids[0, :7], ids[1, :PROMPT]  # pair (0, 2) shares three tokens of the answer, (1, 3) none
    ids[2, 7], ids[3, PROMPT] = (ids[0, 7] + 1) % V, (ids[1, PROMPT] + 1) % V
    model = tiny("llama")
    step = one_record(model, dpo, ids, roles=["chosen"] * 2 + ["rejected"] * 2, groups=[0, 1, 0, 1])
    with torch.no_grad():
        lp = answers(model, ids)[0].sum(1)
    c = 0.1 * (1 - torch.sigmoid(0.1 * (lp[:2] - lp[2:]))) / 2
    expected = torch.cat([c, -c])[:, None].expand(4, 5).flatten()
    torch.testing.assert_close(step.c, expected, rtol=100 * EPS, atol=0)
    force = torch.tensor(step.tokens["force"].to_pylist()).reshape(4, 5)
    assert step.metrics["shared_prefix"] == pytest.approx(float((force[0, :3] + force[2, :3]).sum() / force.sum()), rel=1e-5)
    assert step.tokens["role"].to_pylist() == ["chosen"] * 10 + ["rejected"] * 10
    assert step.metrics["c_up"] == pytest.approx(float(5 * c.sum()), rel=1e-5)
    assert step.metrics["c_down"] == pytest.approx(step.metrics["c_up"], rel=1e-5)
    rows = step.sequences()
    assert rows["c_sum"].to_pylist() == pytest.approx([*(5 * c).tolist(), *(-5 * c).tolist()], rel=1e-5)


A = torch.tensor([1.0, -1.0, 2.0, -0.5])


def clipped_loss(old, level="token", scored=None, tapped=None):
    """GRPO's clip to [0.8, 1.28], of the ratio of each token or of each sequence; `tapped` is what td.tap is told."""

    def loss(m, ids):
        lp = answers(m, ids)[0]
        if tapped is not None:
            td.tap(lp, **tapped)
        moved = lp - old
        ratio = (moved if level == "token" else moved.mean(1, keepdim=True)).exp()
        value = torch.minimum(ratio * A[:, None], ratio.clamp(0.8, 1.28) * A[:, None]).expand_as(lp)
        return -(value if scored is None else value * scored).mean()

    return loss


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("told", ["labels", "mask", "mask of the micro-batch"])
def test_clipped_tokens_have_no_force(level, told):
    """The share comes from the ratios, c from autograd: c = 0 exactly where the ratio is clipped, and c = Aγ/N elsewhere."""
    ids, model = data(), tiny("llama")
    shift = torch.linspace(-0.6, 0.6, 20).reshape(5, 4).T
    with torch.no_grad():
        old = answers(model, ids)[0] + (shift if level == "token" else torch.tensor([-0.5, 0.5, 0.1, -0.1])[:, None])
    tapped = dict(labels=dict(labels=ids[:, PROMPT:]), mask=dict(mask=torch.ones(4, 5))).get(told)
    about = dict(advantages=A, old_log_probs=old, clip=(0.2, 0.28), level=level)
    about |= dict(mask=torch.ones(4, 5)) if told == "mask of the micro-batch" else {}
    step = one_record(model, clipped_loss(old, level, tapped=tapped), ids, **about)
    clipped = torch.tensor(step.tokens["clipped"].to_pylist()).bool()
    assert step.routes == (("logits",) if tapped is None else ("tap",))
    assert 3 < int(clipped.sum()) < 17 and torch.equal(clipped, step.c == 0)
    assert step.metrics["clipped"] == pytest.approx(float(clipped.double().mean()), rel=EPS)
    moved = (answers(model, ids)[0].detach() - old).sum(1)
    fallen = float((moved[A > 0] < 0).double().mean())  # of two responses of five tokens each
    assert fallen == 0.5 and step.metrics["fallen"] == pytest.approx(fallen)
    assert step.notes == [ALARM.format(share=fallen)]
    assert step.tokens["advantage"].to_pylist() == A[:, None].expand(4, 5).flatten().tolist()
    if level == "token":
        ratio = (answers(model, ids)[0].detach() - old).exp()
        expected = (A[:, None] * ratio / 20).flatten()
        torch.testing.assert_close(step.c[~clipped], expected[~clipped], rtol=1e3 * EPS, atol=0)


def test_without_labels_or_mask_nobody_knows_what_is_clipped():
    """A clipped token gets no gradient, and where that is all there is to tell by, no share of clipped tokens is made up."""
    ids, model = data(), tiny("llama")
    with torch.no_grad():
        old = answers(model, ids)[0] + torch.linspace(-0.6, 0.6, 20).reshape(5, 4).T
    about = dict(advantages=A, old_log_probs=old, clip=(0.2, 0.28))
    for tapped in (None, {}):
        step = one_record(model, clipped_loss(old, tapped=tapped), ids, **about)
        assert len(step.c) < 20 and bool((step.c != 0).all())
        assert "clipped" not in step.metrics and "clipped tokens cannot be told from unscored ones" in step.notes[0]
    with pytest.raises(ValueError, match=r"mask must have shape \[B, k\], B=4"):
        one_record(model, clipped_loss(old), ids, **about, mask=torch.ones(3, 5))


def test_a_mask_says_what_is_scored():
    """Tokens outside it are dropped, those inside stay though their gradient is zero."""
    ids, model = data(), tiny("llama")
    mask = torch.arange(5).expand(4, 5) < torch.tensor([5, 3, 0, 4])[:, None]

    def loss(m, ids):
        weight = mask * (torch.arange(5) != 1)  # the second token is scored and has no weight
        return -(answers(m, ids)[0] * weight).sum()

    step = one_record(model, loss, ids, mask=mask)
    assert step.metrics["tokens"] == int(mask.sum()) and int((step.c == 0).sum()) == 3
    assert step.tokens["token_id"].to_pylist() == ids[:, PROMPT:][mask].tolist() and step.residual < 1e-5


def test_squeezing_is_the_rate_at_which_first_choices_gain():
    """The column against a tiny real readout step (td.squeeze) on every token that is pushed down."""
    ids, model = data(), tiny("llama")
    step = one_record(model, lambda m, ids: -sft(m, ids), ids)
    with torch.no_grad():
        z = model(ids).logits[:, PROMPT - 1 : -1].flatten(0, 1).double()
    y, h = ids[:, PROMPT:].flatten(), 1e-6
    top = z.argmax(1, keepdim=True)
    p = [readout_step(z, y, -torch.ones(20).double(), s).softmax(1).gather(1, top).squeeze(1) for s in (-h, h)]
    rate = ((p[1] - p[0]) / (2 * h)) * (top.squeeze(1) != y)
    found = torch.tensor(step.tokens["squeezing"].to_pylist(), dtype=torch.float64)
    torch.testing.assert_close(found, rate, rtol=1e-4, atol=20 * EPS)
    assert step.metrics["squeezing"] == pytest.approx(float(rate.mean()), rel=1e-4)  # c is the same everywhere
    assert step.metrics["force_up_share"] == 0


def test_figures_of_many_steps_are_those_of_all_their_tokens():
    _, _, monitor = train(grpo, steps=3, probe_every=2)
    merged = monitor.metrics(reset=False)
    tables = [step.tokens for step in monitor.steps]
    entropy = torch.tensor([x for t in tables for x in t["entropy"].to_pylist()])
    assert merged["entropy"] == pytest.approx(float(entropy.mean()), rel=1e-5)
    assert merged["tokens"] == 20 and merged["residual"] < 1e-5
    assert [step.actual is not None for step in monitor.steps] == [True, True, False]
    near = [step.actual[:9].mean() for step in monitor.steps[:2]]
    assert merged["near/actual"] == pytest.approx(float(sum(near)) / 2, rel=1e-5)
    assert monitor.metrics() == merged and monitor.metrics() == {}


def test_metadata_reaches_passes_by_forward_or_by_backward():
    """`micro_batch` around the backward pass alone, as in a loop that makes its loss elsewhere, tells as much."""
    model, ids = tiny("llama"), data()
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    with td.Monitor(model, opt, on_error="raise") as monitor:
        for scale in (1.0, 2.0):
            loss = sft(model, ids)
            with monitor.micro_batch(advantages=scale * torch.ones(4)):
                loss.backward()
        opt.step()
        step = monitor.step_end()
    assert step.tokens["advantage"].to_pylist() == [1.0] * 20 + [2.0] * 20
    assert step.tokens["micro_batch"].to_pylist() == [0] * 20 + [1] * 20
    assert step.tokens["sequence"].to_pylist() == [i // 5 for i in range(40)]
    with pytest.raises(ValueError, match="one row per sequence of the batch"):
        one_record(model, sft, ids, advantages=torch.ones(3))


def test_a_wrong_temperature_is_named():
    def loss(m, ids):
        out = m(ids).logits / 0.5
        return -out.log_softmax(-1)[:, PROMPT - 1 : -1].gather(-1, ids[:, PROMPT:, None]).mean()

    with pytest.raises(ValueError, match="not one of log-probs, entropies and mean log-probs at temperature=1"):
        one_record(tiny("llama"), loss, data())

    def tapped(m, ids):
        lp = (m(ids).logits / 0.5).log_softmax(-1)[:, PROMPT - 1 : -1].gather(-1, ids[:, PROMPT:, None]).squeeze(-1)
        return -td.tap(lp, ids[:, PROMPT:]).mean()

    with pytest.raises(ValueError, match="differ by .* nats .*temperature=1: is that what the loss divides by"):
        one_record(tiny("llama"), tapped, data())

    def masked(m, ids):
        lp = answers(m, ids)[0]
        return -td.tap(lp, ids[:, PROMPT:], torch.arange(5).expand(4, 5) > 2).mean()

    with pytest.raises(ValueError, match="falls on tokens taken for unscored"):
        one_record(tiny("llama"), masked, data())


def test_tokens_have_the_turn_of_the_conversation_that_they_stand_in():
    """A conversation scored throughout: what the template wrote in each role's turn, joined, is that role's messages."""
    tokenizer = tokenizer_of("chatml")
    talk = [*MORE, assistant("Red is left over.")]
    ids = torch.tensor([tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"]])
    model = tiny("llama", vocabulary=len(tokenizer))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with td.Monitor(model, optimizer, tokenizer=tokenizer, on_error="raise") as monitor:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        (step,) = [monitor.step_end()]
    rows = step.tokens.to_pylist()
    for role in ("user", "assistant"):
        joined = "".join(row["token"] for row in rows if row["turn"] == role)
        assert all((m["content"] in joined) == (m["role"] == role) for m in talk), joined
    assert {row["turn"] for row in rows} == {"user", "assistant", "markup"}
