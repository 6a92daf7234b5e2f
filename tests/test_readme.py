"""The Python of the README and of its first how-to page runs as printed and says what is true."""

import json
import re
from pathlib import Path

import pytest
import torch

WATCHED = (Path(__file__).parents[1] / "docs/how-to/watch-dpo.md").read_text(encoding="utf-8")
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block_with(word, page=README):
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if word in block]
    return block


def test_python_of_the_readme_runs():
    block, names = block_with("td.preference("), {}
    exec(block, names)
    td, f, pair = names["td"], names["f"], names["pair"]
    assert f.matrix.shape == (sum(map(len, pair)),) * 2
    assert torch.equal(f.predict(1e-3), 1e-3 * f.matrix.sum(1))
    assert 1.8 < td.verify(names["model"], pair, pair, td.objectives.DPO()).order < 2.2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_training_of_the_how_to_page_leaves_its_page(tmp_path, monkeypatch):
    """Curves of chosen, rejected and first choice for every kind, the forces behind them, and predictions that hold."""
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", WATCHED, re.S):
        exec(block, names)
    assert len(names["last"]) and set(names["last"]["role"]) == {"chosen", "rejected"}
    page = (tmp_path / "runs/dpo/report.html").read_text(encoding="utf-8")
    (payload,) = re.findall(r'<script type="application/json" id="payload">(.*?)</script>', page, re.S)
    shown = json.loads(payload)
    kinds = {kind["name"]: kind for kind in shown["probe"]["types"]}
    assert list(kinds) == ["chosen", "rejected", "irr_train", "random_permute", "random_nonhum"]
    assert shown["status"] == "complete" and shown["probe"]["steps"] == [1, 2, 4, 6, 8, 10] == shown["steps"]["step"]
    for kind in kinds.values():
        assert all(len(kind[name]) == 6 and None not in kind[name] for name in ("before", "after", "predicted", "argmax"))
    gap = [a - b for a, b in zip(kinds["chosen"]["after"], kinds["rejected"]["after"], strict=True)]
    assert gap[-1] > gap[0]  # it learns
    assert [group["name"] for group in shown["pushes"]["groups"]] == ["chosen", "rejected"] and shown["pushes"]["steps"]
    assert all(len(values) == len(m["tokens"]) for m in shown["maps"] for values in m["values"])
    assert all(0.9 < x < 1.1 for x in shown["steps"]["linearity"])


@pytest.mark.parametrize("name", re.findall(r"\]\(([\w./-]+)\)", README))
def test_links_of_the_readme_lead_somewhere(name):
    assert (Path(__file__).parents[1] / name).exists()


def test_objectives_of_the_readme_exist():
    from tokdyn.objectives import by_name

    (names,) = re.findall(r"\*\*Objectives\*\*: (.*?), each", README, re.S)
    for name in re.split(r",\s+", names):
        by_name(name.replace("Dr. GRPO", "DrGRPO"))
