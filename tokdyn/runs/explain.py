"""Why one token moves another: the card of a pair, its sentence, and the rules that the sentence keeps (docs/explain.md).

    sentence(facts)  from the numbers of a pair to words; nothing is said that no number says
    Explanation      the facts as a dict, as text and as HTML

`facts` holds: force [unit per unit learning rate], eta or None, observable {label, unit}; observed {name, token, log_prob,
entropy, g_norm}; updated {name, members: [{token, c, g_norm}]}; parts [(layer, kind, force)]; shared {context, token, prefix};
texts {observed, updated}; and where they are known kernel {readout, cosine, scalar}, gradient_cosine, vocabulary {rising,
falling} because of the pair, step {rising, falling} because of the whole update, optimizer {force, plain}.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..sequences import visible
from .by_sequence import BySequence, Row

Facts = Mapping[str, Any]
Part = tuple[str, str, float]  # layer, kind, force

KEPT = 1 / 3  # of Σ|parts|: a force that keeps less of them is said to be what is left of parts that cancel
CARRIES = 1 / 2  # of the force: groups are named until they carry so much of it
QUARTER, MOST = 1 / 4, 3  # of the force: a group that carries so much is named as well; how many are named for the half
AGAINST = 1 / 5  # of the force: a group that takes away so much is named
LAYERS = 2 / 3  # of a group: the layers that are named carry so much of it
NEAR, ALIKE = 0.9, 0.5  # cosine of the hidden states
DEFINED = 1e-3  # cosine of g and γ from which the kernel is told in one number

GROUPS = {"attention": "attention", "MLP": "MLPs", "embedding": "embedding", "readout": "readout", "norms": "norms",
          "router": "routers", "experts": "experts", "tied": "tie of embedding and readout"}  # fmt: skip


def facts_of(run: BySequence, m: int, members: Sequence[int], found: Facts, sequences: Sequence[Facts] = ()) -> dict[str, Any]:
    """The facts of observed token m and the update tokens `members`, which stand behind one text.

    Args:
        run: the token tables; rows with a `context` tell what the two texts share.
        m, members: rows of them.
        found: what was computed of the pair: force, parts, observable, and what else is known; kernel has `product`, <g, γ>.
        sequences: those of run.json, for the prompts.
    """
    o, us = run.observed[m], [run.updated[l] for l in members]  # noqa: E741
    tokens = "/".join(dict.fromkeys(visible(u["token"]) for u in us))
    names = dict.fromkeys(run.name(u) for u in us)
    facts = dict(found) | {
        "observed": {"name": f"“{visible(o['token'])}” {run.place(o)}"}
        | {k: o.get(k) for k in ("row", "token", "log_prob", "entropy", "g_norm")},
        "updated": {
            "name": f"“{tokens}” {', '.join(names)} @{us[0]['position']}",
            "members": [{k: u.get(k) for k in ("row", "token", "c", "g_norm")} for u in us],
        },
        "shared": _shared(run, o, us[0]),
        "texts": {
            "observed": _text(run.observed, o, "observed", sequences),
            "updated": _text(run.updated, us[0], "updated", sequences),
        },
    }
    kernel = found.get("kernel")
    if kernel:
        product = kernel["product"]
        size = o["g_norm"] * sum(abs(u["c"] or 0) * u["g_norm"] for u in us)
        defined = abs(product) > DEFINED * size
        facts["kernel"] = {**kernel, "scalar": found["force"] / product if defined else None}
    return facts


def _shared(run: BySequence, o: Row, u: Row) -> dict[str, Any]:
    """Whether the two tokens, and the texts before them, are the same, and how many tokens their sequences begin with alike."""
    context = o.get("context") is not None and o["context"] == u.get("context")
    mine = {row["context"]: row for row in run.observed if row["sequence"] == o["sequence"] and row.get("context") is not None}
    prefix = 0
    for row in run.updated:
        other = mine.get(row.get("context")) if row["sequence"] == u["sequence"] else None
        if other is not None:
            prefix = max(prefix, row["position"] + int(other["token_id"] == row["token_id"]))
    return {"context": context, "token": o["token_id"] == u["token_id"], "prefix": prefix}


def _text(rows: Sequence[Row], row: Row, side: str, sequences: Sequence[Facts], n: int = 60) -> str:
    """The end of the text before a token, and the token in brackets."""
    prompt = next(
        (s.get("prompt") or "" for s in sequences if s.get("side") == side and s.get("sequence") == row["sequence"]), ""
    )
    before = "".join(r["token"] for r in rows if r["sequence"] == row["sequence"] and r["position"] < row["position"])
    text = " ".join((prompt + before).split())
    return f"{'…' if len(text) > n else ''}{text[-n:]} [{visible(row['token'])}]"


def group(kind: str) -> str:
    """What a kind is called in a sentence: "attention q" is attention, "MLP up" the MLPs."""
    return GROUPS.get(kind.split(" ")[0], "other parameters")


def sums(parts: Sequence[Part], of: int | None = None) -> dict[str, float]:
    """The force by layer (of=0), by kind (1), or by group of kinds (None), in order of appearance."""
    found: dict[str, float] = {}
    for part in parts:
        name = group(part[1]) if of is None else str(part[of])
        found[name] = found.get(name, 0.0) + part[2]
    return found


def kept(parts: Sequence[Part]) -> float:
    """|Σ parts| / Σ |parts| over groups and layers: 1 where all push one way, near 0 where they cancel."""
    cells: dict[tuple[str, str], float] = {}
    for layer, kind, force in parts:
        cells[layer, group(kind)] = cells.get((layer, group(kind)), 0.0) + force
    gross = sum(map(abs, cells.values()))
    return abs(sum(cells.values())) / gross if gross else 0.0


def sentence(facts: Facts) -> str:
    """One sentence that says what the pair's numbers say, by the rules in docs/explain.md."""
    clauses = [where(facts["parts"], facts["force"]), _why(facts), _pull(facts["updated"]["members"]), _optimizer(facts)]
    said = [clause for clause in clauses if clause]
    return f"{_what(facts)}{': ' if said else ''}{'; '.join(said)}."


