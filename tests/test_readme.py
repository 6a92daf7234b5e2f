"""The README's Python runs as printed and says what is true."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_python_of_the_readme_runs():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict = {}
    exec(block, names)
    td, f, pair = names["td"], names["f"], names["pair"]
    assert f.matrix.shape == (sum(map(len, pair)),) * 2
    assert torch.allclose(f.predict(1e-3), 1e-3 * f.matrix.sum(1))
    assert 1.8 < td.verify(names["model"], pair, pair, td.objectives.DPO()).order < 2.2


@pytest.mark.parametrize("name", re.findall(r"\]\(([\w./-]+)\)", README))
def test_links_of_the_readme_lead_somewhere(name):
    assert (Path(__file__).parents[1] / name).exists()


def test_objectives_of_the_readme_exist():
    from tokdyn.objectives import by_name

    (names,) = re.findall(r"\*\*Objectives\*\*: (.*?), each", README, re.S)
    for name in re.split(r",\s+", names):
        by_name(name.replace("Dr. GRPO", "DrGRPO"))
