"""Groups, shards and budgets: a group's column is the sum of its tokens' columns, wherever it is written."""

import pytest
import torch
from engines import forces

import tokdyn as td
from tokdyn import ops
from tokdyn._arguments import size_in_bytes
from tokdyn.exact import engines, readout
from tokdyn.exact.groups import group_labels
from tokdyn.objectives import DPO, GRPO, KTO, SFT, SimKO
from tokdyn.runs.shards import Shards
from tokdyn.sequences import context_numbers
from tokdyn.testing import random_chis, relative_error, tiny

U, O = random_chis([(3, 5), (2, 6)], seed=1), random_chis([(3, 4), (1, 3), (5, 2)], seed=2)  # noqa: E741
FP32 = 1e-5  # two gradients of these models, each off by 5e-6: tests/test_forces.py


def summed(F, labels):
    G = int(labels.max()) + 1
    return torch.stack([F[:, labels == g].sum(1) for g in range(G)], 1)


@pytest.mark.parametrize("method", ["tangent", "naive"])
@pytest.mark.parametrize("scope", ["full", "readout", "backbone"])
@pytest.mark.parametrize("groups", ["sequence", [0] * 11, [0, 1, 1, -1, 2, 3, 0, 4, 5, -1, 6]])
def test_a_group_is_the_sum_of_its_tokens(method, scope, groups):
    """[0] * 11 takes the way of one direction per group, the many small groups that of the token matrix."""
    model = tiny("qwen2")
    labels = group_labels(groups, U)
    expected = summed(forces(model, U, O, scope=scope, method="naive").matrix, labels)
    found = forces(model, U, O, scope=scope, method=method, groups=groups)
    assert relative_error(found.matrix, expected) < FP32
    if method == "tangent" and scope != "readout":
        assert ("one direction per group" in found.coverage.values()) == (max(labels) == 0)
    assert torch.equal(found.groups, labels)
    assert found.updated["size"].to_pylist() == [int((labels == g).sum()) for g in range(int(labels.max()) + 1)]


@pytest.mark.parametrize("observed", [O, O[:1]])
@pytest.mark.parametrize("cheap, engine", [(0.0, "matrix"), (float("inf"), "groups")])
def test_the_count_decides_how_groups_are_made(monkeypatch, cheap, engine, observed):
    """Where the matrix costs nothing it is added up, where it costs everything each group is a direction: the same columns."""
    model, labels = tiny("qwen2"), group_labels("sequence", U)
    expected = summed(forces(model, U, observed, method="naive").matrix, labels)
    asked = []
    monkeypatch.setattr(engines, "_costs", lambda p, memory, together: asked.append(p) or (cheap, cheap))
    found = forces(model, U, observed, groups="sequence")
    assert relative_error(found.matrix, expected) < FP32
    assert ("one direction per group" in found.coverage.values()) == (engine == "groups")
    assert len(asked[0].observed) >= len(asked[0].updated)  # as the engines take it


def test_groups_of_a_loss_with_several_targets_and_an_optimizer():
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2, 3]])).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    chis = [chi.with_(advantage=a, group=0) for chi, a in zip(U, (1.0, -1.0), strict=True)]
    whole = forces(model, chis, O, GRPO(), optimizer=optimizer, method="naive").matrix
    found = forces(model, chis, O, GRPO(), optimizer=optimizer, groups="sequence").matrix
    assert relative_error(found, summed(whole, group_labels("sequence", chis))) < FP32


def siblings(place=5):
    """A pair that shares all tokens but one, at a place of [x; y] whose response begins at 3."""
    chosen = random_chis([(3, 5)], seed=1)[0]
    ids = chosen.ids.clone()
    ids[place] = (ids[place] + 1) % 60
    return [chosen.with_(role="chosen", group=0), chosen.with_(ids=ids, role="rejected", group=0)]


def test_a_context_is_the_ids_before_a_token():
    """By brute force over all pairs of scored tokens, of sequences that share none, some and all of their prefix."""
    chis = [*siblings(), *random_chis([(3, 5), (2, 4)], seed=3), siblings()[0]]
    prefixes = [tuple(chi.ids[:t].tolist()) for chi in chis for t in chi.scored.nonzero().flatten().tolist()]
    labels = context_numbers(chis).tolist()
    for i, a in enumerate(prefixes):
        for j, b in enumerate(prefixes):
            assert (labels[i] == labels[j]) == (a == b)
    first = {}
    assert [first.setdefault(label, len(first)) for label in labels] == labels  # numbered as they appear
    assert context_numbers([]).shape == (0,)


