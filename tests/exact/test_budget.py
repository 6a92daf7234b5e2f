"""The sweep's count of multiplications, padding included, beside what torch's counter sees."""

import engines
import pytest
from torch.utils.flop_counter import FlopCounterMode

from tokdyn.exact import memory, select
from tokdyn.exact.sweep import Tile, budget, fill, strips
from tokdyn.exact.sweep.budget import Size
from tokdyn.model import attention
from tokdyn.model.trace import trace
from tokdyn.testing import random_chis, tiny

SMALL = dict(hidden_size=64, intermediate_size=176)
WIDE = dict(hidden_size=128, intermediate_size=352)


@pytest.mark.parametrize(
    ("update", "observe", "width", "shortest"),
    [
        ([(10, 6)] * 4, [(10, 6)] * 4, SMALL, 64),  # several short sequences
        ([(6, 4), (8, 5), (7, 4)], [(6, 4)] * 4, WIDE, 64),  # of a wider model, some with padding
        ([(1, 64)], [(1, 64)], SMALL, 16),  # a text in strips
        ([(5, 6), (5, 6), (6, 7)], None, WIDE, 64),  # the same on both sides
        ([(5, 6)] * 6, None, WIDE, 64),  # in several batches
    ],
)
def test_the_count_is_what_runs(update, observe, width, shortest, monkeypatch):
    """Within 15 % of the products in a tile; attention's own, which depend on the kernel, are left out on both sides."""
    monkeypatch.setattr(strips, "SHORTEST", shortest)
    if len(update) == 6:  # batches of two, whose blocks are mirrored
        monkeypatch.setattr(budget, "BATCH", 22)
        monkeypatch.setattr(budget, "GROUP", 12)
    update = random_chis(update, seed=1)
    observe = update if observe is None else random_chis(observe, seed=2)
    counter, left_out = FlopCounterMode(display=False), []
    run, attend = Tile.fill, attention.cotangent_attention

    def counting(*args):
        with counter:
            return run(*args)

    def leaving_out(*args):
        before = counter.get_total_flops()
        found = attend(*args)
        left_out.append(counter.get_total_flops() - before)
        return found

    monkeypatch.setattr(Tile, "fill", counting)
    monkeypatch.setattr(attention, "cotangent_attention", leaving_out)
    with trace(tiny("qwen2", **width)) as tracer:
        p = engines.planned(tracer, update, observe)
        p = p if len(p.observed) >= len(p.updated) else p.transposed()
        counted = 2 * Size.of(p).tiling(*p.singles, 1 << 30).products
        fill(p, p.empty(), memory=1 << 30)
    ran = counter.get_total_flops() - sum(left_out)
    assert abs(counted - ran) <= 0.15 * ran, f"{counted:.3g} counted, {ran:.3g} ran"


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_reduction_holds_is_told(tied):
    """A direction has every moving number once; gradients come by use, and those of a tied tensor are added up beside them."""
    with trace(tiny("llama", tied=tied)) as tracer:
        uses, batches = select(tracer, "full"), tracer.batches(random_chis([(3, 4), (2, 5)], seed=1))
        told = memory.reduction_bytes(tracer, uses, batches, batches)
        once = sum(p.nbytes for p in {id(p): p for p in tracer.model.parameters()}.values())
        embedding = tracer.model.get_input_embeddings().weight.nbytes
        assert told["direction"] == once
        assert told["gradients"] == once + (2 * embedding if tied else 0)
        assert told["tangents"] == max(memory.pass_bytes(tracer, batch, 1) for batch in batches)


def test_the_peak_is_the_most_that_is_held_at_once():
    assert memory.peak({}) == 0 == memory.peak({"direction": 0})
    for alone in ("scoring", "backward", "gradients"):
        assert memory.peak({"scoring": 1, "backward": 1, "gradients": 1, alone: 7}) == 7
    assert memory.peak({"backward": 8, "direction": 3, "tangents": 6, "hidden": 1, "matrix": 2, "products": 4}) == 9
    assert memory.peak({"gradients": 6, "direction": 1, "tangents": 2, "hidden": 1, "matrix": 2, "products": 4}) == 7


@pytest.mark.parametrize("most, chunk", [(1, 256), (1 << 40, 600)])
def test_products_of_the_readout_go_by_pieces_of_the_vocabulary(monkeypatch, most, chunk):
    """All of it at once where memory allows, else 256 entries at least."""
    monkeypatch.setattr(memory, "READOUT", most)
    with trace(tiny("llama", tied=False, vocabulary=600)) as tracer:
        batches, N = tracer.batches(random_chis([(3, 4)], seed=1)), 4
        d, item, told = (
            tracer.readout.weight.shape[1],
            tracer.precision.itemsize,
            memory.readout_bytes(tracer, batches, batches),
        )
        assert told["matrix"] == 2 * item * N * N and told["hidden"] == item * 2 * N * d
        assert told["products"] == item * (2 * N * chunk + 2 * 2 * N * d + 2 * N * N)
