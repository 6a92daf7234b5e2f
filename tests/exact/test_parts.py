"""F by layer, module and kind: every part is the force of these parameters alone, and all parts add up."""

import dataclasses

import engines
import pytest
import torch
from engines import counted

import tokdyn as td
from tokdyn.exact import Asked, Scope, UnscoredProblem, naive, parts
from tokdyn.exact import engines as choice
from tokdyn.exact.parts import Parts
from tokdyn.model.trace import trace
from tokdyn.objectives import DPO, SFT
from tokdyn.testing import float64, random_chis, relative_error, tiny, tiny_lora

U, O = random_chis([(3, 2), (2, 3)], seed=1), random_chis([(3, 3), (1, 2)], seed=2)  # noqa: E741
FP32, FP64 = 1e-5, 1e-9  # tests/exact/test_architectures.py
OVER = {"update": -1, "observe": -2, "both": (-2, -1)}
BIASES = {"bias": "bias$", "rest": "."}

pytestmark = pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")


def divided(tracer, by, **asked):
    scope = Scope.named(tracer, "full", by)
    return UnscoredProblem.about(Asked(U, O, SFT(), **asked), scope)


def oracle(problem):
    """Each part's Gram of gradients [N, M, L] from one gradient per token and use; what a tied embedding mixes, "tied"."""
    uses = {use: use for use in problem.uses}
    parts, F = problem.parts, problem.empty().zero_()
    rows, columns = (
        list(dataclasses.replace(problem, uses=uses).vjp_each(side)) for side in (problem.observed, problem.updated)
    )
    for a, tensor in problem.uses.items():
        for b in (use for use, other in problem.uses.items() if other == tensor):
            part = parts.of[a] if parts.of[a] == parts.of[b] else parts.tied
            P = 1 if problem.P is None else problem.P[tensor]
            left, right = torch.stack([x[a] for x in rows]), torch.stack([x[b] for x in columns])
            F[part] += left.flatten(1) @ (right * P).flatten(1).T
    return F


# what differs for parts: tying and biases, experts, state spaces, adapters
SHAPES = [("gpt2", False), ("qwen2_moe", False), ("mamba", False), ("gpt2", True)]


@pytest.mark.parametrize("n", range(len(SHAPES)))
def test_parts_are_forces_of_their_own_and_add_up(n):
    """By layer or by kind, and a reduction, in turns."""
    family, lora = SHAPES[n]
    by, over = ("layer", "kind")[n % 2], ("update", "observe", "both")[n % 3]
    model = (tiny_lora if lora else tiny)(family, tied=None).double()
    with float64(), trace(model) as tracer:
        unscored = divided(tracer, by)
        problem = unscored.scored()
        with counted() as counts:
            F = problem.empty()
            choice.choose(problem, "tangent")(problem, F)
        assert counts["sweep"] == 1 and not counts["per token"]  # one sweep, however many parts
        expected, whole = oracle(problem), dataclasses.replace(problem, parts=None)
        plain = naive_matrix(whole)
        vector = choice.reduce(unscored, "tangent", over)[0]
    for part, truth in zip(F, expected, strict=True):
        assert float((part - truth).norm()) < FP64 * float(expected.norm())
    assert relative_error(F.sum(0), plain) < FP64
    assert float((vector - expected.sum(OVER[over])).norm()) < FP64 * float(expected.abs().sum())


def naive_matrix(problem):
    F = problem.empty()
    naive.fill(problem, F)
    return F


@pytest.mark.parametrize(
    ("by", "over", "ways"),
    [
        ({"lookup": "embed", "rest": "."}, "update", {"sweep": 1, "tangents": 0}),  # a tie between two parts
        (BIASES, "observe", {"sweep": 2, "tangents": 0}),  # a linear layer holds weight and bias: two sweeps
        ({"both uses": "embed|lm_head"}, "both", {"sweep": 1, "naive": 0}),
    ],
    ids=["tie", "biases", "uses"],
)
def test_every_way_gives_the_same_parts(by, over, ways):
    """Matrix by sweep, tangents and one gradient a token, and a reduction, under Adam's P."""
    model = tiny("qwen2").double()
    with float64(), trace(model) as tracer:
        unscored = divided(tracer, by, optimizer=torch.optim.Adam(model.parameters(), eps=1e-3))
        problem = unscored.scored()
        expected = oracle(problem)
        for way, sweeps in ways.items():
            with pytest.MonkeyPatch.context() as patch, counted() as counts:
                patch.setattr(choice, "_sweeps", lambda *_, way=way: way == "sweep")
                F = problem.empty()
                choice.choose(problem, "naive" if way == "naive" else "tangent")(problem, F)
            assert counts["sweep"] == sweeps and bool(counts["tangents"]) == (way == "tangents")
            assert relative_error(F, expected) < FP64
        vector = choice.reduce(unscored, "tangent", over)[0]
        assert float((vector - expected.sum(OVER[over])).norm()) < FP64 * float(expected.abs().sum())


