"""The net view of a training's tokens: sums over tokens behind the same ids, from the tables of a real training."""

import pytest
import torch
from loops import dpo
from pages import payload_of

import tokdyn as td
from tokdyn import steps as records
from tokdyn.report import training
from tokdyn.sequences import Chi, prefix_keys
from tokdyn.testing import tiny

PLACE, PROMPT = 6, 4  # the two answers differ in one token


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One step of DPO on a pair that shares all but one token; watched are the chosen answer and another one."""
    chosen = torch.randint(0, 61, (9,), generator=torch.Generator().manual_seed(0))
    rejected = chosen.clone()
    rejected[PLACE] = (chosen[PLACE] + 1) % 61
    scored, other = torch.arange(9) >= PROMPT, torch.flip(chosen, (0,))
    model, out = tiny("llama"), tmp_path_factory.mktemp("training") / "run"
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = {"chosen": [Chi(chosen, scored)], "other": [Chi(other, scored)]}
    with td.Monitor(model, opt, probe=probe, blame=["chosen", "other"], out=out, on_error="raise") as monitor:
        with monitor.micro_batch(roles=["chosen", "rejected"], groups=[0, 0]):
            dpo(model, torch.stack([chosen, rejected])).backward()
        opt.step()
        monitor.step_end()
    return (chosen, rejected), *records.read(out)


def test_net_columns_are_sums_over_tokens_behind_the_same_ids(trained):
    texts, about, tables = trained
    (shown,) = payload_of(training.render(about, tables))["maps"]
    rows, net = tables["tokens"].to_pylist(), shown["net"]
    behind = [tuple(texts[row["role"] == "rejected"][: row["position"]].tolist()) for row in rows]
    prefixes = list(dict.fromkeys(sorted(behind, key=lambda x: [b == x for b in behind].count(True) == 1)))
    assert len(net["tokens"]) == len(prefixes) == 3 + 2 + 2  # up to the token that differs, and behind it
    assert [(s["name"], s["stop"] - s["start"]) for s in net["sequences"]] == [
        ("chosen 1, rejected 1", 3), ("chosen 1", 2), ("rejected 1", 2)]  # fmt: skip
    for name, column in (("chosen", "on chosen"), ("other", "on other")):
        values = net["values"][shown["groups"].index(name)]
        for value, prefix in zip(values, prefixes, strict=True):
            expected = sum(row[column] for row, own in zip(rows, behind, strict=True) if own == prefix)
            assert value == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert sum(values) == pytest.approx(sum(row[column] for row in rows), rel=1e-4, abs=1e-6)
    assert net["c"][:3] == pytest.approx([0, 0, 0], abs=1e-6)  # c of both answers is opposite
    assert net["tokens"][2] == f"<{int(texts[0][PLACE])}>/<{int(texts[1][PLACE])}>"
    assert max(abs(x) for x in shown["c"]) > 1e-3 and len(shown["tokens"]) == 10  # single tokens are there


def test_a_watched_answers_own_places_are_told_apart(trained):
    _, about, tables = trained
    (shown,) = payload_of(training.render(about, tables))["maps"]
    own = dict(zip(shown["groups"], shown["net"]["own"], strict=True))
    assert own["chosen"] == [True, True, True, True, True, False, False] and not any(own["other"])


def test_tables_without_contexts_have_no_net_view(trained):
    _, about, tables = trained
    old = {name: table if table is None or "context" not in table.column_names else table.drop_columns(["context"])
           for name, table in tables.items()}  # fmt: skip
    (shown,) = payload_of(training.render(about, old))["maps"]
    assert shown["net"] is None and len(shown["tokens"]) == 10


def test_keys_are_those_of_the_ids_before_a_token():
    a, b = [1, 2, 3, 0, 0], [1, 2, 4, 0, 0]
    x, y = prefix_keys(a), prefix_keys(b)
    assert x[:3] == y[:3] and len({*x, *y}) == 3 + 2 + 2 and prefix_keys([]) == []
    assert all(0 < key < 2**61 for key in prefix_keys([2**17] * 1000))
