"""tokdyn check on files: each planted fault is found and named, and ten forms of files and of templates are silent."""

import json
import re

import pytest
from chats import CHATML, FORMS, GOOD, MORE, QUESTION, TEMPLATES, assistant, tokenizer_of, user, write
from tokenizing import tokenizer as small_tokenizer
from typer.testing import CliRunner

from tokdyn.checks.files import check_file
from tokdyn.cli import app
from tokdyn.objectives import by_name
from tokdyn.sequences import token_texts
from tokdyn.turns import Turns

MARKED, THOUGHT = TEMPLATES["chatml, generation marks"], f"<think>\nscattering\n</think>\n\n{GOOD}"
REMINDER = "{% if not add_generation_prompt %}{{ '<|im_start|>system\\nShort!' }}{% endif %}"
PAIR = {"prompt": "Human: Why?\n\nAssistant:", "chosen": " Because.", "rejected": " No."}


def found(tmp_path, rows, form="chatml", template=None, **options):
    tokenizer = tokenizer_of(form)
    tokenizer.chat_template = template or tokenizer.chat_template
    return check_file(write(tmp_path / "rows.jsonl", rows), tokenizer, **options)


@pytest.mark.parametrize("form", TEMPLATES)
@pytest.mark.parametrize("rows", FORMS)
def test_files_and_templates_of_the_hubs_forms_are_silent(tmp_path, form, rows):
    """Ten forms of files under ten forms of templates; what is said is true: Gemma refuses a system role."""
    report = found(tmp_path, FORMS[rows], form)
    if form == "gemma" and "system" in rows:
        assert [f.check for f in report.wrong] == ["rows"] and "System role not supported" in report.wrong[0].what
        return
    assert report.silent and not report.skipped, str(report)


