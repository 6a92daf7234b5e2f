"""Two runs compared: b less a token by token, aligned by what the tokens are, and the page says the same numbers."""

from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from pages import Tags

import tokdyn as td
from tokdyn.report.diff import render
from tokdyn.report.text import signed
from tokdyn.runs.difference import Difference
from tokdyn.sequences import Chi
from tokdyn.testing import tiny


def chis(*ids, first=2):
    return [
        Chi(torch.tensor(i), torch.arange(len(i)) >= first, group=g, tokens=tuple(f"<{x}>" for x in i), prompt=f"p{g}")
        for g, i in enumerate(ids)
    ]


@pytest.fixture(scope="module")
def runs():
    """Two seeds of a tiny model; of the second's observed sequence the middle token is another one."""
    update, other = chis([5, 6, 7, 8], [9, 4, 3, 2, 1]), [5, 6, 1, 2, 3, 4]
    a = td.profile(tiny("llama", seed=0), update, chis(other), td.objectives.SFT())
    b = td.profile(tiny("llama", seed=1), update, chis([5, 6, 1, 7, 3, 4]), td.objectives.SFT())
    return a, b


def test_aligned_tokens_and_their_differences(runs):
    a, b = runs
    found = Difference.of(a, b, unit="rate")
    assert [pair.a["token_id"] for pair in found.observed] == [1, 3, 4] == [pair.b["token_id"] for pair in found.observed]
    keep = torch.tensor([0, 2, 3])
    assert torch.allclose(found.matrix, (b.matrix[keep] - a.matrix[keep]).double())
    assert [pair.change("force") for pair in found.observed] == pytest.approx((b.vector - a.vector)[keep].tolist(), rel=1e-5)
    assert found.missing == {"a": 1, "b": 1} and len(found.updated) == 5
    m, _, change = found.pushes()[0]  # no two update tokens share a context here: the largest entry
    assert abs(change) == pytest.approx(float(found.matrix[m].abs().max())) == pytest.approx(float(found.matrix.abs().max()))
    sums = found.answers()["response 1"]
    assert sums["force_b"] == pytest.approx(float(b.vector[keep].sum()), rel=1e-5)


def test_each_run_takes_its_own_step(runs):
    """Forces are in nats after the step, b's times its eta less a's times its own; by rate where a run took none."""
    a, b = runs
    found, (eta_a, eta_b) = Difference.of(a, b), (run.about["settings"]["eta"] for run in runs)
    keep = torch.tensor([0, 2, 3])
    assert found.unit == "step" and eta_a != eta_b
    torch.testing.assert_close(found.matrix, eta_b * b.matrix[keep].double() - eta_a * a.matrix[keep].double())
    after = (eta_b * b.vector - eta_a * a.vector)[keep]
    assert [pair.change("force") for pair in found.observed] == pytest.approx(after.tolist(), rel=1e-5)
    assert found.as_dict()["unit"] == "step"
    still = replace(b, about=b.about | {"settings": b.about["settings"] | {"eta": None}})
    assert Difference.of(a, still).unit == "rate"
    for unit in ("step", "nats"):
        with pytest.raises(ValueError, match="unit must be"):
            Difference.of(a, still, unit)


def test_a_place_that_one_run_does_not_train_has_no_push_there(runs):
    """The places' changes add up to the change of each token; a pair against its chosen answer and another text."""
    plus, minus = (chi.with_(role=role, group=0, prompt="p") for chi, role in zip(
        chis([5, 6, 7, 8, 4], [5, 6, 7, 9, 4]), ("chosen", "rejected"), strict=True))  # fmt: skip
    further = chis([9, 4, 3, 2, 1])[0].with_(role="chosen", group=1, prompt="q")
    model = tiny("llama", seed=0)
    a = td.profile(model, [plus, minus], [plus, minus], td.objectives.DPO())
    b = td.profile(model, [plus, further], [plus, minus], td.objectives.SFT())
    found = Difference.of(a, b)
    assert found.matrix.shape == (6, 3 + 3)  # what the pair says alike is one place each; the further answer has its own
    change = torch.tensor([pair.change("force") for pair in found.observed], dtype=torch.float64)
    scale = float(found.matrix.abs().sum(1).max())
    torch.testing.assert_close(found.matrix.sum(1), change, rtol=0, atol=1e-5 * scale)  # fp32 sums of about ten entries


def test_a_run_against_itself_is_zero_and_against_a_stranger_is_refused(runs):
    a, b = runs
    same = Difference.of(a, a)
    assert same.most("force") == [] == same.pushes()
    assert same.settings == [] and float(same.matrix.abs().max()) == 0 and same.missing == {"a": 0, "b": 0}
    stranger = td.profile(tiny("llama"), chis([5, 6, 7]), chis([1, 2, 8, 9]), td.objectives.SFT(), method="none")
    with pytest.raises(ValueError, match="no token in common"):
        Difference.of(a, stranger)


def test_the_page_of_two_runs_says_the_numbers_and_hostile_text_stays_text(runs):
    a, b = runs
    nasty = "<img src=x onerror=alert(1)>"
    column = a.tokens.column_names.index("token")
    a = replace(a, tokens=a.tokens.set_column(column, "token", pa.array([nasty] * len(a.tokens))))
    tags = Tags(render(Difference.of(a, b), ("runs/<a>", "runs/b")))
    assert not any(tag in ("img", "script") for tag, _ in tags.tags)
    found = Difference.of(a, b)
    for pair in found.observed:
        assert signed(pair.change("force")) in tags.words and signed(pair.change("log_prob")) in tags.words
    assert "runs/<a>" in tags.words and nasty.replace(" ", "␣") in tags.words
