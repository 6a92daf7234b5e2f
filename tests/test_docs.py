"""What sources and documents cite can be opened: every path exists, and every section of docs/theory.md that is named."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "csrc/README.md"]
SOURCES = sorted(
    path
    for folder in ("tokdyn", "kernels", "csrc", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".md", ".cpp", ".h", ".cu") and path not in (Path(__file__).resolve(), *PAGES)
)
NAME = r"[\w.<>*{},-]+"
SUFFIXES = "py|md|cpp|h|cu|json|jsonl|svg|sh|toml|txt|jinja|js|css"
# no part of an address, of a longer word or of a module's dotted name
PATH = re.compile(rf"(?<![\w./:<-])(?!tokdyn\.)((?:\.\./)*{NAME}(?:/{NAME})*\.(?:{SUFFIXES}))(?!\w)")
FOLDER = re.compile(rf"(?<![\w/])`({NAME}(?:/{NAME})*/)`")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
# documents name these, and somebody who runs tokdyn makes them
MADE = {"run.json", "pairs.jsonl", "probe.jsonl", "test.jsonl", "a.json", "b.json", "c.json", "d.json"}


def words_of(path):
    """A document whole, of Python its comments and strings, of C++ its comments; line breaks are spaces."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        text = " ".join(comments + [token.string for token in tokens if token.type == tokenize.STRING])
        text = re.sub(r'(?<!")" f?"(?!")', "", text)  # a string in several parts
    elif path.suffix in (".cpp", ".h", ".cu"):
        text = " ".join(re.findall(r"//[^\n]*|/\*(?:.|\n)*?\*/", text))
    return re.sub(r"\s+(?:# |// )?", " ", text)


def docstrings_and_comments(path):
    """Of a Python file, without the strings that it works with."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return " ".join(token.string for token in tokens if token.type == tokenize.COMMENT or token.string.startswith('"""'))


def is_there(name, start):
    """Whether a path exists, from the citing file's folder, the root, the package or csrc/; a bare name also further down.

    <op>, {a,b} and * stand for anything. Below the root a bare name would find too much: there it has to be a path.
    """
    pattern = re.sub(r"<[^>]*>|\{[^}]*\}", "*", name).rstrip("/")
    while pattern.startswith("../"):
        pattern, start = pattern[3:], start.parent
    if any(any(place.glob(pattern)) for place in {start, ROOT, ROOT / "tokdyn", ROOT / "csrc"}):
        return True
    return "/" not in pattern and start != ROOT and any(start.rglob(pattern))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_of_a_document_exists(page):
    text = page.read_text(encoding="utf-8")
    named = {*PATH.findall(text), *FOLDER.findall(text), *LINK.findall(text)}
    named = {name for name in named if name not in MADE and not name.startswith("runs/")}
    missing = sorted(name for name in named if not is_there(name, page.parent))
    assert not missing, f"{page.relative_to(ROOT)} names what is not in the repository: {', '.join(missing)}"


def test_every_source_file_that_a_comment_cites_exists():
    missing = []
    for path in SOURCES:
        text = docstrings_and_comments(path) if path.suffix == ".py" else words_of(path)
        cited = {name for name in PATH.findall(text) if name.endswith((".py", ".md", ".cpp", ".cu"))}
        missing += [f"{path.relative_to(ROOT)} cites {name}" for name in sorted(cited) if not is_there(name, path.parent)]
    assert not missing, "\n".join(missing)


def test_every_cited_section_of_the_theory_exists():
    """A citation is `docs/theory.md, Section`; without a section it would send the reader to all of it."""
    sections = re.findall(r"^## (.+)$", (ROOT / "docs/theory.md").read_text(encoding="utf-8"), re.M)
    assert len(set(sections)) == len(sections)
    wrong, cited = [], set()
    for path in [*SOURCES, *PAGES]:
        text = words_of(path)
        for place in re.finditer(r"\btheory(?:\.md(?= §|, \w)|(?=,? (?:§|section)))", text):
            after = text[place.end() :].removeprefix(", ")
            found = [section for section in sections if re.match(rf"{re.escape(section)}\b", after)]
            if place.group() != "theory.md" or not found:
                wrong.append(f"{path.relative_to(ROOT)}: {text[place.start() : place.end() + 40]}")
            cited.update(found)
    assert not wrong, "\n".join(wrong)
    assert {"The decomposition", "Objectives", "The kernel", "Contexts", "Squeezing", "Phenomena"} <= cited


def test_every_test_that_the_theory_names_as_its_proof_is_one():
    """Each statement of docs/theory.md rests on test files: those exist (above) and hold tests."""
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "docs/theory.md").read_text(encoding="utf-8")))
    assert len(named) >= 10
    assert all(re.search(r"^def test_", (ROOT / name).read_text(encoding="utf-8"), re.M) for name in named)


def test_the_site_reaches_every_page():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/-]+\.md", config[config.index("\nnav:") :]))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages - named == set(), "pages of docs/ that nav in mkdocs.yml does not name"


def test_every_check_has_its_row_in_the_page_of_checks():
    """What a finding is called in the source opens a row there, with cause, symptom and cure."""
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "tokdyn/checks").glob("*.py"))]
    named = set(re.findall(r'Finding\(\s*"([\w -]+)"', " ".join(sources)))
    rows = [
        line.strip("|\n ").split(" | ") for line in (ROOT / "docs/check.md").read_text().splitlines() if line.startswith("| ")
    ]
    told = {row[0].partition(":")[0].split(" twice")[0] for row in rows}
    assert len(named) > 15 and named <= told, named - told
    assert not [row for row in rows if len(row) != 5 or not all(row)]
