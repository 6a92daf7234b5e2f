"""What every study shares: how it is found, written to disk, put on a page and into the documents."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from claims import CLAIMS, FALSE, FEW, LANGUAGE, LONG, problems
from typer.testing import CliRunner

import tokdyn.studies.squeezing as any_study
from tokdyn import studies
from tokdyn.cli import app
from tokdyn.studies import figures, gallery
from tokdyn.studies.result import Claim, Result, estimate

FOLDER = Path(studies.__file__).parent


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def made(holds=True, title="A & B grow together"):
    figure, axes = figures.figure(title="One < two & three")
    figures.band(axes, [0, 1], [[0, 1], [0, 3]], figures.BLUE, "mean")
    axes.set(xlabel="step", ylabel="log π, nats", title="a panel")
    axes.legend()
    claim = Claim("It grows (*A paper*, §1).", "slope > 0", "2 ± 1 | nats", holds)
    return Result(title, [claim], {"c": pa.table({"x": [1.0, 2.0]})}, {"f": figure}, "First.\n\nSecond.")


def test_every_module_that_runs_is_a_study_with_its_source():
    found = studies.names()
    assert found == sorted(found) and {"squeezing", "zig-zag", "simko-tree"} <= set(found)
    assert not {"result", "gallery", "figures", "classifiers"} & set(found)
    for name in found:
        text = (FOLDER / f"{name.replace('-', '_')}.py").read_text()
        assert re.match(r'"""[^"]+\n\n[^"]*(arXiv|preprint|thesis)', text), f"{name}: a docstring with its source"
        assert re.search(r"\ndef run\(quick: bool = False, seed: int = 0[^)]*\) -> Result:", text), name


def test_every_study_is_run_and_every_claim_of_the_gallery_is_listed():
    """The verdicts there are those that the list gives as reasons."""
    assert sorted(CLAIMS) == studies.names()
    verdicts = {}
    for line in (FOLDER.parents[1] / "docs" / "gallery.md").read_text().splitlines():
        if row := re.fullmatch(r"\| \[(.+?)\]\(#.+?\) \| (.+?) \| .* \| (yes|\*\*no\*\*) \|", line):
            verdicts[row[1], row[2].replace("\\|", "|")] = row[3] == "yes"
    assert set(verdicts) == {(study, text) for study, listed in CLAIMS.items() for text in listed.texts(quick=False)}
    for study, listed in CLAIMS.items():
        assert set(listed.open.values()) <= {FEW, FALSE, LONG}
        holds = {*listed.asserted, *(text for text, why in listed.open.items() if why != FALSE)}
        assert holds == {text for text in listed.texts(quick=False) if verdicts[study, text]}, study


def test_a_claim_that_fails_is_gone_reworded_or_new_is_named():
    asserted, listed = LANGUAGE["ches-filter"].asserted[0], LANGUAGE["ches-filter"].open
    claims = [dict(claim=text, oracle="o", measured="m", holds=text == asserted) for text in (asserted, *listed)]
    told = dict(study="ches-filter", quick=True, claims=claims)
    assert problems(told) == []
    claims[0]["holds"] = False
    assert problems(told) == [f"ches-filter: does not hold: {asserted!r}. Oracle: o. Measured: m."]
    claims[0] |= dict(claim=asserted.replace("factor", "second factor"), holds=True)
    gone, new = problems(told)
    assert gone == f"ches-filter: missing: {asserted!r}, reworded as {claims[0]['claim']!r}?"
    assert new.startswith(f"ches-filter: not listed: {claims[0]['claim']!r}")
    del claims[0]
    assert problems(told) == [f"ches-filter: missing: {asserted!r}"]
    only_full = next(text for text, why in LANGUAGE["grpo-forces"].open.items() if why == LONG)
    full = dict(study="grpo-forces", quick=False, claims=[])
    assert any(only_full in problem for problem in problems(full))
    assert not any(only_full in problem for problem in problems(full | dict(quick=True)))


def test_names_that_are_no_study_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="no study 'squezing', did you mean 'squeezing'"):
        studies.load("squezing")
    result = call("study", "nothing-like-it")
    assert result.exit_code == 2 and "there is no study" in result.stderr and "Traceback" not in result.stderr


