"""Which linear layers are fused by one elementwise product, seen in a random cotangent.

The rule of such layers is in tokdyn/exact/modules/fused.py.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ...model.calls import Call
from ...model.unroll import Place
from ..graph import depth_of, depths, node_of
from ..modules.fused import Fusion
from .segments import Outline, common_cuts


def fusions(h: Tensor, calls: Sequence[Call], given: Mapping[Place, Tensor], fit: Collection[str]) -> list[Fusion]:
    """The fusions of two modules or more in a graph from Tracer.unroll; `fit` are the modules that may be part of one."""
    outline = Outline.of(h, calls, given)
    keys = common_cuts([outline])
    ends = [outline.cuts[key][0] for key in keys]
    depth = depths(h, [x for call in calls for x in call.outputs if x.is_leaf])[0]
    places: dict[int, Place] = {}
    for place, x in given.items():
        d = depth_of(depth, x) if x.requires_grad else None
        if d is not None and d not in ends:
            places.setdefault(d, place)
    times, found = Counter(call.name for call in calls), list[Fusion]()
    cotangent = torch.randn(h.shape, generator=torch.Generator().manual_seed(0)).to(h)
    for segment, inside in enumerate(outline.segments(keys)):
        free = [i for i in inside if calls[i].name in fit and times[calls[i].name] == 1 and len(calls[i].outputs) == 1]
        for d in sorted(d for d in places if bisect_left(ends, d) == segment):
            w = given[places[d]]
            behind = [i for i in free if outline.shapes[i][0] == w.shape and (outline.depth[i][0] or 0) > d]
            names = _elementwise(h, w, [calls[i] for i in behind], cotangent) if len(behind) > 1 else ()
            if len(names) > 1 and _depends_only_on(w, [calls[i].output for i in behind if calls[i].name in names]):
                found.append(Fusion(places[d], names))
                free = [i for i in free if calls[i].name not in names]
    return found


def _elementwise(h: Tensor, w: Tensor, calls: Sequence[Call], cotangent: Tensor) -> tuple[str, ...]:
    """Those of the calls whose cotangent is w's times a slope, elementwise."""
    ys = [call.output for call in calls]
    slopes = torch.autograd.grad(w, ys, torch.ones_like(w), retain_graph=True, allow_unused=True)
    whole, *deltas = torch.autograd.grad(h, [w, *ys], cotangent, retain_graph=True, allow_unused=True)
    eps = 100 * torch.finfo(h.dtype).eps
    return tuple(
        call.name
        for call, A, delta in zip(calls, slopes, deltas, strict=True)
        if A is not None and delta is not None and bool((delta - A * whole).norm() <= eps * delta.norm())
    )


def _depends_only_on(w: Tensor, ys: Sequence[Tensor]) -> bool:
    """Whether w depends on these tensors alone; false for LoRA on a frozen base: w then also depends on the frozen layer."""
    ends = {node_of(y) for y in ys}
    waiting, seen = [node_of(w)], set()
    while waiting:
        node = waiting.pop()
        if node in ends or node in seen:
            continue
        if hasattr(node, "variable"):
            return False
        seen.add(node)
        waiting += [deeper for deeper, _ in node.next_functions if deeper is not None]
    return True
