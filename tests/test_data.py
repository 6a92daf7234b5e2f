"""Data files: what is read, what each mistake is answered with, and what an objective makes of a row."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokdyn import data
from tokdyn import objectives as td
from tokdyn.loading import load_model

ASK = [{"role": "user", "content": "Where is the cat?"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


COMPLETION = {"prompt": "Where is the cat?", "completion": " On the mat."}
PAIR = {"prompt": "Where is the cat?", "chosen": " On the mat.", "rejected": " In the garden, I think."}
GROUP = {"prompt": "Where is the cat?", "completions": [" On the mat.", " Here.", " There."], "rewards": [1, 0, 0.5]}
CHATS = [
    {"prompt": ASK, "completion": answer("On the mat.")},
    {"prompt": ASK, "chosen": answer("Here."), "rejected": answer("No.")},
]


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<eos>"], show_progress=False
    )
    core.train_from_iterator([json.dumps([COMPLETION, PAIR, GROUP])], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    fast.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return fast


def write(path, rows):
    if path.suffix == ".parquet":
        columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
        pq.write_table(pa.table(columns), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
@pytest.mark.parametrize("rows", [[COMPLETION], [PAIR, PAIR], [GROUP], CHATS[:1], CHATS[1:]])
def test_what_was_written_is_read(tmp_path, name, rows):
    assert data.read(write(tmp_path / name, rows)) == rows


def test_a_line_ends_at_a_newline_only(tmp_path):
    row = {"prompt": "é", "completion": "line\u2028separator\x85 and 🙂"}
    path = write(tmp_path / "rows.jsonl", [row, row])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))  # byte order mark, blank lines
    assert data.read(path) == [row, row]


def test_columns_that_parquet_fills_with_null_are_absent(tmp_path, tokenizer):
    mixed = [COMPLETION, PAIR, GROUP]
    lines, rows = (data.sequences(tokenizer, data.read(write(tmp_path / n, mixed)), td.SFT()) for n in ("r.jsonl", "r.parquet"))
    assert [chi.response for chi in lines] == [chi.response for chi in rows]
    assert len(data.watched(tokenizer, data.read(tmp_path / "r.parquet"))) == 1 + 2 + 3


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
        ("rows.csv", "prompt,completion\na,é".encode("latin-1"), "is not UTF-8"),
    ],
)
def test_files_that_are_not_what_they_are_called_are_named(tmp_path, name, raw, said):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=f"{name} {said}"):
        data.read(tmp_path / name)


def test_a_parquet_column_that_is_there_twice_is_named(tmp_path):
    column = pa.array(["a"])
    pq.write_table(
        pa.Table.from_arrays([column, column, column], names=["prompt", "completion", "prompt"]), tmp_path / "r.parquet"
    )
    with pytest.raises(ValueError, match="r.parquet has more than one column prompt"):
        data.read(tmp_path / "r.parquet")


# ---------------------------------------------------------------- one form for every row

SHORT = [{"role": "user", "content": "Where?"}]
TURNS = [*ASK, *answer("On the mat."), *SHORT]
SAME = [  # (a form that people have, the same row in full)
    ({"chosen": "Q: why? A: so.", "rejected": "Q: why? A: no."}, dict(prompt="Q: why? A:", chosen=" so.", rejected=" no.")),
    ({"chosen": ASK + answer("Here."), "rejected": ASK + answer("No.")}, CHATS[1]),
    ({"prompt": None, "chosen": ASK + answer("Here."), "rejected": ASK + answer("No.")}, CHATS[1]),
    ({"prompt": ASK[0]["content"], "chosen": ASK + answer("Here."), "rejected": ASK + answer("No.")}, CHATS[1]),
    ({"prompt": ASK, "chosen": ASK + answer("Here."), "rejected": ASK + answer("No.")}, CHATS[1]),
    ({"prompt": ASK, "chosen": ASK + answer("Here."), "rejected": answer("No.")}, CHATS[1]),
    ({"prompt": ASK, "completion": ASK + answer("On the mat.")}, CHATS[0]),
    ({"prompt": ASK[0]["content"], "completion": ASK + answer("On the mat.")}, CHATS[0]),
    ({"messages": ASK + answer("On the mat.")}, CHATS[0]),
    ({"messages": TURNS + answer("There.")}, {"prompt": TURNS, "completion": answer("There.")}),
    (
        {"prompt": ASK, "completions": [ASK + answer("Here."), answer("No.")], "rewards": [1, 0]},
        {"prompt": ASK, "completions": [answer("Here."), answer("No.")], "rewards": [1, 0]},
    ),
]


@pytest.mark.parametrize("row, full", SAME)
def test_forms_that_people_have_are_the_same_row(tmp_path, tokenizer, row, full):
    (read,) = data.read(write(tmp_path / "rows.jsonl", [row]))
    assert read == full
    for rows in ([row], [read]):  # given as they are, or read
        assert [chi.response for chi in data.watched(tokenizer, rows)] == [c.response for c in data.watched(tokenizer, [full])]


@pytest.mark.parametrize("row, full", [pair for pair in SAME if "chosen" in pair[0] and not pair[0].get("prompt")])
def test_an_implicit_prompt_is_trls(row, full):
    extract_prompt = pytest.importorskip("trl.data_utils").extract_prompt
    assert extract_prompt(row) == full


def test_a_whole_conversation_beside_its_prompt_scores_the_answer_alone(tokenizer):
    long = {"prompt": ASK, "chosen": ASK + answer("Here."), "rejected": ASK + answer("No.")}
    (whole, _), (bare, _) = (data.sequences(tokenizer, [row], td.DPO()) for row in (long, CHATS[1]))
    assert torch.equal(whole.ids, bare.ids) and torch.equal(whole.scored, bare.scored)


@pytest.mark.parametrize("label, role", [(True, "chosen"), (False, "rejected"), (1, "chosen"), ("False", "rejected")])
def test_a_labelled_completion_is_one_side_of_a_pair(tmp_path, tokenizer, label, role):
    rows = data.read(write(tmp_path / "rows.jsonl", [COMPLETION | {"label": label}]))
    (chi,) = data.sequences(tokenizer, rows, td.KTO())
    assert (chi.role, chi.response) == (role, COMPLETION["completion"])
    pair = dict(prompt=COMPLETION["prompt"], chosen="x", rejected="x") | {role: COMPLETION["completion"]}
    (same,) = [c for c in data.sequences(tokenizer, [pair], td.KTO()) if c.role == role]
    assert torch.equal(chi.ids, same.ids)
    assert data.watched(tokenizer, rows)[0].role == role


@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": ASK, "completion": answer("a") + SHORT + answer("b")}, "completion .* assistant alone, got one of 'user'"),
        ({"prompt": ASK, "chosen": SHORT, "rejected": answer("b")}, "chosen .* assistant alone, got one of 'user'"),
        ({"prompt": "a", "completion": [{"role": "system", "content": "b"}]}, "assistant alone, got one of 'system'"),
        ({"prompt": "a", "chosen": ASK + answer("b"), "rejected": ASK + answer("c")}, "in which the prompt is no message"),
        ({"messages": ASK}, "messages must be a list that ends in a question and the assistant's answer"),
        ({"messages": answer("a") + ASK}, "got one of 'user'"),
        ({"chosen": "abc", "rejected": "xyz"}, "must begin alike and then differ"),
        ({"chosen": "abc", "rejected": "abc"}, "must begin alike and then differ"),
        ({"chosen": "abc", "rejected": answer("abc")}, "must begin alike and then differ"),
        (COMPLETION | {"label": "good"}, "label must be true or false .* got 'good'"),
        ({"prompt": "a", "completion": "b\ud800"}, "completion holds half a character at place 1"),
        ({"prompt": [{"role": "user", "content": "\udc00"}], "completion": "b"}, "prompt holds half a character"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": "b"}, "prompt .* got 'image'"),
    ],
)
def test_rows_in_which_no_answer_can_be_told_are_refused_by_place(tmp_path, tokenizer, row, said):
    (tmp_path / "rows.jsonl").write_text(ROW + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"rows.jsonl line 2:? .*{said}"):
        data.read(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=f"row 2:? .*{said}"):
        data.sequences(tokenizer, [COMPLETION, row], td.SFT())


def test_what_a_template_raises_names_the_line(tmp_path, tokenizer):
    rows = data.read(write(tmp_path / "rows.jsonl", [COMPLETION, CHATS[0]]))
    broken = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    broken.chat_template = "{{ raise_exception('no chats here') }}"
    for make in (lambda: data.sequences(broken, rows, td.SFT()), lambda: data.watched(broken, rows)):
        with pytest.raises(ValueError, match="rows.jsonl line 2: the chat template failed: TemplateError: no chats here"):
            make()


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
    (tmp_path / "rows.txt").write_text("prompt,completion")
    with pytest.raises(ValueError, match="rows.txt must end in .jsonl, .ndjson, .json or .csv .* or in .parquet"):
        data.read(tmp_path / "rows.txt")


# ---------------------------------------------------------------- rows as an objective reads them


def facts(chis):
    return [(chi.role, chi.group, chi.response, chi.advantage) for chi in chis]


HALF = 0.5 / 0.5**0.5  # of a right and a wrong answer: ±½ over the sample spread of 1 and 0


@pytest.mark.parametrize(
    "objective, expected",
    [
        (td.SFT(), [("chosen", 0, PAIR["chosen"], None)]),
        (td.DPO(), [("chosen", 0, PAIR["chosen"], None), ("rejected", 0, PAIR["rejected"], None)]),
        (td.KTO(), [("chosen", 0, PAIR["chosen"], None), ("rejected", 0, PAIR["rejected"], None)]),
        (td.GRPO(), [("chosen", 0, PAIR["chosen"], HALF), ("rejected", 0, PAIR["rejected"], -HALF)]),
        (td.DrGRPO(), [("chosen", 0, PAIR["chosen"], 0.5), ("rejected", 0, PAIR["rejected"], -0.5)]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_preference_row_serves_every_objective(tokenizer, objective, expected):
    assert facts(data.sequences(tokenizer, [PAIR], objective)) == expected


def test_sampled_groups_serve_supervised_and_policy_gradient_objectives(tokenizer):
    texts = GROUP["completions"]
    assert [chi.response for chi in data.sequences(tokenizer, [GROUP], td.SFT())] == texts
    advantages = [chi.advantage for chi in data.sequences(tokenizer, [GROUP], td.GRPO())]
    assert advantages == pytest.approx([1.0, -1.0, 0.0])  # sample spread of 1, 0, ½ is ½
    wide = [chi.advantage for chi in data.sequences(tokenizer, [GROUP], td.GRPO(), std="population")]
    assert wide == pytest.approx([1.5**0.5, -(1.5**0.5), 0.0])  # population spread is 1/√6


@pytest.mark.parametrize("objective", [td.by_name(name) for name in td.__all__ if name != "SimKO"], ids=repr)
def test_sequences_are_what_the_objective_asks_for(tokenizer, objective):
    chis = data.sequences(tokenizer, [PAIR, CHATS[1]], objective)
    log_probs = torch.full((sum(map(len, chis)),), -1.0)
    assert {chi.group for chi in chis} == {0, 1}
    assert objective.g_terms(log_probs, chis).c.abs().max() > 0


def test_every_answer_is_watched_under_its_role(tokenizer):
    chis = data.watched(tokenizer, [COMPLETION, PAIR, GROUP], first_group=5)
    assert [(chi.role, chi.group) for chi in chis] == [("response", 5), ("chosen", 6), ("rejected", 6)] + 3 * [("response", 7)]


@pytest.mark.parametrize(
    "objective, row, said",
    [
        (td.DPO(), COMPLETION, "row 2: DPO needs chosen and rejected in every row; this one has prompt, completion"),
        (td.DPO(), GROUP, "DPO needs chosen and rejected in every row; this one has prompt, completions, rewards"),
        (td.KTO(), COMPLETION, "row 2: KTO needs chosen and rejected, or completion and label in every row; this one has"),
        (td.GRPO(), COMPLETION, "row 2: GRPO needs chosen and rejected, or completions and rewards in every row; this one has"),
    ],
)
def test_rows_that_do_not_fit_the_objective_are_named(tokenizer, objective, row, said):
    with pytest.raises(ValueError, match=said):
        data.sequences(tokenizer, [PAIR, row], objective)


# ---------------------------------------------------------------- models that cannot be loaded


def sentence(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_model_folder_that_is_absent_or_holds_none_is_said_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="there is no model folder .*/none") as error:
        load_model(str(tmp_path / "none"))
    assert sentence(error)
    with pytest.raises(ValueError, match="holds no model: it has no config.json") as error:
        load_model(str(tmp_path))
    assert sentence(error)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="cannot load the tokenizer of .*") as error:
        load_model(str(tmp_path))
    assert sentence(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_cuda_device_is_said_before_anything_is_loaded():
    with pytest.raises(ValueError, match="device 'cuda:0' was asked for but torch finds no CUDA device: use device=\"cpu\""):
        load_model("no/such", device="cuda:0")


def test_an_unknown_device_is_said():
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        load_model("no/such", device="gpu")
