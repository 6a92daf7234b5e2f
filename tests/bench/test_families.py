"""The sweep over every kind of causal LM: what its table says is right stays right; twelve kinds a day, all as days go by."""

import importlib.util
import json
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def families():
    spec = importlib.util.spec_from_file_location("families", ROOT / "benchmarks" / "families.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["families"]


def test_the_days_draw_every_kind(families):
    days = [date(2026, 1, 1) + timedelta(n) for n in range(-(-len(families.kinds()) // 12))]
    assert {kind for day in days for kind in families.drawn(day)} == set(families.kinds())
    assert all(len(set(families.drawn(day))) == 12 for day in days)


def test_twelve_kinds_of_today(families):
    """Kinds that the table has right are right; those that it marks are tried by `make sweep` alone."""
    table = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text())["kinds"]
    for kind in families.drawn(date.today()):
        if families.is_right(table.get(kind, {})) and table[kind]["seconds"] < 10:
            row = families.row_of(kind, families.build)
            assert families.is_right(row), (kind, row)


def test_the_page_is_written_from_the_table(families):
    found = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text())
    assert (ROOT / "docs" / "families.md").read_text() == families.markdown(found)
    assert {*found["kinds"]} <= {*families.kinds()} or found["versions"] != families.versions()


def test_a_wrong_figure_is_marked(families):
    assert families.figure(1e-6) == "1.0e-06" and families.figure(1e-2) == "**1.0e-02**" and families.figure("no") == "**no**"
    assert not families.is_right(dict(matrix=1e-6, update=1e-6, observe="RuntimeError"))


def test_rounding_is_told_from_what_is_wrong(families):
    """By float64, and by how far naive's own float32 is from it: twice that two results as good as it may lie apart."""
    naive = dict(matrix=2e-5, update=2e-5, observe=2e-5)
    row = dict(matrix=3e-5, update=1e-6, observe=3e-5, float64=dict(matrix=1e-14, update=1e-14, observe=1e-14, naive=naive))
    assert families.is_right(row) and "in float64 1e-14" in families.figure(3e-5, row, "matrix")
    for wrong in (row | dict(matrix=5e-5), row | {"float64": row["float64"] | dict(matrix=3e-5)}, row | dict(float64={})):
        assert not families.is_right(wrong) and families.figure(wrong["matrix"], wrong, "matrix").startswith("**")