FAULTS = {  # what is planted: rows, options, the check that finds it, its level, words of the finding
    "prompt that ends with a space": (
        [PAIR | {"prompt": "Human: Why? Assistant: ", "chosen": "Because.", "rejected": "No."}], {},
        "boundary", "wrong", "share a token.*the prompt alone .* with the answer .*' B'",
    ),
    "template that drops its generation prompt": (
        [{"prompt": [user(QUESTION)], "completion": GOOD}],
        dict(template=CHATML.replace("<|im_start|>assistant\\n' }}{% endif", "<|im_start|>assistant\\n<think>\\n' }}{% endif")),
        "boundary", "wrong", "does not begin prompt . answer",
    ),
    "BOS in the text and from the tokenizer": (
        [PAIR | {"prompt": "<s>Human: Why?\n\nAssistant:"}], dict(form="llama 3", bos=True), "BOS", "wrong", "<s> twice",
    ),
    "template without an end": (
        [{"prompt": [user(QUESTION)], "completion": GOOD}], dict(template=CHATML.replace("<|im_end|>\\n", "\\n")),
        "EOS", "suspicious", "never learns to stop",
    ),
    "template whose end is not the tokenizer's": (
        [{"prompt": [user(QUESTION)], "completion": GOOD}], dict(eos_token="<|endoftext|>"),
        "EOS", "suspicious", r"end with '<\|im_end\|>', which is not the end of generation",
    ),
    "answers cut": ([PAIR | {"chosen": " Because" * 50}], dict(max_length=40), "length", "suspicious", "cut at 40 tokens"),
    "answers cut to nothing": (
        [PAIR | {"prompt": "Human: Why?" * 40}], dict(max_length=40), "length", "wrong", "2 of them to nothing",
    ),
    "chosen is rejected": ([PAIR, PAIR | {"rejected": PAIR["chosen"]}], {}, "pairs", "wrong", "same text.*line 2"),
    "both orders": ([PAIR, PAIR | {"chosen": " No.", "rejected": " Because."}], {}, "pairs", "wrong", "both orders"),
    "an empty answer": ([PAIR, PAIR | {"chosen": " "}], {}, "rows", "wrong", "line 2: chosen is empty"),
    "rows that the loss cannot use": (
        [{"prompt": "Why?", "completion": " Because."}], dict(objective=by_name("dpo")), "rows", "wrong", "DPO needs chosen",
    ),
    "system role dropped": (
        [{"messages": [{"role": "system", "content": "Answer in rhyme."}, user(QUESTION), assistant(GOOD)]}],
        dict(template="{% for m in messages if m['role'] != 'system' %}" + CHATML.split("%}", 1)[1]),
        "template", "wrong", "drops system messages.*- 'Answer in rhyme.'",
    ),
    "earlier thoughts cut": (
        [{"messages": [user(QUESTION), assistant(THOUGHT), user("Sure?"), assistant("Yes.")]}],
        dict(form="qwen 3"), "template", "suspicious", "cuts the thoughts of assistant.*scattering",
    ),
    "the answer's thoughts cut": (
        [{"messages": [user(QUESTION), assistant(THOUGHT)]}],
        dict(template=CHATML.replace("m['content'] }}", "m['content'].split('</think>')[-1] | trim }}")),
        "template", "wrong", "cuts the thoughts of the answer.*scattering",
    ),
    "marks missing": (
        [{"messages": [*MORE, assistant("Red.")]}], dict(assistant_only=True), "marks", "wrong", "no generation marks",
    ),
    "marks around a tool's turn": (
        [{"messages": [*MORE, assistant("Red.")]}],
        dict(template=MARKED.replace("== 'assistant' %}{% gen", "in ('assistant', 'tool') %}{% gen")),
        "marks", "wrong", "take in the turn of tool",
    ),
    "marks on the last turn alone": (
        [{"messages": [*MORE, assistant("Red.")]}],
        dict(template=MARKED.replace("== 'assistant' %}{% gen", "== 'assistant' and loop.last %}{% gen")),
        "marks", "wrong", "leave out 1 of 2 turns",
    ),
    "marks that end before the closing token": (
        [{"messages": [*MORE, assistant("Red.")]}],
        dict(template=MARKED.replace(
            "+ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}", "}}{% endgeneration %}{{ '<|im_end|>\\n' }}")),
        "EOS", "wrong", "never scored",
    ),
    "white space on both sides of the boundary": (
        [PAIR | {"prompt": "Human: Why?\n", "chosen": "\nBecause.", "rejected": "\nNo."}], {},
        "boundary", "suspicious", "white space at the boundary is merged.*alone .*'\\\\n'.*with the answer .*'\\\\n\\\\n'",
    ),
    "a tokenizer without an end": ([PAIR], dict(eos_token=None), "EOS", "suspicious", "has no end-of-sequence token"),
    "a text in the wrong column": (
        [{"prompt": "", "completion": "Human: Why?\n\nAssistant: Because."}, PAIR], {},
        "roles", "suspicious", "no prompt.*line 1",
    ),
    "a template that reminds the model behind the answer": (
        [{"prompt": [user(QUESTION)], "completion": GOOD}],
        dict(template=CHATML.replace("{% if add", REMINDER + "{% if add")),
        "roles", "wrong", "other turns.*system 5/5.*system«↵»Short!",
    ),
    "characters that the tokenizer does not know": (
        [{"prompt": "The cat", "completion": " sat \u2603"}], dict(tokenizer="unigram"),
        "vocabulary", "suspicious", "does not know.*\u2603",
    ),
    "answers that begin with their prompt": (
        [PAIR | {k: PAIR["prompt"] + PAIR[k] for k in ("chosen", "rejected")}], {},
        "prompt again", "wrong", "given twice.*line 1, chosen",
    ),
    "one answer that begins with its question": (
        [{"prompt": [user(QUESTION)], "completion": a} for a in (GOOD, QUESTION + " " + GOOD)], {},
        "prompt again", "suspicious", "line 2",
    ),
    "answers that go on with the next turn": (
        [PAIR | {"chosen": " Because.\n\nHuman: And?\n\nAssistant: So."}], {},
        "turns", "suspicious", "user's words.*line 1, chosen",
    ),
    "the end written by data and template": (
        [{"prompt": [user(QUESTION)], "completion": GOOD + "<|im_end|>"}], {}, "turns", "wrong", "template writes it again",
    ),
    "a missing value as text": ([PAIR, PAIR | {"rejected": "nan"}], {}, "text", "suspicious", "missing value.*line 2.*'nan'"),
    "UTF-8 read as Latin-1": (
        [PAIR | {"chosen": " Because of a café.".encode().decode("latin-1")}], {}, "text", "suspicious", "lost.*line 1, chosen",
    ),
    "a lost character": ([PAIR | {"chosen": " Because of a caf\ufffd."}], {}, "text", "suspicious", "lost.*line 1, chosen"),
    "ratings against the order": (
        [PAIR | {"score_chosen": 2.0, "score_rejected": 4.5}, PAIR | {"chosen": " Y.", "score_chosen": 4, "score_rejected": 1}],
        {}, "ratings", "wrong", "rated above.*line 1; of the first 2 for chosen, 4.5 for rejected",
    ),
    "rows that are repeated": ([PAIR] * 3, {}, "repeats", "suspicious", "more than once"),
    "tokens beyond the embedding": ([PAIR], dict(vocabulary=100), "vocabulary", "wrong", "beyond the model's 100 rows"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(tmp_path, fault):
    rows, options, check, level, words = FAULTS[fault]
    options = dict(options)
    small = options.pop("tokenizer", None)
    tokenizer = tokenizer_of(options.pop("form", "chatml")) if small is None else small_tokenizer(small)
    tokenizer.chat_template = options.pop("template", tokenizer.chat_template)
    if options.pop("bos", False):
        tokenizer = adds_bos(tokenizer)
    if options.get("eos_token", "") is None:
        tokenizer.eos_token = options.pop("eos_token")
    if "eos_token" in options:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"], "eos_token": options.pop("eos_token")})
    report = check_file(write(tmp_path / "rows.jsonl", rows), tokenizer, **options)
    assert not report.skipped
    (finding,) = [f for f in (*report.wrong, *report.suspicious) if f.check == check]
    assert finding.level == level and re.search(words, f"{finding.what} {finding.where}", re.DOTALL), str(finding)
    assert finding.do and {f.check for f in (*report.wrong, *report.suspicious)} == {check}, str(report)  # and nothing else


def test_an_end_in_the_data_that_the_template_does_not_write_is_there_once(tmp_path):
    """The turn before the answer ends with the same token: what counts is what stands behind the answer."""
    rows = [{"prompt": [user(QUESTION)], "completion": GOOD + "<|im_end|>"}]
    open_end = CHATML.replace("'<|im_end|>\\n' }}", "('<|im_end|>\\n' if m['role'] != 'assistant' else '') }}")
    assert open_end != CHATML
    report = found(tmp_path, rows, template=open_end)
    assert "turns" not in {f.check for f in (*report.wrong, *report.suspicious)}, str(report)


@pytest.mark.parametrize("prompt", ["", "?", "\n"])
def test_a_prompt_of_one_token_or_none_is_no_fault_of_the_boundary(tmp_path, prompt):
    report = found(tmp_path, [{"prompt": prompt, "completion": " Because."}])
    assert not report.wrong and {f.check for f in report.suspicious} == ({"roles"} if not prompt.strip() else set()), str(
        report
    )


def test_one_token_for_padding_and_end_is_told_and_no_fault(tmp_path):
    tokenizer = tokenizer_of("chatml")
    tokenizer.pad_token = tokenizer.eos_token
    report = check_file(write(tmp_path / "rows.jsonl", [PAIR]), tokenizer)
    (pad,) = [f for f in report if f.check == "pad"]
    assert report.silent and pad.level == "fine" and "masks the end of answers as well" in pad.what


def adds_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    return tokenizer


@pytest.mark.parametrize("form", TEMPLATES)
def test_the_role_of_each_token_is_that_of_its_message(form):
    """Joined by role, the tokens of a turn are the message with what closes it, in order."""
    tokenizer = tokenizer_of(form)
    talk = [*MORE, assistant("Red is left over.")]
    ids = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"]
    texts = token_texts(tokenizer, ids)
    roles = Turns.of(tokenizer).roles(texts)
    joined = {role: "".join(t for t, r in zip(texts, roles, strict=True) if r == role) for role in set(roles)}
    for role in ("user", "assistant"):
        for message in talk:
            assert (message["content"] in joined[role]) == (message["role"] == role), (form, role, joined)


def test_thoughts_and_tools_have_roles_of_their_own():
    tokenizer = tokenizer_of("qwen 3")
    text = tokenizer.apply_chat_template(
        [
            user("Sum?"),
            assistant("Calling."),
            {"role": "tool", "content": "42"},
            assistant("<think>\nsure\n</think>\n\nIt is 42."),
        ],
        tokenize=False,
    )
    regions = Turns.of(tokenizer).roles(list(text))
    of = {role: "".join(c for c, r in zip(text, regions, strict=True) if r == role) for role in set(regions)}
    assert "sure" in of["thinking"] and "It is" in of["assistant"] and "42" in of["tool"] and "Sum?" in of["user"]
    assert "sure" not in of["assistant"] and "Calling." in of["assistant"]


def test_a_template_that_tells_no_roles_apart_has_none():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}"
    assert Turns.of(tokenizer) is None
    tokenizer.chat_template = None
    assert Turns.of(tokenizer) is None


def test_the_command_exits_with_1_where_something_is_wrong(tmp_path):
    good, bad = write(tmp_path / "good.jsonl", [PAIR]), write(tmp_path / "bad.jsonl", [PAIR | {"rejected": PAIR["chosen"]}])
    silent = CliRunner().invoke(app, ["check", str(good)])
    assert silent.exit_code == 0 and "0 wrong, 0 suspicious" in silent.stdout, silent.output
    told = CliRunner().invoke(app, ["check", str(bad), "--objective", "dpo", "--json"])
    report = json.loads(told.stdout)
    assert told.exit_code == 1 and report["wrong"] == 1
    (finding,) = [f for f in report["findings"] if f["level"] == "wrong"]
    assert finding["check"] == "pairs" and finding["number"] == 1 and "line 1" in finding["where"] and finding["do"]
    refused = CliRunner().invoke(app, ["check", str(tmp_path / "absent.jsonl")])
    assert refused.exit_code == 2 and "no data file" in refused.stderr
