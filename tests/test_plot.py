"""Figures hold the numbers of the result that they are drawn from."""

import numpy as np
import pytest

import tokdyn as td
from tokdyn.runs.by_sequence import BySequence
from tokdyn.runs.contexts import Contexts
from tokdyn.testing import random_chis, tiny

pytest.importorskip("matplotlib")
from tokdyn import plot  # noqa: E402


@pytest.fixture(scope="module")
def setting():
    return tiny("llama"), random_chis([(3, 4)], seed=1), random_chis([(2, 5)], seed=2)


def test_a_matrix_is_drawn_cell_by_cell_on_a_scale_about_zero(setting, tmp_path):
    f = td.forces(*setting)
    figure = plot.matrix(f, eta=0.5)
    (image,) = figure.axes[0].images
    assert np.asarray(image.get_array()) == pytest.approx(0.5 * f.matrix.numpy())
    assert image.norm.vmin == -image.norm.vmax == pytest.approx(-0.5 * float(f.matrix.abs().max()))
    figure.savefig(tmp_path / "matrix.pdf")
    with pytest.raises(ValueError, match="no matrix"):
        plot.matrix(td.forces(*setting, reduce="update"))


def test_a_run_is_drawn_net_with_its_changes_and_its_check(setting):
    run = td.profile(*setting, td.objectives.SFT())
    contexts = Contexts.of(BySequence.of(run.tokens, run.matrix), run.about["sequences"])
    (image,) = plot.matrix(run).axes[0].images
    assert np.asarray(image.get_array()) == pytest.approx(contexts.matrix.numpy(), rel=1e-6)
    rows = [row for row in run.tokens.to_pylist() if row["side"] == "observed"]
    (points,) = plot.predicted_against_actual(run).axes[0].collections
    assert np.asarray(points.get_offsets()) == pytest.approx(np.array([[row["predicted"], row["actual"]] for row in rows]))
    predicted, actual = plot.changes(run).axes[0].containers
    for bars, name in ((predicted, "predicted"), (actual, "actual")):
        assert [bar.get_width() for bar in bars] == pytest.approx([sum(row[name] for row in rows)])
    check = td.verify(*setting)
    (points,) = plot.predicted_against_actual(check).axes[0].collections
    assert np.asarray(points.get_offsets())[:, 1] == pytest.approx(check.actual.numpy())
