"""The adjoint check's directions: which tensors move in it."""

import torch

from tokdyn.model import adjoint


def test_the_check_moves_all_tensors_that_are_few_enough_and_at_least_one(monkeypatch):
    """The smallest first, until they have NUMBERS entries together; in their own order."""
    monkeypatch.setattr(adjoint, "NUMBERS", 10)
    params = {name: torch.zeros(n) for name, n in (("a", 4), ("b", 20), ("c", 1), ("d", 5))}
    assert list(adjoint.smallest(params)) == ["a", "c", "d"]
    assert list(adjoint.smallest({"b": params["b"]})) == ["b"]