def test_what_is_transposed_and_tiled_counts_in_the_same_parts():
    """More update tokens than observed ones, in little memory: several tiles, kept in parts."""
    model = tiny("gpt2")
    there = td.forces(model, U, O[1:], by="layer")
    with counted() as counts:
        tiled = td.forces(model, U, O[1:], by="layer", memory=1 << 16)
    back = td.forces(model, O[1:], U, by="layer")
    assert counts["sweep"] == 1 or counts["tangents"]
    for name, part in there.parts.items():
        assert float((tiled.parts[name] - part).norm()) < FP32 * float(there.matrix.norm())
        assert float((back.parts[name].T - part).norm()) < FP32 * float(there.matrix.norm())


@pytest.mark.parametrize(("over", "adam"), [("update", False), ("both", True)])
def test_experts_of_a_stack_are_told_apart(over, adam):
    """A stack is one tensor: an expert's part is the inner product of its own rows of the gradients; every way, and sums."""
    model = tiny("qwen2_moe", tied=False, num_experts=3).double()
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-3) if adam else None
    with float64(), trace(model) as tracer:
        unscored = divided(tracer, "expert", optimizer=optimizer)
        problem = unscored.scored()
        names, stacks = problem.parts.names, problem.parts.experts
        E = len(next(iter(stacks.values())))
        assert len(names) == 2 * E + 1 and "layer 1 · expert 2" in names and "other" in names
        expected = problem.empty().zero_()
        rows, columns = (list(problem.vjp_each(side)) for side in (problem.observed, problem.updated))
        for use, tensor in problem.uses.items():
            P = torch.ones_like(tracer.params[use]) if problem.P is None else problem.P[tensor]
            left, right = torch.stack([x[tensor] for x in rows]), torch.stack([x[tensor] * P for x in columns])
            if use in stacks:
                for e, part in enumerate(stacks[use]):
                    expected[part] += left[:, e].flatten(1) @ right[:, e].flatten(1).T
            else:
                expected[problem.parts.of[use]] += left.flatten(1) @ right.flatten(1).T
        if not adam:
            with counted() as counts:
                F = problem.empty()
                choice.choose(problem, "tangent")(problem, F)
            assert (
                counts["sweep"] == E + 1 and not counts["per token"]
            )  # the rest, and every number of an expert in both layers
            assert relative_error(F, expected) < FP64
        vector = choice.reduce(unscored, "tangent", over)[0]
        assert float((vector - expected.sum(OVER[over])).norm()) < FP64 * float(expected.abs().sum())
    with pytest.raises(ValueError, match="no parameter that moves belongs to an expert"):
        td.forces(tiny("llama"), U, O, by="expert")


def test_slow_ways_divide_as_well():
    """A tensor in two modules: one direction per token for each part; two layers that are one count as the first."""
    model = tiny("llama", tied=False).double()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with float64(), trace(model) as tracer:
        problem = divided(tracer, "layer").scored()
        F = problem.empty()
        coverage = choice.choose(problem, "tangent")(problem, F)
        with_rest = oracle(problem)
    engines.assert_rules({use: rule for use, rule in coverage.items() if "up_proj" in use}, slow="one tensor in two modules")
    assert problem.parts.of["model.layers.1.mlp.up_proj.weight"] == problem.parts.names.index("layer 0")
    assert relative_error(F, with_rest) < FP64


def test_names():
    """Where a parameter counts: kinds by what families call their modules, adapters where they are put, both uses apart."""
    kinds = {"attention q", "attention k", "attention v", "attention o", "MLP gate", "MLP up", "MLP down", "norms"}
    expected = {
        "llama": kinds | {"embedding", "readout"},
        "gpt2": {"embedding", "attention qkv", "attention o", "MLP up", "MLP down", "norms", "readout", "tied"},
        "qwen2_moe": {*(kind for kind in kinds if not kind.startswith("MLP")), "embedding", "router", "experts", "readout"},
        "mamba": {"embedding", "norms", "other", "readout", "tied"},
    }
    for family, names in expected.items():
        with trace(tiny(family, tied=None)) as tracer:
            assert set(Scope.named(tracer, "full", "kind").parts.names) == names
    with trace(tiny("gpt_neox", tied=None)) as tracer:
        layers = Scope.named(tracer, "full", "layer").parts
        assert layers.names == ("embedding", "layer 0", "layer 1", "norms", "readout")
    with trace(tiny_lora("llama")) as tracer:
        scope = Scope.named(tracer, "full", "module")
        assert "base_model.model.model.layers.1.mlp.down_proj" in scope.parts.names and len(scope.parts.names) == 14
        assert Scope.named(tracer, "full", "layer").parts.names == ("layer 0", "layer 1")
        assert {use for use, part in scope.parts.of.items() if scope.parts.names[part].endswith("0.self_attn.q_proj")} == {
            f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.default.weight" for x in "AB"
        }
    one = Parts.named(tracer, {"a": "a"}, {"it": "a"})
    assert one.names == ("it",) and one.tied is None


