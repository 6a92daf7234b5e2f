"""What every study shares: how it is found, written to disk, put on a page and into the documents."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from claims import CLAIMS, FALSE, FEW, LANGUAGE, LONG, UNSURE, problems
from typer.testing import CliRunner

import tokdyn.studies.squeezing as any_study
from tokdyn import studies
from tokdyn.cli import app
from tokdyn.studies import documents, figures, gallery, parts
from tokdyn.studies.gallery import Settings
from tokdyn.studies.readout_vs_exact import _interval
from tokdyn.studies.result import Claim, Estimate, Result, Verdict, above, below, both, estimate, jackknife, of_runs, told

FOLDER = Path(studies.__file__).parent


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


HOLDS, NO, UNDECIDED = Verdict.HOLDS, Verdict.NO, Verdict.UNDECIDED


def made(verdict=HOLDS, title="A & B grow together"):
    figure, axes = figures.figure(title="One < two & three")
    figures.band(axes, [0, 1], [[0, 1], [0, 3]], figures.BLUE, "mean")
    axes.set(xlabel="step", ylabel="log π, nats", title="a panel")
    axes.legend()
    claim = Claim("It grows (*A paper*, §1).", "slope > 0", "2 ± 1 | nats", verdict)
    return Result(title, [claim], {"c": pa.table({"x": [1.0, 2.0]})}, {"f": figure}, "First.\n\nSecond.")


def test_every_module_that_runs_is_a_study_with_its_source():
    found = studies.names()
    assert found == sorted(found) and {"squeezing", "zig-zag", "simko-tree"} <= set(found)
    assert not {"result", "gallery", "figures", "classifiers"} & set(found)
    for name in found:
        text = (FOLDER / f"{name.replace('-', '_')}.py").read_text()
        assert re.match(r'"""[^"]+\n\n[^"]*(arXiv|preprint|thesis)', text), f"{name}: a docstring with its source"
        assert re.search(r"\ndef run\(\s*quick: bool = False,\s+seed: int = 0[^)]*\) -> Result:", text), name


def test_every_study_is_run_and_every_claim_of_the_gallery_is_listed():
    """The verdicts there are those that the list gives as reasons; a study whose code has changed since says so on the page."""
    assert sorted(CLAIMS) == studies.names()
    found = {told["study"]: told for told in documents.results(FOLDER.parents[1] / "docs")}
    page = (FOLDER.parents[1] / "docs" / "gallery.md").read_text()
    said = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    verdict_of = {FEW: "holds", FALSE: "no", UNSURE: "undecided"}
    for study, listed in CLAIMS.items():
        assert set(listed.open.values()) <= {FEW, FALSE, UNSURE, LONG}
        if study not in found:
            assert study in page.partition("Not run yet: ")[2].partition("\n")[0]
        elif documents.stale(found[study]):
            assert "Its code has changed since" in said[study], study
        else:
            verdicts = {claim["claim"]: claim["verdict"] for claim in found[study]["claims"]}
            assert set(verdicts) == listed.texts(quick=False), study
            assert all(verdicts[text] == "holds" for text in listed.asserted), study
            for text, why in listed.open.items():
                assert verdicts[text] == verdict_of.get(why, verdicts[text]), (study, text)


def test_a_claim_that_fails_is_gone_reworded_or_new_is_named():
    asserted, listed = LANGUAGE["ches-filter"].asserted[0], LANGUAGE["ches-filter"].open
    claims = [dict(claim=text, oracle="o", measured="m", verdict="holds" if text == asserted else "no")
              for text in (asserted, *listed)]  # fmt: skip
    told = dict(study="ches-filter", quick=True, claims=claims)
    assert problems(told) == []
    for verdict in ("no", "undecided"):
        claims[0]["verdict"] = verdict
        assert problems(told) == [f"ches-filter: {verdict}: {asserted!r}. Oracle: o. Measured: m."]
    claims[0] |= dict(claim=asserted.replace("factor", "second factor"), verdict="holds")
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


