"""Chat templates of the forms that models on the hub have, and rows of the forms that data sets have."""

import json

from tokdyn.loading import load_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{{ m['content'] }}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "chatml, generation marks": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
        "{{ m['content'] + '<|im_end|>\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ m['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{% set ns.system = m['content'] + '\\n\\n' %}{% elif m['role'] == 'user' %}"
        "{{ '[INST] ' + ns.system + m['content'] + ' [/INST]' }}{% set ns.system = '' %}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}"
        "{{ m['content'] | trim }}{{ '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "qwen 3": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
        "{% if loop.last and '</think>' not in m['content'] %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{{ m['content'] if loop.last else m['content'].split('</think>')[-1].lstrip('\\n') }}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "phi 3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "vicuna": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}{% elif m['role'] == 'user' %}"
        "{{ 'USER: ' + m['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "command r": (
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|' + {'user': 'USER', 'system': 'SYSTEM', "
        "'assistant': 'CHATBOT', 'tool': 'TOOL'}[m['role']] + '_TOKEN|>' + m['content'] + '<|END_OF_TURN_TOKEN|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
    ),
}  # fmt: skip
CLOSING = {"chatml": "<|im_end|>", "chatml, generation marks": "<|im_end|>", "llama 3": "<|eot_id|>", "gemma": "<end_of_turn>",
           "qwen 3": "<|im_end|>", "phi 3": "<|end|>", "command r": "<|END_OF_TURN_TOKEN|>"}  # fmt: skip
BEGINS = ("llama 3", "mistral", "gemma", "command r")  # with a BOS


def tokenizer_of(form):
    """The demo model's byte-level tokenizer with a template, its closing token being the end of sequence."""
    tokenizer = load_tokenizer("demo")
    tokenizer.chat_template = TEMPLATES[form]
    if form in CLOSING:
        tokenizer.add_special_tokens({"eos_token": CLOSING[form]})
    if form in BEGINS:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


QUESTION, GOOD, BAD = "Why is the sky blue?", "Because air scatters blue light most.", "It mirrors the sea."
MORE = [user(QUESTION), assistant(GOOD), user("And at dusk?")]
FORMS = {
    "plain pairs (hh-rlhf with prompt)": [
        {"prompt": f"Human: {QUESTION}\n\nAssistant:", "chosen": f" {GOOD}", "rejected": f" {BAD}"},
        {"prompt": "Human: Is 7 prime?\n\nAssistant:", "chosen": " Yes.", "rejected": " No, 7 is even."},
    ],
    "implicit prompts (hh-rlhf)": [
        {"chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: {BAD}"},
    ],
    "conversations without prompt (ultrafeedback_binarized)": [
        {"chosen": [user(QUESTION), assistant(GOOD)], "rejected": [user(QUESTION), assistant(BAD)]},
    ],
    "prompt and conversations (ultrafeedback of zephyr)": [
        {"prompt": QUESTION, "chosen": [user(QUESTION), assistant(GOOD)], "rejected": [user(QUESTION), assistant(BAD)],
         "messages": [user(QUESTION), assistant(GOOD)], "score_chosen": 8.0, "score_rejected": 3.0},
    ],
    "explicit conversations (trl-lib)": [
        {"prompt": [user(QUESTION)], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
        {"prompt": MORE, "chosen": [assistant("Red is left over.")], "rejected": [assistant("The same.")]},
    ],
    "unpaired labels (kto-mix)": [
        {"prompt": [user(QUESTION)], "completion": [assistant(GOOD)], "label": True},
        {"prompt": [user(QUESTION)], "completion": [assistant(BAD)], "label": False},
    ],
    "messages (ultrachat)": [{"messages": [*MORE, assistant("Red is left over.")]}],
    "prompt and completion (tldr)": [{"prompt": "SUBREDDIT: r/physics\n\nPOST: the sky\n\nTL;DR:", "completion": f" {GOOD}"}],
    "sampled answers (rollouts)": [{"prompt": [user(QUESTION)], "completions": [GOOD, BAD], "rewards": [1.0, 0.0]}],
    "messages with a system prompt (openhermes)": [
        {"messages": [{"role": "system", "content": "Answer in one line."}, user(QUESTION), assistant(GOOD)]},
    ],
}  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
