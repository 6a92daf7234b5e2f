"""What an exact engine takes beyond the model: the budget, and what docs/exact.md says is not counted."""

import os
import subprocess
import sys
import weakref

import pytest
import torch

import tokdyn as td
from tokdyn.bench import measure
from tokdyn.exact import Scope
from tokdyn.exact.memory import kept_bytes
from tokdyn.exact.scanning import Pulled
from tokdyn.exact.scope import select
from tokdyn.model import layered
from tokdyn.model.hooks import hooked
from tokdyn.model.trace import trace
from tokdyn.testing import random_chis, tiny

T = 128
CODE = """
import sys, torch
from tokdyn.bench.measure import peak_memory
from tokdyn.exact import Asked, Scope, UnscoredProblem, sweep, tangents
from tokdyn.model.trace import trace
from tokdyn.objectives import SFT
from tokdyn.testing import random_chis, tiny

engine, T, *budgets = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
model = tiny("qwen2", hidden_size=64, intermediate_size=192, num_hidden_layers=3, max_position_embeddings=T, vocabulary=64)
own = [name for name, module in model.named_modules() if list(module.parameters(recurse=False)) and name != "lm_head"]
with trace(model) as tracer:
    scope = Scope.named(tracer, "full")

    def call(T, memory):
        sides = (random_chis([(1, T - 1)], seed=seed) for seed in (1, 2))
        problem = UnscoredProblem.about(Asked(*sides, SFT()), scope).scored()
        {"sweep": sweep, "tangents": tangents}[engine].fill(problem, torch.empty(problem.shape), memory=memory)
        return tracer.record(problem.observed.batches[0], own)[1]

    call(4, 1 << 24)
    kept = {id(x): x.nbytes for of in call(T, 1 << 28) for x in (*of.inputs, *of.outputs)}
    print(sum(kept.values()), *(peak_memory(lambda: call(T, memory), torch.device("cpu")) for memory in budgets))
"""


def peaks(engine, *budgets):
    """Bytes of what one pass leaves with the modules, and the most taken with each budget."""
    command = [sys.executable, "-c", CODE, engine, str(T), *map(str, budgets)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | measure.steady_memory())
    assert done.returncode == 0, done.stderr
    calls, *found = map(int, done.stdout.split())
    return calls, found


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("engine", ["sweep", "tangents"])
def test_the_budget_is_kept(engine):
    """Beside it: what the modules took in and returned, and a graph of it all while the cuts are sought, which saves more.

    Resident memory counts what the allocator was given back and still holds: it says too much, never too little, so that one
    measurement of several within the bound shows that the pass needs no more.
    """
    little, much = 24 << 20, 1 << 28
    calls, (tight, free) = peaks(engine, little, much)
    for _ in range(4):
        if tight < little + 5 * calls:
            break
        tight = min(tight, *peaks(engine, little)[1])
    assert tight < little + 5 * calls < free, (calls, tight, free)


# ---------------------------------------------------------------- graphs that do not fit

PLAIN, LITTLE = 4 << 30, 1
UPDATE, WATCHED = random_chis([(3, 4), (2, 5)], seed=1), random_chis([(1, 6)], seed=2)


def asked(model, memory, **options):
    """Everything of a reduction: each has a backward pass of its own."""
    found = [
        td.forces(model, UPDATE, WATCHED, reduce=reduce, memory=memory, **options) for reduce in ("update", "observe", "both")
    ]
    found.append(td.forces(model, UPDATE, WATCHED, reduce="update", by="kind", memory=memory, **options))
    return [F.vector for F in found] + list(found[-1].parts.values())


@pytest.fixture
def again(monkeypatch):
    """The layers that were made as checkpoints."""
    made, real = [], layered.checkpoint
    monkeypatch.setattr(layered, "checkpoint", lambda *args, **kwargs: (made.append(1), real(*args, **kwargs))[1])
    return made


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2_moe", "mamba"])
def test_layers_made_again_give_the_same_bits(family, again):
    """The same operations on the same numbers: whatever fits, nothing differs, and the model is left as it was."""
    model = tiny(family)
    whole = asked(model, PLAIN)
    assert not again
    little = asked(model, LITTLE)
    assert len(again) > 2 and all(map(torch.equal, whole, little))
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_made_again_under_an_optimizer_in_a_scan_and_where_two_are_one(again):
    model = tiny("llama")
    model.model.layers[1] = model.model.layers[0]
    optimizer = torch.optim.AdamW(model.parameters())
    assert all(map(torch.equal, asked(model, PLAIN, optimizer=optimizer), asked(model, LITTLE, optimizer=optimizer)))
    with trace(model) as tracer:
        groups = {"one": UPDATE, "two": WATCHED}
        one, two = (Pulled.of(Scope.named(tracer, "full"), groups, memory=memory).directions for memory in (PLAIN, LITTLE))
    assert again and all(torch.equal(one[name], two[name]) for name in one)


def test_layers_that_do_not_run_twice_are_kept_whole(monkeypatch):
    """A layer whose second run differs from its first: the gradients of a short sequence tell."""
    model = tiny("llama")
    whole = asked(model, PLAIN)

    def other(run, *args, **options):
        return run(*args, **{k: v for k, v in options.items() if k not in ("use_reentrant", "preserve_rng_state")}) * 1.01

    monkeypatch.setattr(layered, "checkpoint", other)
    assert all(map(torch.equal, whole, asked(model, LITTLE)))


def test_looking_at_a_graph_leaves_nothing_behind():
    """A saved output handed back as it is would hold its node, and the node it, for ever."""
    model, seen = tiny("llama"), []
    with trace(model) as tracer, hooked(model, after={"model.norm": lambda *call: seen.append(weakref.ref(call[-1]))}):
        kept_bytes(tracer, select(tracer, "full"), 8)
    assert seen and all(ref() is None for ref in seen)
