"""A forward pass as a graph from modules' outputs: its vjp is the transpose of steering, and a graph may be cut anywhere."""

import pytest
import torch
from torch.func import jvp

from tokdyn.model.hooks import hooked
from tokdyn.model.trace import trace
from tokdyn.model.unroll import Place
from tokdyn.testing import float64, random_chis, tiny

# relative rounding of a sum over paths: a path passes about ten sums of at most 64 numbers in each of two layers
PATH = 2 * 10 * 64 * torch.finfo(torch.float64).eps
BLOCKS = {"llama": "model.layers.1", "gpt2": "transformer.h.1", "gpt_neox": "gpt_neox.layers.1", "gemma2": "model.layers.1"}


def near(a, b):
    return bool((a - b).norm() <= PATH * b.norm())


def is_free_of_hooks(model):
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.fixture(params=BLOCKS)
def case(request):
    """A tracer, a batch of two sequences, the innermost modules with parameters, and the name of the second block."""
    with float64(), trace(tiny(request.param).double()) as tracer:
        batch = tracer.batches(random_chis([(3, 4), (2, 3)], seed=1))[0]
        names = sorted({chain[-1] for chains in tracer.usage([batch])[0].values() for chain in chains})
        yield tracer, batch, names, BLOCKS[request.param]


def cotangents(unrolled, v, *more):
    """The vjp at every output of every call, and at other tensors."""
    ends = [x for call in unrolled.calls for x in call.outputs]
    return torch.autograd.grad(unrolled.hidden, [*ends, *more], v)


def stream(tracer, batch, block):
    """The place where a block is given the residual stream: of what it is given, what depends on the modules before it."""
    given = tracer.unroll(batch, [name for name, _ in tracer.model.named_modules() if "embed" in name or "wte" in name]).given
    return next(place for place, x in given.items() if place.module == block and x.requires_grad)


def test_the_pass_is_the_models_own(case):
    tracer, batch, names, _ = case
    unrolled, (hidden, calls) = tracer.unroll(batch, names), tracer.record(batch, names)
    assert near(unrolled.hidden, hidden) and near(hidden, tracer.hidden(batch))
    assert [call.name for call in unrolled.calls] == [call.name for call in calls]
    for a, b in zip(unrolled.calls, calls, strict=True):
        assert all(near(x, y) for x, y in zip(a.outputs, b.outputs, strict=True))
    free = torch.autograd.grad(unrolled.hidden.sum(), list(tracer.model.parameters()), allow_unused=True)
    assert all(g is None for g in free), "no parameter is part of the graph"


def test_its_vjp_is_the_transpose_of_steering(case):
    """<v, ḣ> = Σ <δ_i, E_i> for ḣ the tangent of the hidden states when every output y_i moves by E_i."""
    tracer, batch, names, _ = case
    g = torch.Generator().manual_seed(0)
    unrolled = tracer.unroll(batch, names)
    outputs = [x for call in unrolled.calls for x in call.outputs]
    E = [torch.randn(x.shape, dtype=x.dtype, generator=g) for x in outputs]
    v = torch.randn(unrolled.hidden.shape, dtype=torch.float64, generator=g)
    zeros = tuple(torch.zeros_like(e) for e in E)
    moved = jvp(lambda *x: tracer.steer(batch, names, x), zeros, tuple(E))[1].detach()
    terms = [a * b for a, b in zip(cotangents(unrolled, v), E, strict=True)]
    total, size = (sum(float(f(x).sum()) for x in terms) for f in (lambda x: x, torch.abs))
    # the left side adds the same paths' contributions in another order: relative to the sizes that are added
    assert abs(float((v * moved).sum()) - total) <= PATH * size


