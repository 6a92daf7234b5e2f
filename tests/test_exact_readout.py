"""The readout's part of the matrix in closed form, as a function of both sides: neither of them is special."""

import pytest
import torch

from tokdyn import exact
from tokdyn.exact.naive import naive_matrix
from tokdyn.exact.readout import readout_matrix
from tokdyn.objectives import PPO, SFT, SimKO
from tokdyn.sides import prepare
from tokdyn.testing import random_chis, relative_error, tiny
from tokdyn.trace import trace

FP32 = 1e-5  # two float32 sums of V d = 2e3 products agree to about sqrt(2e3) eps = 5e-6


@pytest.mark.parametrize("objective", [SFT(label_smoothing=0.1), PPO(entropy=0.3), SimKO()], ids=lambda of: type(of).__name__)
def test_the_readout_takes_every_form_of_force_on_either_side(objective):
    """F of the exchanged sides is the transpose, whichever side has the dense or the several targets."""
    some = zip(random_chis([(2, 5), (3, 4)], seed=5), (1.0, -1.0), strict=True)
    update = [chi.with_(group=0, advantage=advantage) for chi, advantage in some]
    with trace(tiny("qwen2")) as tracer:
        sides, uses = prepare(tracer, update, random_chis([(3, 5)], seed=1), objective), exact.select(tracer, "readout")
        naive = torch.empty(len(sides.o), len(sides.u), dtype=tracer.precision)
        naive_matrix(tracer, sides.o, sides.u, uses, None, naive)
        there, back = (readout_matrix(tracer, *of, uses, None) for of in ((sides.o, sides.u), (sides.u, sides.o)))
        sums = [readout_matrix(tracer, sides.u, sides.o, uses, None, reduce) for reduce in ("update", "observe")]
    assert relative_error(there, naive) < FP32 and relative_error(back, naive.T) < FP32
    # rounding of a sum is relative to the sum of magnitudes
    assert all(float((x - naive.sum(i)).norm()) < FP32 * float(naive.abs().sum(i).norm()) for i, x in enumerate(sums))
