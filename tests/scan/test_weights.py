"""Weights by a scan, its totals and its page, against the tables themselves."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import tokdyn as td
from tokdyn.loading import load_tokenizer
from tokdyn.objectives import DPO
from tokdyn.report.scan import findings, listings, render
from tokdyn.runs.scan_totals import EDGES, PREFIX, totals
from tokdyn.runs.scans import Scan
from tokdyn.scan.weights import flat
from tokdyn.testing import tiny

TEXTS = [
    {
        "prompt": f"Where is the {a}?",
        "chosen": f" The {a} is on the mat.",
        "rejected": f" The {a} is here, I think." + " No." * n,
    }
    for n, a in enumerate(["cat", "dog", "<b>bird</b>", "fish"])
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture(scope="module")
def model():
    return tiny("llama", vocabulary=4096)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row | {"id": n}) + "\n" for n, row in enumerate(TEXTS)) + '{"prompt": "no answer"}\n')
    return path


@pytest.fixture(scope="module")
def scan(model, tokenizer, file, tmp_path_factory):
    probe = td.probes.load(tokenizer, TEXTS[:2], types=["chosen", "rejected"])
    return td.scan(model, file, probe, out=tmp_path_factory.mktemp("scan") / "scan", tokenizer=tokenizer, block=2)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_worst_tokens_lose_their_weight_and_the_users_rows_come_back(scan, tmp_path, file):
    tokens = scan.tokens().to_pandas()
    found = td.scan.weights(scan.path, "tokens", on="chosen", share=0.2, scale=0.25, out=tmp_path / "out.jsonl")
    f = tokens.force_chosen.to_numpy()
    worst = np.argsort(f, kind="stable")[: int(0.2 * len(f))]
    truth = np.ones(len(f))
    truth[worst[f[worst] < 0]] = 0.25
    assert [w for row in range(4) for w in flat(found[row])] == truth.tolist()
    rows = read(tmp_path / "out.jsonl")
    assert [{k: v for k, v in row.items() if k != "token_weights"} for row in rows] == read(file)
    assert rows[1]["token_weights"] == found[1] and rows[4]["token_weights"] is None
    assert {role: len(w) for role, w in found[1].items()} == tokens[tokens.row == 1].groupby("role").size().to_dict()


def test_a_weighted_step_hurts_less_by_what_was_spared(scan, model, tokenizer):
    """First order: with w_l the force on the group is Σ w_l F_l, what interventions.loss then really does."""
    found = td.scan.weights(scan.path, "tokens", on="chosen", share=0.3)
    chis = td.preference(tokenizer, **TEXTS[0])
    w = torch.tensor(flat(found[0]))
    assert 0 < int((w == 0).sum()) < len(w)
    watched = td.probes.load(tokenizer, TEXTS[:2], types=["chosen"])["chosen"]

    def gradient(value):
        return torch.autograd.grad(value, list(model.parameters()))

    step = gradient(-td.interventions.loss(model, chis, DPO(), weights=w))
    up = gradient(sum(td.interventions.loss(model, [chi], td.objectives.SFT()) for chi in watched) * -1)
    force = sum(float((a * b).sum()) for a, b in zip(step, up, strict=True))
    f = torch.tensor(scan.tokens().to_pandas().query("row == 0").force_chosen.to_numpy())
    assert force == pytest.approx(float((w * f).sum()), rel=1e-4)  # √(30 · 4096) eps, and terms cancel tenfold


def test_the_worst_rows_are_not_kept(scan, tmp_path):
    sums = scan.rows().to_pandas()
    found = td.scan.weights(scan.path, "rows", on={"chosen": -1.0, "rejected": 1.0}, share=0.5, out=tmp_path / "out.parquet")
    per = scan.tokens_of
    f = (sums.force_rejected / per["rejected"] - sums.force_chosen / per["chosen"]).fillna(0).to_numpy()
    left_out = {int(n) for n in np.argsort(f, kind="stable")[:2] if f[n] < 0}
    assert left_out and {n for n, kept in found.items() if not kept} == left_out
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["keep"].to_pylist() == [found[n] for n in range(5)] and table["id"].to_pylist() == [0, 1, 2, 3, None]


def test_a_rule_of_ones_own(scan):
    found = td.scan.weights(scan.path, lambda f: 1 / (1 + np.exp(-f)), on="rejected")
    f = scan.tokens().to_pandas().force_rejected.to_numpy().astype(float) / scan.tokens_of["rejected"]
    assert [w for row in range(4) for w in flat(found[row])] == pytest.approx((1 / (1 + np.exp(-f))).tolist())
    with pytest.raises(ValueError, match="rule must return"):
        td.scan.weights(scan.path, lambda f: f[:3], on="rejected")


def test_mistakes_are_said(scan, tmp_path, file, model):
    for options, said in (
        (dict(rule="worst"), 'rule must be "tokens"'),
        (dict(on="angry"), "no group 'angry': it has chosen, rejected"),
        (dict(share=2), "share must lie in"),
        (dict(out=tmp_path / "x.jsonl", data=TEXTS), "not the rows that were scanned"),
        (dict(out=tmp_path / "x.txt"), "must end in .jsonl or .parquet"),
    ):
        with pytest.raises(ValueError, match=said):
            td.scan.weights(scan.path, **({"on": "chosen"} | options))
    (tmp_path / "there.jsonl").write_text("")
    with pytest.raises(FileExistsError):
        td.scan.weights(scan.path, on="chosen", out=tmp_path / "there.jsonl")
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- totals and page


def test_totals_are_sums_over_the_tables(scan):
    tokens, rows = scan.tokens().to_pandas(), scan.rows().to_pandas()
    found = totals(scan)
    for name, of in found.items():
        f = tokens[f"force_{name}"].astype(float)
        assert of.whole.tokens == len(f) and of.whole.force == pytest.approx(f.sum(), rel=1e-9)
        assert of.whole.size == pytest.approx(f.abs().sum(), rel=1e-9)
        assert of.net == pytest.approx(rows[f"net_{name}"].sum())
        assert of.row_size == pytest.approx(rows[f"force_{name}"].abs().sum())
        assert of.hurting == (rows[f"force_{name}"].dropna() < 0).mean()
        for role, part in of.roles.items():
            assert part.force == pytest.approx(f[tokens.role == role].sum(), abs=1e-9 * of.whole.size)
        for parts in (of.prefix, of.places, of.roles):
            assert sum(part.tokens for part in parts.values()) == len(f)
            assert sum(part.force for part in parts.values()) == pytest.approx(f.sum(), abs=1e-9 * of.whole.size)
        worst = of.tokens.worst[0]
        line = tokens.iloc[f.argmin()]
        assert (worst["row"], worst["position"], worst["token"]) == (line.row, line.position, line.token)
        assert worst["force"] == pytest.approx(f.min())
        said = "".join(tokens[(tokens.row == line.row) & (tokens.sequence == line.sequence)].token)
        assert (worst["before"][-8:] + worst["token"] + worst["behind"]) in TEXTS[line.row]["prompt"] + said
        named = {entry["row"]: entry["force"] for entry in of.rows.worst + of.rows.best}
        assert named == rows[f"force_{name}"].dropna().to_dict()
        by_word = f.groupby(tokens.token_id).sum()
        assert of.vocabulary.worst[0]["force"] == pytest.approx(by_word.min())


def test_tokens_are_told_apart_by_shared_text(scan):
    """The answers begin alike: their common tokens cancel to nothing, and then comes one point of divergence a pair."""
    tokens = scan.tokens().to_pandas()
    of = totals(scan)["chosen"]
    first = tokens[tokens.row == 0]
    a, b = (first[first.sequence == s].token_id.tolist() for s in (0, 1))
    shared = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    assert shared > 1
    assert of.prefix[PREFIX[1]].tokens == 2 * 4  # the first different token of both answers of each pair
    assert of.prefix[PREFIX[0]].tokens >= 2 * shared
    assert abs(of.prefix[PREFIX[0]].force) < 1e-5 * of.prefix[PREFIX[0]].size
    assert set(of.places) <= set(EDGES)


def test_the_page_says_what_the_totals_hold(scan):
    found = totals(scan)
    page = render(scan, found)
    assert "4 rows by DPO" in page and "complete scan" in page and "<script" not in page
    assert "&lt;b&gt;bird&lt;/b&gt;" in page and "<b>bird" not in page
    for finding in findings(scan, found):
        assert finding["text"].replace("'", "&#39;") in page
    assert f"tokdyn profile --scan {scan.path} --row 1" in page
    assert any("lift" in str(part) or "push" in str(part) for part in listings(scan, found))


def test_the_page_of_a_part_of_a_scan(scan, tmp_path):
    """A folder that is being written has a page of what is there, and weights only when it is whole."""
    import shutil

    part = tmp_path / "part"
    shutil.copytree(scan.path, part)
    path = next(part.glob("manifest-*.json"))
    about = json.loads(path.read_text())
    about["commits"] = about["commits"][:1]
    path.write_text(json.dumps(about))
    page = render(Scan(part))
    assert "Not whole." in page and "2 rows by DPO" in page
    with pytest.raises(ValueError, match="is not whole, 2 blocks are missing"):
        td.scan.weights(part, on="chosen")


# ---------------------------------------------------------------- what it will take


def test_an_estimate_counts_what_a_scan_holds(model, tokenizer, file):
    """Directions are a copy of the moving parameters for each group; a step under an optimizer has its own, and P."""
    probe = td.probes.load(tokenizer, TEXTS[:2], types=["chosen", "rejected"])
    parameters = sum(p.numel() * 4 for p in model.parameters())
    found = td.scan.estimate(model, file, probe, tokenizer=tokenizer, sample=3)
    assert found.memory["parameters"] == parameters and found.memory["directions"] == 2 * parameters
    assert (found.rows, found.sample) == (5, 3) and found.seconds == found.setup + 5 * found.each
    assert found.positions == sum(chi.ids.numel() for row in TEXTS[:3] for chi in td.preference(tokenizer, **row))
    assert f"directions {2 * parameters / 2**20:,.0f} MiB" in found.lines()[-1]
    optimizer = torch.optim.AdamW(model.parameters())
    stepped = td.scan.estimate(model, file, probe, tokenizer=tokenizer, sample=2, optimizer=optimizer, step_rows=2)
    assert stepped.memory["the step's directions and its P"] == 3 * parameters
    with pytest.raises(ValueError, match="none of the first 1 rows can be used: row 1 must have"):
        td.scan.estimate(model, [{"prompt": "?"}], probe, tokenizer=tokenizer)


def test_rows_of_one_text_are_listed_once_with_their_number_and_parts_add_up(model, tokenizer, tmp_path):
    """Two rows drawn three times and twice, over several blocks: the ends name each text once, under its first row."""
    drawn = [0, 1, 2, 1, 3, 0, 1]
    probe = td.probes.load(tokenizer, TEXTS[:2], types=["chosen"])
    scan = td.scan(model, [TEXTS[n] for n in drawn], probe, out=tmp_path / "scan", tokenizer=tokenizer, block=2, by="kind")
    of = totals(scan)["chosen"]
    for ends in (of.rows, of.tokens):
        for entries in (ends.worst, ends.best):
            assert len({entry["text"] for entry in entries}) == len(entries)
            for entry in entries:
                assert entry["times"] == drawn.count(drawn[entry["row"]]) and drawn.index(drawn[entry["row"]]) == entry["row"]
    assert {entry["row"] for entry in [*of.rows.worst, *of.rows.best]} == {0, 1, 2, 4}
    assert of.whole.tokens == scan.tokens().num_rows and len(of.row_forces) == len(drawn)  # sums count every row
    assert list(of.parts) == scan.parts and len(of.parts) > 3
    # a float32 number each
    assert sum(part.force for part in of.parts.values()) == pytest.approx(of.whole.force, abs=1e-5 * of.whole.size)
    html = render(scan)
    assert "row 2 ×3" in html and "row 1 ×2" in html and "row 3</span>" in html
    assert "by what moves" in html and all(f'<th scope="row">{part}</th>' in html for part in scan.parts)
