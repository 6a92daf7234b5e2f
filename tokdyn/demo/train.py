"""Train the language model that ships with tokdyn, from texts on disk, on a CPU.

    python -m tokdyn.demo.train --data PATH_TO_TEXTS --work checkpoints/demo

A byte-level BPE of 4096 tokens, then a Qwen2-shaped decoder (tied embeddings) on natural answers only: HH-RLHF helpful
dialogues with their rephrasings, UltraFeedback answers and GSM8K solutions. The generated control columns of the probe
files (irr_*, random_*, chosen_selfr) stay out, and so does every *_test file, which is used for validation alone. The
script writes a checkpoint every few minutes and goes on from it when it is called again; `--export` then writes the
shipped folder (bf16 safetensors, tokenizer, model card) from the checkpoint of lowest validation loss.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 4096
EOS, PAD = "<|endoftext|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ 'Human: ' if m['role'] == 'user' else ('Assistant: ' if m['role'] == 'assistant' else '') }}"
    "{{ m['content'] | trim }}"
    "{{ eos_token if m['role'] == 'assistant' and loop.last else '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
Document = tuple[str, str, bool]  # prompt, response, whether the prompt is learned too
HH_COLUMNS = ("chosen", "chosen_initial", "chosen_gptsemantic", "chosen_gptformat",
              "rejected", "reject_gptsemantic", "reject_gptformat")  # fmt: skip
SHAPES = {
    "demo": dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=704),
    "large": dict(hidden_size=512, num_hidden_layers=7, num_attention_heads=8, num_key_value_heads=2, intermediate_size=1408),
}


def jsonl(path: Path) -> Iterator[dict]:
    """The rows of a JSONL file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: --data must name a folder that holds {path.name}")
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)


def dialogue(text: str) -> str:
    """One spelling of a prompt: 'Human: …', a blank line between turns, 'Assistant:' at the end."""
    return re.sub(r"\s*\n+\s*(?=(?:Human|Assistant):)", "\n\n", text.strip())


def solution(answer: str) -> str:
    """A GSM8K answer as prose: calculator annotations removed, the result as a sentence."""
    body, _, result = re.sub(r"<<.*?>>", "", answer).partition("####")
    return f"{body.strip()}\nThe answer is {result.strip()}."


def documents(data: Path, split: str) -> list[Document]:
    """The texts to learn from, of the train or the test files. A prompt that recurs with other answers is learned once."""
    rows: list[Document] = []
    for row in jsonl(data / f"hh_helpful_formal_prob_{split}.jsonl"):
        for column in HH_COLUMNS if split == "train" else ("chosen",):
            if row.get(column, "").strip():
                rows.append((dialogue(row["prompt"]), row[column].strip(), column == "chosen"))
    if split == "train":
        rows += [(dialogue(r["prompt"]), r["chosen"].strip(), True) for r in jsonl(data / "ultrafeedback_prob_train_gen.jsonl")]
    for row in jsonl(data / f"gsm8k_{split}.jsonl"):
        rows.append((f"Human: {row['question'].strip()}\n\nAssistant:", solution(row["answer"]), True))
    return rows


def train_tokenizer(texts: list[str], out: Path):
    """A byte-level BPE with the chat template, saved to `out`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=PAD, model_max_length=1024)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    return tokenizer


def pack(tokenizer, rows: list[Document], order: random.Random | None) -> tuple[Tensor, Tensor]:
    """All documents one after the other, each closed by EOS: ids and labels [N] (-100 where not learned)."""
    rows = list(rows)
    if order is not None:
        order.shuffle(rows)
    ids: list[int] = []
    labels: list[int] = []
    for prompt, response, learn_prompt in rows:
        p, r = tokenizer(prompt).input_ids, [*tokenizer(" " + response).input_ids, tokenizer.eos_token_id]
        ids += p + r
        labels += (p if learn_prompt else [-100] * len(p)) + r
    return torch.tensor(ids), torch.tensor(labels)


def build(tokenizer, max_positions: int = 1024, *, shape: str = "demo"):
    """The untrained model, of one of SHAPES."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=VOCABULARY, tie_word_embeddings=True, max_position_embeddings=max_positions, initializer_range=0.02,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **SHAPES[shape]))  # fmt: skip