def _what(facts: Facts) -> str:
    """Who moves whom, and how much."""
    force, eta, label = facts["force"], facts.get("eta"), facts["observable"]["label"]
    plain = label == "log-probability"
    verb = ("lifts", "lowers") if plain else (f"raises the {label} at", f"lowers the {label} at")
    unit = facts["observable"]["unit"]
    size = f"{_signed(force)} {unit} per unit learning rate" if eta is None else f"{_signed(eta * force)} {unit} in this step"
    return f"{facts['updated']['name']} {verb[force < 0]} {facts['observed']['name']}, {size}"


def where(parts: Sequence[Part], force: float) -> str:
    """Which groups of parameters carry a force, or that they cancel."""
    if not parts or not force:
        return ""
    if kept(parts) < KEPT:
        cells: dict[str, float] = {}
        for layer, kind, x in parts:
            name = _the(group(kind), [layer] if layer.startswith("layer ") else [])
            cells[name] = cells.get(name, 0.0) + x
        up, down = max(cells, key=lambda name: cells[name]), min(cells, key=lambda name: cells[name])
        return f"its parts cancel, {100 * kept(parts):.0f}% of them is left: most up by {up}, most down by {down}"
    share = {name: x / force for name, x in sums(parts).items()}
    ranked = sorted(share, key=lambda name: -share[name])
    named, carried = list[str](), 0.0
    for name in ranked:
        if carried < CARRIES and len(named) < MOST or share[name] >= QUARTER:
            named.append(name)
            carried += share[name]
    words = []
    for name in named:
        layers = _layers([part for part in parts if group(part[1]) == name], force)
        inside = sum(x for layer, kind, x in parts if group(kind) == name and (not layers or layer in layers)) / force
        words.append(f"{_the(name, layers)} ({100 * inside:.0f}%)")
    against = [
        f"{_the(name, [])} ({100 * share[name]:.0f}%)".replace("-", "−") for name in ranked[::-1] if share[name] <= -AGAINST
    ]
    goes = f"the {'pull' if force > 0 else 'push'} goes through {_listed(words)}"
    return goes + (f", against {' and '.join(against[:2])}" if against else "")


def _layers(parts: Sequence[Part], force: float) -> list[str]:
    """The shortest run of neighbouring layers that carries LAYERS of a group; none for one layer, or all of them."""
    by_layer = {layer: x / force for layer, x in sums(parts, 0).items() if layer.startswith("layer ")}
    names, total = list(by_layer), sum(by_layer.values())
    for length in range(1, len(names)):
        best = max(
            (names[i : i + length] for i in range(len(names) - length + 1)), key=lambda run: sum(by_layer[n] for n in run)
        )
        if sum(by_layer[name] for name in best) >= LAYERS * total:
            return best
    return []


def _listed(words: Sequence[str]) -> str:
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"


def _the(name: str, layers: Sequence[str]) -> str:
    numbers = [layer.removeprefix("layer ") for layer in layers]
    which = (
        f" of layer{'s' * (len(numbers) > 1)} {numbers[0]}{f'–{numbers[-1]}' if len(numbers) > 1 else ''}" if numbers else ""
    )
    return f"the {name}{which}"