@pytest.mark.parametrize("scope", ["full", "readout", "backbone", "transformer|layers"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_context_is_the_sum_of_its_tokens_and_what_cancels_there_is_gone(family, scope):
    """Forces at the logits are added before anything is pulled back: c+ = -c- leaves exact zeros, not rounding errors."""
    model, pair = tiny(family), siblings()
    naive = forces(model, pair, O, DPO(), scope=scope, method="naive").matrix
    labels = context_numbers(pair)
    for method in ("tangent", "naive"):
        found = forces(model, pair, O, DPO(), scope=scope, method=method, groups="context")
        assert torch.equal(found.groups, labels) and found.matrix.shape == (9, 7)
        # rounding of a sum is relative to the sum of magnitudes
        gross = summed(naive.abs(), labels)
        assert float((found.matrix - summed(naive, labels)).norm()) < FP32 * float(gross.norm())
        assert float((found.matrix.sum(1) - naive.sum(1)).norm()) < FP32 * float(gross.norm())
        assert not found.matrix[:, :2].any() and bool(found.matrix[:, 2:].any(0).all())


@pytest.mark.parametrize(
    "objective, attributes",
    [
        (GRPO(), [dict(advantage=1.0), dict(advantage=-1.0)]),
        (GRPO(beta=0.5), [dict(advantage=1.0), dict(advantage=0.5)]),
        (SimKO(n_candidates=3), [dict(advantage=1.0), dict(advantage=-1.0)]),
        (KTO(), [dict(), dict()]),
    ],
)
def test_contexts_of_losses_with_several_targets_and_an_optimizer(objective, attributes):
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2, 3]])).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    update = [chi.with_(**more) for chi, more in zip(siblings(), attributes, strict=True)] + U[1:]
    update[-1] = update[-1].with_(role="chosen", group=0, advantage=0.25)
    naive = forces(model, update, O, objective, optimizer=optimizer, method="naive").matrix
    found = forces(model, update, O, objective, optimizer=optimizer, groups="context")
    gross = float(summed(naive.abs(), found.groups).norm())
    assert float((found.matrix - summed(naive, found.groups)).norm()) < FP32 * gross


def test_a_context_is_named_by_its_tokens_and_tells_their_net_c():
    pair = [chi.with_(tokens=tuple(f" {i}" for i in chi.ids.tolist())) for chi in siblings()]
    found = forces(tiny("llama"), pair, O, DPO(), groups="context")
    a, b = (int(chi.ids[5]) for chi in pair)
    row = {name: column[2] for name, column in found.updated.to_pydict().items()}
    assert row["token"] == f"␣{a}/␣{b} @5" and row["tokens"] == [f" {a}", f" {b}"]
    assert row["size"] == 2 and row["position"] == 5 and row["c"] == 0
    assert row["tokens_c"] == [found.c[2], found.c[7]] and row["tokens_c"][0] > 0 > row["tokens_c"][1]
    assert found.updated["size"].to_pylist() == [2, 2, 2, 1, 1, 1, 1]
    assert found.updated["tokens_c"].to_pylist()[:2] == [[0.0], [0.0]]


def test_names_of_groups():
    words = tuple("One two . Three four ! five six".split(" "))
    two_turns = torch.tensor([False, True, True, True, True, False, True, True])
    chi = td.Chi(torch.arange(8), two_turns, tokens=words)
    assert group_labels("sequence", [chi, chi]).tolist() == [0] * 6 + [1] * 6
    assert group_labels("response", [chi]).tolist() == [0, 0, 0, 0, 1, 1]
    assert group_labels("sentence", [chi]).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "groups, message",
    [("word", "must be"), ([0, 1], r"\[L\]=\(11,\)"), ([0] * 10 + [2], "without a gap"), ("sentence", "token texts"),
     (torch.zeros(11), "whole numbers")],
)  # fmt: skip
def test_groups_that_make_no_sense(groups, message):
    with pytest.raises(ValueError, match=message):
        forces(tiny("llama"), U, O, groups=groups)


