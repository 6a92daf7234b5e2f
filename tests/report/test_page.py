"""The report page: nothing fetched, nothing executed but its own script, every number carried through.

The run it shows is synthetic but true: a softmax readout on fixed random features, one DPO step on it, and its forces in
closed form, so that predicted and actual changes agree to second order as they would in a real run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pytest
import torch
from pages import Tags, payload_of, synthetic_run

from tokdyn.report import net, page, render
from tokdyn.runs.by_sequence import BySequence
from tokdyn.runs.contexts import Contexts

SECTIONS = ("answers", "forces", "numbers", "verify", "vocabulary", "squeezing", "run")
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]>&lt;\u2028\u2029\u202e",
    "\n",
    "   ",
    "",
    "x" * 400,
    "<|im_end|>",
    "\u0000\u200b\ufffd",
)


def matrix_of(payload: dict[str, Any]) -> np.ndarray:
    """Return the matrix embedded in a payload."""
    packed = payload["matrix"]
    return np.frombuffer(base64.b64decode(packed["base64"]), packed["dtype"]).reshape(packed["shape"])


def without(tokens: pa.Table, *names: str) -> pa.Table:
    """Return the table with the named columns all null."""
    for name in names:
        index = tokens.column_names.index(name)
        tokens = tokens.set_column(index, name, pa.nulls(len(tokens), tokens.schema.field(name).type))
    return tokens


def renamed(tokens: pa.Table, name: str, values: list[Any]) -> pa.Table:
    """Return the table with one column replaced."""
    return tokens.set_column(tokens.column_names.index(name), name, pa.array(values))


@pytest.fixture(scope="module")
def run() -> tuple[dict[str, Any], pa.Table, np.ndarray]:
    """The synthetic run of three pairs."""
    return synthetic_run()


@pytest.fixture(scope="module")
def html(run: Any) -> str:
    """Its page."""
    return render(*run)


def test_the_synthetic_run_is_true(run: Any) -> None:
    """Row sums predict the real step with an error of second order; otherwise the page is developed on nonsense."""
    about, tokens, matrix = run
    observed = tokens.filter(pa.compute.equal(tokens["side"], "observed"))
    np.testing.assert_allclose(matrix.sum(axis=1), observed["force"].to_numpy(), rtol=1e-4, atol=1e-6)
    assert 1.9 < about["verify"]["order"] < 2.1


def test_nothing_is_fetched(html: str) -> None:
    """No tag, style or script can reach outside the file, and the policy forbids it."""
    page = Tags(html)
    for tag, attrs in page.tags:
        assert "src" not in attrs and "srcset" not in attrs and "action" not in attrs, tag
        assert attrs.get("href", "#").startswith(("#", "data:")), attrs
        assert not any(name.startswith("on") or name == "style" for name in attrs), attrs
        assert tag not in ("iframe", "object", "embed", "base", "img")
    (policy,) = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'; ")
    for tag, attrs, text in page.raw:
        if attrs.get("id") == "payload":
            continue
        assert not re.search(r"https?:|//\w+\.|@import|url\(|\bfetch\b|XMLHttpRequest|WebSocket|\bimport\(|\beval\b", text), tag
        assert "innerHTML" not in text.replace('probe.innerHTML = "<svg></svg>"', ""), "data must stay text"


def test_the_policy_admits_exactly_the_script_of_the_page(html: str) -> None:
    """The CSP hash is that of the one executable script, so an escaped one could not run."""
    scripts = [text for tag, attrs, text in Tags(html).raw if tag == "script" and "type" not in attrs]
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html


def test_every_section_in_order(html: str) -> None:
    """The page answers in the order a reader asks."""
    places = [html.index(f'id="{name}"') for name in SECTIONS]
    assert places == sorted(places)
    anchors = {attrs["href"] for tag, attrs in Tags(html).tags if tag == "a"}
    assert anchors == {f"#{name}" for name in SECTIONS}


def test_header_findings_and_footer_need_no_script(run: Any, html: str) -> None:
    """What was run, what was found and with what is plain HTML."""
    about, words = run[0], Tags(html).words
    L, M = run[2].shape[1], run[2].shape[0]
    assert f"One DPO step on synthetic-readout: how {L} update tokens move {M} observed tokens" in words
    assert "observed tokens at learning rate η = 0.4" in words
    for finding in about["findings"]:
        assert finding["title"] in words and finding["text"] in words
    for text in (
        "complete run",
        "beta = 0.1",
        "torch 2.13.0+cpu",
        "forces 21.7",
        "row sum against vector 3.1×10⁻⁷",
        "exact 1 tensor",
        "frozen 1 tensor: emb",
    ):
        assert text in words, text
    assert "Partial run" not in words


def test_the_matrix_survives_bit_for_bit(run: Any, html: str) -> None:
    """The base64 payload decodes to F, and the block sums are its sums over sequences."""
    matrix, payload = run[2], payload_of(html)
    np.testing.assert_array_equal(matrix_of(payload), matrix)
    for r, row in zip(payload["observed"]["sequences"], payload["blocks"], strict=True):
        for c, total in zip(payload["updated"]["sequences"], row, strict=True):
            block = matrix[r["start"] : r["stop"], c["start"] : c["stop"]].astype(float)
            assert total == pytest.approx(block.sum(), rel=1e-5, abs=1e-12)


def test_columns_follow_the_matrix_axes(run: Any) -> None:
    """Rows of the table may come in any order; `row` decides, and the sequences tile both axes."""
    about, tokens, matrix = run
    shuffled = tokens.take(np.random.default_rng(1).permutation(len(tokens)))
    payload, straight = payload_of(render(about, shuffled, matrix)), payload_of(render(about, tokens, matrix))
    assert payload == straight
    for side, size in (("observed", matrix.shape[0]), ("updated", matrix.shape[1])):
        picked = tokens.filter(pa.compute.equal(tokens["side"], side)).sort_by("row")
        data = payload[side]
        assert data["columns"]["token"] == picked["token"].to_pylist()
        assert data["columns"]["log_prob"] == pytest.approx(picked["log_prob"].to_pylist(), rel=1e-5)
        edges = [(item["start"], item["stop"]) for item in data["sequences"]]
        assert edges[0][0] == 0 and edges[-1][1] == size and all(a[1] == b[0] for a, b in zip(edges, edges[1:], strict=False))
        assert [item["name"] for item in data["sequences"]][:2] == ["chosen 1", "rejected 1"]
    first = tokens.filter(pa.compute.equal(tokens["side"], "observed")).sort_by("row")["risers"][0].as_py()[0]
    assert payload["observed"]["columns"]["risers"][0][0] == [first["token"], pytest.approx(first["delta"], rel=1e-5)]
    assert "c" not in payload["observed"]["columns"] and "actual" not in payload["updated"]["columns"]


def test_hostile_text_stays_text(run: Any) -> None:
    """Nothing a model or a file name says becomes markup, in the data or in the prose."""
    about, tokens, matrix = run
    texts = tokens["token"].to_pylist()
    texts[: len(HOSTILE)] = HOSTILE
    nasty = "</script><img src=x onerror=alert(1)>"
    about = about | {
        "model": {"name": nasty},
        "findings": [{"title": nasty, "text": "<b>bold</b>"}, {"text": "no title"}],
        "sequences": [item | {"prompt": nasty} for item in about["sequences"]],
        "versions": {nasty: nasty},
        "coverage": {nasty: "\ud800 lone surrogate"},
    }
    html = render(about, renamed(tokens, "token", texts), matrix)
    html.encode("utf-8")
    page = Tags(html)
    assert "img" not in [tag for tag, _ in page.tags]
    assert len([1 for tag, _ in page.tags if tag == "script"]) == 2
    assert nasty in page.words and "<b>bold</b>" in page.words
    (embedded,) = [text for _, attrs, text in page.raw if attrs.get("id") == "payload"]
    assert not set("<>&") & set(embedded) and embedded.isascii()
    payload = json.loads(embedded)
    assert payload["updated"]["columns"]["token"][: len(HOSTILE)] == list(HOSTILE)
    assert payload["observed"]["sequences"][0]["prompt"] == nasty


def test_a_partial_run_says_so(run: Any) -> None:
    """NaN survives, the banner counts what is there, and sums over holes are not given."""
    about, tokens, matrix = run
    M, holes = matrix.shape[0], matrix.copy()
    holes[M // 2 :] = np.nan
    html = render(about | {"status": "partial", "verify": None}, tokens, holes)
    words, payload = Tags(html).words, payload_of(html)
    assert "Partial run." in words and f"{M // 2} of {M} observed tokens have all their forces" in words
    np.testing.assert_array_equal(matrix_of(payload), holes)
    assert payload["blocks"][0][0] is not None and payload["blocks"][-1][0] is None
    words = Tags(render(about | {"status": "partial"}, tokens, None)).words
    assert "Partial run. No force was computed before the run stopped" in words


def test_a_matrix_too_large_for_a_page_is_summed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit only the sums over sequences are embedded."""
    monkeypatch.setattr(page, "MATRIX_CELLS", run[2].size - 1)
    payload = payload_of(render(*run))
    assert payload["matrix"] is None
    for sums in (payload["blocks"], payload["net"]):
        assert np.array(sums).sum() == pytest.approx(run[2].astype(float).sum(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("rows", [10**9, 7])
def test_the_strongest_partners_of_every_token_are_kept_at_any_size(
    run: Any, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """By brute force over the net matrix, a token's own place apart; whatever the blocks in which the matrix is read."""
    monkeypatch.setattr(page, "MATRIX_CELLS", 0)
    monkeypatch.setattr(net, "CHUNK", rows * run[2].shape[1] // 16 + 1)
    payload = payload_of(render(*run))
    contexts, partners = payload["contexts"], payload["partners"]
    whole = run[2].astype(float) @ np.eye(len(contexts["list"]))[contexts["updated"]]
    others, own = whole.copy(), contexts["observed"]
    assert (
        len(set(contexts["updated"])) < run[2].shape[1] and min(own) >= 0
    )  # the pairs share a beginning; both sides are the same
    others[np.arange(len(own)), own] = 0
    assert partners["own"] == pytest.approx(list(whole[np.arange(len(own)), own]), rel=1e-5, abs=1e-7)
    assert partners["size"] == pytest.approx(list(np.abs(others).sum(1)), rel=1e-4)
    for kept, values in [*zip(partners["observed"], others, strict=True), *zip(partners["reach"], others.T, strict=True)]:
        assert [values[i] for i, _ in kept] == pytest.approx([x for _, x in kept], rel=1e-4, abs=1e-7)
        largest = np.sort(np.abs(values))[::-1][: net.PARTNERS]
        assert np.abs([x for _, x in kept]) == pytest.approx(largest[: len(kept)], rel=1e-4, abs=1e-7)
        assert len(kept) == net.PARTNERS or largest[len(kept)] < 1e-7


@pytest.mark.parametrize("cells", [10**9, 0])
def test_the_headline_is_that_of_the_terminal(run: Any, monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    """The six largest entries of the net matrix in which what a pair's answers say alike is one column."""
    monkeypatch.setattr(page, "MATRIX_CELLS", cells)
    about, tokens, matrix = run
    payload = payload_of(render(*run))
    joined = Contexts.of(BySequence.of(tokens, torch.from_numpy(matrix)), about["sequences"]).alike_joined
    assert len(joined.members) < len(payload["contexts"]["list"])
    largest = joined.others.abs().flatten().sort(descending=True).values[: net.HEADLINE]
    assert [abs(force) for _, _, force in payload["headline"]] == pytest.approx(largest.tolist(), rel=1e-5)
    for m, contexts, force in payload["headline"]:
        (x,) = {int(joined.column[payload["contexts"]["list"][context]["members"][0]]) for context in contexts}
        assert force == pytest.approx(float(joined.others[m, x]), rel=1e-5)


DEGENERATE = {
    "no verification": lambda about, tokens, matrix: (about | {"verify": None}, without(tokens, "actual"), matrix),
    "no matrix": lambda about, tokens, matrix: (about, without(tokens, "force", "predicted", "actual"), None),
    "no risers": lambda about, tokens, matrix: (about, without(tokens, "risers", "fallers"), matrix),
    "no squeezing": lambda about, tokens, matrix: (about, tokens.drop_columns(["p_target_after", "falling_share"]), matrix),
    "nothing known": lambda about, tokens, matrix: ({}, tokens, matrix),
    "only what places tokens": lambda about, tokens, matrix: ({}, tokens.select(["side", "row", "sequence", "token"]), None),
    "no tokens": lambda about, tokens, matrix: (about, tokens.slice(0, 0), np.zeros((0, 0), np.float32)),
    "not finite": lambda about, tokens, matrix: (
        about | {"verify": {"order": float("nan"), "etas": [0.1], "residuals": [float("inf")]}},
        renamed(tokens, "log_prob", [float("-inf")] * len(tokens)),
        np.full_like(matrix, np.nan),
    ),
    "one role": lambda about, tokens, matrix: (
        about | {"sequences": [], "objective": {"name": "SFT"}}, renamed(tokens, "role", ["response"] * len(tokens)), matrix
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_runs_render(run: Any, change: Any) -> None:
    """Whatever is missing, the page has all its sections and valid JSON without NaN."""
    html = render(*change(*run))
    assert all(f'id="{name}"' in html for name in SECTIONS)
    assert "NaN" not in [text for _, attrs, text in Tags(html).raw if attrs.get("id") == "payload"][0]
    payload_of(html)


def test_one_token_on_each_side() -> None:
    """The smallest run: a 1 x 1 matrix, singular words."""
    run = synthetic_run([("Hi", " yes")])
    html = render(*run)
    assert run[2].shape == (1, 1) and payload_of(html)["matrix"]["shape"] == [1, 1]
    assert "how 1 update token moves 1 observed token at" in Tags(html).words


def test_rollouts_of_one_prompt_are_numbered(run: Any) -> None:
    """Sequences that share group and role get a number."""
    about, tokens, matrix = run
    one = renamed(tokens, "role", ["response"] * len(tokens))
    names = [item["name"] for item in payload_of(render(about | {"sequences": []}, one, matrix))["updated"]["sequences"]]
    assert names[:3] == ["response 1", "response 1 #2", "response 2"]


def test_shapes_and_columns_are_checked(run: Any) -> None:
    """A matrix of another run, or a table that places no tokens, is refused with a sentence."""
    about, tokens, matrix = run
    M, L = matrix.shape
    with pytest.raises(ValueError, match=rf"matrix must have shape \[M, L\]=\({M}, {L}\) .* got \({L}, {M - 1}\)"):
        render(about, tokens, matrix.T[:, 1:])
    with pytest.raises(ValueError, match=r"tokens lacks the columns \['row'\]"):
        render(about, tokens.drop_columns(["row"]), matrix)


def test_the_page_stays_small(run: Any, html: str) -> None:
    """Without its data the page is a small fraction of a plotting library."""
    payload = [text for _, attrs, text in Tags(html).raw if attrs.get("id") == "payload"][0]
    assert len(html.encode()) - len(payload) < 150_000


def test_every_static_file_is_inlined() -> None:
    """A file forgotten in SCRIPTS or STYLES would be shipped and never run."""
    folder = page.files("tokdyn.report").joinpath("static")
    assert {item.name for item in folder.iterdir() if item.is_file()} == {*page.SCRIPTS, *page.STYLES}
