"""Data files: what is read, and what each mistake is answered with."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import CHATS, COMPLETION, GROUP, PAIR, write

from tokdyn import data


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
@pytest.mark.parametrize("rows", [[COMPLETION], [PAIR, PAIR], [GROUP], CHATS[:1], CHATS[1:]])
def test_what_was_written_is_read(tmp_path, name, rows):
    assert data.read(write(tmp_path / name, rows)) == rows


def test_a_line_ends_at_a_newline_only(tmp_path):
    row = {"prompt": "é", "completion": "line\u2028separator\x85 and 🙂"}
    path = write(tmp_path / "rows.jsonl", [row, row])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))  # byte order mark, blank lines
    assert data.read(path) == [row, row]


ROW = json.dumps(COMPLETION)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "{path} holds no rows"),
        ("\n \n", "{path} holds no rows"),
        (ROW + '\n{"prompt": ', "{path} line 2 is not JSON"),
        ("\n" + ROW + "\n\n[1, 2]", "{path} line 4 must be an object, got list"),
        ('{"prompt": "a"}', "{path} line 1 must have (prompt, chosen, rejected) or"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": null}',
            "line 1 must have (prompt, chosen, rejected) or (prompt, completions",
        ),
        ('{"prompt": "a", "chosen": "b", "rejected": null}', "it has prompt, chosen"),
        ("{}", "it has nothing"),
        (ROW + '\n{"prompt": "a", "completion": " \\n"}', "{path} line 2: completion is empty, so there is nothing to score"),
        ('{"prompt": "a", "chosen": "b", "rejected": []}', "{path} line 1: rejected is empty"),
        ('{"prompt": "a", "completion": [{"role": "assistant", "content": ""}]}', "{path} line 1: completion is empty"),
        ('{"prompt": [], "completion": "b"}', "{path} line 1: prompt is empty, so there is nothing to answer"),
        ('{"prompt": 3, "completion": "b"}', "{path} line 1: prompt must be text or a list of messages, got int"),
        (
            '{"prompt": "a", "completion": {"text": "b"}}',
            "{path} line 1: completion must be text or a list of messages, got dict",
        ),
        ('{"prompt": "a", "completion": ["b"]}', "{path} line 1: every message of completion must have a role and a content"),
        ('{"prompt": [{"role": "user"}], "completion": "b"}', "{path} line 1: every message of prompt must have a role"),
        (
            '{"prompt": [{"role": "user", "content": 1}], "completion": "b"}',
            "line 1: prompt cannot be taken: every content must be text or a list of parts, got int",
        ),
        (
            '{"prompt": "a", "completions": ["b"], "rewards": [1, 2]}',
            "line 1: completions and rewards must be two lists of one",
        ),
        ('{"prompt": "a", "completions": "bc", "rewards": [1, 2]}', "line 1: completions and rewards must be two lists of one"),
        ('{"prompt": "a", "completions": ["b"], "rewards": ["1"]}', "line 1: rewards must be finite numbers"),
        ('{"prompt": "a", "completions": ["b"], "rewards": [NaN]}', "line 1: rewards must be finite numbers, got [nan]"),
        ('{"prompt": "a", "completions": ["b", ""], "rewards": [1, 0]}', "{path} line 1: completions is empty"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path, text, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        data.read(path)
    assert said.format(path=path) in str(error.value) and "\n" not in str(error.value)


MANY = [COMPLETION, PAIR, GROUP, *CHATS]


def as_csv(rows):
    """RFC 4180 by hand: every cell quoted, quotes doubled, lists as JSON."""
    names = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value):
        text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
        return '"' + text.replace('"', '""') + '"'

    return "".join(",".join(map(cell, line)) + "\r\n" for line in [names, *([row.get(n) for n in names] for row in rows)])


@pytest.mark.parametrize("name", ["rows.JSONL", "rows.ndjson", "rows.json", "rows.jsonl.gz", "array.json", "array.JSON.GZ",
                                  "rows.csv", "rows.csv.gz"])  # fmt: skip
def test_the_same_rows_in_every_kind_of_file(tmp_path, name):
    lines = "\n".join(json.dumps(row) for row in MANY)
    text = json.dumps(MANY, indent=1) if "array" in name else as_csv(MANY) if "csv" in name else lines
    raw = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.lower().endswith("gz") else raw)
    rows = data.read(tmp_path / name)
    assert [{key: value for key, value in row.items() if value is not None} for row in rows] == MANY


@pytest.mark.parametrize(
    "name, raw, said",
    [
        ("rows.jsonl", ROW.encode("utf-16"), "is UTF-16"),
        ("rows.csv", b"\xff\xfep\0", "is UTF-16"),
        ("rows.jsonl.gz", gzip.compress(ROW.encode(), mtime=0)[:-9], "is not a whole gzip file"),
        ("rows.jsonl.gz", ROW.encode(), "is not a whole gzip file"),
        ("rows.json", b'[{"prompt": "a"},', "begins an array and is not JSON"),
        ("rows.json", b'[{"prompt": "a", "completion": "b"}, 3]', "item 2 must be an object, got int"),
        ("rows.csv", b"prompt,completion\na,b\na,b,c", "row 2 has more cells than the first line has names"),
        ("rows.csv", b'prompt,completions,rewards\na,[,"[1]"', "row 1: completions is not a JSON list"),
        ("rows.csv", b"prompt,completion\na,\n", r"row 1 must have .* it has prompt"),
        ("rows.csv", b"prompt,completion\n", "holds no rows"),
        ("rows.csv", b"\xef\xbb\xbfprompt;completion\r\na;b\r\n", "separates its cells by ';'"),
        ("rows.csv", b"prompt\tcompletion\na\tb\n", r"separates its cells by '\\t'"),
        ("rows.csv", "prompt,completion\na,é".encode("latin-1"), "is not UTF-8"),
    ],
)
def test_files_that_are_not_what_they_are_called_are_named(tmp_path, name, raw, said):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=f"{name} {said}"):
        data.read(tmp_path / name)


def test_a_cell_of_csv_may_be_a_long_text(tmp_path):
    (tmp_path / "rows.csv").write_text(f'prompt,completion\n"{"word " * 40_000}",b\n')
    assert len(data.read(tmp_path / "rows.csv")[0]["prompt"]) == 200_000


def test_a_parquet_column_that_is_there_twice_is_named(tmp_path):
    column = pa.array(["a"])
    pq.write_table(
        pa.Table.from_arrays([column, column, column], names=["prompt", "completion", "prompt"]), tmp_path / "r.parquet"
    )
    with pytest.raises(ValueError, match="r.parquet has more than one column prompt"):
        data.read(tmp_path / "r.parquet")


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROW.encode() + "\n{'prompt': 'é'}".encode("latin-1"))
    with pytest.raises(ValueError, match="rows.jsonl line 2 is not UTF-8"):
        data.read(path)


def test_a_bad_parquet_row_or_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="rows.parquet row 2: completion is empty"):
        data.read(write(tmp_path / "rows.parquet", [COMPLETION, COMPLETION | {"completion": ""}]))
    (tmp_path / "text.parquet").write_text(ROW)
    with pytest.raises(ValueError, match="text.parquet is not a parquet file"):
        data.read(tmp_path / "text.parquet")


def test_a_file_that_is_absent_or_of_another_kind_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data file .*none.jsonl"):
        data.read(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="is a folder, no data file"):
        data.read(tmp_path)
    (tmp_path / "rows.txt").write_text("prompt,completion")
    with pytest.raises(ValueError, match="rows.txt must end in .jsonl, .ndjson, .json or .csv .* or in .parquet"):
        data.read(tmp_path / "rows.txt")
