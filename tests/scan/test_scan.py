"""A scan's tables: every force is td.forces' own, whatever the rows are read from and whoever computes them."""

import json
import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import tokdyn as td
from tokdyn._rows import source
from tokdyn.loading import load_tokenizer
from tokdyn.objectives import DPO, SFT, DrGRPO
from tokdyn.report.scan import render
from tokdyn.runs import manifest
from tokdyn.runs.scans import ROWS, Scan
from tokdyn.sequences import context_numbers
from tokdyn.testing import float64, random_chis, relative_error, tiny

FP64 = 1e-11  # as in tests/exact/test_scanning.py
GROUPS = {"chosen": random_chis([(3, 4), (1, 3)], seed=20), "other": random_chis([(1, 2)], seed=22)}
TEXTS = [
    {"prompt": f"Where is the {a}?", "chosen": f" The {a} is on the {b}.", "rejected": f" In the {b}, I think." + " No." * n}
    for n, (a, b) in enumerate(zip(["cat", "dog", "bird", "fish", "bread"], ["mat", "sea", "tree", "sea", "bag"], strict=True))
]


def pairs(n):
    made = []
    for i in range(n):
        chosen, rejected = random_chis([(3, 2 + i % 4), (3, 3 + i % 3)], seed=i)
        rejected.ids[:4] = chosen.ids[:4]  # the first token of the answers too
        made.append([chosen.with_(role="chosen", group=0), rejected.with_(role="rejected", group=0)])
    return made


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture(scope="module")
def reader():
    """A model of the tokenizer's vocabulary, and answers to watch."""
    return tiny("llama", vocabulary=4096)


def probe(tokenizer):
    return td.probes.load(tokenizer, TEXTS[:2], types=["chosen", "rejected"])


