"""One forward pass as an autograd graph that starts at the outputs of chosen modules.

    cotangent at the readout's input  --vjp-->  cotangents at those modules' outputs

Parameters are no part of the graph: it holds activations alone. It can also be kept between two places, tensors that are given
to modules: from `start_at` (where the graph begins) to `stop_at` (where the forward pass ends).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from .calls import Call, floats, map_floats, shaped_like
from .hooks import hooked


class Place(NamedTuple):
    """A tensor that is given to a module in a forward pass: where a graph can be cut."""

    module: str
    call: int  # 1 at the module's first call
    tensor: int  # which one of the floating-point tensors it is given, by position and then by keyword


ReplaceOutput = Callable[[Call], Tensor | None]
ReplaceInput = Callable[[Tensor, list[Call]], Tensor]


class Unrolled(NamedTuple):
    """A recorded forward pass.

    Attributes:
        hidden: [N, d] what the pass returned, or the tensor at `stop_at`; the vjp starts here.
        calls: the calls of the named modules in the order they were made, with outputs in the graph.
        given: the tensors at the places, in the order they were given; the graph can be cut at each of them.
    """

    hidden: Tensor
    calls: list[Call]
    given: dict[Place, Tensor]


class _StopForward(Exception):
    """Leaves the forward pass at `stop_at`."""


@dataclass
class GraphRecorder:
    """Records one forward pass; a recorder for each.

    Args:
        names: modules whose outputs are where the graph starts, each an alias of its own if it depends on another's.
        replace_outputs: module -> a function that is told its call and returns the same output with another graph, or None
            to keep the module's.
        replace_inputs: place -> a function that is told the tensor there, which depends on a recorded output, and the calls
            recorded so far, a list that it may change; it returns the tensor that the module is given instead.
        places: where to keep what modules are given; None keeps everything that any module is given.
        start_at: one of the places. The graph starts at the tensor there; no call before it is recorded.
        stop_at: one of the places. The forward pass ends at the tensor there and returns it.
        copied: modules whose outputs the model writes to in place: it is given a copy, and what is recorded stays as it was.
        shape: of the batch, so many sequences of so many positions.
    """

    names: Collection[str]
    replace_outputs: Mapping[str, ReplaceOutput] = field(default_factory=dict)
    replace_inputs: Mapping[Place, ReplaceInput] = field(default_factory=dict)
    places: Collection[Place] | None = None
    start_at: Place | None = None
    stop_at: Place | None = None
    copied: Collection[str] = ()
    shape: tuple[int, ...] = (1, 0)
    calls: list[Call] = field(default_factory=list, init=False)
    given: dict[Place, Tensor] = field(default_factory=dict, init=False)
    times: Counter[str] = field(default_factory=Counter, init=False)  # how often each module has been called

    def record(self, model: nn.Module, forward: Callable[[], Tensor]) -> Unrolled:
        """Run `forward`, a pass of the model, with the hooks that record it."""
        if self.places is None:
            watched = {name for name, _ in model.named_modules()}
        else:
            watched = {place.module for place in [*self.places, *self.replace_inputs]}
        before = {name: partial(self._before, name) for name in watched}
        after = {name: partial(self._after, name) for name in self.names}
        with hooked(model, before=before, after=after):
            try:
                hidden = forward()
            except _StopForward:  # torch has no other way out of the middle of a forward pass
                assert self.stop_at is not None
                hidden = self.given[self.stop_at]
        return Unrolled(hidden, self.calls, self.given)

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Forward pre-hook: keep what the module is given, replace it, start or stop."""
        self.times[name] += 1
        replaced: dict[int, Tensor] = {}
        for i, x in enumerate(floats((args, kwargs))):
            place = Place(name, self.times[name], i)
            if place in self.replace_inputs and x.requires_grad:
                old, x = x, self.replace_inputs[place](x, self.calls)
                replaced[id(old)] = x
            if self.places is None or place in self.places:
                self.given[place] = x
            if place == self.start_at:
                x.requires_grad_()
            if place == self.stop_at:
                raise _StopForward
        return map_floats(lambda x: replaced.get(id(x), x), (args, kwargs)) if replaced else None

    def _after(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook: record the call and return its output as a tensor of the graph."""
        if self.start_at is not None and self.start_at not in self.given:
            return None
        call = Call(name, module, args, kwargs, output, *self.shape).for_each()
        other = self.replace_outputs[name](call) if name in self.replace_outputs else None
        output = call.output if other is None else other
        call = call.returned(output)
        call = replace(call, output=map_floats(_in_graph, call.output))
        self.calls.append(call)
        return shaped_like(map_floats(Tensor.clone, call.output) if name in self.copied else call.output, output)


def _in_graph(x: Tensor) -> Tensor:
    """A leaf where the graph starts; else an alias, so that no module's output lies on the path to another's."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