def test_a_verdict_is_the_interval_against_the_threshold():
    for low, high, over, under in ((0.1, 0.3, HOLDS, NO), (-0.3, -0.1, NO, HOLDS), (-0.1, 0.3, UNDECIDED, UNDECIDED),
                                   (-0.2, 0.0, NO, UNDECIDED), (0.0, 0.2, UNDECIDED, NO)):  # fmt: skip
        x = Estimate((low + high) / 2, (high - low) / 2, 5)
        assert (above(x), below(x)) == (over, under)
        shifted = Estimate(x.mean + 7, x.half, 5)
        assert (above(shifted, 7 - 1), below(shifted, 7 + 1)) == (HOLDS, HOLDS)
    one = estimate([5.0])  # one run decides nothing, however far off
    assert (above(one), below(one)) == (UNDECIDED, UNDECIDED)
    assert (told(True), told(False)) == (HOLDS, NO)


def test_a_claim_of_parts_is_as_weak_as_its_weakest():
    assert both(HOLDS, HOLDS) == HOLDS == both()
    assert both(HOLDS, UNDECIDED) == UNDECIDED
    assert both(UNDECIDED, NO, HOLDS) == NO


def test_a_true_claim_is_called_false_as_seldom_as_the_interval_says():
    """Of a mean that lies at the threshold: holds and no in 2.5% each, undecided in the rest."""
    draws = np.random.default_rng(1).normal(size=(2000, 5))
    said = [above(estimate(row.tolist())) for row in draws]
    for verdict, share in ((HOLDS, 0.025), (NO, 0.025), (UNDECIDED, 0.95)):
        assert abs(said.count(verdict) / 2000 - share) < 3 * (share * (1 - share) / 2000) ** 0.5  # three standard errors


def test_several_runs_are_the_units_and_of_one_run_its_answers():
    assert of_runs([[1, 3], [2, 6], [5, 5]]) == estimate([2, 4, 5])
    assert of_runs([[1, 3, 8]]) == estimate([1, 3, 8], "answers") and of_runs([[1, 3, 8]]).of == "answers"


def test_jackknife_of_a_mean_is_students_interval_and_of_a_correlation_covers_it():
    values = [1.0, 2.0, 4.0, 7.0, 11.0]
    x, y = jackknife(values, lambda some: sum(some) / len(some), "answers"), estimate(values)
    assert (x.mean, x.half, x.n) == (pytest.approx(y.mean), pytest.approx(y.half, rel=1e-12), 5)
    few = jackknife(values[:4], max, "pairs")
    assert few.n == 1 and above(few) == UNDECIDED and few.words() == "+7.000 (one set of 4 pairs)"
    draws = np.random.default_rng(2).multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], size=(200, 20))
    inside = 0
    for pairs in draws:
        r = jackknife(list(pairs), lambda some: float(np.corrcoef(np.array(some).T)[0, 1]), "pairs")
        inside += r.low <= 0.5 <= r.high
    assert inside / 200 > 0.95 - 3 * (0.95 * 0.05 / 200) ** 0.5 - 0.02  # three standard errors, and the tails of r at n = 20


def test_an_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(size=(2000, 5))
    covered = np.mean([estimate(row.tolist()).low <= 0 <= estimate(row.tolist()).high for row in draws])
    assert abs(covered - 0.95) < 3 * (0.95 * 0.05 / 2000) ** 0.5  # three standard errors


def test_folder_holds_claims_curves_figures_and_pages(tmp_path):
    out = tmp_path / "squeezing"
    saved = gallery.save(made(), any_study, out, Settings(True, 3), seconds=1.25)
    assert {p.name for p in out.iterdir()} == {"result.json", "curves", "f.svg", "section.html", "page.html"}
    assert gallery.read(out) == saved == json.loads((out / "result.json").read_text())
    assert saved["claims"] == [
        dict(claim="It grows (*A paper*, §1).", oracle="slope > 0", measured="2 ± 1 | nats", verdict="holds")
    ]
    assert (saved["quick"], saved["seed"], saved["source"]) == (True, 3, gallery.source_digest("squeezing"))
    assert parquet.read_table(out / "curves" / "c.parquet")["x"].to_pylist() == [1.0, 2.0]
    page = (out / "page.html").read_text()
    assert "A &amp; B grow together" in page and "First." in page and "http-equiv" in page
    assert not re.search(r'(src|href)="(?!#|data:)', page.replace("xlink:href", "href")), "the page needs nothing else"
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for verdict, line, cell in ((NO, "DOES NOT HOLD: ", ">no</strong>"), (UNDECIDED, "UNDECIDED: ", "<em>undecided</em>")):
        assert gallery.save(made(verdict), any_study, out, Settings(), seconds=1.0)["claims"][0]["verdict"] == verdict
        assert gallery.verdicts(gallery.read(out))[0].startswith(line) and cell in (out / "page.html").read_text()


