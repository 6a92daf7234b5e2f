"""Files that somebody else wrote: what they hold is text, and what they lack is one sentence."""

import dataclasses
import gzip
import io
import json
import math
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import tokdyn as td
from tokdyn import _json
from tokdyn._arguments import printable
from tokdyn.cli import app
from tokdyn.data import read, read_part
from tokdyn.sequences import visible
from tokdyn.testing import random_chis, tiny

STEERING = "\x1b[2J\x1b]0;owned\x07\x00\x08\r\x7f\x9b31m\u202etxet\u2066\u061c"
MARKUP = "[/] [bold red]x[/bold red] [/x] :smile:"


def call(*args):
    return CliRunner().invoke(app, [str(word) for word in args])


@pytest.fixture(scope="module")
def run():
    """A profile of two sequences, small enough to be written again and again."""
    model, (chosen, rejected) = tiny("llama"), random_chis([(3, 3), (3, 2)], seed=3)
    pair = [dataclasses.replace(chosen, role="chosen", group=0), dataclasses.replace(rejected, role="rejected", group=0)]
    return td.profile(model, pair, pair, td.objectives.DPO(), k=2)


def spoiled(run, text):
    """The run with a text in every place that a file can fill: tokens, roles, names, findings, constants, checks."""
    tokens = run.tokens
    for name in ("token", "argmax_token", "role"):
        at = tokens.column_names.index(name)
        tokens = tokens.set_column(at, name, pa.array([text] * tokens.num_rows))
    about = json.loads(json.dumps(run.about))
    about["model"]["name"] = about["objective"]["name"] = text
    about["objective"]["arguments"] = {text: 1}
    about["findings"] = [{"title": text, "text": text}]
    about["checks"] = {text: 0.5}
    about["seconds"] = {text: 0.5}
    for sequence in about["sequences"]:
        sequence |= {"prompt": text, "response": text, "role": text}
    return td.Run(about, tokens, run.vector, run.matrix, pairs=run.pairs)


# ---------------------------------------------------------------- the terminal


@pytest.mark.parametrize("text", [STEERING, MARKUP])
def test_what_a_run_holds_is_text_in_the_terminal(run, tmp_path, text):
    """Nothing reaches the terminal that steers it or turns its writing around, and markup is shown as it is written."""
    spoiled(run, text).save(tmp_path / "run")
    for options in ((), ("--per", "tokens"), ("--unit", "rate")):
        result = call("report", tmp_path / "run", *options)
        assert result.exit_code == 0, result.output + str(result.exception)
        assert not [c for c in result.output if c != "\n" and printable(c) != c]
        assert (printable(text) if text is STEERING else "[bold red]x[/bold red]").replace(" ", "") in "".join(
            result.output.split()
        )


@pytest.mark.parametrize("command", [["report"], ["explain", 0, 0], ["diff"]])
def test_json_on_a_terminal_is_text_and_says_the_same(run, tmp_path, command):
    """JSON writes such characters as \\u…: nothing steers the terminal, and what reads it finds what the run holds."""
    spoiled(run, STEERING).save(tmp_path / "run")
    word, *places = command
    paths = [tmp_path / "run"] * (2 if word == "diff" else 1)
    result = call(word, *paths, *places, "--json")
    assert result.exit_code == 0, result.output + str(result.exception)
    assert not [c for c in result.stdout if c != "\n" and printable(c) != c]
    texts = []
    json.loads(result.stdout, object_hook=lambda found: texts.extend(str(x) for x in (*found, *found.values())))
    assert any(STEERING in text or visible(STEERING) in text for text in texts)


@pytest.mark.parametrize("command", ["report", "explain", "diff"])
def test_what_is_no_profile_is_one_sentence(tmp_path, command):
    """Forces on disk have no page: a command that shows profiles says so."""
    chis = random_chis([(2, 2)], seed=1)
    td.forces(tiny("llama"), chis, chis).save(tmp_path / "forces")
    result = call(command, *[tmp_path / "forces"] * (2 if command == "diff" else 1))
    assert result.exit_code == 2 and "holds a run of kind forces, not a profile: read it with td.load" in " ".join(
        result.stderr.split()
    )


