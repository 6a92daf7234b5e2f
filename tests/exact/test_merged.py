"""Tokens with one context and target are pulled once, and the matrix is that of one gradient per token."""

import dataclasses

import engines
import pytest
import torch
from engines import counted, forces

import tokdyn as td
from tokdyn.exact import engines as choice
from tokdyn.exact import merged
from tokdyn.exact.naive import fill as naive_fill
from tokdyn.model.trace import Tracer, trace
from tokdyn.objectives import DPO, PPO, SFT, SimKO
from tokdyn.testing import random_chis, relative_error, tiny

FP32 = 1e-5  # tests/exact/test_architectures.py
A, B, C = random_chis([(4, 5), (2, 4), (1, 1)], seed=1)


def after(chi, n, seed, role="", advantage=0.0):
    """Another sequence that begins with n tokens of this one."""
    (other,) = random_chis([(n, len(chi.ids) - n)], seed=seed)
    ids = torch.cat([chi.ids[:n], other.ids[n:]])
    return chi.with_(ids=ids, group=0, **({"role": role} if role else {}), advantage=advantage)


def drawn(seed):
    """Ragged sequences, one of one token, some repeated, some that begin like another."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(int(x), int(y)) for x, y in torch.randint(1, 6, (2, 2), generator=generator)]
    first = [*random_chis(sizes, seed=seed), C]
    picked = [first[int(i)] for i in torch.randint(3, (2,), generator=generator)]
    return [*first, *picked, after(first[0], int(torch.randint(1, len(first[0].ids), (1,), generator=generator)), seed)]


def kinds_of(chis):
    """The distinct (context, target) of the scored tokens, by their ids."""
    scored = [(tuple(chi.ids[: t + 1].tolist())) for chi in chis for t in chi.scored.nonzero().flatten().tolist()]
    return len(set(scored)), len(scored)


def solved(model, update, observe, objective=None):
    """The matrix by one gradient per token, the merged one, and the tokens of both sides that were pulled."""
    shapes = []

    def fill(problem, out, **options):
        shapes.append(problem.shape)
        return choice.structured(problem, out, **options)

    with trace(model) as tracer:
        problem = engines.scored(tracer, update, observe, objective)
        slow, fast = problem.empty(), problem.empty()
        naive_fill(problem, slow)
        merged.Merged(fill)(problem, fast)
    (shape,) = shapes
    return slow, fast, shape


@pytest.mark.parametrize("seed", range(3))
def test_random_sides(seed):
    update, observe = drawn(seed), drawn(seed + 10)
    observe = update if seed == 2 else observe
    naive, fast, shape = solved(tiny("qwen2"), update, observe)
    assert relative_error(fast, naive) < FP32
    assert shape == (kinds_of(observe)[0], kinds_of(update)[0]) < (kinds_of(observe)[1], kinds_of(update)[1])


def test_what_a_pair_shares_is_pulled_once_though_it_is_pushed_both_ways(monkeypatch):
    """c⁺ and c⁻ differ in sign; the sequences of a side lie in batches of their own."""
    whole = Tracer.batches
    monkeypatch.setattr(Tracer, "batches", lambda tracer, chis, tokens: whole(tracer, chis, tokens=1))
    chosen = A.with_(group=0, role="chosen")
    pair = [chosen, after(A, 6, 3, "rejected")]
    naive, fast, shape = solved(tiny("gpt2"), pair, [A, B], DPO())
    assert relative_error(fast, naive) < FP32
    assert shape == (5 + 4, 2 + 3 + 3)


@pytest.mark.parametrize("objective", [PPO(entropy=0.3), SimKO(), SFT(label_smoothing=0.1)], ids=lambda of: type(of).__name__)
def test_forces_that_are_no_multiples_stay_apart(objective):
    """An entropy's part, further targets, a uniform part: only the observed side, plain log-probabilities, is merged."""
    update = [A.with_(group=0, advantage=1.0), after(A, 7, 4, advantage=-0.5)]
    naive, fast, shape = solved(tiny("llama"), update, [B, B.with_(group=1)], objective)
    assert relative_error(fast, naive) < FP32
    assert shape == (4, 10)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_on_the_left_is_another_context_where_the_model_counts_it(family):
    update = [A, A.with_(padding=2), A.with_(padding=2)]
    with trace(tiny(family)) as tracer:
        tracer.found.counts_padding = family == "gpt2"
    naive, fast, shape = solved(tiny(family), update, [B])
    assert relative_error(fast, naive) < FP32
    assert shape == (4, 10 if family == "gpt2" else 5)


def test_a_temperature_keeps_kinds_apart_and_is_kept():
    with trace(tiny("llama")) as tracer:
        problem = engines.scored(tracer, [A, A], [B])
        (term,) = problem.updated.terms
        halves = [dataclasses.replace(half, temperature=T) for half, T in zip(term.split([5, 5]), (1.0, 0.5), strict=True)]
        (batch,) = problem.updated.batches
        parts = [merged.only(batch, torch.arange(5)), merged.only(batch, torch.arange(5, 10))]
        side = dataclasses.replace(problem.updated, batches=parts, terms=halves)
        assert merged.kinds(side) is None
        again = dataclasses.replace(side, batches=[*parts, parts[1]], terms=[*halves, halves[1]])
        found = merged.kinds(again)
        assert found.index.tolist() == [*range(10), *range(5, 10)] and [x.temperature for x in found.side.terms] == [1.0, 0.5]


@pytest.mark.parametrize("options", [dict(groups="sequence"), dict(groups=[*range(10)]), dict(memory=200)], ids=str)
def test_groups_and_folders(options, tmp_path):
    model, update = tiny("llama"), [A, A.with_(group=1)]
    naive = forces(model, update, [B, B], method="naive", **{k: v for k, v in options.items() if k == "groups"}).matrix
    if "memory" in options:
        options = options | dict(out=tmp_path / "F")
    found = forces(model, update, [B, B], **options)
    fast = found.shards.tensor() if "memory" in options else found.matrix
    assert relative_error(fast, naive) < FP32


def test_what_one_direction_per_token_makes_is_merged_too():
    model = tiny("llama", tied=False)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    naive = td.forces(model, [A, A], [B], method="naive").matrix
    with counted() as counts:
        found = forces(model, [A, A], [B], slow="one tensor in two modules")
    assert counts["per token"] == 1 and relative_error(found.matrix, naive) < FP32
