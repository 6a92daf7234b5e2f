"""A lookup, times a constant where the family scales it: S = scale² 1[id_s = id_t]; its padding row has no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...model.calls import Call
from ..products import Direction
from .base import Outputs, Rule, as_function, flat_cotangents, is_close, own_parameters
from .linear import random_parameters


class Lookup(Rule):
    """A table of which every position takes a row. Its direction, a whole table, is never the smaller thing."""

    label = "lookup"
    tells_sequences = True

    def __init__(self, calls: Sequence[Call], moves: set[str], P: Direction | None = None) -> None:
        super().__init__(calls, size=0)
        found = [_rows_of(call) for call in calls]
        self.o_ids, self.scale = [ids for ids, _ in found], found[0][1]
        padding: Any = calls[0].module.padding_idx
        self.padding = -1 if padding is None else int(padding)
        self.P, self.height = P, len(calls[0].module.get_parameter("weight"))

    def direction(self, calls: Sequence[Call], delta: Outputs) -> Direction:
        """The step of every row of the table, [b B, V, d]: much larger than `rows`, which it is made of."""
        ids, d = self._steps(calls, delta)
        table = d.new_zeros(*d.shape[:2], self.height, d.shape[3])
        for k, rows in enumerate(ids):
            table[:, k].index_add_(1, rows, d[:, k])
        return {"weight": table.flatten(0, 1)}

    def _steps(self, calls: Sequence[Call], delta: Outputs) -> tuple[Int[Tensor, "B S"], Float[Tensor, "b B S q"]]:
        ids = torch.cat([_rows_of(call)[0].view(call.sequences, -1) for call in calls], 1)
        return ids, flat_cotangents(calls, delta) * (ids.ne(self.padding).to(delta[0][0].dtype) * self.scale)[..., None]

    def rows(self, calls: Sequence[Call], delta: Outputs) -> tuple[Int[Tensor, "B S"], Float[Tensor, "b B S q"]]:
        """The rows that the calls look up and the step there: P ⊙ scale · δ, nothing in the padding row."""
        ids, d = self._steps(calls, delta)
        return ids, d if self.P is None else d * self.P["weight"][ids]

    def tangent(self, calls: Sequence[Call], delta: Outputs) -> Outputs:
        """See Rule."""
        E = [[delta[0][0].new_empty(len(delta[0][0]) * calls[0].sequences, *shape)] for (shape,) in self.shapes]
        self.tangent_into(calls, delta, E)
        return E

    def tangent_into(self, calls: Sequence[Call], delta: Outputs, outs: Outputs) -> None:
        """See Rule."""
        ids, d = self.rows(calls, delta)
        for x, (out,) in zip(self.o_ids, outs, strict=True):
            self._moved(x, ids, d, out.view(*d.shape[:2], len(x), -1))

    def _moved(
        self, x: Int[Tensor, " N"], ids: Int[Tensor, "B S"], d: Float[Tensor, "b B S q"], out: Float[Tensor, "b B N q"]
    ) -> None:
        """E at the ids x, with S as the Gram matrix of a linear layer: no size depends on which ids there are."""
        d = d.to(out.dtype)  # a head may be wider than its body
        for k, own in enumerate(ids):
            same = x[:, None].eq(own).to(d.dtype) * self.scale
            torch.bmm(same.expand(len(d), -1, -1), d[:, k], out=out[:, k])

    def steps_of_readout(self, residual: Float[Tensor, "n S"], ids: Int[Tensor, " S"]) -> Float[Tensor, "n S"]:
        """What a step residual hᵀ of a tied readout does to the lookups at `ids`, without the factor h."""
        return residual * (ids.ne(self.padding).to(residual.dtype) * self.scale)

    def looked_up(self, residual: Float[Tensor, "b S"], h: Float[Tensor, "b d"], ids: Int[Tensor, " S"]) -> Tensor:
        """What a step residual hᵀ of a tied readout does to the lookups at `ids`, [b, S, d]."""
        found = self.steps_of_readout(residual, ids)[..., None] * h[:, None]
        return found if self.P is None else found * self.P["weight"][ids]

    def readout_force(
        self, h: Float[Tensor, "n d"], residual: Float[Tensor, "n S"], ids: Int[Tensor, " S"], delta: Float[Tensor, "k S d"]
    ) -> Float[Tensor, "k n"]:
        """<δ, what steps residual hᵀ of a tied readout do> at the lookups of `ids`, k cotangents δ there and n steps."""
        steps = self.steps_of_readout(residual, ids)
        return tied_force(h, steps, delta if self.P is None else delta * self.P["weight"][ids])


def tied_force(h: Float[Tensor, "n d"], residual: Float[Tensor, "n S"], rows: Float[Tensor, "k S d"]) -> Float[Tensor, "k n"]:
    """The readout's direction of n tokens, residual hᵀ, times the lookup's of k tokens, `rows` at the ids of `residual`."""
    return (torch.matmul(h, rows.to(h.dtype).mT) * residual).sum(2)


def _rows_of(call: Call) -> tuple[Int[Tensor, " S"], float]:
    """The rows that a lookup takes and the constant it multiplies them with: its answers to weights of 1 and of 0, 1, 2."""
    if type(call.module) is nn.Embedding:
        return call.inputs[0].flatten(), 1.0
    weight = own_parameters(call)["weight"]
    column = torch.arange(weight.shape[0], dtype=torch.float64, device=weight.device)[:, None]
    (ones,), (count,) = (as_function(call)({"weight": x}) for x in (torch.ones_like(column), column))
    return (count / ones).round().long().flatten(), float(ones.flatten()[0])


def is_lookup(call: Call) -> bool:
    """Whether output = constant · weight[ids], for a lookup whatever its signature (OPT's positions start at 2)."""
    own = random_parameters(call)
    if not isinstance(call.module, nn.Embedding) or call.module.max_norm is not None or set(own) != {"weight"}:
        return False
    try:
        ids, scale = _rows_of(call)
        (output,) = as_function(call)(own)
    except (RuntimeError, TypeError, ValueError):  # it takes no table of one column, or returns something else than a tensor
        return False
    inside = len(ids) > 0 and int(ids.min()) >= 0 and int(ids.max()) < len(own["weight"])
    if not inside or output.numel() != len(ids) * own["weight"].shape[1]:
        return False
    return is_close(output, (scale * own["weight"][ids]).reshape_as(output))