def test_the_answer_of_a_group_over_the_vocabulary():
    """The observed token's own entry is its force."""
    model = tiny("gpt2")
    found = forces(model, U, O, groups="sequence")
    V = model.config.vocab_size
    answer = found.vocabulary(m=2, l=1, k=V)
    y = found.observed["token_id"][2].as_py()
    at = (answer.rising == y).nonzero()[0, 0]
    torch.testing.assert_close(answer.rise[at], found.matrix[2, 1], rtol=1e-4, atol=1e-5 * float(found.matrix.abs().max()))


@pytest.mark.parametrize(
    "options", [{}, {"groups": "sequence"}, {"groups": "context"}, {"scope": "readout"}, {"method": "naive"}]
)
def test_a_folder_holds_what_memory_would(tmp_path, options):
    model = tiny("qwen2")
    whole = forces(model, U, O, **options)
    found = forces(model, U, O, out=tmp_path / "F", memory=200, **options)
    assert found.matrix is None and len(found.shards.blocks) > 1
    again = Shards(tmp_path / "F")
    assert again.complete and relative_error(again.tensor(), whole.matrix) < FP32
    assert torch.equal(again[3:8], again.tensor()[3:8])
    # rounding of a sum is relative to the sum of magnitudes
    assert float((found.predict(0.1) - whole.predict(0.1)).norm()) < FP32 * 0.1 * float(whole.matrix.abs().sum(1).norm())
    assert found.to_dataframe()["force"].tolist() == again.tensor().flatten().tolist()
    with pytest.raises(FileExistsError, match="choose another place"):
        forces(model, U, O, out=tmp_path / "F")


def test_an_interrupt_leaves_the_blocks_that_are_done(tmp_path):
    shards = Shards.create(tmp_path / "F", (5, 3))
    shards.append(torch.ones(2, 3))
    again = Shards(tmp_path / "F")
    assert not again.complete and torch.equal(again[0:2], torch.ones(2, 3))
    with pytest.raises(ValueError, match="2 of 5 rows are there"):
        again[1:4]
    with pytest.raises(ValueError, match="n at most 3"):
        again.append(torch.ones(4, 3))
    with pytest.raises(FileNotFoundError, match="no sharded matrix"):
        Shards(tmp_path)


class Stop(Exception):
    """What a user's own progress raises."""


def test_forces_that_are_interrupted_leave_a_folder_with_the_rows_that_are_done(tmp_path):
    """Whatever ends it: what is written is right, and says what is missing."""
    model, done = tiny("qwen2"), []
    whole = forces(model, U, O).matrix

    def until_half(now, total):
        done.append(now / total)
        if done[-1] > 0.6:
            raise Stop

    with pytest.raises(Stop):
        forces(model, U, O, out=tmp_path / "F", memory=200, progress=until_half)
    again = Shards(tmp_path / "F")
    rows = again.blocks[-1][1]
    assert not again.complete and 0 < rows < len(whole)
    assert relative_error(again[0:rows], whole[:rows]) < FP32


def test_an_interrupted_matrix_is_gone_on_with(tmp_path, monkeypatch):
    """The rows that are there are not made again; other weights, sequences or options are refused."""
    model = tiny("qwen2")
    whole = forces(model, U, O).matrix

    def until_half(now, total):
        if now / total > 0.6:
            raise Stop

    with pytest.raises(Stop):
        forces(model, U, O, out=tmp_path / "F", memory=200, progress=until_half)
    done, made = Shards(tmp_path / "F").rows, []
    with pytest.raises(FileNotFoundError, match="run.json is missing"):
        td.load(tmp_path / "F")
    for other in (dict(scope="readout"), dict(method="naive"), dict(groups="sequence")):
        with pytest.raises(ValueError, match="was begun with (made of|shape)="):
            forces(model, U, O, out=tmp_path / "F", resume=True, **other)
    with pytest.raises(ValueError, match="was begun with made of="):
        forces(tiny("qwen2", seed=3), U, O, out=tmp_path / "F", resume=True)
    with monkeypatch.context() as patch:
        append = Shards.append
        patch.setattr(Shards, "append", lambda self, rows: (made.append(len(rows)), append(self, rows)))
        found = forces(model, U, O, out=tmp_path / "F", memory=400, resume=True)  # in blocks of another height
    assert 0 < done < len(whole) and sum(made) == len(whole) - done
    assert found.shards.complete and relative_error(found.shards.tensor(), whole) < FP32
    again = forces(model, U, O, out=tmp_path / "F", resume=True)  # there is nothing left to do
    assert torch.equal(again.shards.tensor(), found.shards.tensor())