def loss_on(model, ids: Tensor, labels: Tensor, autocast: bool) -> Tensor:
    """Mean cross-entropy of a learned token in nats; ids, labels [B, T]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@torch.no_grad()
def validate(model, ids: Tensor, labels: Tensor, length: int, autocast: bool) -> float:
    """Mean loss over whole blocks of `length` tokens."""
    n = len(ids) // length
    blocks = ids[: n * length].view(n, length), labels[: n * length].view(n, length)
    model.eval()
    total = sum(loss_on(model, i, t, autocast).item() * len(i) for i, t in zip(*(b.split(16) for b in blocks), strict=True))
    model.train()
    return total / n


@dataclass
class Progress:
    """How far a training has come: steps, tokens seen, the best validation loss, and [step, tokens, train, validation] rows."""

    step: int = 0
    seen: int = 0
    best: float = math.inf
    history: list[list[float]] = field(default_factory=list)


def resume(path: Path, model, optimizer) -> Progress:
    """Load a checkpoint into model and optimizer where there is one, and say how far it had come."""
    if not path.exists():
        return Progress()
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state.pop("model"))
    optimizer.load_state_dict(state.pop("optimizer"))
    print(f"resumed at step {state['step']}", flush=True)
    return Progress(**state)


def save(path: Path, model, optimizer, progress: Progress) -> None:
    """Write a checkpoint; an interrupt leaves the old one."""
    part = path.with_suffix(".part")
    torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), **vars(progress)), part)
    os.replace(part, path)


def batches(tokenizer, rows: list[Document], args: argparse.Namespace, done: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and labels [batch, length] epoch after epoch, without the first `done` batches.

    Epoch e is always shuffled by seed e, so that a resumed training goes on in the same order.
    """
    for epoch in range(10**6):
        ids, labels = pack(tokenizer, rows, random.Random(epoch))
        n = len(ids) // args.length
        if epoch == 0:
            print(f"{len(ids)} tokens an epoch", flush=True)
        for start in range(0, n - args.batch + 1, args.batch):
            if done > 0:
                done -= 1
                continue
            span = slice(start * args.length, (start + args.batch) * args.length)
            yield ids[span].view(args.batch, -1), labels[span].view(args.batch, -1)