def test_results_of_the_earlier_format_are_read(tmp_path):
    old = dict(format="tokdyn study 1", study="squeezing", claims=[dict(claim="A", holds=True), dict(claim="B", holds=False)])
    (tmp_path / "result.json").write_text(json.dumps(old))
    assert [claim["verdict"] for claim in gallery.read(tmp_path)["claims"]] == ["holds", "no"]
    (tmp_path / "result.json").write_text(json.dumps(old | {"format": "tokdyn study 9"}))
    with pytest.raises(ValueError, match="run the study again"):
        gallery.read(tmp_path)


def test_a_digest_follows_what_a_study_is_computed_by(monkeypatch):
    """Its module and those it imports here; not the page, the figures and the verdicts."""
    before = {name: gallery.source_digest(name) for name in ("dpo-decay", "extended-sft", "squeezing")}
    real = gallery.files

    class Changed:
        def joinpath(self, name):
            class File:
                def read_text(self, _):
                    return real("tokdyn.studies").joinpath(name).read_text("utf-8") + ("#" if name == changed else "")

            return File()

    monkeypatch.setattr(gallery, "files", lambda _: Changed())
    for changed, moved in (("dpo_decay.py", {"dpo-decay", "extended-sft"}), ("texts.py", {"dpo-decay", "extended-sft"}),
                           ("squeezing.py", {"squeezing"}), ("figures.py", set()), ("gallery.py", set())):  # fmt: skip
        assert {name for name in before if gallery.source_digest(name) != before[name]} == moved, changed