def test_a_gate_is_a_router_where_experts_stand_beside_it():
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    mlp.gate = torch.nn.Linear(2, 2)
    with trace(model) as tracer:
        kind = parts._Kinds(tracer)
        assert kind("model.layers.0.mlp.gate.weight").startswith("MLP")
        mlp.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
        assert kind("model.layers.0.mlp.gate.weight") == "router"
        assert kind("model.layers.0.mlp.up_proj.weight") == "MLP up"  # beside experts, and no router
        assert kind("model.layers.0.mlp.experts.0.weight") == "experts"


def test_parts_of_pairs_groups_and_folders(tmp_path):
    pair = [
        chi.with_(group=0, role=role)
        for chi, role in zip(random_chis([(3, 4)] * 2, seed=3), ("chosen", "rejected"), strict=True)
    ]
    model = tiny("qwen2")
    found = td.forces(model, pair, O, DPO(), by="kind", groups="response")
    assert all(part.shape == found.matrix.shape == (5, 2) for part in found.parts.values())
    tokens = td.forces(model, pair, O, DPO(), by="kind")
    for name, part in tokens.parts.items():
        by_hand = torch.stack([part[:, :4].sum(1), part[:, 4:].sum(1)], 1)
        assert float((found.parts[name] - by_hand).norm()) < FP32 * float(tokens.matrix.norm())
    on_disk = td.forces(model, pair, O, DPO(), by="kind", out=tmp_path / "F", memory=1 << 20)
    on_disk.save(tmp_path / "copy")
    for folder in (on_disk, td.load(tmp_path / "F"), td.load(tmp_path / "copy")):
        assert list(folder.parts) == list(tokens.parts)
        for name, part in tokens.parts.items():  # its rounding is that of the whole: a tie is a difference of larger parts
            assert float((folder.parts[name].tensor() - part).norm()) < FP32 * float(tokens.matrix.norm()), name
    assert relative_error(on_disk.shards.tensor(), tokens.matrix) < FP32
    again = td.forces(model, pair, O, DPO(), by="kind", out=tmp_path / "F", resume=True)  # there is nothing left to do
    assert all(torch.equal(again.parts[name].tensor(), part.tensor()) for name, part in on_disk.parts.items())
    with pytest.raises(ValueError, match="was begun with"):
        td.forces(model, pair, O, DPO(), by="layer", out=tmp_path / "F", resume=True)
    tokens.save(tmp_path / "saved")
    again = td.Forces.load(tmp_path / "saved")
    assert list(again.parts) == list(tokens.parts) and all(torch.equal(again.parts[k], v) for k, v in tokens.parts.items())
    with pytest.raises(ValueError, match="11 parts of a matrix .* raise memory="):
        td.forces(model, pair, O, DPO(), by="kind", memory=256)
    for by, words in (
        ("floor", 'by must be "layer"'),
        ({"x": "("}, "regular expression"),
        ({"x": "nothing"}, "finds no parameter"),
    ):
        with pytest.raises(ValueError, match=words):
            td.forces(model, pair, O, DPO(), by=by)


def test_both_is_one_number_from_two_backward_passes(tmp_path):
    """Σ_m w_m Σ_l F, with and without parts, and no tangent pass."""
    model = tiny("gemma2")
    w = torch.linspace(-1, 2, 5)
    F = td.forces(model, U, O).matrix
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokdyn.exact.products.jvp_logits", lambda *_: pytest.fail("a tangent pass"))
        plain = td.forces(model, U, O, reduce="both", weights=w)
        parts = td.forces(model, U, O, reduce="both", weights=w, by="layer")
    scale = FP32 * float((w.abs() @ F.abs()).sum())
    assert abs(float(plain.vector) - float((w @ F).sum())) < scale
    assert abs(float(parts.vector) - float(plain.vector)) < scale
    assert parts.to_dataframe()["part"].tolist() == ["force", *parts.parts]
    parts.save(tmp_path / "both")
    assert td.load(tmp_path / "both").parts == parts.parts and torch.equal(td.load(tmp_path / "both").vector, parts.vector)
    assert "layer 1" in parts._repr_html_() and f"{float(parts.vector):+.4g}" in parts._repr_html_()
