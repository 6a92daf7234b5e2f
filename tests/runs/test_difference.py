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
    found = Difference.of(a, b)
    assert [pair.a["token_id"] for pair in found.observed] == [1, 3, 4] == [pair.b["token_id"] for pair in found.observed]
    keep = torch.tensor([0, 2, 3])
    assert torch.allclose(found.matrix, (b.matrix[keep] - a.matrix[keep]).double())
    assert [pair.change("force") for pair in found.observed] == pytest.approx((b.vector - a.vector)[keep].tolist(), rel=1e-5)
    assert found.missing == {"a": 1, "b": 1} and len(found.updated) == 5
    m, _, change = found.pushes()[0]  # no two update tokens share a context here: the largest entry
    assert abs(change) == pytest.approx(float(found.matrix[m].abs().max())) == pytest.approx(float(found.matrix.abs().max()))
    sums = found.answers()["response 1"]
    assert sums["force_b"] == pytest.approx(float(b.vector[keep].sum()), rel=1e-5)


def test_a_run_against_itself_is_zero_and_against_a_stranger_is_refused(runs):
    a, b = runs
    same = Difference.of(a, a)
    assert same.settings == [] and float(same.matrix.abs().max()) == 0 and same.missing == {"a": 0, "b": 0}
    stranger = td.profile(tiny("llama"), chis([5, 6, 7]), chis([1, 2, 8, 9]), td.objectives.SFT(), method="none")
    with pytest.raises(ValueError, match="no token in common"):
        Difference.of(a, stranger)


def test_the_page_of_two_runs_says_the_numbers_and_hostile_text_stays_text(runs):
    a, b = runs
    nasty = "<img src=x onerror=alert(1)>"
    column = a.tokens.column_names.index("token")
    a = replace(a, tokens=a.tokens.set_column(column, "token", pa.array([nasty] * len(a.tokens))))
    tags = Tags(render(a, b, ("runs/<a>", "runs/b")))
    assert not any(tag in ("img", "script") for tag, _ in tags.tags)
    found = Difference.of(a, b)
    for pair in found.observed:
        assert signed(pair.change("force")) in tags.words and signed(pair.change("log_prob")) in tags.words
    assert "runs/<a>" in tags.words and nasty.replace(" ", "␣") in tags.words