def test_parts_are_made_once_and_again_for_other_settings(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return [{"x": 1.5, "nan": float("nan")}]

    for key, times in (("a", 1), ("a", 1), ("b", 2)):
        found = parts.kept_in(tmp_path / "p", key)("one", make)
        assert found[0]["x"] == 1.5 and found[0]["nan"] != found[0]["nan"] and len(calls) == times
    assert parts.spent(tmp_path / "p", "b") > 0 == parts.spent(tmp_path / "p", "a")
    with pytest.raises(KeyboardInterrupt):  # nothing half made is kept
        parts.kept_in(tmp_path / "p", "b")("two", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["one.json"]


def test_all_runs_what_is_not_finished_and_says_how_long_it_takes(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(studies, "names", lambda: ["squeezing", "zig-zag"])

    def run(name, out, settings, *, resume):
        ran.append(name)
        return gallery.save(made(), studies.load(name), out, settings, seconds=120.0)

    monkeypatch.setattr(gallery, "run_study", run)
    first = call("study", "--all", "--quick", "--out", tmp_path)
    assert ran == ["squeezing", "zig-zag"] and "2 of 2 studies to run, about 1 minutes" in first.output
    assert "All 2 studies are finished" in call("study", "--all", "--quick", "--out", tmp_path).output and len(ran) == 2
    saved = gallery.read(tmp_path / "zig-zag") | {"source": "another"}
    (tmp_path / "zig-zag" / "result.json").write_text(json.dumps(saved))
    call("study", "--all", "--quick", "--out", tmp_path)
    assert ran[2:] == ["zig-zag"]
    call("study", "--all", "--quick", "--fresh", "--out", tmp_path)
    assert ran[3:] == ["squeezing", "zig-zag"]
    folders = {name: tmp_path / name for name in studies.names()}
    said = gallery.outlook(["squeezing"], folders, Settings(quick=True))
    assert said.startswith("1 of 2")
    (tmp_path / "squeezing" / "result.json").write_text(json.dumps(gallery.read(tmp_path / "squeezing") | {"quick": False}))
    assert "2 minutes when they were last run" in gallery.outlook(["squeezing"], folders, Settings())


def test_a_model_or_texts_are_refused_where_a_study_has_its_own():
    result = call("study", "squeezing", "--model", "m")
    assert result.exit_code == 2 and "takes no --model" in result.stderr and "dpo-decay" in result.stderr
    result = call("study", "simko", "--data", "d.jsonl")
    assert result.exit_code == 2 and "takes no --data" in result.stderr and "sft-dynamics" in result.stderr


@pytest.mark.parametrize(
    "place, name, text",
    [
        ("study", "thesis.txt", "precious"),
        ("study", "result.json", '{"accuracy": 0.9}'),  # of another tool
        ("study", "result.json", '{"format": "tokdyn study 2"}'),  # ours, and something of somebody else's beside it
        ("study.part", "thesis.txt", "precious"),
        ("study.parts", "thesis.txt", "precious"),
    ],
)
def test_a_folder_with_other_things_is_left_alone(tmp_path, place, name, text):
    """A study replaces its folder, and two beside it that are named after it: by what is in them, never by their names."""
    (tmp_path / place).mkdir()
    (tmp_path / place / name).write_text(text)
    if "format" in text:
        (tmp_path / place / "curves").mkdir()
        (tmp_path / place / "curves" / "thesis.txt").write_text("precious")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"{place} exists already and holds no study"):
        gallery.save(made(), any_study, tmp_path / "study", Settings(True), seconds=1.0)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_a_folder_without_a_study_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no result\.json"):
        gallery.read(tmp_path)


def test_figures_are_the_same_text_each_time_and_follow_the_page():
    one, two = (figures.svg(made().figures["f"], "n", inline=True) for _ in range(2))
    assert one == two and 'aria-label="One &lt; two &amp; three"' in one
    assert "var(--f0072b2)" in one and "#0072b2" not in one.lower()
    alone = figures.svg(made().figures["f"], "n", inline=False)
    assert "prefers-color-scheme:dark" in alone and "--f0072b2:#0072b2" in alone


def test_gallery_and_documents_come_from_the_folders_alone(tmp_path):
    for name, verdict in (("squeezing", HOLDS), ("zig-zag", NO), ("digits", UNDECIDED)):
        module = studies.load(name)
        gallery.save(made(verdict, f"{name} found"), module, tmp_path / "runs" / name, Settings(), seconds=9.0)
    folders = gallery.saved(tmp_path / "runs")
    page = gallery.page(folders)
    assert page.count("<svg") == 3 and "squeezing found" in page
    assert "1 of 3 claims hold, 1 does not, 1 is undecided, in 3 studies" in page
    (tmp_path / "docs").mkdir()
    result = call("study", "--docs", tmp_path / "docs", "--out", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "docs" / "gallery.md").read_text()
    assert "| [squeezing](#squeezing) | It grows (*A paper*, §1). | slope > 0 | 2 ± 1 \\| nats | holds |" in text
    assert "| **no** |" in text and "| *undecided* |" in text and "Not run yet: " in text and "simko" in text
    for link in re.findall(r"\]\((gallery/[^)]+)\)", text):
        assert (tmp_path / "docs" / link).read_text().startswith("<svg")


def test_documents_keep_what_is_not_run_again_and_say_where_its_code_has_changed(tmp_path):
    docs, zig_zag = tmp_path / "docs", studies.load("zig-zag")
    for name, module in (("squeezing", any_study), ("zig-zag", zig_zag)):
        gallery.save(made(title=f"{name} first"), module, tmp_path / "one" / name, Settings(), seconds=9.0)
    documents.write_docs(tmp_path / "one", docs)
    gallery.save(made(NO, title="zig-zag again"), zig_zag, tmp_path / "two" / "zig-zag", Settings(), seconds=9.0)
    text = documents.write_docs(tmp_path / "two", docs).read_text()
    assert "squeezing first" in text and "zig-zag again" in text and "zig-zag first" not in text
    assert {p.name for p in (docs / "gallery").iterdir()} == {
        "squeezing.json",
        "zig-zag.json",
        "squeezing-f.svg",
        "zig-zag-f.svg",
    }
    assert "Its code has changed since" not in text
    (docs / "gallery" / "squeezing.json").write_text(json.dumps(documents.results(docs)[0] | {"source": "another"}))
    text = documents.gallery_text(documents.results(docs))
    assert text.count("Its code has changed since") == 1 and text.index("changed since") < text.index("## zig-zag")


def test_prompts_without_marked_pairs_are_no_units_of_an_interval():
    """One prompt of six has two answers: pairs between them have no interval over prompts, and none is left out in vain."""
    group = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
    sequence = torch.tensor([0, 0, 1, 1, *(group[4:] + 1).tolist()])
    F = torch.randn(len(group), len(group), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    near = group[:, None] == group
    twin = near & (sequence[:, None] != sequence)
    assert _interval(F, {"guess": F**3}, twin, group) == {
        "spearman": pytest.approx(1),
        "half": 0.0,
        "n": 1,
        "of": "set of 1 prompts",
    }
    assert _interval(F, {"guess": F**3}, ~near, group)["n"] == 6
