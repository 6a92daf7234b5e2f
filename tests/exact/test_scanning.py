"""Rows against groups: the same forces as td.forces(reduce="observe"), row by row and group by group, in float64."""

import pytest
import torch

import tokdyn as td
from tokdyn.exact import Scope, products
from tokdyn.exact.scanning import Pulled, Row, packed
from tokdyn.model import trace as tracing
from tokdyn.model.adjoint import Derivatives
from tokdyn.model.trace import trace
from tokdyn.objectives import DPO, GRPO, KTO, SFT, SimPO
from tokdyn.observables import observable as as_observable
from tokdyn.testing import float64, random_chis, relative_error, tiny, tiny_lora

FP64 = 1e-11  # about 30 sums of 61 terms on the way of a gradient, each off by √61 · 1.1e-16 of its terms, with room


def pairs(n, seed=0):
    rows = []
    for i in range(n):
        lengths = [(2 + (seed + i) % 3, 2 + (3 * i) % 5), (2 + (seed + i) % 3, 3 + i % 3)]
        chosen, rejected = random_chis(lengths, seed=seed + i)
        reference = dict(reference_log_probs=torch.full((len(chosen),), -3.0 - i))
        rows.append(Row(f"row {i + 1}", [chosen.with_(role="chosen", group=i, **reference),
                                         rejected.with_(role="rejected", group=i)]))  # fmt: skip
    return rows


GROUPS = {"chosen": random_chis([(3, 4), (1, 3)], seed=20), "rejected": random_chis([(2, 5)], seed=21),
          "other": random_chis([(1, 2)], seed=22)}  # fmt: skip


def scanned(model, rows, objective, positions=40, scope="full", **options):
    """F by row and group, and how many batches there were."""
    with trace(model) as tracer:
        pulled = Pulled.of(Scope.named(tracer, scope), GROUPS)
        update = packed(tracer, rows, objective, positions)
        F, side = pulled.forces(update, **options)
        row_of = update.row_of()
        return {row.where: F[:, row_of == i] for i, row in enumerate(update.rows)}, side, update


def oracle(model, row, objective, **options):
    found = [td.forces(model, row.chis, group, objective, reduce="observe", **options).vector for group in GROUPS.values()]
    return torch.stack(found)


@pytest.mark.parametrize("family, memory", [("llama", 1), ("llama", 4 << 30), ("gemma2", 4 << 30)])
def test_every_row_has_the_forces_that_it_has_alone(family, memory):
    """A group at a time, or all groups together, as memory allows."""
    model, rows = tiny(family).double(), pairs(3)
    with float64():
        found, _, update = scanned(model, rows, DPO(), positions=25, memory=memory)
        assert len(update.batches) > 1
        for row in rows:
            assert relative_error(found[row.where], oracle(model, row, DPO())) < FP64


@pytest.mark.parametrize("objective", [SFT(label_smoothing=0.1), SimPO(), KTO(), GRPO()], ids=lambda o: type(o).__name__)
def test_objectives_are_asked_row_by_row(objective):
    """Also one whose loss over many rows is no sum over them."""
    model, rows = tiny("qwen2").double(), pairs(2)
    rows = [Row(row.where, [chi.with_(advantage=a) for chi, a in zip(row.chis, (1.5, -0.5), strict=True)]) for row in rows]
    with float64():
        found, side, update = scanned(model, rows, objective)
        for row in rows:
            assert relative_error(found[row.where], oracle(model, row, objective)) < FP64
        assert torch.equal(torch.cat([term.own_c for term in side.terms]), side.c)


@pytest.mark.parametrize("scope", ["readout", "backbone", "layers.1"])
def test_scopes(scope):
    model, rows = tiny("llama", tied=False).double(), pairs(2)
    with float64():
        found, _, _ = scanned(model, rows, DPO(), scope=scope)
        for row in rows:
            assert relative_error(found[row.where], oracle(model, row, DPO(), scope=scope)) < FP64


@pytest.mark.parametrize("observable, adam", [("log-prob", False), ("entropy", True)])
def test_forces_are_divided_by_what_moves(observable, adam):
    """A tied embedding's parts too; by layer, on what is watched, under an optimizer's P or none."""
    model, rows = tiny("gpt2").double(), pairs(1)
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-3) if adam else None
    group = {"chosen": GROUPS["chosen"]}
    with float64():
        with trace(model) as tracer:
            scope = Scope.named(tracer, "full", "layer")
            F, _ = Pulled.of(scope, group, as_observable(observable)).forces(packed(tracer, rows, DPO()), optimizer)
        found = td.forces(model, rows[0].chis, group["chosen"], DPO(), reduce="observe", by="layer", observable=observable,
                          optimizer=optimizer)  # fmt: skip
    assert list(found.parts) == list(scope.parts.names) and "tied" in found.parts
    for part, truth in zip(F, found.parts.values(), strict=True):
        assert float((part[0] - truth).norm()) < FP64 * float(found.vector.norm())


