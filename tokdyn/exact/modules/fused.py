"""Modules that act on one tensor number by number: in a sweep that tensor stands for all of them.

    w = f(y_1, ..., y_k) elementwise, all that the y_i act on     =>     δ_{y_i} = A_i ⊙ δ_w,   A_i = ∂w/∂y_i
    what the parameters behind all y_i do to w together:                    E = Σ_i A_i ⊙ E_i

A gated MLP's gate and up are such a pair, w what the down projection takes. One cotangent is kept instead of two, and met once.
Which modules they are is seen in a random cotangent, not told by names.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...model.calls import Call, Joined
from ...model.unroll import Place
from ..sweep.segments import Outline, common_cuts, depth_of, depths


class _Elementwise(torch.autograd.Function):
    """w as it is, with its derivative by the tensors it is made of: they and their functions are needed no more."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, slopes: tuple[Tensor, ...], *ys: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*slopes)
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return None, None, *(slope * g for slope in ctx.saved_tensors)


@dataclass(frozen=True)
class Joint:
    """A place where a tensor w is given to a module, and the modules whose outputs y_i it is made of."""

    place: Place
    modules: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of all of them."""
        return " + ".join(self.modules)

    def __call__(self, w: Tensor, calls: list[Call]) -> Tensor:
        """Join the modules' calls in a list of them, and give w with its derivative by their outputs in closed form.

        A graph that begins behind one of them keeps w and the calls as they are.
        """
        mine = [call for call in calls if call.name in self.modules]
        if len(mine) < len(self.modules):
            return w
        ys = [call.output for call in mine]
        slopes = torch.autograd.grad(w, ys, torch.ones_like(w))
        whole = _Elementwise.apply(w.detach(), slopes, *ys)
        joined = Joined(self.name, mine[0].module, (), {}, whole, tuple(zip(mine, slopes, strict=True)))
        calls[:] = [joined if call is mine[0] else call for call in calls if call is mine[0] or call.name not in self.modules]
        return whole


def joints(h: Tensor, calls: Sequence[Call], given: Mapping[Place, Tensor], fit: Collection[str]) -> list[Joint]:
    """The joints of two modules or more in what Tracer.unroll gives; `fit` are the modules that may be part of one."""
    outline = Outline.of(h, calls, given)
    keys = common_cuts([outline])
    ends = [outline.cuts[key][0] for key in keys]
    depth = depths(h, [x for call in calls for x in call.outputs if x.is_leaf])[0]
    places: dict[int, Place] = {}
    for place, x in given.items():
        d = depth_of(depth, x) if x.requires_grad else None
        if d is not None and d not in ends:
            places.setdefault(d, place)
    times, found = Counter(call.name for call in calls), list[Joint]()
    cotangent = torch.randn(h.shape, generator=torch.Generator().manual_seed(0)).to(h)
    for segment, inside in enumerate(outline.segments(keys)):
        free = [i for i in inside if calls[i].name in fit and times[calls[i].name] == 1 and len(calls[i].outputs) == 1]
        for d in sorted(d for d in places if bisect_left(ends, d) == segment):
            w = given[places[d]]
            behind = [i for i in free if outline.shapes[i][0] == w.shape and (outline.depth[i][0] or 0) > d]
            names = _elementwise(h, w, [calls[i] for i in behind], cotangent) if len(behind) > 1 else ()
            if len(names) > 1 and _made_of(w, [calls[i].output for i in behind if calls[i].name in names]):
                found.append(Joint(places[d], names))
                free = [i for i in free if calls[i].name not in names]
    return found


def _elementwise(h: Tensor, w: Tensor, calls: Sequence[Call], cotangent: Tensor) -> tuple[str, ...]:
    """Those of the calls whose cotangent is that of w, number by number."""
    ys = [call.output for call in calls]
    slopes = torch.autograd.grad(w, ys, torch.ones_like(w), retain_graph=True, allow_unused=True)
    whole, *deltas = torch.autograd.grad(h, [w, *ys], cotangent, retain_graph=True, allow_unused=True)
    eps = 100 * torch.finfo(h.dtype).eps
    return tuple(
        call.name
        for call, A, delta in zip(calls, slopes, deltas, strict=True)
        if A is not None and delta is not None and bool((delta - A * whole).norm() <= eps * delta.norm())
    )


def _made_of(w: Tensor, ys: Sequence[Tensor]) -> bool:
    """Whether w depends on these tensors alone: an adapter's output is added to that of a frozen layer, which leads deeper."""
    ends = {torch.autograd.graph.get_gradient_edge(y).node for y in ys}
    waiting, seen = [torch.autograd.graph.get_gradient_edge(w).node], set()
    while waiting:
        node = waiting.pop()
        if node in ends or node in seen:
            continue
        if hasattr(node, "variable"):
            return False
        seen.add(node)
        waiting += [deeper for deeper, _ in node.next_functions if deeper is not None]
    return True
