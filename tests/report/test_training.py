"""The page of a training: curves and forces are those of the tables, nothing is fetched, text stays text.

The training it shows is synthetic but adds up: every step's actual change is the predicted one and a little more, and what was
predicted is the sum of the update tokens' forces and of what was carried over.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from pages import Tags, payload_of
from typer.testing import CliRunner

import tokdyn as td
from tokdyn import steps as records
from tokdyn.cli import app
from tokdyn.report import training, training_maps
from tokdyn.sequences import Chi
from tokdyn.testing import random_chis, tiny
from tokdyn.training.columns import SUMS

ANSWERS = {
    "chosen": " It lets the body and the mind rest.",
    "rejected": " It is just something that people do.",
    "irr_train": " Leaves in hot water, left for a while.",
    "random_permute": " rest. the It body lets and mind the",
}
RATE = {"chosen": 0.004, "rejected": -0.03, "irr_train": -0.006, "random_permute": -0.012}
HOSTILE = ("</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\u2028\u202e", "", "\u0000")


def words(text):
    return re.findall(r" ?\w+|[^\w\s]", text)


def synthetic(steps=24, every=2, groups=("chosen", "rejected"), ranks=1, seed=0):
    """run.json and the tables of a DPO training on two pairs with a probe of four kinds."""
    rng = np.random.default_rng(seed)
    probe, tokens, figures = [], [], []
    at = {name: -2.0 - 0.8 * k for k, name in enumerate(ANSWERS)}
    for step in [1, *range(every, steps + 1, every)]:
        wave = 1 + 0.4 * np.sin(step / 3)
        for name, text in ANSWERS.items():
            rate = RATE[name] * wave
            for s in range(2):
                for t, token in enumerate(words(text)):
                    before, predicted = at[name] - 0.1 * t + 0.05 * s, rate * (1 + 0.1 * t)
                    row = dict(step=step, probe=name, sequence=s, group=s, role=name, position=4 + t, token_id=t, token=token)
                    probe.append(row | dict(
                        before=before, predicted=predicted, actual=1.05 * predicted, after=before + 1.05 * predicted,
                        predicted_readout=None, argmax_log_prob=-0.9 + 0.01 * step,
                    ))  # fmt: skip
            at[name] += rate * every
        for rank in range(ranks):
            for role in ("chosen", "rejected"):
                for t, token in enumerate(words(ANSWERS[role])):
                    c = (1 if role == "chosen" else -1) * 0.05 * np.exp(-step / 30)
                    row = dict(step=step, rank=rank, micro_batch=0, sequence=int(role == "rejected"), role=role, group=0)
                    row |= dict(position=4 + t, token_id=t, token=token, c=c, log_prob=-2.0 - 0.1 * t, force=abs(c))
                    tokens.append(row | {f"on {name}": float(c * rng.normal(1 if name == role else -0.6)) for name in groups})
            sums = dict(steps=1.0, tokens=16.0, c_up=0.4, c_down=0.4, force=1.0, force_up=0.5 + 0.005 * step, pushed=0.4)
            sums = dict.fromkeys(SUMS, 0.0) | sums | dict(squeezed=0.1 + 0.004 * step)
            own = dict(step=step, rank=rank, linearity=1.05 if rank == 0 else None, accounted=1.0, carried=0.001)
            figures.append(own | {f"sum_{name}": value for name, value in sums.items()})
    about = dict(
        format=1, kind="training", status="complete", steps=steps, problems=[],
        model=dict(name="LlamaForCausalLM", parameters=15_000_000), settings=dict(every=every, probe_every=every),
        probe={name: 2 for name in ANSWERS}, versions=dict(tokdyn="0.1", torch="2.13"),
    )  # fmt: skip
    return about, {
        name: pa.Table.from_pylist(rows) for name, rows in (("probe", probe), ("tokens", tokens), ("steps", figures))
    }


@pytest.fixture(scope="module")
def run():
    return synthetic()


@pytest.fixture(scope="module")
def html(run):
    return training.render(*run)


# ---------------------------------------------------------------- what is shown


def test_curves_are_the_means_of_the_probe(run, html):
    payload, table = payload_of(html)["probe"], run[1]["probe"].to_pylist()
    assert [kind["name"] for kind in payload["types"]] == list(ANSWERS)
    assert payload["steps"] == [1, *range(2, 25, 2)]
    for kind in payload["types"]:
        assert kind["sequences"] == 2
        for key, column in (
            ("before", "before"),
            ("after", "after"),
            ("predicted", "predicted"),
            ("argmax", "argmax_log_prob"),
        ):
            for step, value in zip(payload["steps"], kind[key], strict=True):
                rows = [row[column] for row in table if row["probe"] == kind["name"] and row["step"] == step]
                assert value == pytest.approx(sum(rows) / len(rows), rel=1e-5)


def test_predictions_of_consecutive_steps_add_up_exactly_and_gaps_hold_the_mean_rate():
    assert training._predicted_path([1, 2, 3], [-3.0, None, None], [0.5, 0.25, -1.0]) == [-2.5, -2.25, -3.25]
    # steps 2, 3 and 4 were not probed: each moves by the mean of the rates around them
    assert training._predicted_path([1, 5], [-3.0, -9.0], [0.5, 0.1]) == [-2.5, pytest.approx(-2.5 + 3 * 0.3 + 0.1)]
    assert training._predicted_path([1, 2], [None, None], [0.5, 0.5]) == [None, None]


def test_forces_add_up_by_side_and_over_ranks():
    about, tables = synthetic(ranks=2)
    pushes, table = payload_of(training.render(about, tables))["pushes"], tables["tokens"].to_pylist()
    assert pushes["roles"] == ["chosen", "rejected"] and [group["name"] for group in pushes["groups"]] == ["chosen", "rejected"]
    for group in pushes["groups"]:
        for role, sums in zip(pushes["roles"], group["sums"], strict=True):
            for step, value in zip(pushes["steps"], sums, strict=True):
                rows = [row[f"on {group['name']}"] for row in table if row["step"] == step and row["role"] == role]
                assert value == pytest.approx(sum(rows), rel=1e-4, abs=1e-9)


def test_figures_of_all_ranks_are_ratios_of_their_sums():
    about, tables = synthetic(ranks=2)
    series = payload_of(training.render(about, tables))["steps"]
    one = payload_of(training.render(*synthetic()))["steps"]
    assert series["step"] == one["step"] and series["force"] == [2 * x for x in one["force"]]
    assert series["force_up_share"] == one["force_up_share"] == pytest.approx([0.5 + 0.005 * s for s in series["step"]])
    assert series["squeezing"] == pytest.approx([(0.1 + 0.004 * s) / 0.4 for s in series["step"]])
    assert series["linearity"] == [1.05] * len(one["step"])


def test_steps_whose_forces_do_not_add_up_are_left_out_and_named(run):
    about, tables = run
    rows = tables["steps"].to_pylist()
    rows[0]["accounted"], rows[3]["accounted"] = 0.85, float("nan")
    html = training.render(about, tables | {"steps": pa.Table.from_pylist(rows)})
    payload = payload_of(html)
    assert payload["pushes"]["steps"] == [2, 4, *range(8, 25, 2)] and payload["maps"][0]["step"] == 2
    assert "Left out here and below: steps 1, 6." in Tags(html).words
    for row in rows:
        row["accounted"] = 0.5  # nothing would be left
    html = training.render(about, tables | {"steps": pa.Table.from_pylist(rows)})
    assert len(payload_of(html)["pushes"]["steps"]) == 13 and "Left out here" not in Tags(html).words


def test_heat_maps_hold_the_forces_of_their_steps_token_by_token(run, html):
    maps, table = payload_of(html)["maps"], run[1]["tokens"].to_pylist()
    steps = [m["step"] for m in maps]
    assert len(steps) == training_maps.MAPS and steps[0] == 1 and steps[-1] == 24 and steps == sorted(set(steps))
    for m in maps:
        rows = [row for row in table if row["step"] == m["step"]]
        assert m["tokens"] == [row["token"] for row in rows] and m["groups"] == ["chosen", "rejected"]
        for name, values in zip(m["groups"], m["values"], strict=True):
            assert values == pytest.approx([row[f"on {name}"] for row in rows], rel=1e-5)
        assert [s["role"] for s in m["sequences"]] == ["chosen", "rejected"]
        assert [s["name"] for s in m["sequences"]] == ["chosen 1", "rejected 1"]
        assert [(s["start"], s["stop"]) for s in m["sequences"]] == [(0, 9), (9, 17)]


def test_steps_of_the_maps_can_be_chosen(run):
    assert [m["step"] for m in payload_of(training.render(*run, steps=[4, 20]))["maps"]] == [4, 20]
    with pytest.raises(ValueError, match="step 3 has no forces; those that have are 1, 2, 4, 6"):
        training.render(*run, steps=[3])


def test_large_batches_are_cut_and_said(run, monkeypatch):
    monkeypatch.setattr(training_maps, "MAP_TOKENS", 12)
    (first, *_) = payload_of(training.render(*run))["maps"]
    assert len(first["tokens"]) == 12 and first["left_out"] == 5 and first["sequences"][-1]["stop"] == 12


def test_lazy_likelihood_displacement_is_the_first_finding(run, html):
    about, tables = run
    rows = tables["steps"].to_pylist()
    for row, fallen in zip(rows, (0.0, 6.0, 2.0), strict=False):
        row |= dict(sum_fallen=fallen, sum_rewarded=8.0)
    found = Tags(training.render(about, tables | {"steps": pa.Table.from_pylist(rows)})).words
    assert "Good answers fell: lazy likelihood displacement" in found and "In 2 recorded steps" in found
    assert f"in step {rows[1]['step']} they held 75% of the tokens" in found
    assert "displacement" not in Tags(html).words


def test_findings_say_what_the_numbers_say(html):
    text = Tags(html).words
    assert "Chosen rose most, rejected fell most" in text
    assert "The first choice became more likely" in text and "squeezing" in text.lower()
    assert "This is squeezing" not in text  # the chosen answer rose
    assert "The forces explain the steps" in text and "1.05 in the middle" in text
    about, tables = synthetic()
    falling = tables["probe"].to_pylist()
    for row in falling:
        if row["probe"] == "chosen":
            row["after"] = row["before"] - 1.0
    assert "This is squeezing" in Tags(training.render(about, tables | {"probe": pa.Table.from_pylist(falling)})).words


def test_a_training_whose_entropy_was_watched_says_so():
    """Curves and findings are of what was watched; nothing is concluded from falling answers."""
    about, tables = synthetic()
    falling = [row | {"after": row["before"] - 1.0} for row in tables["probe"].to_pylist()]
    watched = {"observable": {"name": "Entropy", "arguments": {}, "label": "entropy", "unit": "nats"}}
    html = training.render(about | watched, tables | {"probe": pa.Table.from_pylist(falling)})
    words = Tags(html).words
    assert "What is watched is the entropy at each token of the probe" in words and "mean entropy of a token" in words
    assert "squeezing." not in words and "mean log-probability of a token" not in words
    assert payload_of(html)["watched"] == {"label": "entropy", "unit": "nats"}


# ---------------------------------------------------------------- what must not happen


def test_nothing_is_fetched_and_the_policy_admits_exactly_its_script(html):
    page = Tags(html)
    for _, attrs in page.tags:
        assert "src" not in attrs and attrs.get("href", "#").startswith(("#", "data:")), attrs
        assert not any(name.startswith("on") or name == "style" for name in attrs), attrs
    (policy,) = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    (script,) = [text for tag, attrs, text in page.raw if tag == "script" and "type" not in attrs]
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    for _, attrs, text in page.raw:
        if attrs.get("id") != "payload":
            assert not re.search(r"https?:|//\w+\.|@import|url\(|\bfetch\b|XMLHttpRequest|WebSocket|\bimport\(|\beval\b", text)
            assert "innerHTML" not in text.replace('probe.innerHTML = "<svg></svg>"', ""), "data must stay text"
    assert {attrs["href"] for tag, attrs in page.tags if tag == "a"} <= {
        f"#{attrs['id']}" for _, attrs in page.tags if "id" in attrs
    }


def test_text_of_a_model_stays_text(run):
    about, tables = run
    tokens = tables["tokens"].to_pylist()
    for row, text in zip(tokens, HOSTILE * len(tokens), strict=False):
        row["token"] = text
    about = about | {"problems": [HOSTILE[0]], "model": {"name": HOSTILE[1]}}
    html = training.render(about, tables | {"tokens": pa.Table.from_pylist(tokens)})
    page = Tags(html)
    assert [tag for tag, _ in page.tags].count("script") == 2 and not any(tag == "img" for tag, _ in page.tags)
    assert set(HOSTILE) - {""} <= set(payload_of(html)["maps"][0]["tokens"])


@pytest.mark.parametrize("missing", ["probe", "tokens", "steps", "all"])
def test_whatever_is_missing_is_left_out(run, missing):
    about, tables = run
    gone = dict.fromkeys(tables) if missing == "all" else tables | {missing: None}
    page = Tags(training.render(about if missing != "all" else {}, gone))
    assert {"curves", "behind", "tokens", "balance", "prediction", "run"} <= {attrs.get("id") for _, attrs in page.tags}


def test_states_of_a_training():
    about, tables = synthetic()
    running, broken = (training.render(about | {"status": status}, tables) for status in ("running", "interrupted"))
    refreshes = [[a for _, a in Tags(page).tags if a.get("http-equiv") == "refresh"] for page in (running, broken)]
    assert refreshes[0][0]["content"] == str(training.REFRESH) and not refreshes[1]
    assert "Still running" in Tags(running).words and "was interrupted" in Tags(broken).words
    told = Tags(training.render(about | {"problems": [f"step {n}: odd" for n in range(7)]}, tables)).words
    assert "step 4: odd" in told and "step 5: odd" not in told and "and 2 more in run.json" in told


def test_every_static_file_of_the_page_is_used():
    folder = training.Path(training.__file__).parent / "static"
    assert {f"training/{item.name}" for item in (folder / "training").iterdir()} <= {*training.SCRIPTS, *training.STYLES}
    assert all((folder / name).is_file() for name in (*training.SCRIPTS, *training.STYLES))


# ---------------------------------------------------------------- from a real training


def test_a_monitored_training_has_a_page(tmp_path):
    """Forces of every group that was asked about are those of a monitor that asks about it alone, and they reach the page."""
    probe = {"near": random_chis([(3, 5), (2, 4)], seed=5), "far": random_chis([(3, 3)], seed=6)}
    alone = {}
    for blame in ("near", "far", ["near", "far"]):
        model = tiny("llama")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        out = tmp_path / "-".join([blame] if isinstance(blame, str) else blame)
        (chi,) = random_chis([(3, 6)], seed=1)
        with td.Monitor(model, optimizer, probe=probe, blame=blame, out=out, on_error="raise") as monitor:
            for _ in range(2):
                optimizer.zero_grad()
                model(chi.ids[None], labels=torch.where(chi.scored, chi.ids, -100)[None]).loss.backward()
                optimizer.step()
                monitor.step_end()
        alone[out.name] = [step.forces for step in monitor.steps]
    table = records.read(tmp_path / "near-far")[1]["tokens"]
    for name in ("near", "far"):
        found, truth = torch.tensor(table[f"on {name}"].to_pylist()), torch.cat(alone[name])
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-5 * float(truth.abs().max()))  # two gradients
    page = td.watch(tmp_path / "near-far", follow=True)
    payload = payload_of(page.read_text(encoding="utf-8"))
    assert page == tmp_path / "near-far" / "report.html" and [m["step"] for m in payload["maps"]] == [1, 2]
    near = alone["near"][0]
    assert payload["maps"][0]["values"][0] == pytest.approx(near.tolist(), rel=1e-4, abs=1e-5 * float(near.abs().max()))
    assert [kind["name"] for kind in payload["probe"]["types"]] == ["near", "far"]
    result = CliRunner().invoke(app, ["report", str(tmp_path / "near-far"), "--follow"])
    shown = " ".join(result.output.split())
    assert shown.index("report.html") < shown.index("The training has ended (complete): there is nothing to follow")
    assert result.exit_code == 0 and "report.html" in result.output.replace("\n", ""), result.output + result.stderr


def test_following_says_so_first_and_ends_with_the_training(tmp_path, monkeypatch):
    """One page at once, one more after the training has ended; nobody waits twenty seconds here."""
    about = {"format": 2, "kind": "training", "status": "running", "written": "2000-01-01T00:00:00+00:00"}
    (tmp_path / "run.json").write_text(json.dumps(about))
    monkeypatch.setattr("time.sleep", lambda _: (tmp_path / "run.json").write_text(json.dumps(about | {"status": "complete"})))
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--follow"])
    shown = " ".join(result.output.split())
    parts = ("report.html", "The training runs, records were last written", "until it ends", "The training has ended")
    places = [shown.index(part) for part in parts]
    assert result.exit_code == 0 and places == sorted(places), result.output + result.stderr
    assert "complete training" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_folders_that_hold_no_training(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run: run.json is missing"):
        td.watch(tmp_path)
    (tmp_path / "run.json").write_text('{"kind": "profile", "format": 1}')
    with pytest.raises(ValueError, match="holds profile in format 1, not a training"):
        td.watch(tmp_path)


def test_somebody_must_be_asked_about():
    model, chi = tiny("llama"), Chi(torch.arange(3), torch.arange(3) > 0)
    with pytest.raises(ValueError, match="blame must name a group of the probe at least"):
        td.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), probe=[chi], blame=[])
