"""Models that take the largest of scores of positions: which of equal ones depends on the length, so rows stand alone."""

import pytest
from untouched import FP32, O, build, gram

import tokdyn as td
from tokdyn.model.trace import trace
from tokdyn.testing import random_chis, relative_error, tiny

LONGER = random_chis([(12, 8), (3, 4), (2, 20)], seed=1)  # of several lengths: some are padded where they stand in one batch


@pytest.mark.parametrize("heads, taken", [(1, 3), (3, 6)])
def test_scores_that_tie_are_those_of_a_sequence_alone(heads, taken):
    """With few heads many scores of the indexer are ReLU's zero; which of them are the largest depends on the length."""
    model = build("dsa", index_n_heads=heads, index_topk=taken)
    truth = gram(model, LONGER)
    found = td.forces(model, LONGER, O)
    assert relative_error(found.matrix, truth) < FP32
    assert relative_error(td.forces(model, LONGER, O, method="naive").matrix, truth) < FP32
    for reduce, axis in (("update", 1), ("observe", 0)):
        apart = td.forces(model, LONGER, O, reduce=reduce).vector - truth.sum(axis)
        assert float(apart.norm()) < FP32 * float(truth.abs().sum(axis).norm())
    assert any("depends on how many there are" in rule for rule in found.coverage.values())


@pytest.mark.parametrize("name, selects", [("dsa", True), ("doge", True), ("git", False), ("bert as decoder", False)])
def test_what_selects_among_positions_is_seen(name, selects):
    with trace(build(name)) as tracer:
        assert tracer.found.selects is selects
        assert [len(batch.ids) for batch in tracer.batches(LONGER)] == ([1, 1, 1] if selects else [3])


@pytest.mark.parametrize("family", ["mixtral", "llama"])
def test_a_router_selects_among_experts_and_not_among_positions(family):
    with trace(tiny(family)) as tracer:
        assert not tracer.found.selects and len(tracer.batches(LONGER)) == 1