def learning_rate(args: argparse.Namespace, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / args.warmup)
    return args.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(args: argparse.Namespace) -> None:
    """Train, or go on from the checkpoint in args.work."""
    from transformers import AutoTokenizer

    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    rows = documents(args.data, "train")
    if (work / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(work)
    else:
        tokenizer = train_tokenizer([f"{p} {r}" for p, r, _ in rows], work)
    held_out = [t[: args.validation_tokens] for t in pack(tokenizer, documents(args.data, "test"), random.Random(1))]

    torch.manual_seed(args.seed)
    model = build(tokenizer, shape=args.shape)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)],
                                  lr=args.lr, betas=(0.9, 0.95), fused=True)  # fmt: skip
    at = resume(work / "checkpoint.pt", model, optimizer)
    per_step = args.batch * args.length
    steps, parameters = args.tokens // per_step, sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {steps} steps of {per_step} tokens", flush=True)

    model.train()
    clock, mean = time.perf_counter(), None
    for ids, labels in batches(tokenizer, rows, args, at.step):
        if at.step >= steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, at.step, steps)
        loss = loss_on(model, ids, labels, args.bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        at.step, at.seen = at.step + 1, at.seen + per_step
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if at.step % 50 == 0:
            rate = 50 * per_step / (time.perf_counter() - clock)
            clock = time.perf_counter()
            print(f"step {at.step}/{steps}  loss {mean:.3f}  {rate:.0f} tokens/s", flush=True)
        if at.step % args.every == 0 or at.step == steps:
            keep(work, model, at, mean, validate(model, held_out[0], held_out[1], args.length, args.bf16))
            save(work / "checkpoint.pt", model, optimizer, at)
            clock = time.perf_counter()
    (work / "history.json").write_text(json.dumps(at.history))


def keep(work: Path, model, at: Progress, mean: float, validation: float) -> None:
    """Record a validation, and keep the weights where it is the best one so far."""
    at.history.append([at.step, at.seen, round(mean, 4), round(validation, 4)])
    print(f"step {at.step}: validation {validation:.4f} nats a token", flush=True)
    if validation < at.best:
        at.best = validation
        torch.save(model.state_dict(), work / "best.pt")
        (work / "best.json").write_text(json.dumps(dict(step=at.step, tokens=at.seen, validation=validation)))


CARD = """---
license: apache-2.0
language: en
library_name: transformers
---
# tokdyn demo model

A {parameters:.1f} M parameter causal language model (Qwen2 shape, {layers} layers of width {width}, tied embeddings,
byte-level BPE of {vocabulary} tokens){purpose}. It is a
specimen for learning dynamics, not a source of advice: it writes legible English and knows next to nothing.

| | |
|---|---|
| data | HH-RLHF helpful dialogues and rephrasings (Learning_dynamics_LLM, Apache-2.0; texts from Anthropic HH-RLHF, MIT) |
| | UltraFeedback answers (MIT); GSM8K questions and worked answers (MIT) |
| left out | irrelevant, permuted, random and self-refined columns; every test file |
| prompt | `Human: …`, blank line, `Assistant:` (also as chat template) |
| steps | {step} steps of {batch} x {length} tokens, {tokens:.1f} M tokens, AdamW, cosine from {lr}, weight decay 0.1 |
| validation loss | {validation:.3f} nats a token on {validation_tokens} tokens of the test files |
| stored as | bf16 safetensors |
| made by | `{made}` |

## Three samples, as they came (temperature 0.7, top-p 0.9, seed 0)
{samples}
"""
SAMPLE_PROMPTS = ("How can I learn to cook a simple dinner?", "Why is sleep important?",
                  "Tom has 12 apples and gives 5 of them to Ann. How many apples does he have left?")  # fmt: skip


def export(args: argparse.Namespace) -> None:
    """Write the shipped folder from the best checkpoint."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.work)
    model = build(tokenizer, shape=args.shape).eval()
    model.load_state_dict(torch.load(args.work / "best.pt", weights_only=True))
    best = json.loads((args.work / "best.json").read_text())
    model.to(torch.bfloat16).save_pretrained(args.export)
    tokenizer.save_pretrained(args.export)
    model = model.float()
    torch.manual_seed(0)
    samples = []
    for question in SAMPLE_PROMPTS:
        x = tokenizer(f"Human: {question}\n\nAssistant:", return_tensors="pt").input_ids
        y = model.generate(x, attention_mask=torch.ones_like(x), do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=80,
                           pad_token_id=tokenizer.pad_token_id)  # fmt: skip
        samples.append("> " + tokenizer.decode(y[0], skip_special_tokens=True).replace("\n", "\n> "))
    large = args.shape == "large"
    card = CARD.format(
        purpose="" if large else " that ships with tokdyn so that every example runs without a download",
        made="tokdyn demo --large" if large else "python -m tokdyn.demo.train",
        parameters=sum(p.numel() for p in model.parameters()) / 1e6, layers=model.config.num_hidden_layers,
        width=model.config.hidden_size, vocabulary=VOCABULARY, step=best["step"], tokens=best["tokens"] / 1e6,
        batch=args.batch, length=args.length, lr=args.lr, validation=best["validation"],
        validation_tokens=args.validation_tokens, samples="\n\n".join(samples))  # fmt: skip
    (args.export / "README.md").write_text(card, encoding="utf-8")
    print(card)


def main(arguments: list[str] | None = None) -> None:
    """Train or export, as the arguments of the command line say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the text files (needed to train)")
    parser.add_argument("--work", type=Path, default=Path("checkpoints/demo"), help="checkpoints, resumed when present")
    parser.add_argument("--export", type=Path, help="only write the shipped folder here, from the best checkpoint")
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--every", type=int, default=400, help="steps between validations and checkpoints")
    parser.add_argument("--validation-tokens", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape", choices=list(SHAPES), default="demo", help="demo: 4 M parameters, large: 22 M")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast: faster where the processor has bf16 units")
    args = parser.parse_args(arguments)
    if args.export:
        export(args)
    elif args.data is None:
        parser.error("--data FOLDER is needed to train")
    else:
        train(args)


if __name__ == "__main__":
    main()
