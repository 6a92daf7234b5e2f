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
from pages import Tags, payload_of

from tokdyn.report import page, render

PAIRS = (
    (
        "How do I keep basil alive on a windowsill?",
        " Give it at least six hours of sun, and water the soil, not the leaves, when the top is dry. Pinch the tips weekly.",
        " Just water it a lot every day and it will be fine. Basil is easy, so do not worry about the sun or the soil.",
    ),
    (
        "What is the capital of Australia, and why not Sydney?",
        " The capital is Canberra. Sydney and Melbourne both wanted it, so a new city was built between them.",
        " The capital of Australia is Sydney, because it is the largest city and everyone knows the opera house.",
    ),
    (
        "Write one sentence that thanks a colleague for a code review.",
        " Thank you for reading this so closely: the test you asked for found a bug I would have shipped.\n",
        " Thanks for the review!!! You are the best, best, best colleague.\nThank you thank you thank you.",
    ),
)
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


def log_softmax(z: np.ndarray) -> np.ndarray:
    """Return z - log Σ exp z over the last axis."""
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def synthetic_run(
    pairs: Any = PAIRS, *, eta: float = 0.4, observe: Any = None, width: int = 48, seed: int = 0
) -> tuple[dict[str, Any], pa.Table, np.ndarray]:
    """Return (about, tokens, matrix) of one DPO step of a readout W [V, d] on fixed features h.

    F[m,l] = (h_m·h_l) c_l <e_{y_m} - π_m, e_{y_l} - π_l>, exact for this model. `observe` are (prompt, chosen, rejected)
    as `pairs` are, which is also their default.
    """
    rng = np.random.default_rng(seed)
    observe = pairs if observe is None else observe
    words = [re.findall(r" ?\w+| ?[^\w\s]+|\s", " ".join(pair)) for pair in (*pairs, *observe)]
    vocabulary = sorted({"", *(word for text in words for word in text)}) + [f" w{i}" for i in range(40)]
    index = {word: i for i, word in enumerate(vocabulary)}
    embedding = rng.normal(size=(len(vocabulary), width)) / np.sqrt(width)

    def sequence(prompt: str, response: str) -> tuple[np.ndarray, np.ndarray]:
        ids = [[index[word] for word in re.findall(r" ?\w+| ?[^\w\s]+|\s", text)] for text in (prompt, response)]
        all_ids = np.array([0, 0, 0, *ids[0], *ids[1]])
        first = len(all_ids) - len(ids[1])
        context = [embedding[all_ids[t - 1]] + 0.7 * embedding[all_ids[t - 2]] + 0.4 * embedding[all_ids[t - 3]]
                   for t in range(first, len(all_ids))]  # fmt: skip
        return np.array(context), all_ids[first:]

    rows: dict[str, list[Any]] = {"updated": [], "observed": []}
    sequences = []
    for side, source in (("updated", pairs), ("observed", observe)):
        for group, (prompt, *responses) in enumerate(source):
            for role, response in zip(("chosen", "rejected"), responses, strict=False):
                h, y = sequence(prompt, response)
                number = len([item for item in sequences if item["side"] == side])
                sequences.append({"side": side, "sequence": number, "group": group, "role": role, "prompt": prompt,
                                  "response": response, "tokens": len(y), "truncated": 0})  # fmt: skip
                rows[side] += [(number, group, role, t, y[t], h[t]) for t in range(len(y))]
    h_u, h_o = (np.array([row[5] for row in rows[side]]) for side in ("updated", "observed"))
    y_u, y_o = (np.array([row[4] for row in rows[side]]) for side in ("updated", "observed"))

    W = 0.3 * rng.normal(size=(len(vocabulary), width))  # "pretraining": some steps on what will be observed
    for _ in range(14):
        pi = np.exp(log_softmax(h_o @ W.T))
        pi[np.arange(len(y_o)), y_o] -= 1
        W -= 0.25 * pi.T @ h_o

    def measure(h: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_pi = log_softmax(h @ W.T)
        g = -np.exp(log_pi)
        g[np.arange(len(y)), y] += 1
        return log_pi, g

    (log_pi_u, g_u), (log_pi_o, g_o) = measure(h_u, y_u), measure(h_o, y_o)
    weight = 0.05 + 0.02 * rng.normal(size=len(pairs))
    c = np.array([weight[row[1]] * (1 if row[2] == "chosen" else -1) for row in rows["updated"]])
    matrix = ((h_o @ h_u.T) * (g_o @ g_u.T) * c).astype(np.float32)
    step = (c[:, None] * g_u).T @ h_u
    force = matrix.astype(float).sum(axis=1)

    def actual(rate: float) -> np.ndarray:
        return (log_softmax(h_o @ (W + rate * step).T) - log_pi_o)[np.arange(len(y_o)), y_o]

    delta = h_o @ step.T
    delta -= (np.exp(log_pi_o) * delta).sum(axis=1, keepdims=True)
    after = np.exp(log_softmax(h_u @ W.T + eta * (h_u**2).sum(1)[:, None] * c[:, None] * g_u))
    top = log_pi_u.argmax(axis=1)
    table: dict[str, list[Any]] = {name: [] for name in (
        "side", "row", "sequence", "group", "role", "position", "token_id", "token", "log_prob", "entropy", "g_norm",
        "collision", "rank", "argmax_token", "argmax_log_prob", *[k for k, v in page.COLUMNS.items() if len(v) == 1],
    )}  # fmt: skip
    moved = actual(eta)
    for side, log_pi in (("updated", log_pi_u), ("observed", log_pi_o)):
        for i, (number, group, role, t, y, _) in enumerate(rows[side]):
            p = np.exp(log_pi[i])
            best = int(p.argmax())
            values: dict[str, Any] = dict(
                side=side, row=i, sequence=number, group=group, role=role, position=t, token_id=int(y),
                token=vocabulary[y], log_prob=log_pi[i, y], entropy=-(p * log_pi[i]).sum(),
                g_norm=np.sqrt(1 - 2 * p[y] + (p**2).sum()), collision=(p**2).sum(), rank=int((p > p[y]).sum()),
                argmax_token=vocabulary[best], argmax_log_prob=log_pi[i, best],
            )  # fmt: skip
            if side == "updated":
                values |= dict(
                    c=c[i], p_target_after=after[i, y], p_argmax_after=after[i, top[i]],
                    mass_to_argmax=after[i, top[i]] - p[top[i]], falling_share=float((after[i] < p).mean()),
                )  # fmt: skip
            else:
                order = delta[i].argsort()
                values |= dict(
                    force=force[i], predicted=eta * force[i], actual=moved[i],
                    risers=[dict(token=vocabulary[v], delta=delta[i, v]) for v in order[::-1][:10] if delta[i, v] > 0],
                    fallers=[dict(token=vocabulary[v], delta=delta[i, v]) for v in order[:10] if delta[i, v] < 0],
                )  # fmt: skip
            for name, column in table.items():
                column.append(values.get(name))
    entry = pa.list_(pa.struct([("token", pa.string()), ("delta", pa.float64())]))
    tokens = pa.table({name: pa.array(column, type=entry if name in ("risers", "fallers") else None)
                       for name, column in table.items()})  # fmt: skip
    etas = [eta / 4, eta / 2, eta]
    residuals = [float(np.linalg.norm(actual(rate) - rate * force)) for rate in etas]
    predicted = eta * force
    best = int(np.abs(moved).argmax())
    total = float(moved.sum())
    about = {
        "format": 1, "tokdyn": "0.1.0", "status": "complete", "created": "2026-07-14T09:30:00+00:00",
        "model": {"name": "synthetic-readout", "parameters": W.size, "vocabulary": len(vocabulary), "layers": 1,
                  "width": width, "tied": False, "dtype": "float64", "device": "cpu"},
        "data": {"path": "demo/pairs.jsonl", "rows": 30, "used": len(pairs)},
        "objective": {"name": "DPO", "arguments": {"beta": 0.1}},
        "settings": {"scope": "full", "method": "naive", "eta": eta, "pairs": len(pairs), "top": 10, "seed": seed},
        "sequences": sequences,
        "verify": {"eta": eta, "order": float(np.log2(residuals[2] / residuals[1])), "etas": etas, "residuals": residuals,
                   "linearity": float(predicted @ moved / (predicted @ predicted))},
        "checks": {"row_sum_against_vector": 3.1e-7, "largest_probability_error": 1.2e-16},
        "seconds": {"load": 0.41, "trace": 1.93, "forces": 21.7, "verify": 3.02},
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.17.0", "numpy": "2.4.6"},
        "coverage": {"readout.weight": "exact", "embedding.weight": "frozen"},
        "findings": [
            {"title": f"“{vocabulary[y_o[best]].strip()}” moved most",
             "text": f"Its log-probability changed by {moved[best]:+.3f} nats, by prediction {predicted[best]:+.3f}."},
            {"title": "The answers as a whole",
             "text": f"Summed over {len(y_o)} observed tokens the step changed the log-probability by {total:+.2f} nats."},
            {"title": "The forces explain the step",
             "text": "Predicted and actual changes agree; what is left falls with the square of the learning rate."},
            {"title": "Pushing down lifts the argmax",
             "text": "Where a token was pushed down, the model's first choice gained in most places."},
        ],
    }  # fmt: skip
    return about, tokens, matrix


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
    assert np.array(payload["blocks"]).sum() == pytest.approx(run[2].astype(float).sum(), rel=1e-4, abs=1e-6)


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
