"""Sequences side by side in the sweep: a batch gives what its sequences give alone; where it does not, they stay alone."""

import engines
import pytest
import torch
from engines import counted, matrices

from tokdyn.exact import sweep
from tokdyn.exact.sweep import budget, stacks, strips, tile
from tokdyn.model.trace import trace
from tokdyn.objectives import GRPO, PPO, SFT
from tokdyn.testing import float64, random_chis, relative_error, tiny

FP32, FP64 = 1e-5, 1e-9  # two gradients of these models, each off by 5e-6: tests/test_forces.py


def ragged():
    """Sequences of many lengths: one token, the same twice, two with a common beginning."""
    chis = random_chis([(3, 5), (1, 1), (4, 3), (3, 5), (2, 6), (5, 2)], seed=11)
    chis[3] = chis[0]
    chis[4] = chis[4].with_(ids=torch.cat([chis[0].ids[:5], chis[4].ids[5:]]))
    return chis


@pytest.mark.parametrize(  # gpt2 looks the positions of all sequences up at once, mixtral's experts and opt's MLP take tokens
    ("family", "equal", "shortest"),
    [(f, *of) for f in ("qwen2", "gpt2", "gemma2") for of in ((True, 2), (True, 64), (False, 64))]
    + [("mixtral", True, 2), ("opt", False, 64)],
)
def test_a_batch_of_ragged_sequences_is_exact(family, equal, shortest, monkeypatch):
    """Against one gradient per token in float64: a batch a side, or one for both, whose tokens are then pulled back once."""
    monkeypatch.setattr(strips, "SHORTEST", shortest)
    update = ragged()
    observe = ragged() if equal else random_chis([(2, 4), (6, 3), (1, 1), (2, 7)], seed=12)
    with float64(), counted() as counts:
        naive, fast, by = matrices(tiny(family).double(), update=update, observe=observe, engine="sweep")
    assert relative_error(fast, naive) < FP64
    assert counts["strip"] == (len(strips.in_strips(6)) if equal else 2) and not any("at a time" in of for of in by.values())


def test_a_lookup_of_the_models_own_class_may_answer_once_for_all_sequences():
    """As BART's positions do: called again with other weights it still has one row for all."""

    class Positions(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids[:1])

    model = tiny("gpt2")
    model.transformer.wpe.__class__ = Positions
    with float64(), counted() as counts:
        naive, fast, by = matrices(model.double(), update=ragged(), observe=ragged()[1:], engine="sweep")
    assert relative_error(fast, naive) < FP64 and by["transformer.wpe.weight"] == "lookup"
    assert not any("at a time" in of for of in by.values()) and counts["strip"] < 11


def test_what_is_on_both_sides_is_pulled_once_whatever_its_weight():
    """c of rollouts, their weights as observed tokens, held-out ones on either side; other forms of loss are pulled twice."""
    update = [chi.with_(group=0, advantage=a) for chi, a in zip(ragged()[:3], (1.0, -1.0, 0.5), strict=True)]
    observe = [update[2], *random_chis([(2, 4)], seed=12), update[0]]
    weights = torch.arange(1.0, 1 + sum(len(chi) for chi in observe))
    for objective, common in ((GRPO(), True), (PPO(entropy=0.3), False)):
        with counted() as counts, trace(tiny("qwen2")) as tracer:
            problem = engines.scored(tracer, update, observe, objective, weights=weights)
            naive, fast = problem.empty(), problem.empty()
            engines.naive.fill(problem, naive)
            sweep.fill(problem, fast)
        assert relative_error(fast, naive) < FP32
        assert counts["strip"] == (3 if common else 2)


