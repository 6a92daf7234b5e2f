"""Probe sets: what each kind of response is, that a seed fixes it, and what each mistake is answered with."""

import json
import os
import random
import unicodedata

import pytest
import torch
from typer.testing import CliRunner

import tokdyn as td
from tokdyn import probes
from tokdyn.cli import app
from tokdyn.loading import DEMO_PAIRS, load_model

PAIRS = [
    {"prompt": "Q: Why sleep?\n\nA:", "chosen": " It lets the body and the mind rest.", "rejected": " People do it."},
    {
        "prompt": "Q: Why sleep?\n\nA:",
        "chosen": " So that the brain can tidy up.",
        "rejected": " Yes.",
    },  # the same prompt again
    {"prompt": "Q: What is tea?\n\nA:", "chosen": " Leaves in hot water, left for a while.", "rejected": " A drink."},
    {"prompt": "Q: Is it late?\n\nA:", "chosen": " Yes.", "rejected": " No."},
    {"prompt": "Q: Where is north?\n\nA:", "chosen": " Where moss grows, some say.", "rejected": " Yes."},
]
# the form of the paper's files, with fields that are no kinds and one that is blank
PAPER = [
    {"prompt": f"\n\nHuman: {q}\n\nAssistant:", "chosen_selfr": "@@@", "other": 3}
    | {kind: f" {kind} answers {q}" for kind in probes.TYPES}
    | ({"chosen_initial": " \n"} if n == 1 else {})
    for n, q in enumerate(("why?", "where?", "when?"))
]
HELD_OUT = [
    {"prompt": "Q: Why sleep?\n\nA:", "chosen": " Held out, but the prompt of two rows."},
    {"prompt": "Q: How far is the moon?\n\nA:", "chosen": " Some thirty Earths away."},
]


def words(text):
    return sorted(text.split())


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---------------------------------------------------------------- what is made


@pytest.mark.parametrize("seed", range(5))
def test_permuted_are_the_same_words_in_another_order(seed):
    for row in probes.build(PAIRS, seed=seed):
        if "random_permute" in row:
            assert words(row["random_permute"]) == words(row["chosen"])
            assert row["random_permute"].split() != row["chosen"].split()
            assert row["random_permute"][0] == " "  # the prompt runs into the answer as before
        else:
            assert row["chosen"] == " Yes."  # one word has one order


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "text, words",
    [
        ("今天天气很好。我们去公园吧。", 12),
        (" こんにちは、世界。", 7),
        ("我爱 Python 编程", 5),
        ("สวัสดีครับ", 7),
        (" It lets\n the body rest.", 5),
    ],
)
def test_words_of_scripts_without_spaces_are_permuted_too(text, words, seed):
    """The same characters in another order, cut only between words; no space comes to where there was none."""
    mixed = probes.permute(text, random.Random(seed))
    assert len(probes.split_words(text)) == words and "".join(probes.split_words(text)).split() == text.split()
    assert sorted(mixed.replace(" ", "")) == sorted("".join(text.split())) and mixed.split() != text.split()
    assert len(mixed.split()) <= len(text.split()) and (mixed[0] == " ") == (text[0] == " ")
    assert not any(
        unicodedata.category(c)[0] in "MP" for c in (mixed.lstrip()[0], *(w.strip()[0] for w in probes.split_words(mixed)))
    )


def test_random_words_of_scripts_without_spaces_are_as_many_and_no_answer_as_it_stands():
    texts = ["今天天气很好。", "我们去公园吧。", "他昨天没有来。", "这本书很有意思。"]
    rows = [{"prompt": f"{n}?", "chosen": text} for n, text in enumerate(texts)]
    for row in probes.build(rows, seed=3):
        assert len(probes.split_words(row["random_nonhum"])) == len(probes.split_words(row["chosen"]))
        assert row["random_nonhum"] not in texts and " " not in row["random_nonhum"] and row["random_permute"] not in texts


def test_turns_of_others_are_no_part_of_an_answer():
    def say(*texts):
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=False)]

    rows = [{"chosen": say(q, good), "rejected": say(q, bad)} for q, good, bad in (("a?", "b", "c"), ("d?", "e f", "g"))]
    full = [{"prompt": r["chosen"][:1], "chosen": r["chosen"][1:], "rejected": r["rejected"][1:]} for r in rows]
    assert probes.build(rows) == probes.build(full) and probes.text_of(probes.build(rows)[0]["irr_train"]) == "e f"
    with pytest.raises(ValueError, match="row 1: chosen .* assistant alone, got one of 'user'"):
        probes.build([{"prompt": "a", "chosen": say("b")}])
    with pytest.raises(ValueError, match="row 2: irr_train .* assistant alone, got one of 'user'"):
        probes.build([full[0], full[1] | {"irr_train": say("a?", "b")}])


