"""What notebooks show and pandas gets: every number is the result's own, and text of a model is text."""

from dataclasses import replace
from html.parser import HTMLParser

import pyarrow as pa
import pytest
import torch

import tokdyn as td
from tokdyn.runs.notebook import SIDE, colour, drawn
from tokdyn.testing import random_chis, tiny

NASTY = "<script>alert(1)</script>&"


class Cells(HTMLParser):
    """Counts start tags, and collects titles."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.titles, self.inside = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag == "title"
        if self.inside:
            self.titles.append("")
        self.titles += [dict(attrs)["title"]] if "title" in dict(attrs) else []

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.titles[-1] += data


@pytest.fixture(scope="module")
def setting():
    return tiny("llama"), random_chis([(3, 4), (2, 3)], seed=1), random_chis([(2, 5)], seed=2)


def test_forces_show_every_entry_and_the_strongest_first(setting):
    f = td.forces(*setting)
    html = f._repr_html_()
    shown = [float(title.rpartition(": ")[2]) for title in Cells(html).titles]
    assert shown == pytest.approx(f.matrix.flatten().tolist(), rel=1e-3)  # four digits
    rows = html.partition("<tbody>")[2].split("</tr>")[:-1]
    listed = [abs(float(row.rpartition("<td>")[2].partition("<")[0])) for row in rows]
    assert listed == pytest.approx(f.matrix.abs().flatten().topk(5).values.tolist(), rel=1e-3)
    frame = f.to_dataframe()
    assert frame["force"].to_numpy().reshape(f.matrix.shape) == pytest.approx(f.matrix.numpy())
    assert (frame["m"] * f.matrix.shape[1] + frame["l"]).tolist() == list(range(f.matrix.numel()))


def test_a_large_matrix_is_drawn_as_sums_of_blocks():
    """The sum over all cells that are drawn is the sum over all entries."""
    matrix = torch.randn(SIDE + 7, 3 * SIDE + 1, dtype=torch.float64)
    found = Cells(drawn(matrix, ["a"] * len(matrix), ["b"] * matrix.shape[1]))
    shown = [float(title.rpartition(": ")[2]) for title in found.titles]
    assert len(shown) <= SIDE * SIDE
    assert sum(shown) == pytest.approx(float(matrix.sum()), abs=len(shown) * 5e-4 * float(max(map(abs, shown))))


def test_colours_are_signed_and_end_at_one():
    assert colour(2.0) == colour(1.0) == "#1d5fa6" and colour(-1.0) == "#a84e04" and colour(0.0) == "#f7f7f5"
    assert colour(float("nan")) == "#9a9a9a"


def test_reductions_verification_kernel_and_step_say_their_numbers(setting, tmp_path):
    model, update, observe = setting
    f = td.forces(model, update, observe, reduce="observe")
    assert [float(x) for x in Cells(f._repr_html_()).titles] == pytest.approx(f.vector.tolist(), rel=1e-3)
    assert f.to_dataframe()["force"].tolist() == f.vector.tolist()
    check = td.verify(model, update, observe)
    assert f"order {check.order:.2f}" in check._repr_html_() and "The prediction holds" in check._repr_html_()
    assert check.to_dataframe()["actual"].tolist() == check.actual.tolist()
    kernel = td.kernel(model, update, observe, samples=2)
    assert len(Cells(kernel._repr_html_()).titles) == kernel.norm.numel() == len(kernel.to_dataframe())
    assert kernel.to_dataframe()["trace_error"].tolist() == kernel.trace_error.flatten().tolist()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with td.Monitor(model, optimizer) as monitor:
        model(update[0].ids[None], labels=update[0].ids[None]).loss.backward()
        optimizer.step()
        step = monitor.step_end()
    optimizer.zero_grad()
    assert f"<td>{step.metrics['c_up']:.4g}</td>" in step._repr_html_() and len(step.to_dataframe()) == len(step.c)
    sharded = td.forces(model, update, observe, out=tmp_path / "blocks")
    assert str(tmp_path / "blocks") in sharded._repr_html_()


def test_a_run_shows_its_answers_and_findings_and_hostile_text_stays_text(setting):
    model, update, observe = setting
    run = td.profile(model, update, observe, td.objectives.SFT())
    rows = [row for row in run.tokens.to_pylist() if row["side"] == "observed"]
    shown = [float(x) for x in Cells(run._repr_html_()).titles]
    assert shown == pytest.approx([row["actual"] for row in rows], rel=1e-3)
    observed, pairs = run.to_dataframe(), run.to_dataframe("pairs")
    assert observed["force"].tolist() == pytest.approx(run.vector.tolist()) and "c" not in observed
    sums = run.matrix.double().sum(1).tolist()
    assert pairs.groupby("m")["force"].sum().tolist() == pytest.approx(sums, rel=1e-12, abs=1e-12)
    assert run.to_dataframe("updated")["c"].tolist() == pytest.approx([1.0] * sum(map(len, update)))
    with pytest.raises(ValueError, match="observed"):
        run.to_dataframe("rows")
    tokens = run.tokens.set_column(run.tokens.column_names.index("token"), "token", pa.array([NASTY] * len(run.tokens)))
    about = run.about | {"findings": [{"title": NASTY, "text": NASTY}]}
    html = replace(run, tokens=tokens, about=about)._repr_html_()
    assert "script" not in Cells(html).tags and html.count("&lt;script&gt;") == len(rows) + 2
