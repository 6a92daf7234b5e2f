"""Answers with a positive advantage that have fallen since their rollout: which tokens push them, in record, note and page."""

import pytest
import torch
from loops import PROBE, PROMPT, answers, data
from pages import Tags

import tokdyn as td
from tokdyn.report import training
from tokdyn.steps import read
from tokdyn.testing import tiny
from tokdyn.training.fallen import FALLEN, ROUNDING, fallen_tokens

A = torch.tensor([1.0, -1.0, 2.0, -0.5])


def watched(out, falls, steps=1, lr=0.1, **options):
    """Policy-gradient steps in which the first and third answers are less likely than at their rollout, by `falls` [2]."""
    torch.manual_seed(0)
    model, ids = tiny("llama"), data()
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    with torch.no_grad():
        old = answers(model, ids)[0] + torch.tensor([falls[0], 0.3, falls[1], 0.3])[:, None] / 5
    with td.Monitor(model, opt, on_error="raise", out=out, **options) as monitor:
        for _ in range(steps):
            with monitor.micro_batch(advantages=A, old_log_probs=old):
                lp = answers(model, ids)[0]
                td.tap(lp, ids[:, PROMPT:])
                (-(lp * A[:, None]).mean()).backward()
            opt.step()
            monitor.step_end()
            opt.zero_grad()
    return ids, monitor.steps


def test_an_answer_has_fallen_when_its_log_probability_has_by_more_than_rounding():
    """In sum over its tokens; one that is certain, and one that has not moved, have not."""
    log_prob = torch.tensor([-1.0, -1.0, 0.0, 0.0, -2.0, -2.0, -1.0], dtype=torch.float64)
    moved = torch.tensor([0.1, -0.2, 0.0, 0.0, 0.0, -0.9 * 4 * ROUNDING, -1.0], dtype=torch.float64)
    of = dict(sequence=torch.tensor([0, 0, 1, 1, 2, 2, 3]), advantage=torch.tensor([1.0, 1, 1, 1, 1, 1, -1]))
    found = fallen_tokens(of | dict(ratio=moved.exp(), log_prob=log_prob))
    assert found.tolist() == [True, True, False, False, False, False, False]


def test_the_pushes_on_answers_that_fell_are_the_forces_on_a_probe_of_them(tmp_path):
    """Bit for bit those of a probe group with the same sequence, which tests/training/test_probe.py holds against td.forces."""
    scored = torch.arange(data().shape[1]) >= PROMPT
    probe = PROBE | {"same": [td.Chi(data()[2], scored)]}
    ids, (step,) = watched(tmp_path, (-0.2, 0.2), probe=probe, blame=["near", "same"])  # only the third has fallen
    of = step.tokens
    assert of[f"on {FALLEN}"].to_pylist() == of["on same"].to_pylist() != of["on near"].to_pylist()
    torch.testing.assert_close(step.forces, torch.tensor(of["on near"].to_pylist()))  # the blamed group's stays the record's
    alarm, pushes = step.notes
    forces = of[f"on {FALLEN}"].to_pylist()
    worst = min(range(20), key=lambda k: forces[k])
    row = of.slice(worst, 1).to_pylist()[0]
    assert "50% of the tokens with a positive advantage" in alarm
    first = pushes.split("by ")[2].split(",")[0]
    assert f"at {row['position']} of sequence {row['sequence']} (A" in first and row["advantage"] < 0
    assert first.endswith(f"{forces[worst]:+.2g}".replace("-", "−")) and pushes.count("(A ") == 5
    assert f"moves these answers by {sum(forces):+.2g} nats" in pushes


def test_the_page_names_them_where_the_most_had_fallen(tmp_path):
    """From the folder, where probe steps without a fall, and steps without a probe, have no such column."""
    watched(tmp_path, (-0.2, 0.01), probe=PROBE, steps=3, every=1, probe_every=2, lr=0.5)
    about, tables = read(tmp_path)
    known = [row for row in tables["tokens"].to_pylist() if row[f"on {FALLEN}"] is not None]
    assert {row["step"] for row in known} <= {1, 2} and known
    words = Tags(training.render(about, tables)).words
    assert "Good answers fell" in words and "the strongest pushes down are by" in words and "Give td.attach" not in words
    maps = training.token_maps(tables["tokens"], None, {})
    at = {m["step"]: m["groups"] for m in maps}
    assert {step for step, groups in at.items() if FALLEN in groups} == {row["step"] for row in known}
    assert all(len(m["values"]) == len(m["groups"]) == len(m["net"]["values"]) for m in maps)


def test_nothing_is_computed_where_nothing_fell_and_nothing_said_without_a_probe(tmp_path):
    _, (step,) = watched(tmp_path / "a", (-0.2, -0.2), probe=PROBE)
    assert f"on {FALLEN}" not in step.tokens.column_names and step.notes == []
    _, (step,) = watched(tmp_path / "b", (0.2, 0.2))
    assert len(step.notes) == 1 and "100% of the tokens" in step.notes[0]
    assert "Give td.attach or td.Monitor a probe" in Tags(training.render(*read(tmp_path / "b"))).words
    _, (step,) = watched(tmp_path / "c", (0.2, 0.2), probe=PROBE, observable="entropy")  # a force in another unit
    assert f"on {FALLEN}" not in step.tokens.column_names
    with pytest.raises(ValueError, match="cannot be named 'fallen'"):
        td.Monitor(tiny("llama"), torch.optim.SGD(tiny("llama").parameters()), probe={FALLEN: PROBE["far"]})
