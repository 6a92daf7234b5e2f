"""What the host reads back from the device inside a tile: on a GPU it would wait there, so that tokens must cost none of it."""

from collections import Counter

import pytest
import torch
from engines import planned
from torch.utils._python_dispatch import TorchDispatchMode

from tokdyn.exact.sweep import fill, strips
from tokdyn.exact.sweep.budget import Size
from tokdyn.exact.sweep.tile import Tile
from tokdyn.kernels.tangent_attention import reference
from tokdyn.model.trace import trace
from tokdyn.testing import random_chis, tiny

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::unique_dim", "aten::masked_select"}


class Reads(TorchDispatchMode):
    """Counts the operators that give the host a number, or a size, that depends on the device's data."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in READS:
            self.seen[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def reads(tokens, family, monkeypatch):
    """Of one tile with so many tokens a side, four cotangents in a vjp, and how often the backbone was pulled through."""
    found, pulls = Reads(), Counter()
    run, pull, tolist, tiling = Tile.fill, strips.Strip.pull, torch.Tensor.tolist, Size.tiling

    def counted(*args):
        with found:
            return run(*args)

    def pulled(*args, **options):
        for chunk in pull(*args, **options):
            pulls["chunks"] += 1
            yield chunk

    with monkeypatch.context() as patch:
        patch.setattr(Size, "tiling", lambda *args: (of := tiling(*args))._replace(budget=of.budget._replace(chunk=4, group=8)))
        patch.setattr(Tile, "fill", counted)
        patch.setattr(strips.Strip, "pull", pulled)
        patch.setattr(torch.Tensor, "tolist", lambda x: found.seen.update(["tolist"]) or tolist(x))
        patch.setattr(reference, "on_host", lambda x: False)  # as on a GPU
        with trace(tiny(family)) as tracer:
            p = planned(tracer, random_chis([(3, tokens)], seed=1), random_chis([(3, tokens)], seed=2))
            fill(p, p.empty())
    assert pulls["chunks"]
    return found.seen, pulls["chunks"]


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_what_the_host_reads_does_not_grow_with_the_tokens(family, monkeypatch):
    """Three times the tokens are three times the chunks and not one read more: what is read is read of a graph or a strip."""
    (few, chunks), (many, more) = (reads(n, family, monkeypatch) for n in (8, 24))
    assert more == 3 * chunks
    assert many == few