def test_paths_are_text(tmp_path):
    for name in ("[/x]", "a[red]b", "\x1b[2J"):
        result = call("report", tmp_path / name)
        assert result.exit_code == 2 and "holds no run" in " ".join(result.stderr.split()) and "\x1b" not in result.output
    result = call("profile", "--rows", 1, "--held-out", 0, "--method", "none", "--out", tmp_path / "[" / "x]")
    assert result.exit_code == 0 and "x]/report.html" in "".join(result.output.split())


def test_what_is_escaped_and_what_is_not():
    assert printable("\x1b[2J\u202e\x9b\ud800") == "\\x1b[2J\\u202e\\x9b\\ud800"
    assert printable("Grüße, 你好 🙂\n\t€") == "Grüße, 你好 🙂\n\t€" and visible(" \x1b\n") == "␣\\x1b↵"


def test_report_does_not_write_through_a_link(run, tmp_path):
    (tmp_path / "precious").write_text("mine")
    run.save(tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    (tmp_path / "run" / "report.html").symlink_to(tmp_path / "precious")
    assert call("report", tmp_path / "run").exit_code == 0
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "run" / "report.html").is_symlink() and "<html" in (tmp_path / "run" / "report.html").read_text()


# ---------------------------------------------------------------- a run that nobody wrote


def changed(about, path, value):
    """A copy with another value at a path of keys; None for the value takes the key away."""
    about = json.loads(json.dumps(about))
    *way, last = path
    at = about
    for key in way:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return about


@pytest.mark.parametrize(
    "path, value, message",
    [
        (["objective"], 3, "objective must be an object, it is 3"),
        (["objective", "name"], None, "objective.name is missing"),
        (["objective", "name"], ["a"], "objective.name must be a text"),
        (["objective", "arguments"], "x", "objective.arguments must be an object"),
        (["model"], [], "model must be an object"),
        (["settings", "eta"], "much", "settings.eta must be a number"),
        (["settings", "eta"], 10**400, "settings.eta must be a number"),
        (["settings"], None, "settings is missing"),
        (["sequences"], {"a": 1}, "sequences must be a list"),
        (["sequences"], [7], "sequences[0] must be an object"),
        (["findings"], [{"title": 1, "text": "x"}], "findings[0].title must be a text"),
        (["findings"], None, "findings is missing"),
        (["checks"], {"x": "high"}, "checks.x must be a number"),
        (["seconds"], {"x": None}, "seconds.x must be a number"),
        (["status"], 5, "status must be a text"),
        (["verify"], 5, "verify must be an object"),
    ],
)
def test_a_record_of_other_types_is_an_error_of_load(run, tmp_path, path, value, message):
    run.save(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps(changed(run.about, path, value)))
    with pytest.raises(ValueError) as caught:
        td.load(tmp_path / "run")
    assert str(caught.value).startswith(f"{tmp_path / 'run' / 'run.json'}: {message}")
    result = call("report", tmp_path / "run")
    assert result.exit_code == 2 and "Traceback" not in result.output + result.stderr


@pytest.mark.parametrize(
    "text",
    [b"", b"[" * 200_000, b"[]", b'{"format": 1', b'{"format": "\\ud800"}', b"\xff\xfe{}", b'{"format": ' + b"9" * 5000 + b"}"],
)
def test_garbage_for_a_record_is_one_sentence(run, tmp_path, text):
    run.save(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_bytes(text)
    with pytest.raises(ValueError, match="run.json .{10,260}$"):
        td.load(tmp_path / "run")
    assert call("report", tmp_path / "run").exit_code == 2


@pytest.mark.parametrize("name", ["token", "side", "sequence", "actual", "risers"])
def test_a_table_without_a_column_is_an_error_of_load(run, tmp_path, name):
    td.Run(run.about, run.tokens.drop_columns([name]), run.vector, run.matrix)
    run.save(tmp_path / "run")
    (tmp_path / "run" / "manifest-0.json").unlink()  # as in a folder of an earlier version
    pq.write_table(run.tokens.drop_columns([name]), tmp_path / "run" / "tokens.parquet")
    with pytest.raises(ValueError, match=f"tokens.parquet has no column {name}"):
        td.load(tmp_path / "run")


def test_a_matrix_of_other_sizes_is_an_error_of_load(run, tmp_path):
    from safetensors.torch import save_file

    run.save(tmp_path / "run")
    (tmp_path / "run" / "manifest-0.json").unlink()
    for tensors, message in (
        ({"vector": run.vector, "matrix": run.matrix[:, 1:].contiguous()}, "matrix must be"),
        ({"vector": run.vector[1:].contiguous()}, "vector must be"),
    ):
        save_file(tensors, tmp_path / "run" / "forces.safetensors")
        with pytest.raises(ValueError, match=f"forces.safetensors: {message}"):
            td.load(tmp_path / "run")


# ---------------------------------------------------------------- data


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"prompt": "a", "chosen": "\\ud800", "rejected": "b"}', "half of a surrogate pair"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 400 + b"}", "a number of 400 digits"),
        (b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
    ],
)
def test_hostile_lines_are_one_sentence_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"data.jsonl line 2 .*{message}"):
        read(path)
    path = tmp_path / "data.json"
    path.write_bytes(b"[" + line + b"]")
    with pytest.raises(ValueError, match=f"data.json .*{message}"):
        read(path)


