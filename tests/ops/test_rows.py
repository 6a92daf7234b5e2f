"""Rows of logits looked at in blocks: the same numbers as all at once, whatever the block."""

import pytest
import torch

from tokdyn.exact import Side
from tokdyn.kernels.readout_forces.reference import logit_force
from tokdyn.objective import GTerm
from tokdyn.ops import rows
from tokdyn.sequences import collate
from tokdyn.testing import random_chis


@pytest.mark.parametrize(("N", "V"), [(0, 7), (1, 7), (10, 3), (5, rows.CACHED + 1), (300, 2**11)])
def test_blocks_tile_the_rows(N, V):
    z = torch.empty(N, V)
    covered = [i for block in rows.blocks(z) for i in range(N)[block]]
    assert covered == list(range(N))


def test_log_probs_are_those_of_the_whole_softmax(monkeypatch):
    monkeypatch.setattr(rows, "CACHED", 64)  # blocks of three rows
    torch.manual_seed(0)
    z, y = 5 * torch.randn(10, 20), torch.randint(0, 20, (10,))
    truth = z.double().log_softmax(1)[torch.arange(10), y]
    found = rows.log_probs(z.requires_grad_(), y)
    assert found.dtype == torch.float64 and not found.requires_grad
    assert torch.equal(found, truth)


def test_a_side_forces_and_works_block_by_block(monkeypatch):
    """Γ and <Γ, ż> of all kinds of terms are those of one call for all tokens."""
    monkeypatch.setattr(rows, "CACHED", 64)
    torch.manual_seed(0)
    N, V = 10, 20
    z, velocity, y = torch.randn(N, V), torch.randn(N, V), torch.randint(0, V, (N, 2))
    term = GTerm(y, torch.randn(N, 2), torch.randn(N), torch.randn(N))
    side = Side([collate(random_chis([(1, N)]))], [term])
    truth = logit_force(z, term.targets, term.c, term.v, term.uniform)
    assert torch.equal(side.logit_force(0, z), truth)
    assert torch.equal(side.work(0, z, velocity), (truth * velocity).sum(1))
    assert side.logit_force(0, z.bfloat16()).dtype == torch.float32