def test_a_graph_from_a_cut_and_one_to_it_give_the_cotangents_of_the_whole(case):
    tracer, batch, names, block = case
    place = stream(tracer, batch, block)
    whole = tracer.unroll(batch, names, places=[place])
    above = tracer.unroll(batch, names, places=[place], start_at=place)
    below = tracer.unroll(batch, names, places=[place], stop_at=place)
    assert [call.name for call in [*below.calls, *above.calls]] == [call.name for call in whole.calls]
    assert below.calls and above.calls
    assert near(below.hidden, whole.given[place]) and below.hidden is below.given[place]
    v = torch.randn(whole.hidden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    *expected, at_place = cotangents(whole, v, whole.given[place])
    *upper, at_cut = cotangents(above, v, above.given[place])
    lower = cotangents(below, at_cut)
    assert near(at_cut, at_place)
    assert all(near(a, b) for a, b in zip([*lower, *upper], expected, strict=True))


def test_everything_given_is_kept_where_no_places_are_named(case):
    tracer, batch, names, block = case
    place = stream(tracer, batch, block)
    every = tracer.unroll(batch, names).given
    assert {name for name, _ in tracer.model.named_modules()} >= {key.module for key in every} > {block}
    assert near(every[place], tracer.unroll(batch, names, places=[place]).given[place])
    assert all(key.call == 1 for key in every)  # no module of these models is called twice


def test_an_output_is_replaced_by_another_with_its_own_graph(case):
    """The last norm's output with three times its derivative: three times every cotangent below it."""
    tracer, batch, names, _ = case
    last = tracer.unroll(batch, names).calls[-1].name
    told = []

    def tripled(call):
        told.append(call)
        return call.output.detach() + 3 * (call.output - call.output.detach())

    plain = tracer.unroll(batch, names, replace_outputs={last: lambda call: None})
    other = tracer.unroll(batch, names, replace_outputs={last: tripled})
    assert near(other.hidden, plain.hidden) and [call.name for call in told] == [last]
    v = torch.ones_like(plain.hidden)
    for call, a, b in zip(plain.calls, cotangents(other, v), cotangents(plain, v), strict=True):
        assert near(a, b if call.name == last else 3 * b)


def test_an_input_is_replaced_and_the_calls_before_it_may_be_changed(case):
    tracer, batch, names, block = case
    place = stream(tracer, batch, block)
    below = tracer.unroll(batch, names, places=[place], stop_at=place).calls
    told = []

    def scaled(x, calls):
        told.extend(call.name for call in calls)
        calls.clear()
        return 2 * x

    unrolled = tracer.unroll(batch, names, replace_inputs={place: scaled}, places=[place])
    assert told == [call.name for call in below]
    assert not set(told) & {call.name for call in unrolled.calls}
    assert near(unrolled.given[place], 2 * tracer.unroll(batch, names, places=[place]).given[place])
    (found,) = torch.autograd.grad(unrolled.hidden.sum(), unrolled.given[place])  # what the module took is in the graph
    assert found.norm() > 0
    above = tracer.unroll(batch, names, replace_inputs={place: scaled}, places=[place], start_at=place)
    assert len(told) == len(below) and near(above.hidden, tracer.hidden(batch)), "nothing recorded lies before it"


def test_hooks_are_removed_after_a_pass_that_stops_and_after_an_error(case):
    tracer, batch, names, block = case
    place = stream(tracer, batch, block)

    def fails(*args):
        assert not is_free_of_hooks(tracer.model)
        raise ZeroDivisionError

    def passes():
        yield None, lambda: tracer.unroll(batch, names, places=[place], stop_at=place)
        yield ZeroDivisionError, lambda: tracer.unroll(batch, names, replace_outputs={names[0]: fails})
        yield ZeroDivisionError, lambda: tracer.unroll(batch, names, replace_inputs={place: fails}, places=[])
        yield AttributeError, lambda: tracer.unroll(batch, [*names, "no such module"])
        yield AttributeError, lambda: tracer.record(batch, [*names, "no such module"])
        yield RuntimeError, lambda: tracer.steer(batch, names, [torch.zeros(5, 3, 2)] * 100)

    before = tracer.hidden(batch)
    for error, run in passes():
        if error is None:
            run()
        else:
            with pytest.raises(error):
                run()
        assert is_free_of_hooks(tracer.model)
    assert torch.equal(tracer.hidden(batch), before)


def test_a_module_called_twice_has_a_place_for_each_call():
    model = tiny("llama", tied=False).double()
    model.model.layers[1] = model.model.layers[0]
    with float64(), trace(model) as tracer:
        batch = tracer.batches(random_chis([(2, 3)], seed=1))[0]
        twice = [key for key in tracer.unroll(batch, ["model.layers.0.mlp.down_proj"]).given if key.module == "model.layers.0"]
    assert {key.call for key in twice} == {1, 2} and Place("model.layers.0", 2, 0) in twice


def test_hooks_are_removed_where_one_of_them_cannot_be_registered():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for where in ("before", "after"):
        with pytest.raises(AttributeError), hooked(model, **{where: {"0": print, "2": print}}):
            raise AssertionError("the block is not entered")
        assert is_free_of_hooks(model)


def test_every_output_is_a_node_of_its_own_also_of_modules_that_return_what_they_are_given():
    """Otherwise the depth of one would be that of the other, and a cut could not lie between them."""
    model = tiny("llama", tied=False)
    mlp = "model.layers.1.mlp"
    model.model.layers[1].mlp = torch.nn.Sequential(model.model.layers[1].mlp, torch.nn.Identity())
    names = [f"{mlp}.0.down_proj", f"{mlp}.0", f"{mlp}.1", mlp]
    with trace(model) as tracer:
        unrolled = tracer.unroll(tracer.batches(random_chis([(2, 3)], seed=1))[0], names)
    outputs = [call.output for call in unrolled.calls]
    assert [call.name for call in unrolled.calls] == names
    assert outputs[0].is_leaf and len({torch.autograd.graph.get_gradient_edge(x).node for x in outputs}) == 4
    found = torch.autograd.grad(unrolled.hidden.sum(), outputs)
    assert all(torch.equal(x, found[-1]) for x in found) and found[-1].norm() > 0