@pytest.mark.parametrize("seed", range(20))
def test_other_prompts_answers_never_come_from_the_same_prompt(seed):
    for row in probes.build(PAIRS, held_out=HELD_OUT, seed=seed):
        for kind, source in (("irr_train", PAIRS), ("irr_test", HELD_OUT)):
            (origin,) = [other for other in source if other["chosen"] == row[kind]]
            assert origin["prompt"] != row["prompt"] and row[kind] not in (row["chosen"], row["rejected"])


def test_every_other_answer_can_come(seeds=60):
    drawn = {probes.build(PAIRS, seed=s)[0]["irr_train"] for s in range(seeds)}
    assert drawn == {row["chosen"] for row in PAIRS[2:]}


@pytest.mark.parametrize("seed", range(5))
def test_random_words_are_as_many_as_chosen_has_and_from_answers_to_other_prompts(seed):
    for row in probes.build(PAIRS, seed=seed):
        foreign = {w for other in PAIRS if other["prompt"] != row["prompt"] for w in other["chosen"].split()}
        assert len(row["random_nonhum"].split()) == len(row["chosen"].split())
        assert set(row["random_nonhum"].split()) <= foreign


def test_kinds_that_are_given_are_kept_and_blank_ones_are_not():
    made = probes.build(PAPER)
    for before, after in zip(PAPER, made, strict=True):
        given = {kind for kind in probes.TYPES if before[kind].strip()}
        assert list(after) == ["prompt", *[kind for kind in probes.TYPES if kind in given]]
        assert all(after[key] == before[key] for key in after)
    assert "chosen_initial" in made[0] and "chosen_initial" not in made[1]


def test_prompts_with_answers_alone_and_completions_do(tmp_path):
    alone = [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in PAIRS]
    named = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    made = probes.build(write(tmp_path / "alone.jsonl", alone))
    assert made == probes.build(write(tmp_path / "named.jsonl", named))
    assert set(made[0]) == {"prompt", "chosen", "irr_train", "random_permute", "random_nonhum"}


def test_conversations():
    def say(role, text):
        return [{"role": role, "content": text}]

    chats = [
        {"prompt": say("user", row["prompt"]), "chosen": say("assistant", row["chosen"]),
         "rejected": say("assistant", row["rejected"])} for row in PAIRS
    ]  # fmt: skip
    made, plain = probes.build(chats, seed=3), probes.build(PAIRS, seed=3)
    for chat, row in zip(made, plain, strict=True):
        assert probes.text_of(chat["irr_train"]) == row["irr_train"] and chat.get("random_permute") == row.get("random_permute")
    _, tokenizer = load_model("demo")
    loaded = probes.load(tokenizer, made)
    assert loaded["random_permute"][0].response.split()[:-1] != loaded["chosen"][0].response.split()[:-1]


# ---------------------------------------------------------------- seeds and rows


def test_a_seed_fixes_everything_and_another_changes_it():
    assert probes.build(PAIRS, seed=1) == probes.build(PAIRS, seed=1)
    assert probes.build(PAIRS, seed=1) != probes.build(PAIRS, seed=2)


@pytest.mark.parametrize("seed", range(5))
def test_drawn_rows_are_those_of_the_whole_in_their_order(seed):
    whole, some = probes.build(DEMO_PAIRS, seed=seed), probes.build(DEMO_PAIRS, seed=seed, rows=7)
    places = [whole.index(row) for row in some]  # equal in every response: none depends on which others were drawn
    assert len(some) == 7 and places == sorted(places) and places != list(range(7))


# ---------------------------------------------------------------- files


def test_written_and_read_back(tmp_path):
    made = probes.build(PAIRS)
    probes.write(tmp_path / "probe.jsonl", made)
    assert [json.loads(line) for line in (tmp_path / "probe.jsonl").read_text().splitlines()] == made
    assert probes.build(tmp_path / "probe.jsonl") == made  # nothing is left to make
    with pytest.raises(FileExistsError, match="exists already.*overwrite"):
        probes.write(tmp_path / "probe.jsonl", made)
    probes.write(tmp_path / "probe.jsonl", made[:1], overwrite=True)
    assert len((tmp_path / "probe.jsonl").read_text().splitlines()) == 1


def test_a_file_that_could_not_be_written_leaves_what_was_there(tmp_path):
    probes.write(tmp_path / "probe.jsonl", PAIRS)
    before = (tmp_path / "probe.jsonl").read_bytes()
    with pytest.raises(TypeError):
        probes.write(tmp_path / "probe.jsonl", [*PAIRS, {"prompt": object()}], overwrite=True)
    assert (tmp_path / "probe.jsonl").read_bytes() == before and os.listdir(tmp_path) == ["probe.jsonl"]


# ---------------------------------------------------------------- as a probe


