"""The force matrix by structured tangents: one side pulled back, the other moved along, forward.

    F[m,l] = F_readout[m,l] + <u_m, ḣ_{m,l}>,    u_m = ∂log pi(y_m)/∂h_m

For a chunk of tokens of the looped side, one batched backward pass gives the cotangents δ at every module's output; a rule per
module (rules.py) turns them into what that module's parameters do to its output on the other side; one batched tangent pass
carries all of them to ḣ. Cost per looped token about 4·P·T flops, memory chunk · T · Σ module widths; the other side is never
pulled back token by token, which pays where it has many more tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp, vmap

from ..model.calls import Call
from ..model.trace import Tracer
from .modules.rules import Embedding, Outputs, Rule
from .sweep.plan import Plan, Watched
from .sweep.tile import tied

Deltas = dict[str, tuple[list[Call], Outputs]]


def columns(
    tracer: Tracer, p: Plan, others: list[tuple[Watched, dict[str, Rule]]], source: Watched, chunk: int
) -> Iterator[tuple[slice, list[Float[Tensor, "M b"]]]]:
    """The backbone's part of F for one sequence of the looped side, by chunks: which tokens, and a block for each other."""
    for n in range(0, len(source.h), chunk):
        rows = slice(n, min(n + chunk, len(source.h)))
        deltas = _cotangents(tracer, p, source, rows)
        yield rows, [_move(tracer, p, w, rules, source, rows, deltas) for w, rules in others]


def token_bytes(w: Watched, rules: dict[str, Rule], source: Watched) -> int:
    """Bytes that one looped token takes: its cotangents, its tangents, what is written of directions."""
    tangents = sum(x.numel() for call in w.calls for x in call.outputs)
    width = tangents / w.batch.ids.numel()
    written = max((rule.written for rule in rules.values()), default=0)
    return int(w.u.element_size() * (width * source.batch.ids.numel() + 3 * tangents + 2 * written))


def _cotangents(tracer: Tracer, p: Plan, source: Watched, rows: slice) -> Deltas:
    """The calls of every moving module for a chunk of tokens, and δ [b, ...] at each of their outputs.

    The sequence is cut behind the chunk's last token: nothing later takes part.
    """
    h, calls, _ = p.unroll(tracer, source.batch.upto(rows))
    b, d = h.shape
    cotangent = torch.zeros(b, b, d, dtype=h.dtype, device=h.device)
    index = torch.arange(b, device=h.device)
    cotangent[index, index] = source.u[rows].to(h.dtype)
    outputs = [x for call in calls for x in call.outputs]

    def back(v: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(h, outputs, v, retain_graph=True, allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, outputs, strict=True))

    deltas, found = iter(vmap(back)(cotangent)), Deltas()
    for call in calls:
        mine, delta = found.setdefault(call.name, ([], []))
        mine.append(call.detached())
        delta.append([next(deltas) for _ in call.outputs])
    return found


@torch.no_grad()
def _move(
    tracer: Tracer, p: Plan, w: Watched, rules: dict[str, Rule], source: Watched, rows: slice, deltas: Deltas
) -> Float[Tensor, "M b"]:
    """What the backbone's part of a chunk of update tokens does to one batch of observed ones."""
    b = rows.stop - rows.start
    waiting = {name: iter(rule.tangent(*deltas[name])) for name, rule in rules.items() if name in deltas}
    tangents, F = list[Tensor](), torch.zeros(len(w.h), b, dtype=w.h.dtype, device=w.h.device)
    if p.lookup is not None:  # the cross terms of a tied embedding: the lookup moves the readout, and the readout the lookup
        rule = rules[p.lookup]
        assert isinstance(rule, Embedding)
        ids, d = rule.rows(*deltas[p.lookup])
        F += tied(w.h, w.residual_at(ids), d).T
        moved = iter([rule.looked_up(source.residual_at(ids)[rows], source.h[rows], ids) for ids in rule.o_ids])
    for call in w.calls:
        E = next(waiting[call.name]) if call.name in waiting else [x.new_zeros(b, *x.shape) for x in call.outputs]
        if call.name == p.lookup:
            E = [E[0] + next(moved).reshape_as(E[0])]
        tangents.extend(e.to(x.dtype) for e, x in zip(E, call.outputs, strict=True))
    zeros = tuple(torch.zeros_like(x) for call in w.calls for x in call.outputs)

    def forward(e: tuple[Tensor, ...]) -> Tensor:
        return jvp(lambda *x: tracer.steer(w.batch, p.names, x), zeros, e)[1]

    h_dot = vmap(forward)(tuple(tangents))
    return F + torch.einsum("bmd,md->mb", h_dot.to(w.u.dtype), w.u)
