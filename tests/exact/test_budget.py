"""The sweep's count of multiplications, padding included, beside what torch's counter sees."""

import engines
import pytest
from torch.utils.flop_counter import FlopCounterMode

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