def _why(facts: Facts) -> str:
    """What the two positions have in common."""
    shared, kernel = facts.get("shared") or {}, facts.get("kernel") or {}
    if shared.get("context"):
        return "both stand behind the same text"
    cosine = kernel.get("cosine")
    if cosine is None:
        return ""
    how = (
        "nearly the same hidden state" if cosine >= NEAR else "similar hidden states" if cosine >= ALIKE
        else "opposed hidden states" if cosine <= -ALIKE else "hidden states with little in common"
    )  # fmt: skip
    return f"the two positions have {how} (cosine {cosine:.2f})".replace("-", "−")


def _pull(members: Sequence[Mapping[str, Any]]) -> str:
    """Which way the loss moves the update tokens themselves."""
    up, down = ([m for m in members if m.get("c") is not None and m["c"] * sign > 0] for sign in (1, -1))
    said = []
    for of, verb, way in ((up, "pulls", "up"), (down, "pushes", "down")):
        if of:
            tokens = "/".join(dict.fromkeys(visible(m["token"]) for m in of))
            said.append(f"{verb} “{tokens}” {way}")
    return f"the loss {' and '.join(said)} there" if said else ""


def _optimizer(facts: Facts) -> str:
    """What the pair does without the optimizer's preconditioner."""
    found = facts.get("optimizer")
    if not found:
        return ""
    return f"a plain gradient step would do {_signed(found['plain'])} per unit learning rate"


def _signed(x: float) -> str:
    """A number with its sign, three significant digits, and a minus that reads as one."""
    return f"{x:+.3g}".replace("-", "−")


@dataclass(frozen=True)
class Explanation:
    """The card of a pair of tokens: its facts, as a dict, as text and as HTML."""

    facts: Facts

    @property
    def sentence(self) -> str:
        """See `sentence`."""
        return sentence(self.facts)

    @property
    def address(self) -> str:
        """What selects the two tokens on the page of their run, behind its name: "#m=9&l=2"."""
        return f"#m={self.facts['observed']['row']}&l={self.facts['updated']['members'][0]['row']}"

    def to_dict(self) -> dict[str, Any]:
        """The facts with the sentence, of plain types."""
        return {**self.facts, "sentence": self.sentence}

    @property
    def text(self) -> str:
        """The card as lines of text."""
        return "\n".join([self.sentence, "", *(f"{name:<9} {value}" for name, value in _lines(self.facts))])

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in _lines(self.facts)
        )
        return f"<p>{html.escape(self.sentence)}</p><table>{rows}</table>"


def _lines(facts: Facts) -> list[tuple[str, str]]:
    """The card's lines as (name, value): A, G, K, parts, texts, vocabulary."""
    o, members, unit = facts["observed"], facts["updated"]["members"], facts["observable"]["unit"]
    lines = [("A", f"log π {o['log_prob']:.3f} nats, entropy {o['entropy']:.3f} nats, ‖e − π‖ {o['g_norm']:.3f}")]
    for m in members:
        lines.append(("G", f"“{visible(m['token'])}” c {_signed(m['c'])}, ‖G‖ {abs(m['c']) * m['g_norm']:.3f}"))
    kernel = facts.get("kernel")
    if kernel:
        scalar = "not defined: <g, γ> is nearly 0" if kernel["scalar"] is None else f"{kernel['scalar']:.3g}"
        lines.append(
            ("K", f"F/<g, γ> {scalar}; of the readout h·h {kernel['readout']:.3g}; cosine of h {kernel['cosine']:.2f}")
        )
    if facts.get("gradient_cosine") is not None:
        lines.append(("", f"cosine of the two tokens' gradients {facts['gradient_cosine']:.3f}"))
    for of, name in ((0, "by layer"), (1, "by kind")):
        for i, (part, force) in enumerate(sums(facts["parts"], of).items()):
            share = f" {round(100 * force / facts['force']):4}%" if facts["force"] else ""
            lines.append((name if i == 0 else "", f"{part:<24} {_signed(force):>10} {unit}/lr{share}"))
    if facts.get("texts"):
        lines += [("observed", facts["texts"]["observed"]), ("update", facts["texts"]["updated"])]
    shared = facts.get("shared")
    if shared:
        lines.append(
            (
                "shared",
                f"the first {shared['prefix']} tokens of the sequences; the same token: {'yes' if shared['token'] else 'no'}",
            )
        )
    for key, whose in (("vocabulary", ""), ("step", ", by the whole step")):
        for name, entries in (facts.get(key) or {}).items():
            lines.append((name, "  ".join(f"“{visible(token)}” {_signed(x)}" for token, x in entries) + whose))
    if facts.get("optimizer"):
        lines.append(
            ("optimizer", f"{_signed(facts['optimizer']['force'])} under its P, {_signed(facts['optimizer']['plain'])} plain")
        )
    return [(name, value.replace("-", "−")) for name, value in lines]
