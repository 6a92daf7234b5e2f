"""Rows of data: the forms that people have, and what an objective makes of them."""

import json

import pytest
import torch
from rows import ASK, CHATS, COMPLETION, GROUP, PAIR, answer, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokdyn import data, probes
from tokdyn import objectives as td

ROW = json.dumps(COMPLETION)


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


# ---------------------------------------------------------------- one form for every row

SHORT = [{"role": "user", "content": "Where?"}]


def shared(messages):
    """Messages in ShareGPT's form."""
    names = dict(user="human", assistant="gpt", system="system", tool="observation")
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


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
    ({"conversations": ASK + answer("On the mat.")}, CHATS[0]),
    ({"conversations": shared(ASK + answer("On the mat."))}, CHATS[0]),
    ({"messages": shared(TURNS + answer("There."))}, {"prompt": TURNS, "completion": answer("There.")}),
    (
        {"system": "Be brief.", "conversations": shared(ASK + answer("There."))},
        {"prompt": [dict(role="system", content="Be brief."), *ASK], "completion": answer("There.")},
    ),
    ({"conversations": shared(ASK), "chosen": shared(answer("Here."))[0], "rejected": shared(answer("No."))[0]}, CHATS[1]),
    ({"prompt": shared(ASK), "chosen": shared(ASK + answer("Here.")), "rejected": shared(answer("No."))}, CHATS[1]),
    (
        {"prompt": ASK, "completions": [ASK + answer("Here."), answer("No.")], "rewards": [1, 0]},
        {"prompt": ASK, "completions": [answer("Here."), answer("No.")], "rewards": [1, 0]},
    ),
]


@pytest.mark.parametrize("row, full", SAME)
def test_forms_that_people_have_are_the_same_row(tmp_path, tokenizer, row, full):
    (read,) = data.read(write(tmp_path / "rows.jsonl", [row]))
    assert {key: value for key, value in read.items() if key != "system"} == full
    for rows in ([row], [read]):  # given as they are, or read
        assert [chi.response for chi in data.watched(tokenizer, rows)] == [c.response for c in data.watched(tokenizer, [full])]


@pytest.mark.parametrize(
    "row, full",
    [pair for pair in SAME if "chosen" in pair[0] and not {"prompt", "conversations"} & {k for k, v in pair[0].items() if v}],
)
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
        (
            {"conversations": shared(ASK) + [{"from": "function_call", "value": "{}"}]},
            "no template knows who 'function_call' is",
        ),
        (CHATS[0] | {"tools": "[{"}, "tools is not JSON"),
        (CHATS[0] | {"tools": {"name": "look"}}, "tools must be a list of objects, or its JSON, got dict"),
        (COMPLETION | {"label": "good"}, "label must be true or false .* got 'good'"),
        ({"prompt": "a", "completion": "b\ud800"}, "half (a character|of a surrogate)"),
        ({"prompt": [{"role": "user", "content": "\udc00"}], "completion": "b"}, "half (a character|of a surrogate)"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": "b"}, "prompt .* got 'image'"),
    ],
)
def test_rows_in_which_no_answer_can_be_told_are_refused_by_place(tmp_path, tokenizer, row, said):
    (tmp_path / "rows.jsonl").write_text(ROW + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"rows.jsonl line 2:? .*{said}"):
        data.read(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=f"row 2:? .*{said}"):
        data.sequences(tokenizer, [COMPLETION, row], td.SFT())


LOOK = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}
CALL = [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "mat"}}}]}]
TOOL_TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t.function.name }}{% endfor %}</tools>{% endif %}{{ style }}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}<{{ c.function.name }}>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("tools", [[LOOK], json.dumps([LOOK])], ids=["list", "json"])
@pytest.mark.parametrize("row", CHATS, ids=["completion", "pair"])
def test_what_the_template_is_told_beside_the_messages_is_trls(tmp_path, tokenizer, row, tools, name):
    """The columns tools and chat_template_kwargs, in every answer's prompt, in a probe set too; an answer may be a call."""
    apply = pytest.importorskip("trl.data_utils").apply_chat_template
    told = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    told.chat_template = TOOL_TEMPLATE
    prompt = ASK + CALL + [{"role": "tool", "content": "a cat"}]
    row = row | {"prompt": prompt, "tools": tools, "chat_template_kwargs": {"style": "!"}}
    theirs = apply(row | {"prompt": [dict(content="") | m for m in prompt]}, told, tools=[LOOK])
    rows = data.read(write(tmp_path / name, [row, row | {"chat_template_kwargs": None}]))
    made = data.watched(told, rows)
    assert made[0].prompt == theirs["prompt"] and "<tools>look</tools>![user]" in made[0].prompt and "<look>" in made[0].prompt
    assert [chi.response for chi in made[: len(made) // 2]] == [theirs[key] for key in data.ANSWERS if key in theirs]
    assert "!" not in made[-1].prompt
    assert data.sequences(told, rows, td.SFT())[0].prompt == theirs["prompt"]
    probe = probes.build([{**r, "chosen": row.get("chosen", row.get("completion"))} for r in rows], types=["chosen"])
    assert probes.load(told, probe)["chosen"][0].prompt == theirs["prompt"]
    called = data.read(write(tmp_path / name, [{"prompt": ASK, "completion": CALL, "tools": tools}]))
    assert data.watched(told, called)[0].response == "<look>"


def test_what_a_template_raises_names_the_line(tmp_path, tokenizer):
    rows = data.read(write(tmp_path / "rows.jsonl", [COMPLETION, CHATS[0]]))
    broken = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    broken.chat_template = "{{ raise_exception('no chats here') }}"
    for make in (lambda: data.sequences(broken, rows, td.SFT()), lambda: data.watched(broken, rows)):
        with pytest.raises(ValueError, match="rows.jsonl line 2: the chat template failed: TemplateError: no chats here"):
            make()


def test_columns_that_parquet_fills_with_null_are_absent(tmp_path, tokenizer):
    mixed = [COMPLETION, PAIR, GROUP]
    lines, rows = (data.sequences(tokenizer, data.read(write(tmp_path / n, mixed)), td.SFT()) for n in ("r.jsonl", "r.parquet"))
    assert [chi.response for chi in lines] == [chi.response for chi in rows]
    assert len(data.watched(tokenizer, data.read(tmp_path / "r.parquet"))) == 1 + 2 + 3


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