def test_loaded_kinds_are_a_probe(tmp_path):
    _, tokenizer = load_model("demo")
    probes.write(tmp_path / "probe.jsonl", probes.build(DEMO_PAIRS, rows=2))
    probe = td.probes.load(tokenizer, tmp_path / "probe.jsonl", max_length=None)
    assert list(probe) == ["chosen", "rejected", "irr_train", "random_permute", "random_nonhum"]
    rows = [json.loads(line) for line in (tmp_path / "probe.jsonl").read_text().splitlines()]
    for kind, chis in probe.items():
        assert [chi.role for chi in chis] == [kind] * 2 and [chi.group for chi in chis] == [0, 1]
        assert [chi.response.removesuffix(tokenizer.eos_token) for chi in chis] == [row[kind] for row in rows]
    model, _ = load_model("demo")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    probe = probes.load(tokenizer, tmp_path / "probe.jsonl", types=["random_permute", "chosen"], rows=1)
    with td.Monitor(model, optimizer, probe=probe, on_error="raise") as monitor:
        chi = probe["chosen"][0]
        log_probs = model(chi.ids[None]).logits[0, :-1].log_softmax(-1)
        labels = torch.where(chi.scored, chi.ids, -100)[1:]
        torch.nn.functional.nll_loss(log_probs, labels, ignore_index=-100).backward()
        optimizer.step()
        monitor.step_end()
    assert set(monitor.steps[-1].observed["probe"].to_pylist()) == {"random_permute", "chosen"}
    assert monitor.probe.blamed == ["random_permute"]


def test_the_papers_form_is_read_as_it_is(tmp_path):
    _, tokenizer = load_model("demo")
    probe = probes.load(tokenizer, write(tmp_path / "paper.jsonl", PAPER))
    assert tuple(probe) == probes.TYPES
    assert {kind: len(chis) for kind, chis in probe.items()} == {k: 2 if k == "chosen_initial" else 3 for k in probes.TYPES}
    assert [chi.group for chi in probe["chosen_initial"]] == [0, 2]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: probes.build("nowhere.jsonl"), "no data file nowhere.jsonl"),
        (lambda: probes.build(PAIRS, rows=6), "between 1 and the 5 rows of the data, got 6"),
        (lambda: probes.build(PAIRS, types=["chosen", "choosen"]), "types must be among chosen, .* got choosen"),
        (lambda: probes.build(PAIRS, types=[]), "got none"),
        (lambda: probes.build(PAIRS, types=["chosen_gptformat"]), "no chosen_gptformat: no row of the data has it"),
        (lambda: probes.build(PAIRS, types=["irr_test"]), "irr_test can be made with held_out="),
        (lambda: probes.build(PAIRS[:2]), "no answer to another prompt than 'Q: Why sleep.*more prompts"),
        (lambda: probes.build([{"prompt": "Why?"}]), r"row 1 must have prompt and chosen \(or completion\); it has prompt"),
        (lambda: probes.build([{"prompt": "Why?", "chosen": "  "}]), "row 1: chosen is empty"),
        (lambda: probes.build([{"prompt": "Why?", "chosen": 3}]), "row 1: chosen must be text or a list of messages, got int"),
        (lambda: probes.build([]), "no rows"),
        (lambda: probes.build([*PAIRS, {"prompt": "Why?", "chosen": "\ud800"}]), "row 6: chosen holds half a character"),
        (lambda: probes.load(None, PAIRS, types=["irr_hum"]), "no irr_hum: the data has none: build them with"),
        (lambda: probes.load(None, PAIRS, rows=0), "between 1 and the 5 rows"),
        (lambda: probes.write("no/where/probe.jsonl", PAIRS), "no folder no/where"),
    ],
)  # fmt: skip
def test_mistakes_say_what_to_do(call, words):
    with pytest.raises((ValueError, OSError), match=words):
        call()


def test_a_file_and_line_are_named(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [PAIRS[0], {"question": "Why?"}])
    with pytest.raises(ValueError, match="pairs.jsonl line 2 must have prompt and chosen .* it has question"):
        probes.build(path)
    path.write_text('"Why?"\n')
    with pytest.raises(ValueError, match="pairs.jsonl line 1 must be an object, got str"):
        probes.build(path)


# ---------------------------------------------------------------- command line


def test_command_line(tmp_path):
    def call(*args):
        return CliRunner().invoke(app, ["probe", "build", *map(str, args)])

    out = tmp_path / "probe.jsonl"
    result = call("demo", "--out", out, "--rows", 3, "--seed", 5, "--held-out", write(tmp_path / "other.jsonl", HELD_OUT))
    assert result.exit_code == 0, result.output + result.stderr
    assert [json.loads(line) for line in out.read_text().splitlines()] == probes.build(
        DEMO_PAIRS, rows=3, seed=5, held_out=HELD_OUT
    )
    assert all(kind in result.output for kind in ("chosen", "irr_test", "random_permute"))
    again = call("demo", "--out", out)
    assert again.exit_code == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr
    assert call("demo", "--out", out, "--overwrite", "--kind", "chosen", "--kind", "rejected").exit_code == 0
    assert set(json.loads(out.read_text().splitlines()[0])) == {"prompt", "chosen", "rejected"}
    assert "got wrong" in call("demo", "--out", tmp_path / "p.jsonl", "--kind", "wrong").stderr
