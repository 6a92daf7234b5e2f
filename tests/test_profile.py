"""A run holds what forces() and verify() give, survives the disk, and an interrupt."""

import json

import pytest
import torch

import tokdyn as td
from tokdyn.runs.by_sequence import BySequence, block_sums, sequence_names
from tokdyn.runs.contexts import Contexts, alike, context_keys
from tokdyn.runs.findings import signed
from tokdyn.testing import float64, random_chis, relative_error, tiny

# On the way of a gradient lie some 30 sums of up to V = 61 terms (two layers, there and back), each off by √V eps of its terms:
# √(30 V) eps = 5e-6 in either factor of a force. In float64 it is 1e-14; 1e-10 leaves room for sums that cancel.
FP32, FP64 = 1e-5, 1e-10


def pair():
    chosen, rejected = random_chis([(3, 5), (2, 6)], seed=1)
    return [chosen.with_(role="chosen", group=0), rejected.with_(role="rejected", group=0)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return td.profile(
        tiny("llama"), pair(), pair(), out=tmp_path_factory.mktemp("runs") / "one", about={"model": {"name": "tiny"}}
    )


def test_run_is_forces_and_verify():
    """In float64, where nothing but the same numbers is near enough."""
    with float64():
        model = tiny("llama").double()
        run = td.profile(model, pair(), pair())
        naive = td.forces(model, pair(), pair(), td.objectives.DPO(), method="naive").matrix
        check = td.verify(model, pair(), pair(), td.objectives.DPO())
        top = td.forces(model, pair(), pair(), td.objectives.DPO(), reduce="update").vocabulary(2, k=3)
    assert run.matrix.dtype == torch.float64 and relative_error(run.matrix, naive) < FP64
    assert relative_error(run.vector, naive.sum(1)) < FP64
    assert run.about["checks"]["row sums of the matrix against the tangent pass"] < FP64
    observed = [row for row in run.tokens.to_pylist() if row["side"] == "observed"]
    assert [row["actual"] for row in observed] == pytest.approx(check.actual.tolist(), rel=FP64)
    assert run.about["verify"]["order"] == pytest.approx(check.order, rel=FP64)
    assert [f"<{i}>" for i in top.rising.tolist()] == [entry["token"] for entry in observed[2]["risers"][:3]]
    assert [entry["delta"] for entry in observed[2]["fallers"][:3]] == pytest.approx(top.fall.tolist(), rel=FP64)


def test_a_run_in_float32_is_right_to_float32(run):
    naive = td.forces(tiny("llama"), pair(), pair(), td.objectives.DPO(), method="naive").matrix
    assert run.matrix.dtype == torch.float32 and relative_error(run.matrix, naive) < FP32
    # rounding of a sum is relative to the sum of magnitudes
    assert float((run.vector - naive.sum(1)).norm()) < FP32 * float(naive.abs().sum(1).norm())
    cancelled = float(naive.abs().sum(1).norm() / naive.sum(1).norm())
    assert run.about["checks"]["row sums of the matrix against the tangent pass"] < FP32 * cancelled


def test_the_default_step_moves_one_observed_token_by_a_fifth_of_a_nat(run):
    assert run.about["settings"]["eta"] * float(run.vector.abs().max()) == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_squeezing_columns_are_a_step_of_the_readout_weight_also_through_a_softcap(family):
    model = tiny(family)
    run = td.profile(model, pair(), pair(), method="none")
    updated = [row for row in run.tokens.to_pylist() if row["side"] == "updated"]
    chi, eta = pair()[1], run.about["settings"]["eta"]
    out = model(chi.ids[None], output_hidden_states=True)
    h = out.hidden_states[-1][0, :-1][chi.scored[1:]]
    h, cap = h.detach(), getattr(model.config, "final_logit_softcapping", None)

    def logits(W, x):
        return W @ x if cap is None else cap * (W @ x / cap).tanh()

    for i, row in enumerate(updated[len(pair()[0]) :]):
        W = model.lm_head.weight.detach().clone().requires_grad_()
        loss = -row["c"] * logits(W, h[i]).log_softmax(0)[chi.ids[row["position"]]]
        p = logits(W.detach() - eta * torch.autograd.grad(loss, W)[0], h[i]).softmax(0)
        assert row["p_target_after"] == pytest.approx(float(p[row["token_id"]]), rel=1e-4)
        assert row["p_argmax_after"] == pytest.approx(float(p[row["argmax"]]), rel=1e-4)


def test_run_survives_the_disk(run, tmp_path):
    run.save(tmp_path / "r")
    again = td.load(tmp_path / "r")
    assert torch.equal(again.matrix, run.matrix) and torch.equal(again.vector, run.vector)
    assert again.tokens.equals(run.tokens) and again.about == json.loads(json.dumps(run.about))
    assert {p.name for p in (tmp_path / "r").iterdir()} == {
        "run.json",
        "tokens.parquet",
        "forces.safetensors",
        "report.html",
        "manifest-0.json",
    }
    with pytest.raises(FileExistsError, match="overwrite"):
        run.save(tmp_path / "r")
    run.save(tmp_path / "r", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["r"]  # no scaffolding is left
    with pytest.raises(FileNotFoundError, match="holds no run"):
        td.load(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="thesis.txt"):
        run.save(tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "precious"


def test_blocks_and_sums_are_those_of_the_matrix(run):
    table = BySequence.of(run.tokens, run.matrix)
    forces = table.forces()
    assert forces["rejected 1"]["chosen 1"] == pytest.approx(float(run.matrix[5:, :5].sum()), rel=1e-5)
    total = run.about["settings"]["eta"] * sum(forces["chosen 1"].values())
    assert table.changes()["chosen 1"]["predicted"] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("chunk", [2**19, 7])
def test_block_sums_are_one_hot_products_whatever_the_order_and_a_nan_stays_in_its_block(monkeypatch, chunk):
    monkeypatch.setattr("tokdyn.runs.by_sequence.CHUNK", chunk)  # 7 entries: the rows are read one by one
    matrix = torch.randn(23, 17, generator=torch.Generator().manual_seed(0))
    o, u = torch.arange(23) * 5 % 4, torch.arange(17) // 6
    one_hot = torch.nn.functional.one_hot
    truth = one_hot(o).T.double() @ matrix.double() @ one_hot(u).double()
    torch.testing.assert_close(block_sums(matrix, o, u), truth, rtol=0, atol=1e-13)  # 391 terms of size 1 at 1e-16
    matrix[3, 8] = torch.nan
    broken = torch.zeros(4, 3, dtype=torch.bool)
    broken[o[3], u[8]] = True
    assert torch.equal(block_sums(matrix, o, u).isnan(), broken)
    none = torch.zeros(0, dtype=torch.long)
    assert block_sums(torch.zeros(0, 0), none, none).shape == (0, 0)


def test_names_of_sequences_are_told_apart_and_need_neither_role_nor_group():
    assert sequence_names([("chosen", 0), ("rejected", 0), ("chosen", 2)]) == ["chosen 1", "rejected 1", "chosen 3"]
    assert sequence_names([("response", 4)] * 3) == ["response 5", "response 5 #2", "response 5 #3"]
    assert sequence_names([(None, None)] * 2 + [("chosen", None)]) == ["response 1", "response 2", "chosen 3"]


def strongest(run):
    return next(finding for finding in run.about["findings"] if "strongest" in finding["title"])


def brute_force(run, prefixes):
    """The largest net force between different contexts, summed token by token: (m, context's tokens, force)."""
    M, L = run.matrix.shape
    of_update, of_observed = prefixes[:L], prefixes[L:]
    nets = {
        (m, x): sum(float(run.matrix[m, l]) for l in range(L) if of_update[l] == x)  # noqa: E741
        for m in range(M)
        for x in dict.fromkeys(of_update)
        if of_observed[m] != x
    }
    m, x = max(nets, key=lambda key: abs(nets[key]))
    return m, [l for l in range(L) if of_update[l] == x], nets[m, x]  # noqa: E741


def prefixes(*sides):
    return [tuple(chi.ids[:t].tolist()) for side in sides for chi in side for t in chi.scored.nonzero().flatten().tolist()]


def test_the_strongest_finding_leaves_out_what_a_token_does_in_its_own_place(run):
    """By brute force over all pairs of a token and a context; of the same texts, so F is largest on its diagonal."""
    m, members, force = brute_force(run, prefixes(pair(), pair()))
    table = BySequence.of(run.tokens, run.matrix)
    text = strongest(run)["text"]
    assert text.startswith(f"“{table.updated[members[0]]['token']}” {table.place(table.updated[members[0]])} ")
    assert f"{table.place(table.observed[m])}: {signed(run.about['settings']['eta'] * force)} nats" in text


def siblings(place=-1):
    """A pair that shares all tokens but one."""
    chosen = random_chis([(3, 8)], seed=1)[0]
    ids = chosen.ids.clone()
    ids[place] = (ids[place] + 1) % 60
    both = [chosen.with_(role="chosen", group=0), chosen.with_(ids=ids, role="rejected", group=0)]
    return [chi.with_(tokens=tuple(f" {y}" for y in chi.ids.tolist()), prompt="p", response=str(ids)) for chi in both]


@pytest.mark.parametrize("family, place", [("llama", 10), ("gpt2", 8)])
def test_the_headline_of_two_answers_that_share_all_but_one_token_is_that_token(family, place):
    """What either answer does to the text around it the other takes back: F's largest entries, and hardly a net push."""
    from rich.console import Console

    from tokdyn.runs.summary import summary

    both, held_out = siblings(place), random_chis([(3, 4)], seed=2)
    run = td.profile(tiny(family), both, [*both, *held_out])
    a, b = (int(chi.ids[place]) for chi in both)
    finding = strongest(run)
    assert finding["text"].startswith(f"“␣{a}/␣{b}” chosen 1, rejected 1 @{place} ")
    m, l = divmod(int(run.matrix.abs().argmax()), run.matrix.shape[1])  # noqa: E741
    single = float(run.matrix[:, [i for i in range(16) if i % 8 != place - 3]].abs().max())
    assert single > 0.1 * float(run.matrix[m, l].abs())  # and yet single tokens of the shared text push as hard
    console = Console(width=250, record=True)
    console.print(summary(run.about, run.tokens, run.matrix))
    text = console.export_text()
    movers = [line for line in text.splitlines() if "@" in line and "(" in line and not line.startswith("•")]
    assert len(movers) == 5
    held = [line for line in movers if f"“␣{a}”" not in line[:8] and f"“␣{b}”" not in line[:8]]
    assert held and all(f"“␣{a}/␣{b}” chosen 1, rejected 1 @{place} (" in line for line in held)
    console.print(summary(run.about, run.tokens, run.matrix, per="tokens", unit="rate"))
    assert f"“␣{a}/␣{b}”" in text and "nats per unit learning rate" in console.export_text()


@pytest.mark.parametrize(
    "a, b, pairs",
    [
        ("abXcd", "abYcd", [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]),  # one token differs
        ("aXbcYd", "aZbcUd", [(i, i) for i in range(6)]),  # two do, with a text between them
        ("aXXbYc", "aZZbUVc", [(0, 0), (5, 6)]),  # a single token in the middle says nothing, nor does what stands around it
        ("Xab", "YZab", [(1, 2), (2, 3)]),  # as long as each other or not at all
        ("abc", "xyz", []),
        ("aXYZb", "aUVWb", [(0, 0), (4, 4)]),  # of one length by chance
        ("abc", "wxyz", []),
        ("", "ab", []),
    ],
)
def test_answers_are_alike_in_runs_and_in_what_differs_between_them(a, b, pairs):
    assert alike(a, b) == pairs


def test_what_a_pair_says_alike_is_joined():
    """Behind the token that differs too; both groups hold the same texts, one of them with another last token."""
    both = [chi.with_(group=group) for group in (0, 1) for chi in siblings(8)]
    other = [both[3].with_(ids=torch.cat([both[3].ids[:-1], both[3].ids[-1:] - 1]))]
    run = td.profile(tiny("llama"), [*both[:3], *other], both[:2])
    contexts = Contexts.of(BySequence.of(run.tokens, run.matrix), run.about["sequences"])
    joined = contexts.alike_joined
    assert contexts.column.tolist()[:16] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 8, 9]
    assert joined.column.tolist() == 2 * [0, 1, 2, 3, 4, 5, 6, 7] + [0, 1, 2, 3, 4, 5, 6, 7] + [0, 1, 2, 3, 4, 5, 6, 7]
    assert joined.own.tolist() == 2 * [0, 1, 2, 3, 4, 5, 6, 7]
    torch.testing.assert_close(joined.matrix.sum(1), run.matrix.sum(1), rtol=1e-4, atol=1e-4)


def test_what_rounding_leaves_of_a_model_that_is_certain_is_no_headline():
    """Forces of each place on itself, and elsewhere the last digits of sums that cancel."""
    from tokdyn.runs.findings import _strongest

    rows = [dict(side=side, sequence=0, role="chosen", group=0, row=i, position=i, token="a", token_id=1, context=i, c=0.5)
            for side in ("updated", "observed") for i in range(3)]  # fmt: skip
    for elsewhere, told in ((1e-9, False), (1e-3, True)):
        matrix = torch.eye(3) + elsewhere * (1 - torch.eye(3))
        names = {("updated", 0): "chosen 1", ("observed", 0): "chosen 1"}
        contexts = Contexts.of(BySequence(rows[:3], rows[3:], matrix, names), [])
        assert (_strongest({"settings": {"eta": 1.0}}, contexts) is not None) is told


def test_terminal_units_are_one_step_size_apart(run):
    """A force in nats after the step is eta times the force; a change after it per unit learning rate its eta-th part."""
    from rich.console import Console

    from tokdyn.runs.summary import summary

    figures = {}
    for unit in ("step", "rate"):
        console = Console(width=250, record=True)
        console.print(summary(run.about, run.tokens, run.matrix, unit=unit))
        rows = [line for line in console.export_text().splitlines() if line.startswith(("chosen 1 ", "rejected 1 "))]
        figures[unit] = torch.tensor([[float(x) for x in line.split()[3:]] for line in rows[:2]])
    assert figures["step"].shape == (2, 4)
    torch.testing.assert_close(figures["rate"] * run.about["settings"]["eta"], figures["step"], rtol=1e-3, atol=1e-4)
    for wrong in ({"unit": "nats"}, {"per": "words"}):
        with pytest.raises(ValueError, match="must be"):
            summary(run.about, run.tokens, run.matrix, **wrong)


def test_contexts_are_those_of_the_ids_also_where_a_run_was_written_without_them():
    """`context` numbers equal prefixes alike on both sides; from prompts, positions and token ids it comes out the same."""
    both = siblings(5)
    observe = [both[1], *siblings(-2), *random_chis([(3, 4)], seed=2)]
    run = td.profile(tiny("llama"), both, observe, method="none")
    known = prefixes(both, observe)
    for sequences, tokens in (([], run.tokens), (run.about["sequences"], run.tokens.drop_columns(["context"]))):
        found = context_keys(tokens.to_pylist(), sequences)
        for i, a in enumerate(known):
            assert [x == found[i] for x in found] == [b == a for b in known]
    alone = context_keys(run.tokens.drop_columns(["context"]).to_pylist(), [])  # nothing is known of the texts
    assert len(set(alone)) == len(alone)


def test_net_columns_are_sums_over_contexts_and_bands_sums_of_those():
    both = siblings(6)
    run = td.profile(tiny("llama"), both, both)
    contexts = Contexts.of(BySequence.of(run.tokens, run.matrix), run.about["sequences"])
    assert contexts.column.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11]
    one_hot = torch.nn.functional.one_hot(contexts.column).double()
    torch.testing.assert_close(contexts.matrix.double(), run.matrix.double() @ one_hot, rtol=1e-6, atol=1e-6)
    assert contexts.own.tolist() == contexts.column.tolist() and not contexts.others[range(16), contexts.own].any()
    assert {name: len(of) for name, of in contexts.bands.items()} == {"chosen 1, rejected 1": 4, "chosen 1": 4, "rejected 1": 4}
    forces = contexts.forces()["rejected 1"]
    assert forces["rejected 1"] == pytest.approx(float(run.matrix[8:, 12:].sum()), rel=1e-5)
    assert sum(forces.values()) == pytest.approx(float(run.matrix[8:].sum()), rel=1e-4, abs=1e-4)


def test_interrupt_keeps_what_is_done(tmp_path):
    def stop(what, done, total):
        if what == "force matrix" and done >= 5:
            raise KeyboardInterrupt

    run = td.profile(tiny("llama"), pair(), pair(), method="tangent", memory=1, out=tmp_path / "p", stage=stop)
    again = td.load(tmp_path / "p")
    assert again.about["status"] == "partial" and again.about["verify"]["order"] == run.about["verify"]["order"]
    whole = td.forces(tiny("llama"), pair(), pair(), td.objectives.DPO()).matrix
    done = ~again.matrix.isnan()
    assert 0 < int(done.sum()) < done.numel()  # whole tiles
    assert relative_error(again.matrix[done], whole[done]) < 1e-5


def test_error_writes_nothing(tmp_path):
    with pytest.raises(ValueError):
        td.profile(tiny("llama"), pair(), random_chis([(2, 3)], vocabulary=900), out=tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_rollouts_of_one_prompt_keep_their_names_and_markup_in_tokens_is_text():
    from rich.console import Console

    from tokdyn.runs.summary import summary

    chis = [
        chi.with_(group=0, advantage=a, tokens=tuple("[/INST]" for _ in range(chi.ids.numel())))
        for chi, a in zip(random_chis([(3, 4), (3, 4), (3, 4)], seed=4), (1.0, -0.5, -0.5), strict=True)
    ]
    run = td.profile(tiny("llama"), chis, chis, td.objectives.GRPO())
    console = Console(width=250, record=True)
    console.print(summary(run.about, run.tokens, run.matrix))
    text = console.export_text()
    assert "[/INST]" in text
    sums = BySequence.of(run.tokens, run.matrix).changes()
    assert list(sums) == ["response 1", "response 1 #2", "response 1 #3"]
    assert [entry["tokens"] for entry in sums.values()] == [4, 4, 4]
    assert all(name in text for name in sums)
    m, members, _ = brute_force(run, prefixes(chis, chis))
    table = BySequence.of(run.tokens, run.matrix)
    for row in (table.observed[m], table.updated[members[0]]):
        assert table.place(row) in strongest(run)["text"]


@pytest.mark.parametrize("name", ["run.json", "tokens.parquet", "forces.safetensors"])
def test_a_broken_run_is_named(run, tmp_path, name):
    run.save(tmp_path / "r")
    (tmp_path / "r" / name).write_text("[]" if name == "run.json" else "garbage")
    with pytest.raises(ValueError, match=name):
        td.load(tmp_path / "r")


def test_forces_and_profiles_are_told_apart_on_disk(run, tmp_path):
    forces = td.forces(tiny("gpt2"), pair(), pair(), td.objectives.DPO())
    forces.save(tmp_path / "f")
    run.save(tmp_path / "r")
    again = td.Forces.load(tmp_path / "f")
    assert (
        torch.equal(again.matrix, forces.matrix)
        and again.observed.equals(forces.observed)
        and again.updated.equals(forces.updated)
    )
    assert torch.equal(again.predict(0.5), forces.predict(0.5)) and again.coverage == forces.coverage
    with pytest.raises(ValueError, match="needs the model"):
        again.vocabulary(0)
    assert isinstance(td.load(tmp_path / "f"), td.Forces) and isinstance(td.load(tmp_path / "r"), td.Run)
    with pytest.raises(ValueError, match="td.load"):
        td.Forces.load(tmp_path / "r")


def test_what_is_not_finite_is_refused_not_written(tmp_path):
    away = [chi.with_(old_log_probs=torch.full((len(chi),), -1e4), advantage=1.0, group=0) for chi in pair()]
    with pytest.raises(ValueError, match="GRPO gives sequence 0 a weight c that is not finite"):
        td.profile(tiny("llama"), [c.with_(advantage=-1.0) for c in away], pair(), td.objectives.GRPO(), out=tmp_path / "x")
    for eta in (float("inf"), float("nan"), -1.0):
        with pytest.raises(ValueError, match="eta must be positive and finite"):
            td.profile(tiny("llama"), pair(), pair(), eta=eta, out=tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