PEAK = """
import resource, sys
import pyarrow.parquet
from tokdyn._rows import objects
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = objects(sys.argv[1])
try:
    found = [len(row["prompt"]) for _, row in rows]
except ValueError as error:
    found = str(error)
print(found if isinstance(found, str) else (len(found), sum(found)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)  # MiB
"""


def peak(path):
    """What came of reading a file in a process of its own, and the memory it took in MiB."""
    run = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()[0], int(run.stdout.splitlines()[1])


def test_a_kilobyte_of_parquet_takes_no_gigabytes(tmp_path):
    """A text of 16 MB in each of 250 rows, 3.9 GiB as objects, is read row by row; a list of 67 million nulls is refused."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 250, pa.int8()), pa.array(["a" * (1 << 24)]))
    others = pa.array(["b"] * 250)
    pq.write_table(pa.table({"prompt": text, "completion": others}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 2000
    told, taken = peak(tmp_path / "a.parquet")
    assert told == f"(250, {250 << 24})" and taken < 512  # the page, the dictionary and a text or two at a time: 16 MB each
    nulls = pa.ListArray.from_arrays(pa.array([0, 1 << 26]), pa.nulls(1 << 26, pa.string()))
    pq.write_table(pa.table({"prompt": ["a"], "messages": nulls}), tmp_path / "b.parquet")
    del nulls
    told, taken = peak(tmp_path / "b.parquet")
    assert f"{tmp_path}/b.parquet has 67,108,864 values of messages.list.element in 1 rows and" in told and taken < 64


def test_some_kilobytes_of_gzip_take_no_gigabytes(tmp_path):
    """A line, or an item of an array, that is longer than any row is refused; 96 rows of 1 MB are read one by one."""
    opened, more, row = (
        gzip.compress(x) for x in (b'{"prompt": "', 1048576 * b"a", b'{"prompt": "' + 1048576 * b"a" + b'"}\n')
    )
    first, between, last = map(gzip.compress, (b"[", b",", b"]"))
    for name, packed, said in (
        ("line.jsonl.gz", opened + 96 * more, "line.jsonl.gz line 1 has more than 64 MiB: that is no row of a data set"),
        ("item.json.gz", first + opened + 96 * more, "an item of more than 64 MiB, or Unterminated string"),
    ):
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(ValueError, match=said):
            read(tmp_path / name)
    for name, packed in (("rows.jsonl.gz", 96 * row), ("rows.json.gz", first + between.join(96 * [row]) + last)):
        (tmp_path / name).write_bytes(packed)
        told, taken = peak(tmp_path / name)
        assert told == f"(96, {96 << 20})" and taken < 32, (name, told, taken)


ARRAYS = (
    *("[]", " [ ] \n", "[1]", "[1 ]", '[12345, -1.5e3, true, null, "\\u00e9"]', "\ufeff[1,\n2]"),
    '[{"a": [1, {"b": "]},\\\\\\""}]}, [], "é你🙂"]\n\n',
)
NO_ARRAYS = "[", "[1", "[1,", "[1,]", "[,1]", "[1 2]", "[1] 2", "[1]]", '["a', '[{"a": 1]', "[tru]", "[1,\n\n!]"


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 16])
def test_an_array_that_is_read_in_pieces_is_what_it_is_read_whole(monkeypatch, piece):
    monkeypatch.setattr(_json, "PIECE", piece)
    for text in ARRAYS:
        assert list(_json.array(io.BytesIO(text.encode()).read)) == json.loads(text.removeprefix("\ufeff"))
    for text in NO_ARRAYS:
        with pytest.raises(json.JSONDecodeError) as caught:
            list(_json.array(io.BytesIO(text.encode()).read))
        assert caught.value.lineno == (3 if "!" in text else 1), text


def test_a_profile_reads_the_rows_it_needs(tmp_path):
    """The rest of a file is counted: rows behind those that are asked for may be anything."""
    rows = [{"prompt": f"{n}", "completion": "b"} for n in range(5)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:3], "", "{", *lines[3:]]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=3)
    for name in ("rows.jsonl", "rows.parquet"):
        found, total = read_part(tmp_path / name, 1, 3)
        assert [row["prompt"] for row in found] == ["1", "2"] and total == 6 - name.endswith("parquet")
        assert read_part(tmp_path / name, 9, 12) == ([], total)
    with pytest.raises(ValueError, match=r"rows.jsonl line 5 is not JSON"):
        read_part(tmp_path / "rows.jsonl", 3, 4)


def test_a_text_of_parquet_that_is_not_utf_8_names_its_row(tmp_path):
    raw = pa.array([b"good", b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"prompt": raw, "completion": ["a", "b"]}), tmp_path / "r.parquet")
    for read_ in (read, lambda path: read_part(path, 1, 2)):
        with pytest.raises(ValueError, match="r.parquet row . cannot be read"):
            read_(tmp_path / "r.parquet")


def test_forces_that_are_not_finite_are_not_saved(run, tmp_path):
    model, chis = tiny("llama"), random_chis([(2, 2)], seed=1)
    found = td.forces(model, chis, chis)
    broken = dataclasses.replace(found, matrix=found.matrix * math.inf)
    with pytest.raises(ValueError, match="the forces are not finite: they are not saved"):
        broken.save(tmp_path / "F")
    assert not (tmp_path / "F").exists()
    whole = td.Run(run.about, run.tokens, run.vector, torch.full_like(run.matrix, math.nan))
    with pytest.raises(ValueError, match="the forces are not finite: they are not saved"):
        whole.save(tmp_path / "run")
    partial = td.Run(run.about | {"status": "partial"}, run.tokens, run.vector, torch.full_like(run.matrix, math.nan))
    partial.save(tmp_path / "partial")


def test_weights_that_can_run_code_are_read_with_a_flag_alone(tmp_path):
    from safetensors.torch import load_file

    from tokdyn.loading import DEMO_MODEL, load_weights

    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    torch.save(load_file(tmp_path / "model" / "model.safetensors"), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds its weights as .bin alone, a format that can run code: .*--allow-pickle"):
        load_weights(str(tmp_path / "model"))
    one, other = load_weights(str(tmp_path / "model"), allow_pickle=True), load_weights("demo")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    (tmp_path / "adapter").mkdir()
    torch.save({}, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter holds its weights as .bin alone"):
        load_weights("demo", adapter=str(tmp_path / "adapter"))


@pytest.mark.parametrize("command", ["profile", "scan"])
def test_the_flag_for_such_weights_reaches_every_model_that_is_loaded(tmp_path, monkeypatch, command):
    """The policy, the reference: with --allow-pickle, and not without."""
    from tokdyn import loading

    asked, load = [], loading.load_weights

    def noted(name, device="cpu", dtype=None, adapter=None, *, allow_pickle=False):
        asked.append(allow_pickle)
        return load("demo")

    monkeypatch.setattr(loading, "load_weights", noted)
    if command == "scan":
        words = ["--data", "demo", "--rows", 1, "--probe", "demo", "--probe-rows", 1, "--kind", "chosen", "--dry-run"]
    else:
        words = ["--rows", 1, "--held-out", 0, "--method", "none", "--scope", "readout"]
    for flag in ([], ["--allow-pickle"]):
        asked.clear()
        result = call(command, *words, "--reference", "demo", "--out", tmp_path / f"run{len(flag)}", *flag)
        assert result.exit_code == 0, result.output + result.stderr
        assert asked == [bool(flag)] * 2
