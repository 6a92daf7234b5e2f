"""The card of a pair: its sentence says what its numbers say and nothing else; runs, forces and command line agree on them."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

import tokdyn as td
from tokdyn.cli import app
from tokdyn.objectives import DPO, SFT
from tokdyn.runs.by_sequence import BySequence
from tokdyn.runs.contexts import Contexts
from tokdyn.runs.explain import Explanation, kept, sentence, sums
from tokdyn.runs.pairs import strongest
from tokdyn.testing import random_chis, relative_error, tiny

FP32 = 1e-5


def facts(parts, *, c=0.5, cosine=0.93, eta=None, context=False, label="log-probability", **more):
    force = sum(x for *_, x in parts)
    return {
        "force": force, "eta": eta, "observable": {"label": label, "unit": "nats"}, "parts": parts,
        "observed": {"name": "“8” chosen 1 @14", "token": "8", "log_prob": -1.0, "entropy": 2.0, "g_norm": 0.7},
        "updated": {"name": "“x” rejected 1 @12", "members": [{"token": "x", "c": c, "g_norm": 0.5}]},
        "kernel": {"readout": 20.0, "cosine": cosine, "product": 0.1, "scalar": force / 0.1},
        "shared": {"context": context, "token": False, "prefix": 3}, "texts": {"observed": "a [8]", "updated": "b [x]"},
    } | more  # fmt: skip


MLPS = [
    ("layer 0", "MLP up", -0.05),
    ("layer 1", "attention q", -0.2),
    ("layer 2", "MLP up", -0.4),
    ("layer 2", "MLP down", -0.1),
    ("layer 3", "MLP gate", -0.21),
    ("readout", "readout", -0.04),
]


def test_the_sentence_of_a_push_through_some_layers():
    assert sentence(facts(MLPS, c=-0.5, eta=0.1)) == (
        "“x” rejected 1 @12 lowers “8” chosen 1 @14, −0.1 nats in this step: the push goes through the MLPs of layers 2–3 "
        "(71%); the two positions have nearly the same hidden state (cosine 0.93); the loss pushes “x” down there."
    )


def up(force, layer=0):
    return (f"layer {layer}", "MLP up", force)


READOUT = ("readout", "readout", 0.4)
CASES = {
    "parts that cancel say so, and name no carrier": (
        [up(1.0), ("layer 1", "attention o", -0.9)],
        ["its parts cancel, 5% of them is left: most up by the MLPs of layer 0, most down by the attention of layer 1"],
        ["goes through"],
    ),
    "a group that carries half is named alone, and no layers where all are needed": (
        [up(0.9), up(0.9, 1), READOUT],
        ["the pull goes through the MLPs (82%);"],
        ["readout", "layers"],
    ),
    "but not where another carries a quarter": ([up(0.6), READOUT], ["the MLPs (60%) and the readout (40%);"], []),
    "several where none carries half": (
        [up(0.3), ("layer 0", "attention v", 0.3), READOUT],
        ["the readout (40%), the MLPs (30%) and the attention (30%);"],
        ["cancel"],
    ),
    "what takes a fifth away is named": (
        [up(1.4), ("embedding", "embedding", -0.4)],
        ["the MLPs (140%), against the embedding (−40%)"],
        ["cancel"],
    ),
    "what takes less is not": ([up(1.1), ("embedding", "embedding", -0.1)], ["the MLPs (110%);"], ["against"]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_of_the_parts(case):
    parts, said, unsaid = CASES[case]
    text = sentence(facts(parts))
    assert all(words in text for words in said) and not any(words in text for words in unsaid)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (dict(cosine=0.6), "similar hidden states (cosine 0.60)"),
        (dict(cosine=0.1), "hidden states with little in common (cosine 0.10)"),
        (dict(cosine=-0.7), "opposed hidden states (cosine −0.70)"),
        (dict(context=True), "both stand behind the same text"),
        (dict(c=0.5), "the loss pulls “x” up there."),
        (dict(label="entropy"), "lowers the entropy at “8” chosen 1 @14"),
        (dict(optimizer={"force": -1.0, "plain": 2.0}), "a plain gradient step would do +2 per unit learning rate"),
    ],
)
def test_what_is_said_of_the_rest(more, said):
    assert said in sentence(facts(MLPS, **more))


def test_a_token_without_weight_is_said_to_be_pulled_nowhere():
    assert "the loss" not in sentence(facts(MLPS, c=0.0))


def test_every_number_of_the_sentence_is_a_number_of_the_card():
    given = facts(MLPS, eta=0.1)
    numbers = {float(x.replace("−", "-")) for x in re.findall(r"[−+]?\d+\.?\d*(?=%|\)| nats)", sentence(given))}
    shares = {round(100 * (0.71)), 0.93, -0.1}
    assert numbers == shares
    assert sums(given["parts"])["MLPs"] == pytest.approx(-0.76) and kept(given["parts"]) == pytest.approx(1)


def pair(rejected=(1, 2, 7, 6)):
    """Two answers that share two tokens and then part, so that some contexts hold two update tokens."""
    prompt, tails = [3, 8, 5], ([1, 2, 9, 4], list(rejected))
    return [
        td.Chi(
            torch.tensor(prompt + tail),
            torch.arange(3 + len(tail)) >= 3,
            role=role,
            tokens=tuple(f"t{i}" for i in prompt + tail),
        )
        for tail, role in zip(tails, ("chosen", "rejected"), strict=True)
    ]


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A run of two answers that say nothing alike."""
    path = tmp_path_factory.mktemp("runs") / "apart"
    return td.profile(tiny("qwen2"), pair((7, 6, 0, 6)), pair((7, 6, 0, 6)), DPO(), out=path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model, update = tiny("qwen2"), pair()
    observe = [*update, *(chi.with_(group=1) for chi in random_chis([(3, 3)], seed=5))]
    path = tmp_path_factory.mktemp("runs") / "run"
    made = td.profile(model, update, observe, DPO(), out=path)
    return model, update, observe, made, path


def test_a_run_and_its_forces_give_one_card(run):
    """Parts, kernel and force of single pairs, from the run's matrix in parts and from two backward passes each."""
    model, update, observe, made, path = run
    F = td.forces(model, update, observe, DPO())
    assert relative_error(made.matrix, F.matrix) < FP32
    gram = td.forces(model, observe, observe, SFT(), method="naive").matrix.double()  # of ∇ log pi; the update stands first
    for m, l in ((0, 2), (8, 6), (9, 7)):  # noqa: E741
        kept_card, live = made.explain(m, l, per="tokens").facts, F.explain(m, l).facts
        size = float(F.matrix.abs().max())
        for mine, other in zip(kept_card["parts"], live["parts"], strict=True):
            assert mine[:2] == other[:2] and abs(mine[2] - other[2]) < FP32 * size
        assert live["force"] == pytest.approx(float(F.matrix[m, l]), rel=1e-4)
        for name in ("readout", "cosine"):
            assert kept_card["kernel"][name] == pytest.approx(live["kernel"][name], rel=1e-4)
        cosine = float(F.c[l].sign() * gram[m, l] / (gram[m, m] * gram[l, l]).sqrt())
        assert live["gradient_cosine"] == pytest.approx(cosine, abs=1e-5)
        assert live["shared"] == kept_card["shared"] and live["observed"]["name"] == kept_card["observed"]["name"]
    again = td.load(path)
    assert again.explain().to_dict() == made.explain().to_dict()
    assert torch.equal(again.pairs.parts, made.pairs.parts) and len(made.pairs.index) == made.matrix.numel()


def test_a_context_is_explained_net(run):
    """Two update tokens behind one text: their parts add up, and both are named."""
    *_, made, _ = run
    F = made.matrix
    card = made.explain(9, 2).facts  # t9 and t7, where the answers part
    assert [member["token"] for member in card["updated"]["members"]] == ["t9", "t7"]
    assert card["force"] == pytest.approx(float(F[9, 2] + F[9, 6]), rel=1e-4)
    assert card["shared"]["prefix"] == 0 and made.explain(2, 2).facts["shared"] == {"context": True, "token": True, "prefix": 7}


def test_the_summary_and_the_page_say_why(run):
    *_, made, path = run
    why = next(finding for finding in made.about["findings"] if finding["title"] == "Why")
    assert why["text"] == made.explain().sentence
    page = (path / "report.html").read_text(encoding="utf-8")
    payload = json.loads(re.search(r'id="payload">(.*?)</script>', page, re.S)[1])
    first = payload["cards"][0]
    l = payload["contexts"]["updated"].index(first["x"])  # noqa: E741
    card = made.explain(first["m"], l)
    assert first["sentence"] == card.sentence
    assert sum(x for _, x in first["layers"]) == pytest.approx(card.facts["force"], rel=1e-5)


def test_why_is_said_of_the_headlines_push(run):
    """Summed over what both answers of the pair say alike: the finding before it names the same tokens and the same force."""
    *_, made, _ = run
    titles = [finding["title"] for finding in made.about["findings"]]
    at = titles.index("Why")
    said, headline = made.explain(), made.about["findings"][at - 1]
    assert titles[at - 1].startswith("The strongest net") and headline["text"].startswith(said.facts["updated"]["name"])
    joined = Contexts.of(BySequence.of(made.tokens, made.matrix), made.about["sequences"]).alike_joined
    assert said.facts["force"] == pytest.approx(float(joined.others.flatten()[joined.others.abs().argmax()]), rel=1e-4)
    few = strongest(Contexts.of(BySequence.of(made.tokens, made.matrix), made.about["sequences"]), parts=1, count=1)
    assert len(few) >= 1  # the headline's tokens, however few are wanted


def test_the_strongest_push_between_answers_is_the_least_entry_of_their_block(apart):
    """By words, as the terminal prints places: every entry is compared, but for texts that chosen tokens stand behind too."""
    made, path = apart, apart.path
    rows = made.tokens.to_pylist()
    observed, updated = ([row for row in rows if row["side"] == side] for side in ("observed", "updated"))
    shared = {row["context"] for row in updated if row["role"] == "chosen"}
    F, block = made.matrix, dict[tuple[int, int], float]()
    for m, o in enumerate(observed):
        for l, u in enumerate(updated):  # noqa: E741
            if o["role"] == "chosen" and u["role"] == "rejected" and u["context"] not in {*shared, o["context"]}:
                block[m, l] = float(F[m, l])
    (m, l), least = min(block.items(), key=lambda each: each[1])  # noqa: E741
    found = made.explain("chosen 1", "rejected", down=True)
    assert least < 0 and found.facts["force"] == pytest.approx(least, rel=1e-4)
    assert found.address == f"#m={m}&l={l}"
    places = [f"chosen 1 @{observed[m]['position']}", f"rejected 1 @{updated[l]['position']}"]
    assert made.explain(*places).facts == found.facts == made.explain(m, l).facts
    assert abs(made.explain("chosen 1", "rejected").facts["force"]) == pytest.approx(max(map(abs, block.values())), rel=1e-4)
    finding = next(each for each in made.about["findings"] if each["title"].startswith("The rejected token that pushes"))
    assert finding["text"] == found.sentence and finding["address"] == found.address and " lowers " in found.sentence
    page = (path / "report.html").read_text(encoding="utf-8")
    assert f'<a class="pair" href="{found.address.replace("&", "&amp;")}">' in page
    contexts = Contexts.of(BySequence.of(made.tokens, made.matrix), made.about["sequences"])
    assert [m, l] in strongest(contexts, parts=1, count=8).tolist()  # it is kept, however few are


def test_the_command_line_prints_the_card(run, apart):
    asked = CliRunner().invoke(app, ["explain", str(apart.path), "chosen", "rejected", "--down"])
    found = apart.explain("chosen", "rejected", down=True)
    assert found.sentence in asked.output and f"{(apart.path / 'report.html').as_uri()}{found.address}" in asked.output
    *_, made, path = run
    shown = CliRunner().invoke(app, ["explain", str(path)])
    assert shown.exit_code == 0 and made.explain().sentence in shown.output and "by layer" in shown.output
    as_json = CliRunner().invoke(app, ["explain", str(path), "0", "2", "--per", "tokens", "--json"])
    assert json.loads(as_json.output)["force"] == pytest.approx(float(made.matrix[0, 2]), rel=1e-4)
    for words, message in (
        (["chosen", "rejected"], "no update token of 'rejected' moves a token of 'chosen'"),  # all is said alike
        (["chosen 9"], "no observed token is called 'chosen 9'"),
        (["chosen 1 @1"], "'chosen 1', 'rejected 1', 'response 2'"),
        (["response 2", "response"], "no updated token is called 'response'"),
        (["99", "0"], "M must lie in [0, 11)"),
        (["0", "0", "--per", "x"], "per must be"),
    ):
        failed = CliRunner().invoke(app, ["explain", str(path), *words])
        assert failed.exit_code == 2 and message in failed.output


def test_html_is_escaped_and_text_is_the_card():
    card = Explanation(facts(MLPS, texts={"observed": "<b> [8]", "updated": "b [x]"}))
    assert "&lt;b&gt;" in card._repr_html_() and "<b>" not in card._repr_html_().replace("<b>", "", 0)
    assert str(card).startswith(card.sentence) and "layer 2" in card.text


def test_observables_and_optimizers_have_cards():
    model, update = tiny("llama"), pair()
    adam = torch.optim.Adam(model.parameters(), eps=1e-3)
    F = td.forces(model, update, update, DPO(), observable="entropy", optimizer=adam)
    card = F.explain(1, 2)
    assert card.facts["optimizer"]["force"] == pytest.approx(float(F.matrix[1, 2]), rel=1e-4)
    plain = td.forces(model, update, update, DPO(), observable="entropy").matrix
    assert card.facts["optimizer"]["plain"] == pytest.approx(float(plain[1, 2]), rel=1e-4)
    assert "the entropy at" in card.sentence and "a plain gradient step" in card.sentence


def test_a_profile_of_the_entropy_names_its_unit(tmp_path):
    model, update = tiny("llama"), pair()
    made = td.profile(model, update, update, DPO(), observable="entropy", out=tmp_path / "run", pairs=5)
    assert made.about["observable"]["label"] == "entropy" and len(made.pairs.index) == 5
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "What is watched is the entropy" in page
    assert "Change of entropy after a step" in json.dumps(made.about["findings"])
    with pytest.raises(ValueError, match="is not among the 5 strongest"):
        smallest = divmod(int(made.matrix.abs().argmin()), 8)
        made.explain(*smallest, per="tokens")
