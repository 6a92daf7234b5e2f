"""Every block of code in the documents runs: Python in one namespace a page, command lines as far as their parser."""

import ast
import inspect
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import typer

import tokdyn as td
from tokdyn.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)

# What a page's blocks take as given, and what they may import that is not installed here.
GIVEN = {
    "training.md": """
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from tokdyn.loading import load_model
import tokdyn as td
model, tokenizer = load_model("demo")
ids = tokenizer("Human: Why?\\n\\nAssistant: To rest.", return_tensors="pt").input_ids
row = {"input_ids": ids[0], "labels": ids[0]}
args = TrainingArguments("runs/trainer", max_steps=1, report_to="none", save_strategy="no", use_cpu=True)
trainer = Trainer(model, args=args, train_dataset=[row])
loader, A, old = [ids], None, None
mask = torch.ones_like(ids, dtype=torch.bool)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
def loss_of(model, batch):
    log_probs = model(batch).logits[:, :-1].log_softmax(-1).gather(2, batch[:, 1:, None])
    return -log_probs.sum()
""",
    "interventions.md": """
import tokdyn as td
from datasets import Dataset
from tokdyn.loading import DEMO_PAIRS, load_model
from trl import DPOConfig, DPOTrainer
model, tokenizer = load_model("demo")
td.probes.write("probe.jsonl", td.probes.build(DEMO_PAIRS, rows=1))
rows = Dataset.from_list(td.data.read(DEMO_PAIRS)[:2])
args = DPOConfig("runs/trainer", max_steps=1, bf16=False, report_to="none", save_strategy="no")
trainer = DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
prompt, completions, rewards = "Human: 2 + 3?\\n\\nAssistant:", [" 5.", " 6."], [1, 0]
protect = [td.encode(tokenizer, prompt, " 5.")]
objective, optimizer = td.objectives.GRPO(), None
""",
}
NEEDS = {
    "training.md": ["accelerate"],
    "interventions.md": ["trl"],
    "how-to/protect.md": ["trl"],
    "how-to/checkpoint.md": ["peft"],
    "how-to/read-a-run.md": ["pandas", "matplotlib"],
    "how-to/falling-chosen.md": ["pandas"],
    "how-to/watch-grpo.md": ["pandas"],
    "how-to/why.md": ["pandas"],
}


def name_of(page):
    return page.relative_to(ROOT / "docs").as_posix()


def blocks(page, language):
    return [code for of, code in BLOCK.findall(page.read_text(encoding="utf-8")) if of == language]


@pytest.fixture
def verl(monkeypatch):
    """A module where verl has its engine; tests/integrations/test_packages.py drives the real one."""
    for name in ("verl", "verl.workers", "verl.workers.engine", "verl.workers.engine.fsdp"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    engine = type("FSDPEngine", (), {"optimizer_step": lambda self: None})
    head = type("FSDPEngineWithLMHead", (engine,), {"forward_step": lambda self, *given: None})
    impl = types.SimpleNamespace(FSDPEngine=engine, FSDPEngineWithLMHead=head)
    sys.modules["verl.workers.engine.fsdp"].transformer_impl = impl
    return impl


SKETCHES = ["check.md", "stacks.md"]  # for packages with GPUs, a trainer at hand: their calls are checked below
ELSEWHERE = ["how-to/watch-dpo.md", *SKETCHES]  # the first runs, and what it says is checked, in tests/test_readme.py


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python") and name_of(p) not in ELSEWHERE], ids=name_of)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, verl):
    for needed in NEEDS.get(name_of(page), []):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("__page__")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "__page__", module)
    exec(GIVEN.get(name_of(page), ""), module.__dict__)
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), module.__dict__)


@pytest.mark.parametrize("name", SKETCHES)
def test_what_a_sketch_calls_of_tokdyn_is_there_and_takes_those_arguments(name):
    calls = [node for code in blocks(ROOT / "docs" / name, "python") for node in ast.walk(ast.parse(code))
             if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("td.")]  # fmt: skip
    assert calls
    for call in calls:
        function = getattr(td, ast.unparse(call.func).removeprefix("td."))
        named = {word.arg: None for word in call.keywords}
        inspect.signature(function).bind(*call.args, **named)  # TypeError where it does not take them


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=name_of)
def test_the_command_lines_of_a_page_are_understood(page):
    """Command, options and the number of arguments; files that they name are the reader's."""
    group = typer.main.get_command(app)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for line in "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line, comments=True)
        if program == "make":
            assert set(words) <= set(targets), line
        elif program == "tokdyn":
            context = group.make_context("tokdyn", words, resilient_parsing=False)
            rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
            name, command, left = group.resolve_command(context, rest)
            command.make_context(name, list(left), parent=context)
        else:
            assert program in ("pip", "python", "git"), line


def test_every_block_says_its_language_and_is_one_that_is_run():
    """A block without a language would be shown and run by nobody; indented ones are output and formulas."""
    other = {(name_of(page), of) for page in PAGES for of, _ in BLOCK.findall(page.read_text(encoding="utf-8"))
             if of not in ("python", "sh")}  # fmt: skip
    assert not other