def test_a_study_that_lacks_its_packages_says_what_to_install(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")

    monkeypatch.setattr(studies, "import_module", absent)
    with pytest.raises(ValueError, match="needs sklearn: pip install"):
        studies.load("digits")


def test_estimate_is_students_interval():
    values = [1.0, 2.0, 4.0, 7.0, 11.0]
    x = estimate(values)
    half = 2.7764451 * np.std(values, ddof=1) / 5**0.5  # t of 4 degrees of freedom at 97.5%
    assert x.mean == 5 and x.half == pytest.approx(half, rel=1e-6) and (x.low, x.high) == (5 - x.half, 5 + x.half)
    assert x.words("nats") == "5.0 ± 5.0 nats (95%, 5 seeds)"
    assert estimate([-0.5, -0.5]).words() == "−0.5 ± 0 (95%, 2 seeds)"
    alone = estimate([-0.25])  # one run has no interval and says so
    assert (alone.low, alone.high, alone.words("nats")) == (-0.25, -0.25, "−0.250 nats (one seed)")
    for bad in ([], [float("nan")], [1.0, float("inf")]):
        with pytest.raises(ValueError, match="finite values"):
            estimate(bad)


def test_an_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(size=(2000, 5))
    covered = np.mean([estimate(row.tolist()).low <= 0 <= estimate(row.tolist()).high for row in draws])
    assert abs(covered - 0.95) < 3 * (0.95 * 0.05 / 2000) ** 0.5  # three standard errors


def test_folder_holds_claims_curves_figures_and_pages(tmp_path):
    out = tmp_path / "squeezing"
    told = gallery.save(made(), any_study, out, quick=True, seed=3, seconds=1.25)
    assert {p.name for p in out.iterdir()} == {"result.json", "curves", "f.svg", "section.html", "page.html"}
    assert gallery.read(out) == told == json.loads((out / "result.json").read_text())
    assert told["claims"] == [dict(claim="It grows (*A paper*, §1).", oracle="slope > 0", measured="2 ± 1 | nats", holds=True)]
    assert parquet.read_table(out / "curves" / "c.parquet")["x"].to_pylist() == [1.0, 2.0]
    page = (out / "page.html").read_text()
    assert "A &amp; B grow together" in page and "First." in page and "http-equiv" in page
    assert not re.search(r'(src|href)="(?!#|data:)', page.replace("xlink:href", "href")), "the page needs nothing else"
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert gallery.save(made(False), any_study, out, quick=True, seed=3, seconds=1.0)["claims"][0]["holds"] is False
    assert "DOES NOT HOLD" in gallery.verdicts(gallery.read(out))[0]


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds no study"):
        gallery.save(made(), any_study, tmp_path, quick=True, seed=0, seconds=1.0)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    with pytest.raises(ValueError, match=r"no result\.json"):
        gallery.read(tmp_path)


def test_figures_are_the_same_text_each_time_and_follow_the_page():
    one, two = (figures.svg(made().figures["f"], "n", inline=True) for _ in range(2))
    assert one == two and 'aria-label="One &lt; two &amp; three"' in one
    assert "var(--f0072b2)" in one and "#0072b2" not in one.lower()
    alone = figures.svg(made().figures["f"], "n", inline=False)
    assert "prefers-color-scheme:dark" in alone and "--f0072b2:#0072b2" in alone


def test_gallery_and_documents_come_from_the_folders_alone(tmp_path):
    for name, holds in (("squeezing", True), ("zig-zag", False)):
        module = studies.load(name)
        gallery.save(made(holds, f"{name} found"), module, tmp_path / "runs" / name, quick=False, seed=0, seconds=9.0)
    folders = gallery.saved(tmp_path / "runs")
    page = gallery.page(folders)
    assert page.count("<svg") == 2 and "1 of 2 claims hold, in 2 studies" in page and "squeezing found" in page
    (tmp_path / "docs").mkdir()
    result = call("study", "--docs", tmp_path / "docs", "--out", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "docs" / "gallery.md").read_text()
    assert "| [squeezing](#squeezing) | It grows (*A paper*, §1). | slope > 0 | 2 ± 1 \\| nats | yes |" in text
    assert "| **no** |" in text and "Not run yet: " in text and "digits" in text
    for link in re.findall(r"\]\((gallery/[^)]+)\)", text):
        assert (tmp_path / "docs" / link).read_text().startswith("<svg")
