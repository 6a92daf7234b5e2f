"""Chats: the template of the tokenizer says where the answer stands, and what nobody wrote as an answer is not scored."""

import warnings

import pytest
import torch
from tokenizing import tokenizer
from transformers import PreTrainedTokenizerFast

import tokdyn as td

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ '\\n' }}{{ m.content | trim }}<|end|>{{ '\\n' }}{% endfor %}"
OPENING = "{% if add_generation_prompt %}<|assistant|>{{ '\\n' }}REST{% endif %}"
TEMPLATES = {
    "generation prompt is a prefix": TURNS + OPENING.replace("REST", ""),
    "generation prompt is not repeated": TURNS + OPENING.replace("REST", "<think>"),
    "no generation prompt": TURNS,
}
USER = [{"role": "user", "content": "Where is the cat?"}]


def chat(template):
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer("byte bos").backend_tokenizer, eos_token="<eos>")
    fast.chat_template = template
    return fast


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("response", ["The cat sat there.", "end", "a", " naïve 🙂"])
def test_a_chat_is_scored_from_the_character_where_the_template_puts_the_answer(template, response):
    chi = td.encode(chat(template), USER, response)
    assert chi.prompt == "<|user|>\nWhere is the cat?<|end|>\n<|assistant|>\n"
    assert chi.response == response.strip() + "<|end|>\n"
    plain = td.encode(tokenizer("byte"), chi.prompt, chi.response, eos=False)
    assert torch.equal(chi.ids, plain.ids) and torch.equal(chi.scored, plain.scored)


def test_a_response_given_as_a_message_is_the_response_given_as_text():
    fast = chat(TEMPLATES["generation prompt is a prefix"])
    message = [{"role": "assistant", "content": "The cat sat."}]
    assert torch.equal(td.encode(fast, USER, message).ids, td.encode(fast, USER, "The cat sat.").ids)
    assert torch.equal(td.encode(fast, "Where?", message).ids, td.encode(fast, "Where?", "The cat sat.").ids)


def test_chat_messages_need_a_template_that_shows_the_response():
    with pytest.raises(ValueError, match="no chat template"):
        td.encode(tokenizer("byte"), USER, "there")
    with pytest.raises(ValueError, match="does not reproduce the response"):
        td.encode(chat("{{ messages | length }}"), USER, "there")
    with pytest.raises(ValueError, match="text or one assistant message, got 2 messages"):
        td.encode(tokenizer("byte"), "Where?", 2 * [{"role": "assistant", "content": "There."}])


@pytest.mark.parametrize("prompt", ["Where?", USER])
def test_what_nobody_wrote_as_an_answer_is_not_scored(prompt):
    fast = chat(TEMPLATES["generation prompt is a prefix"])
    answer = {"role": "assistant", "content": "There."}
    for response in (USER, [answer, *USER, answer], [{"role": "system", "content": "Be brief."}]):
        with pytest.raises(ValueError, match="messages of the assistant alone, got one of '(user|system)'"):
            td.encode(fast, prompt, response)
    with pytest.raises(ValueError, match="got none"):
        td.encode(fast, prompt, [])


def test_content_in_parts_is_their_text():
    fast = chat(TEMPLATES["generation prompt is a prefix"])

    def say(role, *texts):
        return [{"role": role, "content": [{"type": "text", "text": text} for text in texts]}]

    parts = td.encode(fast, say("user", "Where is", " the cat?"), say("assistant", "The ", "cat sat."))
    assert torch.equal(parts.ids, td.encode(fast, USER, "The cat sat.").ids) and "type" not in parts.prompt
    image = [{"role": "user", "content": [{"type": "image", "image": "cat.png"}]}]
    with pytest.raises(ValueError, match="every part of a content must have type \"text\" and a text, got 'image'"):
        td.encode(fast, image, "There.")
    with pytest.raises(ValueError, match="every content must be text or a list of parts, got NoneType"):
        td.encode(fast, [{"role": "user", "content": None}], "There.")


def test_templates_and_tokenizers_that_fail_are_said_in_a_sentence():
    for template, kind in (
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{% for", "TemplateSyntaxError"),
    ):
        with pytest.raises(ValueError, match=f"the chat template failed: {kind}"):
            td.encode(chat(template), USER, "There.")
    with pytest.raises(ValueError, match="the tokenizer failed: TypeError"):
        td.encode(tokenizer("byte"), "Where?", " \ud800")


def test_a_second_bos_is_said():
    fast = tokenizer("byte bos")
    with pytest.warns(UserWarning, match=f"begins with {fast.bos_token} and the tokenizer adds another"):
        assert td.encode(fast, f"{fast.bos_token}Where?", "There.").ids.tolist().count(fast.bos_token_id) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        td.encode(fast, "Where?", "There.")
