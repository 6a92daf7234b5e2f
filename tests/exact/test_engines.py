"""The two exact engines: memory, sides, rules and shared modules do not change the matrix; what they cannot cover they say."""

import dataclasses
from functools import partial

import engines
import pytest
import torch
from engines import counted, forces

from tokdyn.exact import sweep, tangents
from tokdyn.exact.modules import local
from tokdyn.exact.modules.norms import Norm
from tokdyn.exact.naive import fill as naive_fill
from tokdyn.exact.sweep import budget, plan, segments, strips
from tokdyn.model.calls import Call
from tokdyn.model.trace import Tracer, trace
from tokdyn.model.usage import parameter_uses
from tokdyn.objectives import GRPO, PPO, SFT, SimKO
from tokdyn.testing import FAMILIES, float64, random_chis, relative_error, tiny, tiny_lora

U, O = random_chis([(3, 5), (2, 6)], seed=1), random_chis([(3, 4), (1, 3), (5, 2)], seed=2)  # noqa: E741
FP32, FP64 = 1e-5, 1e-9  # two gradients of these models, each off by 5e-6: tests/test_forces.py
ENGINES = ["sweep", "tangents"]
CROSS = ["lookup on readout", "readout on lookup"]
matrices = partial(engines.matrices, update=U, observe=O)


def with_budget(monkeypatch, given):
    """Have sweeps made with this budget."""
    made = budget.Size.tiling
    monkeypatch.setattr(budget.Size, "tiling", lambda *args: made(*args)._replace(budget=given))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("memory", [1, 1 << 16, 1 << 30])
def test_memory_sets_chunks_and_tiles_and_nothing_else(engine, memory):
    few = dict(update=random_chis([(3, 3)], seed=1), observe=random_chis([(2, 2)], seed=2))
    some = few if memory < 1 << 30 else {}  # so little memory is a tile for each pair of tokens
    with counted() as counts:
        naive, fast, _ = matrices(tiny("qwen2"), engine=engine, memory=memory, **some)
    assert relative_error(fast, naive) < FP32
    if engine == "sweep":
        assert counts["tile"] == fast.numel() if memory == 1 else (counts["tile"] == 1) == (memory == 1 << 30)


@pytest.mark.parametrize("launch", [0.0, 1e9])
def test_strips_of_different_lengths_meet(launch, monkeypatch):
    """Sequences cut behind their tokens, apart or in one batch: a short strip meets tangents made for the whole."""
    monkeypatch.setattr(budget, "LAUNCH", launch)
    monkeypatch.setattr(strips, "SHORTEST", 3)
    monkeypatch.setattr(budget, "GROUP", 5)
    monkeypatch.setattr(budget, "CHUNK", 2)
    long = random_chis([(2, 21), (4, 9)], seed=3), random_chis([(3, 19)], seed=4)
    with counted() as counts:
        naive, fast, _ = matrices(tiny("gemma2"), update=long[0], observe=long[1], engine="sweep")
    assert relative_error(fast, naive) < FP32
    slots = (21, 9, 19) if launch == 0 else (21, 19)
    assert counts["tile"] == 1 and counts["strip"] == sum(len(strips.in_strips(n)) for n in slots) > len(slots)


@pytest.mark.parametrize("tied", [True, False])
def test_parts_of_a_tile_add_up(tied, monkeypatch):
    """What does not fit is done in parts, and the streamed side is pulled through the segment once for each."""
    with_budget(monkeypatch, strips.Budget(2, 3, strip=1, kept=1, graphs=1))
    monkeypatch.setattr(strips, "SHORTEST", 2)
    with counted() as counts:
        naive, fast, _ = matrices(tiny("qwen2", tied=tied), engine="sweep")
    assert relative_error(fast, naive) < FP32
    assert counts["part"] > counts["mixed"] > 0
    assert all(bool(counts[cross]) == tied for cross in CROSS)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0)])
def test_sequences_may_stand_in_any_order(engine, order):
    """One of a single token, which leaves attention nothing to mix, among them."""
    observe = [*random_chis([(3, 4)], seed=2), *random_chis([(1, 1)], seed=3), *random_chis([(2, 5)], seed=4)]
    naive, fast, _ = matrices(tiny("qwen2"), update=U[:1], observe=[observe[i] for i in order], engine=engine)
    assert relative_error(fast, naive) < FP32


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("advantages", [(1.0, -1.0, 0.0), (0.0, 1.0, -1.0)])
def test_tokens_without_a_force_say_nothing_of_the_others(engine, advantages):
    """A rollout of advantage 0 among others: its cotangents are zero, which looks as if nothing were mixed."""
    rollouts = [chi.with_(group=0, advantage=a) for chi, a in zip(random_chis([(2, 5)] * 3, seed=5), advantages, strict=True)]
    naive, fast, _ = matrices(tiny("qwen2"), update=rollouts, observe=U[:1], objective=GRPO(), engine=engine)
    assert relative_error(fast, naive) < FP32
    assert not fast[:, 5 * advantages.index(0.0) :][:, :5].any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("objective", [SFT(label_smoothing=0.1), PPO(entropy=0.3), SimKO()], ids=lambda of: type(of).__name__)
