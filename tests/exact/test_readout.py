"""The readout's part of the matrix in closed form, as a function of both sides: neither of them is special."""

import pytest
from engines import scored

from tokdyn.exact import naive
from tokdyn.exact.readout import readout_matrix
from tokdyn.model.trace import trace
from tokdyn.objectives import PPO, SFT, SimKO
from tokdyn.testing import random_chis, relative_error, tiny

FP32 = 1e-5  # two float32 sums of V d = 2e3 products agree to about sqrt(2e3) eps = 5e-6


@pytest.mark.parametrize("objective", [SFT(label_smoothing=0.1), PPO(entropy=0.3), SimKO()], ids=lambda of: type(of).__name__)
def test_the_readout_takes_every_form_of_force_on_either_side(objective):
    """F of the exchanged sides is the transpose, whichever side has the dense or the several targets."""
    some = zip(random_chis([(2, 5), (3, 4)], seed=5), (1.0, -1.0), strict=True)
    update = [chi.with_(group=0, advantage=advantage) for chi, advantage in some]
    with trace(tiny("qwen2")) as tracer:
        problem = scored(tracer, update, random_chis([(3, 5)], seed=1), objective, "readout")
        expected = problem.empty()
        naive.fill(problem, expected)
        there, back = readout_matrix(problem), readout_matrix(problem.transposed())
        sums = [readout_matrix(problem.transposed(), reduce) for reduce in ("update", "observe")]
    assert relative_error(there, expected) < FP32 and relative_error(back, expected.T) < FP32
    # rounding of a sum is relative to the sum of magnitudes
    assert all(float((x - expected.sum(i)).norm()) < FP32 * float(expected.abs().sum(i).norm()) for i, x in enumerate(sums))
