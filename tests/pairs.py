"""A pair to train on and sequences to observe."""

from tokdyn.testing import random_chis


def pair(seed=1):
    chosen, rejected = random_chis([(3, 5), (2, 6)], seed=seed)
    return [chosen.with_(role="chosen", group=0), rejected.with_(role="rejected", group=0)]


OBSERVED = random_chis([(3, 4), (1, 3)], seed=2)