def test_both_engines_take_every_form_of_force(engine, objective):
    """The uniform part of smoothing, a dense v of the entropy, several targets a token; update tokens in the majority."""
    some = zip(random_chis([(2, 5), (3, 4), (1, 6)], seed=5), (1.0, -1.0, 0.5), strict=True)
    update = [chi.with_(group=0, advantage=advantage) for chi, advantage in some]
    for observe in (U[:1], [*O, *U]):
        with counted() as counts:
            naive, fast, _ = matrices(tiny("qwen2"), update=update, observe=observe, objective=objective, engine=engine)
        assert relative_error(fast, naive) < FP32
        assert all(counts[cross] for cross in CROSS)


class Experts(torch.nn.Module):
    """A list of layers, each called for the tokens of its kind alone, by token or every other one first."""

    def __init__(self, width, by_token):
        super().__init__()
        self.each = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(3))
        self.by_token = by_token

    def forward(self, x):
        flat = x.flatten(0, -2)
        kind, out = (7 * flat[:, :3]).argmax(1), torch.zeros_like(flat)
        for i, expert in enumerate(self.each):
            rows = (kind == i).nonzero().squeeze(1)
            rows = rows if self.by_token else torch.cat([rows[::2], rows[1::2]])
            if len(rows):
                out = out.index_add(0, rows, expert(flat[rows]))
        return out.view_as(x)


@torch.no_grad()
def experts_of(model, chi):
    """Which of a model's Experts run on what a sequence's tokens are read from, all but its last."""
    run, each = set(), model.model.layers[1].mlp.each
    hooks = [expert.register_forward_hook(lambda *_, i=i: run.add(i)) for i, expert in enumerate(each)]
    model(chi.ids[None, :-1])
    for hook in hooks:
        hook.remove()
    return run


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("shortest", [4, 64])
def test_modules_that_only_some_tokens_call(by_token, shortest, monkeypatch):
    """Experts one by one: a sequence may leave one out, and return a module's rows in an order that its length changes."""
    monkeypatch.setattr(strips, "SHORTEST", shortest)
    model = tiny("llama", tied=False)
    torch.manual_seed(0)
    model.model.layers[1].mlp = Experts(model.config.hidden_size, by_token)
    update, observe = random_chis([(1, 1), (2, 3)], seed=6), random_chis([(3, 12), (1, 2)], seed=7)
    slow = "returns something else for the beginning of a sequence" if (by_token, shortest) == (False, 4) else None
    naive, fast, _ = matrices(model, update=update, observe=observe, engine="sweep", slow=slow)
    assert relative_error(fast, naive) < FP32


@pytest.mark.parametrize("scope", ["full", r"mlp\.each\.2"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("graphs", [1, 1 << 30])
def test_modules_that_only_some_sequences_call(scope, seed, graphs, monkeypatch):
    """Which experts run differs between sequences of one length, a short one and its padding, and may be none that moves.

    A graph of a few segments is foreseen from another sequence of that length, a graph of all is not; cuts are sought in all.
    """
    with_budget(monkeypatch, strips.Budget(4, 8, strip=64, kept=1 << 30, graphs=graphs))
    model = tiny("llama", tied=False)
    torch.manual_seed(0)
    model.model.layers[1].mlp = Experts(model.config.hidden_size, True)
    update, observe = random_chis([(1, 1), (1, 1)], seed=seed), random_chis([(1, 2), (3, 12), (1, 2)], seed=10 + seed)
    run = [(len(chi.ids), experts_of(model, chi)) for chi in (*update, *observe)]
    if scope == "full":
        covered = graphs > 1 or all(mine == theirs for n, mine in run for m, theirs in run if n == m)
    else:
        covered = all(2 in experts for _, experts in run)
    slow = None if covered else segments.DIFFERENT_MODULES
    naive, fast, _ = matrices(model, scope, update=update, observe=observe, engine="sweep", slow=slow)
    assert float((fast - naive).norm()) <= FP32 * float(naive.norm())


def random_P(tracer):
    generator = torch.Generator().manual_seed(5)
    return {name: torch.rand(tracer.params[name].shape, generator=generator) + 0.1 for name in tracer.trainable}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "qwen2_moe", "opt"])