@pytest.mark.parametrize("groups", [None, "sequence"])
def test_a_matrix_in_a_folder_is_a_result(tmp_path, monkeypatch, groups):
    """`td.load` reads it with its tokens, c and settings; it is saved elsewhere file by file, never whole in memory."""
    model = tiny("llama")
    found = forces(model, U, O, out=tmp_path / "F", memory=200, groups=groups)
    assert len(found.shards.blocks) > 1
    with monkeypatch.context() as patch:
        patch.setattr(Shards, "__getitem__", None)
        found.save(tmp_path / "G")
    with pytest.raises(FileExistsError, match="choose another place"):
        found.save(tmp_path / "G")
    for place in ("F", "G"):
        again = td.load(tmp_path / place)
        assert isinstance(again, td.Forces) and torch.equal(again.shards.tensor(), found.shards.tensor())
        assert torch.equal(again.c, found.c)
        for side in ("observed", "updated"):
            want = getattr(found, side)
            assert getattr(again, side).select(want.column_names).to_pydict() == want.to_pydict()
        assert (again.scope, again.method, again.coverage) == (found.scope, found.method, found.coverage)
        assert torch.equal(again.predict(0.1), found.predict(0.1))


def test_rows_that_are_not_finite_are_not_written(tmp_path):
    shards = Shards.create(tmp_path / "F", (2, 2))
    with pytest.raises(ValueError, match="rows 0:1 of the matrix are not finite"):
        shards.append(torch.tensor([[1.0, torch.inf]]))
    assert Shards(tmp_path / "F").rows == 0


@pytest.mark.parametrize("method", ["tangent", "naive"])
@pytest.mark.parametrize("folder", [False, True])
def test_progress_grows_to_the_whole(tmp_path, method, folder):
    heard = []
    options = dict(out=tmp_path / "F", memory=200) if folder else {}
    forces(tiny("llama"), U, O, method=method, progress=lambda done, total: heard.append((done, total)), **options)
    shares = [done / total for done, total in heard]
    assert len(heard) > 1 and shares == sorted(shares) and shares[-1] == 1 and shares[0] < 1


@pytest.mark.parametrize("text, size", [("2GiB", 2 << 30), ("500 MB", 500_000_000), (1024, 1024), ("1.5KiB", 1536)])
def test_sizes(text, size):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["many", "2 GiBB", 0, -3, "1.2.3MB", "."])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="2GiB"):
        forces(tiny("llama"), U, O, memory=text)


@pytest.mark.parametrize("option", [{"groups": "sequence"}, {"out": torch.zeros(9, 11)}])
def test_matrix_options_do_not_go_with_a_reduction(option):
    with pytest.raises(ValueError, match="leave reduce='update' out"):
        forces(tiny("llama"), U, O, reduce="update", **option)


@pytest.mark.parametrize("groups, columns", [("sequence", 2), ("context", 11)])
def test_groups_survive_the_disk(tmp_path, groups, columns):
    found = forces(tiny("llama"), U, O, SFT(), groups=groups)
    found.save(tmp_path / "run")
    again = td.Forces.load(tmp_path / "run")
    assert torch.equal(again.groups, found.groups) and torch.equal(again.matrix, found.matrix)
    names = found.updated.column_names
    assert again.updated.num_rows == columns and again.updated.select(names).to_pydict() == found.updated.to_pydict()
    assert again.observed.to_pydict() == found.observed.to_pydict()


def test_the_readouts_groups_and_weighted_reductions_make_no_whole_matrix(monkeypatch):
    """[M, L] may be larger than memory where neither answer is: rows are taken a few at a time."""
    sizes, run = [], ops.readout_forces

    def spy(*args, **options):
        found = run(*args, **options)
        sizes.append(found.numel() if found.dim() == 2 else 0)
        return found

    model = tiny("qwen2")
    whole = forces(model, U, O, scope="readout").matrix
    weights = torch.rand(len(whole))
    monkeypatch.setattr(readout.ops, "readout_forces", spy)
    monkeypatch.setattr(readout, "ELEMENTS", 2 * whole.shape[1])
    vector = forces(model, U, O, scope="readout", reduce="observe", weights=weights).vector
    assert relative_error(vector, weights @ whole) < FP32
    few = forces(model, U, O, scope="readout", groups="sequence", memory=2 * 4 * 4 * whole.shape[1])
    assert relative_error(few.matrix, summed(whole, group_labels("sequence", U))) < FP32
    assert max(sizes) < whole.numel()
