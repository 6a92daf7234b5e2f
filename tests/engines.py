"""Which way a force matrix was computed: the comparison with one gradient per token passes whichever it was.

Labels tell where there are labels (`Forces.coverage`); what has none is counted. Only this file knows where in the engine.
"""

import contextlib
from collections import Counter

import pytest
import torch

import tokdyn as td
from tokdyn import exact
from tokdyn.exact import matrix as engine_choice
from tokdyn.exact import norms, rotary, rules, segments, sweep, tangents
from tokdyn.exact.naive import naive_matrix
from tokdyn.objectives import SFT
from tokdyn.sides import prepare
from tokdyn.trace import trace

FAST = {"outer product", "lookup", "elementwise gain", "readout in closed form"}
SLOW = "one direction per token"
UNUSED = "not used in the forward pass"

# What no closed form covers moves by its own module's vjp and jvp: stacks of experts and their routers (tensors of three
# axes; two outputs), the state-space scan, and weights that a module around theirs reads without calling theirs.
EXPERTS = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
MAMBA = ("A_log", "mixer.D", "conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias")
LOCAL = {"mamba": MAMBA, "mixtral": EXPERTS, "qwen2_moe": EXPERTS}
# PEFT writes the adapter of an expert stack or router into its weight: the wrapper around it reads both factors
LOCAL_LORA = {"mixtral": ("mlp.gate.lora", "mlp.experts.lora", "mlp.experts.base_layer.lora")}

PLACES = {
    "sweep": [(engine_choice, "_sweep")],
    "tangents": [(engine_choice, "_tangents")],
    "per token": [(engine_choice, "tangent_matrix")],  # the way of last resort
    "tile": [(sweep, "tile")],
    "strip": [(sweep.Strip, "spread")],  # tokens of a sequence that are pulled back together
    "alone": [(sweep, "_meet_alone")],  # segments in which every cotangent stays at its own position
    "mixed": [(sweep, "_fitting")],  # segments in which it does not
    "part": [(sweep, "_reserve")],  # of what is kept of a mixed segment
    "whole graph": [(segments.Cuts, "whole")],  # all segments of a strip in one forward pass
    "some segments": [(segments.Cuts, "segments")],  # a graph of a few of them
    "direction": [(rules.Linear, "direction")],  # a linear layer's direction, written down
    "inner products": [(rules.Linear, "_gram")],  # of a linear layer's inputs
    "joint": [(rules.Together, "fill"), (rules.Together, "factors")],  # layers fused by an elementwise product met as one
    "norm": [(norms._Pulled, "apply")],  # the derivative of a norm, and of a rotary embedding, in closed form
    "rotary": [(rotary._Turned, "apply")],
    "lookup on readout": [(sweep, "tied"), (tangents, "tied")],  # the two cross terms of a tied embedding
    "readout on lookup": [(rules.Embedding, "looked_up")],
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
    moved = {name: rule for name, rule in coverage.items() if rule != "frozen"}
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


def matrices(model, scope="full", *, update, observe, P=None, objective=None, slow=None, **options):
    """The matrix by one gradient per token, the engine's and its rules, having run the engine that was asked for.

    With a reason in `slow` it was one direction per token instead, for that reason.
    """
    with trace(model) as tracer, counted() as counts:
        sides = prepare(tracer, update, observe, objective or SFT())
        uses = exact.select(tracer, scope)
        P = P(tracer) if P else None
        naive, fast = (torch.full((len(sides.o), len(sides.u)), torch.nan, dtype=tracer.precision) for _ in range(2))
        naive_matrix(tracer, sides.o, sides.u, uses, P, naive)
        by = engine_choice.matrix(tracer, sides.o, sides.u, uses, P, fast, **options)
    assert set(by) == set(uses)  # every parameter took part
    assert_rules(by, slow)
    ran, asked = WAYS & set(counts), options.get("engine")
    if slow is not None:
        assert "per token" in ran
    else:
        assert ran == {asked} if asked else len(ran) == 1
    return naive, fast, by
