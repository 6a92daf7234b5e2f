"""Readers on whatever Hypothesis makes up: what a file holds, or one sentence that names it; never another error.

`make fuzz` runs many more cases than the few of `make test`.
"""

import dataclasses
import gzip
import json
import shutil
import string

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import tokdyn as td
from tokdyn.cli import app
from tokdyn.data import read, read_part
from tokdyn.runs.manifest import committed
from tokdyn.testing import random_chis, tiny

pytest.importorskip("hypothesis")  # among the extras of dev

from cases import tried  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

NAMES = """prompt chosen rejected completion completions rewards messages conversations role content from value label tools
system chat_template_kwargs user assistant human gpt tool type text function""".split()  # that rows and messages give
text = st.text(st.characters(codec=None), max_size=8) | st.sampled_from([*NAMES, "", " ", "a", "\x1b[2J", "[/x]", "\ud800"])
plain = st.none() | st.booleans() | st.integers() | st.integers(-(10**45), 10**45) | st.floats() | text
anything = st.recursive(plain, lambda x: st.lists(x, max_size=3) | st.dictionaries(text, x, max_size=3), max_leaves=6)
message = st.fixed_dictionaries({"role": text | st.sampled_from(["user", "assistant"]), "content": anything})
row = st.dictionaries(st.sampled_from(NAMES), anything | st.lists(message, max_size=3), max_size=4)


def spoiled(draw, data):
    """Bytes with up to three places changed: a byte or a few put in, taken away, or replaced; an end that is missing."""
    for _ in range(draw(st.integers(0, 3))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 4))
        new = draw(
            st.binary(max_size=4) | st.sampled_from([b"\xff", b"\0", b'"', b"[", b"{", b"}", b"\n", b"\\ud800", b"1e999"])
        )
        data = data[:at] + new + data[at + length :]
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 9)) == 0 else data


def asked(path, reader):
    """What a reader finds; None for an error, which must be one sentence about the file."""
    try:
        return reader(path)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert str(path) in message and "\n" not in message and len(message) < 1000, message
        return None


# ---------------------------------------------------------------- data


@st.composite
def data_file(draw):
    """A name and its bytes: rows in each of the formats, some of them spoiled."""
    rows = draw(st.lists(row | anything, max_size=4))
    ending = draw(st.sampled_from([".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz"]))
    if ending == ".csv":
        lines = [",".join(NAMES[:5])] + [",".join(json.dumps(x) for x in r.values()) for r in rows if isinstance(r, dict)]
    else:
        lines = [json.dumps(r, ensure_ascii=draw(st.booleans())) for r in rows]
    joined = f"[{','.join(lines)}]" if ending.startswith(".json") and draw(st.booleans()) else "\n".join(lines)
    data = spoiled(draw, joined.encode("utf-8", "surrogatepass"))
    return f"rows{ending}", spoiled(draw, gzip.compress(data)) if ending.endswith(".gz") else data


def test_a_data_file_is_its_rows_or_one_sentence(tmp_path, fuzz_cases):
    def check(given):
        name, data = given
        (tmp_path / name).write_bytes(data)
        rows = asked(tmp_path / name, read)
        part = asked(tmp_path / name, lambda path: read_part(path, 0, 10**9))
        if rows is not None:
            assert part[1] == len(rows) and json.dumps(part[0]) == json.dumps(rows)
            assert json.dumps(rows, ensure_ascii=False).encode()

    tried(fuzz_cases, data_file(), check)


def test_a_parquet_file_is_its_rows_or_one_sentence(tmp_path, fuzz_cases):
    @st.composite
    def parquet(draw):
        path = tmp_path / "made.parquet"
        try:
            pq.write_table(pa.Table.from_pylist(draw(st.lists(row, min_size=1, max_size=4))), path)
        except (pa.ArrowException, UnicodeError, OverflowError, TypeError):  # rows of one type a column alone fit in
            pq.write_table(pa.table({"prompt": ["a", "b"], "completion": ["c", "d"], "label": [True, False]}), path)
        return spoiled(draw, path.read_bytes())

    def check(data):
        (tmp_path / "rows.parquet").write_bytes(data)
        asked(tmp_path / "rows.parquet", read)

    tried(fuzz_cases, parquet(), check)


# ---------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind."""
    from loops import sft, train

    place = tmp_path_factory.mktemp("folders")
    model, (chosen, rejected) = tiny("llama"), random_chis([(3, 3), (3, 2)], seed=3)
    pair = [dataclasses.replace(chosen, role="chosen", group=0), dataclasses.replace(rejected, role="rejected", group=0)]
    td.profile(model, pair, pair, td.objectives.DPO(), k=2, out=place / "profile")
    td.forces(model, pair, pair, by="layer").save(place / "forces")
    td.forces(model, pair, pair, out=place / "shards")
    train(sft, steps=1, out=place / "training")
    td.scan(model, [pair, pair], {"watched": pair}, td.objectives.DPO(), out=place / "scan", block=1)
    return place


@st.composite
def respelled(draw, found):
    """JSON with up to three of its values replaced, taken away or given another name."""
    found = json.loads(json.dumps(found))
    for _ in range(draw(st.integers(1, 3))):
        at = found
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], (dict, list)) and at[key] and draw(st.integers(0, 3)):
                at = at[key]
                continue
            how = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
            if how == "replace":
                at[key] = draw(anything)
            elif how == "remove":
                del at[key]
            elif isinstance(at, dict):
                at[draw(text)] = at.pop(key)
            break
    return found


@pytest.mark.parametrize("kind", ["profile", "forces", "shards", "training", "scan"])
def test_a_folder_is_loaded_and_shown_or_one_sentence(folders, tmp_path, kind, fuzz_cases):
    """Its JSON in other words, or any of its files with other bytes: what loads can be shown, and nothing is a traceback."""
    path = tmp_path / kind
    shutil.copytree(folders / kind, path)
    whole = {file.name: file.read_bytes() for file in path.iterdir() if file.suffix != ".html"}
    records = sorted(name for name in whole if name.endswith(".json"))

    @st.composite
    def changed(draw):
        if draw(st.booleans()):
            name = draw(st.sampled_from(records))
            return name, json.dumps(draw(respelled(json.loads(whole[name])))).encode("utf-8", "surrogatepass")
        name = draw(st.sampled_from(sorted(whole)))
        return name, spoiled(draw, whole[name])

    def check(change):
        name, data = change
        (path / name).write_bytes(data)
        try:
            asked_folder(path)
        finally:
            (path / name).write_bytes(whole[name])

    tried(fuzz_cases, changed(), check)
    assert asked_folder(path)


def asked_folder(path):
    """Whether a folder is loaded; the command shows it then, and refuses it otherwise."""
    found = asked(path, td.load)
    asked(path, committed)
    if found is not None:
        result = CliRunner().invoke(app, ["report", str(path)])
        assert result.exit_code in (0, 2) and (result.exception is None or isinstance(result.exception, SystemExit)), (
            result.output
        )
        printable = set(string.printable) - {"\x0b", "\x0c"}
        assert not {c for c in result.output if ord(c) < 128} - printable
    return found is not None