def test_of_two_batches_on_both_sides_one_block_is_met_and_mirrored(monkeypatch):
    """F is symmetric where the same tokens are on both sides: of three such batches and one more, 9 of 12 blocks are met."""
    monkeypatch.setattr(budget, "BATCH", 1)
    monkeypatch.setattr(budget, "GROUP", 1)
    met, meet = set(), tile.Tile._add_inner_products

    def meeting(self, F, kept, rules, group):
        met.add((next(iter(kept.values()))[0].first, group[0][1].where.start))
        meet(self, F, kept, rules, group)

    monkeypatch.setattr(tile.Tile, "_add_inner_products", meeting)
    update = random_chis([(3, 5), (2, 3), (4, 2)], seed=11)
    with float64():
        held_out = random_chis([(2, 4)], seed=12)
        naive, fast, _ = matrices(tiny("qwen2").double(), update=update, observe=update + held_out, engine="sweep")
    assert relative_error(fast, naive) < FP64
    assert len(met) == 9 and len({first for first, _ in met}) == 4


@pytest.mark.parametrize("memory", [1 << 17, 1 << 20])
def test_batches_in_little_memory_are_exact(memory):
    """Batches, parts of their slots in several tiles, graphs of a few segments."""
    naive, fast, _ = matrices(tiny("llama"), update=ragged(), observe=ragged()[2:], engine="sweep", memory=memory)
    assert relative_error(fast, naive) < FP32


def test_sequences_share_a_batch_where_padding_costs_less():
    """Without a cost of a batch's own what pads nothing is together; at any price everything is, up to the most positions."""
    with trace(tiny("llama")) as tracer:
        problem = engines.scored(tracer, random_chis([(9, 2)], seed=3), ragged(), SFT())
        side, _, common = stacks.on_both_sides(problem.observed.one_by_one(), problem.updated.one_by_one())
    assert not common
    rows = [sorted(batch.sequence.unique().tolist()) for batch in stacks.side_by_side(side, 1000, 0.0).batches]
    assert sorted(rows) == [[0, 3], [1], [2], [4], [5]]
    whole = stacks.side_by_side(side, 1000, 1e9)
    (batch,) = whole.batches
    assert batch.ids.shape == (6, max(b.ids.shape[1] for b in side.batches)) and batch.slots == 6
    for k, alone in enumerate(side.batches):  # the tokens of each sequence, and where they are on the axis
        again = batch.alone(k)
        assert all(torch.equal(getattr(again, name), getattr(alone, name)) for name in ("ids", "rows", "targets", "position"))
        assert torch.equal(whole.where[0][batch.sequence == k], side.where[k])
    assert all(b.ids.numel() <= 14 for b in stacks.side_by_side(side, 14, 1e9).batches)


def test_sequences_that_meet_in_a_module_stay_alone_and_the_coverage_says_so():
    """A module that comes to read how many sequences there are, once the trace has been checked."""
    model = tiny("llama", tied=False)

    class Counting(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.silu(x) * len(x)

    with trace(model) as tracer:
        problem = engines.scored(tracer, ragged(), ragged()[:2], SFT())
        model.model.layers[0].mlp.act_fn = Counting()
        coverage = engines.choice.structured(problem, problem.empty())
    assert all("one sequence at a time" in label and "in a batch than alone" in label for label in coverage.values())


def test_modules_that_take_tokens_of_all_sequences_in_turn_go_one_by_one_and_the_coverage_says_so():
    """Rows that are not a sequence's positions one after the other are seen, and nothing is mixed up."""

    class Turned(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.transpose(0, 1).flatten(0, 1)).unflatten(0, x.shape[1::-1]).transpose(0, 1)

    model = tiny("llama")
    model.model.layers[0].mlp = Turned(model.model.layers[0].mlp)
    naive, fast, by = matrices(model, update=ragged()[:3], observe=ragged()[2:4], engine="sweep")
    assert relative_error(fast, naive) < FP32
    assert all("one sequence at a time (" in label and "in a batch than alone" in label for label in by.values())


def test_the_counted_multiplications_prefer_a_batch(monkeypatch):
    """Sides of equal lengths are one batch each whatever a batch costs."""
    monkeypatch.setattr(budget, "LAUNCH", 0.0)
    update, observe = random_chis([(3, 4)] * 5, seed=3), random_chis([(3, 4)] * 2, seed=4)
    with counted() as counts:
        naive, fast, _ = matrices(tiny("qwen2"), update=update, observe=observe, engine="sweep")
    assert relative_error(fast, naive) < FP32 and counts["strip"] == 2
