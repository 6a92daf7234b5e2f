"""Which way a force matrix was computed: the comparison with one gradient per token passes whichever it was.

Labels tell where there are labels (`Forces.coverage`); what has none is counted. Only this file knows where in the engine.
"""

import contextlib
import dataclasses
from collections import Counter

import pytest

import tokdyn as td
from tokdyn.exact import Asked, Scope, UnscoredProblem, naive, per_direction, sweep, tangents
from tokdyn.exact import engines as choice
from tokdyn.exact.modules import fused, linear, lookup, norms, rotary
from tokdyn.exact.sweep import plan, segments, strips, tile
from tokdyn.model.trace import trace
from tokdyn.objectives import SFT

FAST = {"outer product", "outer product by expert", "lookup", "elementwise gain", "readout in closed form"}
SLOW = "one direction per token"

# What no closed form covers moves by its own module's vjp and jvp: the state-space scan, and weights that a module around
# theirs reads without calling theirs.
MAMBA = ("A_log", "mixer.D", "conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias")
LOCAL = {"mamba": MAMBA}
# PEFT writes the adapter of an expert stack or router into its weight: the wrapper around it reads both factors
LOCAL_LORA = {"mixtral": ("mlp.gate.lora", "mlp.experts.lora", "mlp.experts.base_layer.lora")}

PLACES = {
    "sweep": [(sweep, "fill")],
    "tangents": [(tangents, "fill")],
    "per token": [(per_direction, "fill")],  # the way of last resort
    "tile": [(tile.Tile, "fill")],
    "strip": [(strips.Strip, "spread")],  # tokens of a sequence that are pulled back together
    "alone": [(tile.Tile, "_add_aligned")],  # segments in which every cotangent stays at its own position
    "mixed": [(tile.Tile, "_add_segment")],  # segments in which it does not
    "part": [(tile, "reserve")],  # of what is kept of a mixed segment
    "whole graph": [(segments.Cuts, "taken")],  # all segments of a strip in one forward pass
    "some segments": [(segments.Cuts, "segments")],  # a graph of a few of them
    "direction": [(linear.Linear, "_weight_into")],  # a linear layer's direction, written down
    "inner products": [(linear.Linear, "_gram")],  # of a linear layer's inputs
    "joint": [(fused.Fused, "of_term"), (fused.Fused, "outer_products")],  # layers fused by an elementwise product
    "norm": [(norms._Pulled, "apply")],  # the derivative of a norm, and of a rotary embedding, in closed form
    "rotary": [(rotary._Turned, "apply")],
    "lookup on readout": [(tile, "tied_force"), (tangents, "tied_force")],  # the two cross terms of a tied embedding
    "readout on lookup": [(lookup.Lookup, "steps_of_readout")],
}
WAYS = {"sweep", "tangents", "per token"}


@contextlib.contextmanager
def counted():
    """How often the engine came to each of the PLACES inside the block, by name."""
    counts = Counter()

    def counting(what, run):
        return lambda *args, **options: counts.update([what]) or run(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        for what, places in PLACES.items():
            for owner, name in places:
                patch.setattr(owner, name, counting(what, getattr(owner, name)))
        yield counts


def assert_rules(coverage, slow=None):
    """No parameter took the slow way; with a reason in `slow`, all that moved did, and for that reason."""
    moved = {rule for rule in coverage.values() if rule != "frozen" and not rule.startswith("outside scope")}
    if slow is None:
        assert not [rule for rule in moved if rule.startswith(SLOW)], moved
    else:
        assert moved and all(rule.startswith(SLOW) and slow in rule for rule in moved), moved


def assert_local(coverage, family, lora=False):
    """The parameters that move by a module's own vjp and jvp are those of the tables above, all others have a closed form."""
    parts = (LOCAL_LORA if lora else LOCAL).get(family, ())
    moved = {name: rule.partition(", one sequence at a time")[0] for name, rule in coverage.items() if rule != "frozen"}
    expected = {name for name in moved if any(part in name for part in parts)}
    assert {name for name, rule in moved.items() if rule == "module-local"} == expected
    assert {moved[name] for name in moved.keys() - expected} <= FAST


def forces(model, update, observe, objective=SFT(), *, slow=None, **options):  # noqa: B008
    """td.forces, and that it went by the rules, or the slow way for the reason given."""
    found = td.forces(model, update, observe, objective, **options)
    assert_rules(found.coverage, slow)
    if options.get("method", "tangent") == "tangent" and not options.get("reduce"):
        assert "autograd" not in found.coverage.values()
    return found


def scored(tracer, update, observe, objective=None, scope="full", **asked):
    """The scored problem of a traced model."""
    return UnscoredProblem.about(Asked(update, observe, objective or SFT(), **asked), Scope.named(tracer, scope)).scored()


def planned(tracer, update, observe, objective=None, scope="full"):
    """The same with its moving modules sorted."""
    return plan.planned(scored(tracer, update, observe, objective, scope))


def matrices(model, scope="full", *, update, observe, P=None, objective=None, slow=None, engine=None, **options):
    """The matrix by one gradient per token, the engine's and its rules, having run the engine that was asked for.

    With a reason in `slow` it was one direction per token instead, for that reason.
    """
    with trace(model) as tracer, counted() as counts, pytest.MonkeyPatch.context() as patch:
        problem = scored(tracer, update, observe, objective, scope)
        problem = dataclasses.replace(problem, P=P(tracer)) if P else problem
        slowly, fast = problem.empty(), problem.empty()
        naive.fill(problem, slowly)
        if engine is not None:
            patch.setattr(choice, "_cheaper", lambda p, memory: {"sweep": sweep, "tangents": tangents}[engine].fill)
        by = choice.structured(problem, fast, **options)
    assert set(by) == set(problem.uses)  # every parameter took part
    assert_rules(by, slow)
    ran = WAYS & set(counts)
    if slow is not None:
        assert "per token" in ran
    else:
        assert ran == {engine} if engine else len(ran) == 1
    return slowly, fast, by