def test_an_adapter_alone_moves():
    model, rows = tiny_lora("llama").double(), pairs(2)
    with float64():
        found, _, _ = scanned(model, rows, DPO())
        for row in rows:
            assert relative_error(found[row.where], oracle(model, row, DPO())) < FP64


class Mean(DPO):
    """DPO as trainers take it: the mean over pairs."""

    def loss(self, log_probs, chis, scores=None):
        return super().loss(log_probs, chis) / (len(chis) / 2)


@pytest.mark.parametrize("stepped", [True, False], ids=["with state", "before its first step"])
def test_under_an_optimizer_the_rows_of_a_step_are_its_update(stepped):
    """F = P of the coming step on the rows' mean, which is td.forces of all of them; a step makes of a row a share 1/n."""
    model, rows = tiny("llama").double(), pairs(3)
    with float64():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
        if stepped:
            model(rows[0].chis[0].ids[None]).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found, _, _ = scanned(model, rows, DPO(), optimizer=optimizer)
        together = [chi for row in rows for chi in row.chis]
        truth = oracle(model, Row("all", together), Mean(), optimizer=optimizer)
        mine = torch.cat([found[row.where] for row in rows], 1) / len(rows)
        assert relative_error(mine, truth) < 1e-9  # 1/(sqrt(v) + eps) in a group's direction adds its own roundoff


def test_a_row_larger_than_a_batch_is_scored_before_it_is_moved_along():
    model = tiny("llama").double()
    rows = [Row("long", [chi.with_(advantage=a, group=0) for chi, a in zip(random_chis([(3, 9)] * 3, seed=5), (1.0, -2.0, 1.0),
                                                                            strict=True)])]  # fmt: skip
    with float64():
        found, _, update = scanned(model, rows, GRPO(), positions=12)
        assert len(update.batches) == 3 and not update.is_by_batch
        assert relative_error(found["long"], oracle(model, rows[0], GRPO())) < FP64


def test_passes_do_not_grow_with_groups_but_tangents_do(monkeypatch):
    """A backward pass a group's batch, then one forward and one tangent pass for all groups of a batch of rows."""
    calls, model = [], tiny("llama")
    run = tracing.Tracer.logits
    monkeypatch.setattr(tracing.Tracer, "logits", lambda self, batch, *a: calls.append(batch.ids.shape) or run(self, batch, *a))
    with trace(model) as tracer:
        scope = Scope.named(tracer, "full")
        tracer.why_not_tangents(scope.uses)
        calls.clear()
        pulled = Pulled.of(scope, GROUPS)
        assert len(calls) == len(GROUPS)
        update = packed(tracer, pairs(6), DPO(), 60)
        calls.clear()
        pulled.forces(update)
        assert calls == [batch.ids.shape for batch in update.batches]


def test_batches_hold_whole_rows_of_like_length():
    with trace(tiny("llama")) as tracer:
        rows = pairs(30, seed=1)
        update = packed(tracer, rows, DPO(), 64)
    lengths = [row.length for row in update.rows]
    assert lengths == sorted(lengths) and {id(row) for row in update.rows} == {id(row) for row in rows}
    assert update.is_by_batch and max(batch.ids.numel() for batch in update.batches) <= 64
    assert torch.equal(torch.cat([batch.sequence for batch in update.batches]).unique(), torch.arange(60))


@pytest.mark.parametrize("twice", [True, False])
def test_where_tangents_cannot_be_trusted_others_stand_in(monkeypatch, twice):
    """Two backward passes, exact, with one graph for all groups; else real steps."""
    model, rows = tiny("llama").double(), pairs(2)
    monkeypatch.setattr(tracing.Tracer, "derivatives", lambda self, uses: Derivatives("for the test", twice))
    taken = []
    for name in ("backward_twice", "real_velocities"):
        made = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *a, name=name, made=made: taken.append(name) or made(*a))
    with float64():
        found, _, update = scanned(model, rows, DPO())
        batches = len(update.batches)
        assert taken == ["backward_twice"] * batches if twice else ["real_velocities"] * batches * len(GROUPS)
        monkeypatch.undo()
        for row in rows:  # extrapolated central differences: 1e-6
            assert relative_error(found[row.where], oracle(model, row, DPO())) < (1e-10 if twice else 1e-6)


def test_mistakes_are_said():
    rows = pairs(2)
    empty = Row("pairs.jsonl line 7", [rows[0].chis[1].with_(scored=torch.zeros_like(rows[0].chis[1].scored))])
    with trace(tiny("llama")) as tracer:
        scope = Scope.named(tracer, "full")
        with pytest.raises(ValueError, match="pairs.jsonl line 7 holds a sequence without a scored token"):
            packed(tracer, [*rows, empty], DPO())
        with pytest.raises(ValueError, match="no group to observe"):
            Pulled.of(scope, {})
        with pytest.raises(ValueError, match="group 'none' holds no sequence"):
            Pulled.of(scope, {"none": []})
        single = Row("pairs.jsonl line 9", rows[1].chis[:1])
        with pytest.raises(ValueError, match="pairs.jsonl line 9: group 1 must hold one chosen and one rejected"):
            Pulled.of(scope, GROUPS).forces(packed(tracer, [single], DPO()))
