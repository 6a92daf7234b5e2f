"""What the tests of pages share: a run to show, and what they read out of HTML."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow as pa

from tokdyn.report import page

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


class Tags(HTMLParser):
    """Collects the start tags of a page, and the text of each <script> and <style>."""

    def __init__(self, html: str) -> None:
        """Parse `html`."""
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the tag; scripts and styles wait for their text."""
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        """Keep text, with the script or style it belongs to."""
        if self.cdata_elem:
            tag, attrs, text = self.raw.pop()
            self.raw.append((tag, attrs, text + data))
        else:
            self.text.append(data)

    @property
    def words(self) -> str:
        """The visible text, white space collapsed."""
        return " ".join(" ".join(self.text).split())


def payload_of(html: str) -> dict[str, Any]:
    """Return the data embedded in a page."""
    (text,) = [text for _, attrs, text in Tags(html).raw if attrs.get("id") == "payload"]
    return json.loads(text)
