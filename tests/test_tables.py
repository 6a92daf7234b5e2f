"""Every figure of the documents' tables is in committed JSON: their blocks are what docs/tables.py writes from it."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tokdyn.studies import documents

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
GENERATED = {"docs/gallery.md", "docs/families.md"}  # written whole by a program, and compared with it below
MEASURED = re.compile(r"\d (?:s|ms|MiB|GB/s|%)(?![\w/])|\d(?:x|%)(?!\w)|\d times")
# tables of a page that measure and have no JSON, with the reason
WITHOUT = {
    "docs/scale.md": "printed by benchmarks/scan.py --passes, which keeps no JSON",
    "docs/reliability.md": "bounds, each asserted or counted by the test or command in its row",
}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load(ROOT / "docs/tables.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_are_what_their_json_says(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- figures") == len(tables.BLOCK.findall(text)), "a block is not of the form in docs/tables.py"
    assert tables.written(text) == text, f"run python docs/tables.py: {page.relative_to(ROOT)} is not what its JSON says"


def test_every_table_of_measurements_has_its_json():
    bare = []
    for page in PAGES:
        name, text = str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")
        if name in GENERATED:
            continue
        rest = re.sub(r"<!--.*?-->", "", tables.BLOCK.sub("", text), flags=re.S)
        rows = [line for line in rest.splitlines() if line.startswith("|") and MEASURED.search(line)]
        assert name not in WITHOUT or rows, f"{name} has no such table any more: take it off WITHOUT"
        bare += [f"{name}: {row}" for row in rows if name not in WITHOUT]
    assert not bare, "figures without a template (docs/tables.py says how to write one):\n" + "\n".join(bare)


def test_a_template_takes_numbers_from_json_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps({"rows": [{"side": "x", "ms": [3, 1, 2]}, {"side": "y", "ms": [8]}], "a b": 2}))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    template = '| {median(row(a.rows, side="x").ms)} ms | {a.rows[1].ms[0] / a["a b"]:.2f} |'
    page = f"Before.\n\n<!-- figures\na = a.json\n---\n{template}\n-->\n| old |\n| older |\n\nAfter.\n"
    after = page.replace("| old |\n| older |", "| 2 ms | 4.00 |")
    assert tables.written(page) == after == tables.written(after)
    for wrong, said in (("{a.gone}", "'gone' is not among"), ('{row(a.rows, side="z")}', "0 rows"), ("{open}", "NameError")):
        with pytest.raises(ValueError, match=said):
            tables.render("a = a.json", wrong)
    with pytest.raises(ValueError, match="no file b.json"):
        tables.render("a = b.json", "")


def test_the_gallery_and_the_families_are_what_their_programs_write():
    assert (ROOT / "docs/gallery.md").read_text(encoding="utf-8") == documents.gallery_text(documents.results(ROOT / "docs"))
    found = json.loads((ROOT / "benchmarks/results/families.json").read_text(encoding="utf-8"))
    written = load(ROOT / "benchmarks/families.py").markdown(found)
    page = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    assert [line for line in page.splitlines() if line.startswith("|")] == [
        line for line in written.splitlines() if line.startswith("|")
    ]