@pytest.fixture
def one_thread():
    """A forked process has none of the threads that its parent computed with: torch would wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def doubles(values):
    return torch.tensor(list(values), dtype=torch.float64)


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "run.json"}


def test_tables_hold_the_forces_of_every_row_alone(tmp_path):
    model, rows = tiny("llama").double(), pairs(3)
    with float64():
        scan = td.scan(model, rows, GROUPS, DPO(), out=tmp_path / "scan", block=2)
        tokens, sums = scan.tokens().to_pandas(), scan.rows().to_pylist()
        assert scan.complete and len(scan.blocks) == 2
        for n, row in enumerate(rows):
            own = tokens[tokens.row == n]
            contexts = context_numbers(row)
            for name, group in GROUPS.items():
                f = td.forces(model, row, group, DPO(), reduce="observe")
                assert relative_error(doubles(own[f"force_{name}"]), f.vector) < FP64
                assert own.token_id.tolist() == f.updated["token_id"].to_pylist()
                assert own.context.tolist() == contexts.tolist()
                for column in ("sequence", "position", "role", "rank", "argmax"):
                    assert own[column].tolist() == f.updated[column].to_pylist()
                for column in ("c", "log_prob", "entropy"):
                    assert torch.allclose(doubles(own[column]), doubles(f.updated[column].to_pylist()))
                net = torch.zeros(int(contexts.max()) + 1, dtype=torch.float64).index_add_(0, contexts, f.vector)
                for what, value in (("force", f.vector.sum()), ("size", f.vector.abs().sum()), ("net", net.abs().sum())):
                    assert sums[n][f"{what}_{name}"] == pytest.approx(float(value), rel=1e-9)
        assert sums[0]["net_chosen"] < sums[0]["size_chosen"]  # the pair's shared prefix cancels
        assert scan.to_dataframe("tokens").equals(tokens) and scan.to_dataframe()["force_other"].tolist() == [
            row["force_other"] for row in sums
        ]
        html = scan._repr_html_()
        for name in GROUPS:
            forces = [row[f"force_{name}"] / scan.tokens_of[name] for row in sums]
            worst = [f"{n + 1} ({forces[n]:+.3g})" for n in sorted(range(3), key=forces.__getitem__) if forces[n] < 0]
            lower = f"{len(worst) / 3:.0%}"
            assert f"<td>{name}</td><td>{sum(forces) / 3:+.4g}</td><td>{lower}</td><td>{', '.join(worst)}</td>" in html


def test_parts_have_columns_of_their_own_and_units_are_named(tmp_path):
    scan = td.scan(tiny("llama"), pairs(2), GROUPS, DPO(), out=tmp_path / "scan", observable="entropy", by="layer")
    tokens, sums = scan.tokens().to_pandas(), scan.rows().to_pandas()
    assert scan.parts == ["embedding", "layer 0", "layer 1", "norms", "readout", "tied"]
    assert scan.watched == {"label": "entropy", "unit": "nats"}
    for name in GROUPS:
        parts = [f"force_{name} · {part}" for part in scan.parts]
        whole, size = tokens[f"force_{name}"], tokens[parts].abs().sum(axis=1)
        assert bool(((tokens[parts].sum(axis=1) - whole).abs() <= 1e-6 * size).all())  # a float32 sum of six
        first = tokens[tokens.row == 0]
        assert sums[parts[1]][0] == pytest.approx(float(first[parts[1]].sum()), abs=1e-6 * float(first[parts[1]].abs().sum()))
    assert "mean entropy of a token" in render(scan)
    with pytest.raises(ValueError, match="was begun with"):
        td.scan(tiny("llama"), pairs(2), GROUPS, DPO(), out=tmp_path / "scan", observable="entropy", resume=True)


def test_rows_may_come_from_anything(tmp_path, reader, tokenizer):
    """JSON lines, parquet, several files, a datasets.Dataset, a list, a generator: one table, but for where a row stands."""
    import datasets

    lines = "".join(json.dumps(row) + "\n" for row in TEXTS)
    (tmp_path / "rows.jsonl").write_text("\n" + lines)
    (tmp_path / "a.jsonl").write_text("".join(lines.splitlines(True)[:2]))
    (tmp_path / "b.jsonl").write_text("".join(lines.splitlines(True)[2:]))
    pq.write_table(pa.Table.from_pylist(TEXTS), tmp_path / "rows.parquet")
    kinds = {"lines": tmp_path / "rows.jsonl", "parquet": str(tmp_path / "rows.parquet"), "list": TEXTS,
             "two": [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], "dataset": datasets.Dataset.from_list(TEXTS),
             "generator": (row for row in TEXTS)}  # fmt: skip
    scans = {
        kind: td.scan(reader, rows, probe(tokenizer), out=tmp_path / kind, tokenizer=tokenizer, block=2)
        for kind, rows in kinds.items()
    }
    tokens = scans["lines"].tokens()
    assert tokens.num_rows == sum(len(chi) for row in TEXTS for chi in td.preference(tokenizer, **row))
    for kind, scan in scans.items():
        assert scan.tokens().equals(tokens), kind
        assert scan.complete and scan.rows(["row"])["row"].to_pylist() == list(range(5))
    assert scans["lines"].rows(["where"])["where"][3].as_py() == f"{tmp_path / 'rows.jsonl'} line 5"
    assert scans["two"].rows(["where"])["where"][3].as_py() == f"{tmp_path / 'b.jsonl'} line 2"
    first = td.scan(
        reader, tmp_path / "rows.jsonl", probe(tokenizer), out=tmp_path / "3", tokenizer=tokenizer, block=2, limit=3
    )
    assert first.size == 3 and first.rows().num_rows == 3


def test_an_objective_takes_of_a_row_what_it_reads(tmp_path, reader, tokenizer):
    for objective in (SFT(), DrGRPO()):
        name = type(objective).__name__
        scan = td.scan(reader, TEXTS[:2], probe(tokenizer), objective, out=tmp_path / name, tokenizer=tokenizer)
        roles = set(scan.tokens(["role"])["role"].to_pylist())
        assert roles == ({"chosen"} if name == "SFT" else {"chosen", "rejected"})


def test_rows_that_cannot_be_used_are_kept_with_the_reason(tmp_path, reader, tokenizer):
    path = tmp_path / "rows.jsonl"
    bad = ['{"prompt": "a", "completion": "b"}', '{"prompt": ', "[1]", '{"prompt": "a", "chosen": " ", "rejected": "c"}']
    path.write_text("\n".join([json.dumps(TEXTS[0]), *bad, json.dumps(TEXTS[1])]))
    scan = td.scan(reader, path, probe(tokenizer), out=tmp_path / "scan", tokenizer=tokenizer, max_length=12)
    rows = scan.rows().to_pylist()
    assert [row["problem"] is None for row in rows] == [True, False, False, False, False, True]
    for row, said in zip(rows[1:5], ("DPO needs chosen and rejected", "is not JSON", "must be an object", "chosen is empty"),
                         strict=True):  # fmt: skip
        assert row["problem"].startswith(row["where"]) and said in row["problem"]
        assert row["force_chosen"] is None and row["tokens"] == 0
    assert set(scan.tokens(["row"])["row"].to_pylist()) == {0, 5}
    assert rows[0]["truncated"] > 0 and "max_length=12 cut" in rows[0]["note"]


def test_a_reference_model_fills_in_what_rows_do_not_bring(tmp_path):
    model, reference, rows = tiny("llama").double(), tiny("llama", seed=5).double(), pairs(2)
    rows[0] = [chi.with_(reference_log_probs=torch.full((len(chi),), -2.0)) for chi in rows[0]]
    with float64():
        scan = td.scan(model, rows, GROUPS, DPO(), out=tmp_path / "scan", reference=reference)
        truth = [td.forces(model, row, GROUPS["other"], DPO(), reduce="observe", reference=reference).vector for row in rows]
        assert relative_error(doubles(scan.tokens()["force_other"].to_pylist()), torch.cat(truth)) < FP64


def test_under_an_optimizer_steps_are_rows_one_after_the_other(tmp_path):
    model, rows = tiny("llama").double(), pairs(4)
    with float64():
        optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, eps=1e-3)
        scan = td.scan(model, rows, GROUPS, DPO(), out=tmp_path / "s", optimizer=optimizer, step_rows=1, block=2)
        truth = [td.forces(model, row, GROUPS["other"], DPO(), reduce="observe", optimizer=optimizer).vector for row in rows]
        assert relative_error(doubles(scan.tokens()["force_other"].to_pylist()), torch.cat(truth)) < 1e-9
        with pytest.raises(ValueError, match="block=3 is not a multiple of step_rows=2"):
            td.scan(model, rows, GROUPS, DPO(), out=tmp_path / "t", optimizer=optimizer, step_rows=2, block=3)


# ---------------------------------------------------------------- nothing lost


def interrupted_after(n):
    """A stage that presses Ctrl-C before block n."""
    seen = []

    def stage(what, done, total):
        seen.append(done)
        if len(seen) > n:
            raise KeyboardInterrupt

    return stage


def test_an_interrupted_scan_is_readable_and_goes_on_to_the_same_bytes(tmp_path, model):
    rows = pairs(9)
    td.scan(model, rows, GROUPS, DPO(), out=tmp_path / "whole", block=2)
    with pytest.raises(KeyboardInterrupt):
        td.scan(model, rows, GROUPS, DPO(), out=tmp_path / "part", block=2, stage=interrupted_after(2))
    part = Scan(tmp_path / "part")
    assert not part.complete and part.missing == [2, 3, 4] and part.rows(["row"])["row"].to_pylist() == [0, 1, 2, 3]
    with pytest.raises(FileExistsError, match="go on with --resume"):
        td.scan(model, rows, GROUPS, DPO(), out=tmp_path / "part", block=2)
    assert td.scan(model, rows, GROUPS, DPO(), out=tmp_path / "part", block=2, resume=True).complete
    assert files(tmp_path / "part") == files(tmp_path / "whole")
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for name, said in (("file", "is a file"), ("full", "holds no scan")):
        with pytest.raises(FileExistsError, match=said):
            td.scan(model, rows, GROUPS, DPO(), out=tmp_path / name, resume=True)


def test_a_scan_goes_on_with_the_same_question_only(tmp_path, model):
    rows, out = pairs(3), tmp_path / "scan"
    td.scan(model, rows, GROUPS, DPO(), out=out, block=2)
    other = {"chosen": GROUPS["chosen"]}
    for changed, said in (
        (dict(model=tiny("llama", seed=3)), "parameters="),
        (dict(rows=pairs(2)), "data="),
        (dict(observe=other), "groups="),
        (dict(objective=DPO(beta=0.2)), "objective="),
        (dict(block=4), "settings="),
        (dict(optimizer=torch.optim.SGD(model.parameters(), lr=0.1), step_rows=2), "optimizer="),
    ):
        asked = dict(model=model, rows=rows, observe=GROUPS, objective=DPO(), block=2) | changed
        with pytest.raises(ValueError, match=f"was begun with {said}"):
            td.scan(out=out, resume=True, **asked)


def test_shards_share_a_folder_and_are_one_scan(tmp_path, model):
    """Every table is that of one process, bit for bit."""
    rows = pairs(7)
    whole = td.scan(model, rows, GROUPS, DPO(), out=tmp_path / "whole", block=2)
    for i in (1, 0):
        shared = td.scan(model, rows, GROUPS, DPO(), out=tmp_path / "shared", block=2, shard=(i, 2))
        assert shared.complete == (i == 0)
    assert [commit.writer for _, commit in shared.blocks] == ["0-of-2", "1-of-2"] * 2
    for (_, a), (_, b) in zip(whole.blocks, shared.blocks, strict=True):
        assert a.sums == b.sums
    assert shared.tokens().equals(whole.tokens()) and shared.rows().equals(whole.rows())
    with pytest.raises(ValueError, match="0 <= i < n"):
        td.scan(model, rows, GROUPS, DPO(), out=tmp_path / "more", shard=(2, 2))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_what_a_killed_scan_called_done_is_there(tmp_path, model, one_thread):
    """SIGKILL at any moment, over and over: a block that was listed stays, and in the end all bytes are those of one run."""
    rows, out, seen = pairs(24), tmp_path / "scan", {}
    td.scan(model, rows, GROUPS, DPO(), out=tmp_path / "whole", block=2)
    for attempt in range(6):
        child = os.fork()
        if child == 0:
            td.scan(model, rows, GROUPS, DPO(), out=out, block=2, resume=True)
            os._exit(0)
        end = time.monotonic() + 60  # killed a few blocks later, however slow the machine is
        while len(list(out.glob("tokens-*.parquet"))) < 2 * (attempt + 1) and time.monotonic() < end:
            time.sleep(0.002 * (attempt + 1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (out / "run.json").exists():
            found = {block: commit.sums for block, commit in Scan(out).blocks}
            assert seen.items() <= found.items()
            seen = found
    assert seen and td.scan(model, rows, GROUPS, DPO(), out=out, block=2, resume=True).complete
    assert files(out) == files(tmp_path / "whole")


def test_a_full_disk_and_too_little_memory_end_with_a_sentence_and_a_readable_folder(tmp_path, model, monkeypatch):
    rows, put, calls = pairs(6), manifest._put, []

    def full(path, write):
        calls.append(path)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        return put(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_put", full)
        with pytest.raises(OSError, match=r"cannot be written to \(No space left on device\): what is there can be read"):
            td.scan(model, rows, GROUPS, DPO(), out=tmp_path / "disk", block=2)
    assert len(Scan(tmp_path / "disk").blocks) == 1
    from tokdyn.scan import scanner

    forces = scanner.Pulled.forces

    def exhausted(self, update, *args):
        if update.rows[0].where == "row 3":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forces(self, update, *args)

    monkeypatch.setattr(scanner.Pulled, "forces", exhausted)
    with pytest.raises(ValueError, match="out of memory at rows 3 to 4: give less memory="):
        td.scan(model, rows, GROUPS, DPO(), out=tmp_path / "memory", block=2)
    assert Scan(tmp_path / "memory").rows(["row"])["row"].to_pylist() == [0, 1]


def test_what_is_not_a_scan_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        Scan(tmp_path)
    (tmp_path / "run.json").write_text('{"kind": "training", "format": 1}')
    with pytest.raises(ValueError, match="holds a training, not a scan"):
        Scan(tmp_path)
    (tmp_path / "run.json").write_text('{"kind": "scan", "format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        Scan(tmp_path)


def test_blocks_that_are_there_are_read_one_at_a_time(tmp_path, model):
    scan = td.scan(model, pairs(5), GROUPS, DPO(), out=tmp_path / "scan", block=2)
    assert [table.num_rows for table in scan.each(ROWS, ["row"])] == [2, 2, 1]
    assert scan.groups == ["chosen", "other"] and scan.tokens_of == {"chosen": 7, "other": 2}


# ---------------------------------------------------------------- rows by number


def test_rows_are_read_on_and_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"n": {n}}}\n\n' for n in range(7)))
    table = source(path, limit=6)
    assert table.size == 6
    for start, stop in ((0, 2), (4, 9), (1, 3), (6, 8)):
        assert [row["n"] for _, row in table.read(start, stop)] == list(range(start, min(stop, 6)))
    assert table.read(2, 3) == [(f"{path} line 5", {"n": 2})]
    assert source(path).about != table.about
    with pytest.raises(ValueError, match="must be paths of data files, or rows"):
        source({"prompt": "a"})
    with pytest.raises(ValueError, match="holds no rows"):
        source([])


def test_processes_that_begin_at_once_write_one_record(tmp_path, model):
    """Each under a name of its own until it is whole; what a killed one left is gone."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    from tokdyn.scan import _write_about

    writers = [manifest.Writer(tmp_path / "scan", f"rank{r}") for r in range(4)]
    (tmp_path / "scan" / ".run.json.rank0.part").write_text("{")
    together = Barrier(4)

    def write(writer):
        together.wait()
        for _ in range(20):
            _write_about(writer, {"kind": "scan"}, {"more": 1})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, writers))
    assert json.loads((tmp_path / "scan" / "run.json").read_text()) == {"kind": "scan", "more": 1}
    assert not list((tmp_path / "scan").glob(".run.json*"))
    for writer in writers:
        writer.close()