def test_a_preconditioner_scales_every_direction(family, engine):
    """F = J_o P J_uᵀ with any positive diagonal P; the tied embedding keeps both cross terms."""

    naive, fast, _ = matrices(tiny(family), P=random_P, engine=engine)
    assert relative_error(fast, naive) < FP32


@pytest.mark.parametrize("transposed", [False, True])
def test_a_square_weight_of_an_unknown_layer_is_read_the_right_way_round(transposed):
    """Its shape does not tell W a from Wᵀ a, nor does F without P: a preconditioner scales W[q, p] by P[q, p]."""

    class Square(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = torch.nn.Parameter(weight.clone())

        def forward(self, x):
            return x @ self.weight if transposed else torch.nn.functional.linear(x, self.weight)

    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj = Square(layer.self_attn.o_proj.weight.detach())
    naive, fast, by = matrices(model, P=random_P, engine="sweep")
    assert by["model.layers.0.self_attn.o_proj.weight"] == "outer product"
    assert relative_error(fast, naive) < FP32


@pytest.mark.parametrize("scope", ["full", "backbone", "readout", r"layers\.0\.mlp"])
def test_sides_may_be_exchanged(scope):
    """The side that is looped over is chosen by cost: more updated than observed tokens is the transposed problem."""
    model = tiny("gemma2")
    there, back = forces(model, U, O, scope=scope).matrix, forces(model, O, U, scope=scope).matrix
    assert relative_error(back.T, there) < FP32


@pytest.mark.parametrize("scope", [r"layers\.0\.", r"layers\.1\.mlp", r"model\.norm\."])
def test_segments_in_which_nothing_moves_say_nothing_of_a_side_with_itself(scope):
    """What was kept of a side serves the other too where both are the same texts, also where there is nothing to keep."""
    model = tiny("qwen2")
    assert (
        relative_error(forces(model, U, U, scope=scope).matrix, forces(model, U, U, scope=scope, method="naive").matrix) < FP32
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_local_rule_agrees_with_the_special_ones(family, engine, monkeypatch):
    naive, _, by = matrices(tiny(family, tied=False), engine=engine)
    assert {"outer product", "lookup", "elementwise gain"} <= set(by.values())
    monkeypatch.setattr(plan, "kind_of", lambda calls, moves: local.Local)
    _, by_module, by = matrices(tiny(family, tied=False), engine=engine)
    assert "module-local" in by.values() and "outer product" not in by.values()
    assert relative_error(by_module, naive) < FP32


@pytest.mark.parametrize("engine", ENGINES)
def test_written_directions_agree_with_inner_products(engine):
    """Two sequences of more than six widths: the direction is written down instead of S (tokdyn/exact/modules/linear.py)."""
    chis = random_chis([(212, 6)], seed=3)
    model = tiny("llama", intermediate_size=16, max_position_embeddings=256)
    with counted() as counts:
        naive, fast, _ = matrices(model, update=chis, observe=chis, engine=engine)
    assert relative_error(fast, naive) < FP32
    assert not counts["inner products"] and bool(counts["direction"]) == (engine == "sweep")  # tangents do it in place
    with counted() as counts:
        matrices(model, engine=engine)
    assert counts["inner products"] and not counts["direction"]


def test_a_module_called_twice_moves_twice():
    model = tiny("llama", tied=False)
    model.model.layers[1] = model.model.layers[0]
    naive = forces(model, U, O, SFT(), method="naive").matrix
    result = forces(model, U, O, SFT())
    assert relative_error(result.matrix, naive) < FP32
    assert "outer product" in result.coverage.values()


def test_a_tensor_in_two_modules_takes_the_slower_exact_way_and_says_so():
    model = tiny("llama", tied=False)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    naive = forces(model, U, O, SFT(), method="naive").matrix
    assert relative_error(forces(model, U, O, SFT(), slow="one tensor in two modules").matrix, naive) < FP32


def test_a_weight_that_no_module_was_seen_to_use_is_not_left_out(monkeypatch):
    """A kernel of somebody's own may take a weight out of sight; its gradient tells."""
    hidden = "model.norm.weight"

    def unseen(*of):
        return {name: by for name, by in parameter_uses(*of).items() if name != hidden}

    monkeypatch.setattr("tokdyn.model.trace.parameter_uses", unseen)
    naive, fast, _ = matrices(tiny("llama", tied=False), slow=f"no module was seen to use {hidden}")
    assert relative_error(fast, naive) < FP32


def test_a_gain_is_recognised_by_what_it_does():
    class Odd(torch.nn.Module):
        """One 1-D weight, but not a gain."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(32))

        def forward(self, x):
            return x + self.weight.sigmoid() * x.roll(1, -1)

    model = tiny("llama", tied=False)
    model.model.norm = Odd()
    naive, fast, by = matrices(model)
    assert by["model.norm.weight"] == "module-local"
    assert by["model.layers.0.input_layernorm.weight"] == "elementwise gain"
    assert relative_error(fast, naive) < FP32


def test_a_residual_stream_is_cut_before_every_block():
    """Cuts are found, not assumed: two a layer where attention and MLP follow each other, one where they are parallel."""
    for family, cuts in (("llama", 4), ("gpt_neox", 2)):  # two layers each
        with trace(tiny(family)) as tracer:
            p = engines.planned(tracer, U, O)
            side, of = p.singles[0], p.cuts
            outline, whole = of.outline(side.batches[0]), of.segments(side.batches[0], 0, len(of))
            inside = outline.segments(of.keys)
            assert len([part for part in inside if any("layers" in outline.names[i] for i in part)]) == cuts
            assert sum(map(len, inside)) == len(outline.names)
            for depth, part in enumerate(whole):  # made by itself, with nothing below it in the graph
                assert part.agrees(of.segments(side.batches[0], depth, depth + 1)[0])


def test_a_place_where_a_segment_cannot_be_made_by_itself_is_no_cut():
    """A stream that is read before it is given to a module: a graph that starts there would lose what was made of it."""
    model = tiny("llama")
    first = model.model.layers[0]

    class Gated(type(first)):
        def forward(self, hidden_states, **options):
            h = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)[0]
            gate = torch.tanh(h)
            return h + gate * self.mlp(self.post_attention_layernorm(h))

    first.__class__ = Gated
    few = dict(update=random_chis([(3, 3)], seed=1), observe=random_chis([(2, 2)], seed=2))
    naive, fast, _ = matrices(model, engine="sweep", memory=1 << 16, **few)  # little enough that each is made by itself
    assert relative_error(fast, naive) < FP32


def test_graphs_are_made_once_where_they_fit_and_again_where_they_do_not(monkeypatch):
    """One graph of each strip in the first case, one for each of its segments in the second."""
    for graphs, used, other in ((1 << 30, "whole graph", "some segments"), (1, "some segments", "whole graph")):
        with_budget(monkeypatch, strips.Budget(4, 8, strip=64, kept=1 << 30, graphs=graphs))
        with counted() as counts:
            naive, fast, _ = matrices(tiny("qwen2"), engine="sweep", update=U[:1], observe=O[:1])
        assert relative_error(fast, naive) < FP32
        assert counts["strip"] == 2 and not counts[other]
        assert counts[used] == (2 if graphs > 1 else 2 * (counts["alone"] + counts["mixed"]))


@pytest.mark.parametrize(
    ("update", "observe", "memory", "expected"),
    [
        ((4, 20), (4, 20), 1 << 30, "sweep"),
        ((4, 2), (4, 30), 1 << 30, "tangents"),  # a forward derivative for each of two tokens, not 30 cotangents
        ((4, 30), (4, 2), 1 << 30, "tangents"),
        ((4, 20), (4, 20), 1 << 12, "tangents"),  # each tile would be pulled back anew
        ((4, 20), [(9, 1)] * 20, 1 << 30, "sweep"),  # tangents would carry each of 20 tokens through 20 sequences
    ],
)
def test_the_cheaper_engine_is_taken(update, observe, memory, expected):
    update, observe = (x if isinstance(x, list) else [x] for x in (update, observe))
    sides = dict(update=random_chis(update, seed=1), observe=random_chis(observe, seed=2))
    with counted() as counts:
        naive, fast, _ = matrices(tiny("llama"), memory=memory, **sides)
    assert counts[expected] == 1 and relative_error(fast, naive) < FP32


@pytest.mark.parametrize(
    ("family", "alone", "mixed", "gated"), [("llama", 3, 3, True), ("gpt_neox", 2, 2, False), ("mixtral", 3, 3, False)]
)
def test_what_the_sweep_spares_is_spared(family, alone, mixed, gated):
    """Above the last attention each cotangent stays at its own position, and a gated MLP is met as one module.

    Those segments are what is above the readout's norm, the norm, and an MLP or a stack of experts behind its attention: not
    one beside it.
    """
    with counted() as counts:
        naive, fast, _ = matrices(tiny(family), update=U[:1], observe=O[:1], engine="sweep")
    assert relative_error(fast, naive) < FP32
    assert (counts["alone"], counts["mixed"]) == (alone, mixed)
    assert bool(counts["joint"]) == gated
    assert counts["norm"] and bool(counts["rotary"]) == (family != "gpt_neox")  # which turns a part of a head


@pytest.mark.parametrize("n", [19, 20, 23])
def test_graphs_that_fit_are_made_once_whatever_the_length(n, monkeypatch):
    """Strips of lengths that do not divide the sequence, in as much memory as one could want."""
    monkeypatch.setattr(strips, "SHORTEST", 6)
    update, observe = (random_chis([(1, n)], seed=seed) for seed in (1, 2))
    with counted() as counts:
        matrices(tiny("qwen2"), update=update, observe=observe, engine="sweep", memory=1 << 30)
    assert counts["whole graph"] == 2 * len(strips.in_strips(n)) == 6 and not counts["some segments"]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_are_recognised_by_their_derivative(centred, offset):
    class Plain(torch.nn.Module):
        """(weight + offset) ⊙ the normalised input + bias."""

        def __init__(self):
            super().__init__()
            self.weight, self.bias = (torch.nn.Parameter(torch.randn(24, generator=generator)) for _ in range(2))

        def forward(self, x):
            x = x - x.mean(-1, keepdim=True) if centred else x
            return (self.weight + offset) * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() + self.bias

    generator = torch.Generator().manual_seed(0)
    module, x = Plain(), torch.randn(1, 7, 24, generator=generator)
    assert Norm.of(Call("", module, (x,), {}, module(x))) == Norm(offset, centred)
    module.forward = lambda x: module.weight * x.tanh()
    assert Norm.of(Call("", module, (x,), {}, module(x))) is None


@pytest.mark.parametrize(
    ("family", "lora"), [*((of, False) for of in FAMILIES), *((of, True) for of in ("gpt2", "gemma2", "mixtral", "mamba"))]
)
@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")
def test_tangents_are_exact_to_rounding_on_every_architecture(family, lora):
    """Forces() takes the sweep where both sides are of a size (tests/exact/test_architectures.py); this is the other way."""
    model = (tiny_lora if lora else tiny)(family, tied=None).double()
    with float64():
        naive, fast, by = matrices(model, engine="tangents")
    assert relative_error(fast, naive) < FP64
    engines.assert_local(by, family, lora)


@pytest.mark.parametrize("engine", ENGINES)
def test_sides_of_several_batches_meet(engine, monkeypatch):
    """Two sequences padded to one length and a third in a batch of its own, on either side."""
    whole = Tracer.batches
    monkeypatch.setattr(Tracer, "batches", lambda tracer, chis, tokens: whole(tracer, chis, tokens=16))
    update, observe = random_chis([(3, 5), (2, 3), (4, 8)], seed=1), random_chis([(5, 9), (3, 4), (1, 3)], seed=2)
    with trace(tiny("gemma2")) as tracer:
        sizes = [[len(batch.ids) for batch in tracer.batches(side, 1)] for side in (update, observe)]
    assert sizes == [[2, 1], [1, 2]]
    naive, fast, _ = matrices(tiny("gemma2"), update=update, observe=observe, engine=engine)
    assert relative_error(fast, naive) < FP32


@pytest.mark.parametrize("fill", [naive_fill, sweep.fill, tangents.fill], ids=["naive", "sweep", "tangents"])
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_every_engine_divides_the_logits_by_the_losss_temperature(family, fill):
    """Σ_l F[m,l] = <∇ log pi(y_m), -∇L> with L = -Σ_l c_l log softmax(z_l / T)_{y_l} by plain autograd, also at the readout."""
    T, model = 0.6, tiny(family).double()
    with float64(), trace(model) as tracer:
        problem = engines.scored(tracer, U, O)
        terms = [dataclasses.replace(term, temperature=T) for term in problem.updated.terms]
        problem = dataclasses.replace(problem, updated=dataclasses.replace(problem.updated, terms=terms))
        F = problem.empty()
        fill(problem, F)
        leaves = {name: p.clone().requires_grad_() for name, p in tracer.params.items() if tracer.owner[name] == name}
        shared = {name: leaves[owner] for name, owner in tracer.owner.items()}
        loss = 0.0
        for batch, term in zip(problem.updated.batches, terms, strict=True):
            log_pi = (tracer.logits(batch, shared) / T).log_softmax(1)
            loss = loss - (term.c * log_pi.gather(1, batch.targets[:, None]).squeeze(1)).sum()
        step = {name: -g for name, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)}
        expected = problem.jvp(problem.observed, step)
    assert relative_error(F.sum(1), expected) < FP64
