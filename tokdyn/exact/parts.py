"""A force divided by what moves: F = Σ_p F_p, F_p[m,l] = <∇θ_p log pi(y_m), -P ∇θ_p L_l> of the parameters θ_p of a part.

Every part is a force of its own, that of a step on these parameters alone. A tied embedding is one tensor with two uses: what
its step as a lookup does to the readout and back belongs to neither and is a part called "tied", unless one part has both uses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from .._arguments import check_by
from ..model.trace import Tracer

TIED, OTHER = "tied", "other"
By = str | Mapping[str, str]
BOTH = "layer and kind"  # of a card
SEPARATOR = " · "  # of layer and kind

# last name of a projection's module -> what it is, inside attention and inside an MLP; as families of transformers call them
ATTENTION = {
    **dict.fromkeys(("q_proj", "query", "q_lin", "wq", "q"), "q"),
    **dict.fromkeys(("k_proj", "key", "k_lin", "wk", "k"), "k"),
    **dict.fromkeys(("v_proj", "value", "v_lin", "wv", "v"), "v"),
    **dict.fromkeys(("o_proj", "out_proj", "dense", "c_proj", "out_lin", "wo", "o"), "o"),
    **dict.fromkeys(("qkv_proj", "query_key_value", "c_attn", "qkv", "wqkv"), "qkv"),
}
MLP = {
    **dict.fromkeys(("gate_proj", "w1"), "gate"),
    **dict.fromkeys(("up_proj", "w3", "c_fc", "fc1", "fc_in", "dense_h_to_4h"), "up"),
    **dict.fromkeys(("down_proj", "w2", "c_proj", "fc2", "fc_out", "dense_4h_to_h"), "down"),
    **dict.fromkeys(("gate_up_proj",), "gate and up"),
}
EXPERT = re.compile(r"\.experts\.(\d+)\.")
ADAPTER = re.compile(r"\.(?:base_layer|original_module|modules_to_save|(?:lora|hada|lokr|oft|ia3|vera|randlora)_)")


@dataclass(frozen=True)
class Parts:
    """A partition of the uses that move.

    Attributes:
        names: of the parts, in the order of the model.
        of: use of a tensor -> its part, an index of `names`.
        tied: the part of what a tied embedding does from lookup to readout and back; None where it is not tied.
        experts: use of a tensor that holds a stack of experts -> the part of each (`of` has the first); empty unless asked for.
    """

    names: tuple[str, ...]
    of: Mapping[str, int]
    tied: int | None = None
    experts: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @classmethod
    def named(cls, tracer: Tracer, uses: Mapping[str, str], by: By) -> Parts:
        """The partition that a user calls by a name, or by a regular expression for each part (the first that is found counts).

        Args:
            tracer: the model.
            uses: what moves of it (scope.select).
            by: "layer", "module", "kind", "expert" (what is of no expert is "other"), or name -> regular expression over
                parameter names; what none finds is "other".

        Raises:
            ValueError: another name, an expression that is not valid or finds nothing that moves; no experts to tell apart.
        """
        name_of = _naming(tracer, uses, by)
        head, first = tracer.readout.weight_name, dict[str, str]()
        for use, tensor in uses.items():  # a tensor that modules share counts where it is named first
            if use != head:
                first.setdefault(tensor, use)
        named = {use: name_of(use if use == head else first[tensor]) for use, tensor in uses.items()}
        stacks = {
            use: [f"{named[use]}{e}" for e in range(n)] for use, n in (_stacks(tracer, uses) if by == "expert" else {}).items()
        }
        named |= {use: of[0] for use, of in stacks.items()}
        names = dict.fromkeys(name for use, of in named.items() for name in stacks.get(use, [of]))
        tied = None
        if head in uses and uses[head] in first:
            lookup = named[first[uses[head]]]
            tied = lookup if lookup == named[head] else TIED
            names.setdefault(tied)
        index = {name: i for i, name in enumerate(names)}
        experts = {use: tuple(index[name] for name in of) for use, of in stacks.items()}
        of = {use: index[name] for use, name in named.items()}
        return cls(tuple(names), of, None if tied is None else index[tied], experts)

    def uses(self, part: int, among: Mapping[str, str]) -> dict[str, str]:
        """The uses of one part."""
        return {use: tensor for use, tensor in among.items() if part in self.experts.get(use, (self.of[use],))}

    def only(self, of: Mapping[str, int], tied: int | None = None) -> tuple[list[int], Parts]:
        """Some parts, of these uses: their indices here, and the partition of these uses."""
        index = sorted({*of.values()} | ({tied} if tied is not None else set()))
        place = {part: i for i, part in enumerate(index)}
        names = tuple(self.names[part] for part in index)
        return index, Parts(names, {use: place[part] for use, part in of.items()}, None if tied is None else place[tied])

    def rounds(self, among: Mapping[str, str], module: Mapping[str, str]) -> Iterator[dict[str, str]]:
        """The uses in sets that hold of no module more than one part, as few as that takes; module is that of each use."""
        turn: dict[str, dict[int, int]] = {}
        for use in among:
            if use in module:
                turns = turn.setdefault(module[use], {})
                turns.setdefault(self.of[use], len(turns))
        for n in range(max([1, *map(len, turn.values())])):
            yield {use: of for use, of in among.items() if n == (turn[module[use]][self.of[use]] if use in module else 0)}


def _naming(tracer: Tracer, uses: Mapping[str, str], by: By) -> Callable[[str], str]:
    """From the name of a use to that of its part."""
    if isinstance(by, str):
        if by != BOTH:
            check_by(by)
        if by == BOTH:
            return _both(_Layers(tracer, uses), _Kinds(tracer))
        if by == "expert":
            return _expert(_Layers(tracer, uses), uses)
        known: dict[str, Callable[[str], str]] = {"layer": _Layers(tracer, uses), "module": _module, "kind": _Kinds(tracer)}
        return known[by]
    patterns = {}
    for name, expression in by.items():
        try:
            patterns[name] = re.compile(expression)
        except re.error as error:
            raise ValueError(f"by[{name!r}] must be a regular expression, got {expression!r}: {error}") from None

    def named(use: str) -> str:
        return next((name for name, pattern in patterns.items() if pattern.search(use)), OTHER)

    found = {named(use) for use in uses}
    for name in patterns:
        if name not in found:
            raise ValueError(f"by[{name!r}]={by[name]!r} finds no parameter that moves and is not found before")
    return named


def _both(layer: Callable[[str], str], kind: Callable[[str], str]) -> Callable[[str], str]:
    """Layer and kind in one name; the kind alone outside of layers."""
    return lambda use: kind(use) if layer(use) == kind(use) else f"{layer(use)}{SEPARATOR}{kind(use)}"


def _expert(layer: _Layers, uses: Mapping[str, str]) -> Callable[[str], str]:
    """The expert of a layer that a parameter belongs to, without its number where a tensor holds all; "other" outside.

    Raises:
        ValueError: nothing that moves belongs to one.
    """
    stacks = _stacks(layer.tracer, uses)

    def named(use: str) -> str:
        number = "" if use in stacks else found[1] if (found := EXPERT.search(use)) else None
        if number is None:
            return OTHER
        return f"{layer(use)}{SEPARATOR}expert {number}" if layer.place(use) else f"expert {number}"

    if all(named(use) == OTHER for use in uses):
        raise ValueError(
            'by="expert": no parameter that moves belongs to an expert; by="layer", "module" or "kind" divide others'
        )
    return named


def _stacks(tracer: Tracer, uses: Mapping[str, str]) -> dict[str, int]:
    """Uses of tensors that hold one matrix or bias of every expert one after the other, and how many those are."""
    found = {}
    for use in uses:
        path, _, name = use.rpartition(".")
        if "expert" in path.rpartition(".")[2].lower():
            own = dict(tracer.model.get_submodule(path).named_parameters(recurse=False))
            if name in own and len({len(p) for p in own.values()}) == 1 and any(p.dim() == 3 for p in own.values()):
                found[use] = len(own[name])
    return found


def _module(use: str) -> str:
    """The module that a parameter belongs to, an adapter's the one that it adapts."""
    adapted = ADAPTER.split(use)[0]
    return adapted if adapted != use else use.rpartition(".")[0] or use


@dataclass(frozen=True)
class _Kinds:
    """What a parameter is for, told from the names that families of transformers use; "other" where they do not tell."""

    tracer: Tracer

    def __call__(self, use: str) -> str:
        head = self.tracer.readout
        if use in (head.weight_name, head.bias_name):
            return "readout"
        path = _module(use).split(".")
        module = self.tracer.model.get_submodule(".".join(path)) if len(path) > 1 or path[0] != use else self.tracer.model
        owner = getattr(module, "base_layer", module)
        if isinstance(owner, nn.Embedding):
            return "embedding"
        last, words = path[-1], [word.lower() for word in path]
        if "norm" in type(owner).__name__.lower() or any("norm" in word or word.startswith("ln_") for word in words[-3:]):
            return "norms"
        beside = self.tracer.model.get_submodule(".".join(path[:-1]))
        if last in ("router", "shared_expert_gate") or (last == "gate" and hasattr(beside, "experts")):
            return "router"
        if any("expert" in word for word in words):
            return "experts"
        if any("attn" in word or "attention" in word for word in words):
            return f"attention {ATTENTION[last]}" if last in ATTENTION else "attention"
        if any(word in ("mlp", "ffn", "feed_forward", "feedforward") for word in words) or last in ("fc1", "fc2"):
            return f"MLP {MLP[last]}" if last in MLP else "MLP"
        return OTHER


class _Layers:
    """The layer of a parameter: the first number in its name that counts modules of a list; outside of layers its kind."""

    def __init__(self, tracer: Tracer, uses: Mapping[str, str]) -> None:
        self.tracer, self.kind = tracer, _Kinds(tracer)
        self.lists = {found[0] for use in uses if (found := self.place(use)) is not None}

    def place(self, use: str) -> tuple[str, str] | None:
        """The list of modules and the number there of the layer that a parameter is in; None outside of layers."""
        path = use.split(".")
        for i, word in enumerate(path[1:], 1):
            name = ".".join(path[:i])
            if word.isdigit() and isinstance(self.tracer.model.get_submodule(name), nn.ModuleList):
                return name, word
        return None

    def __call__(self, use: str) -> str:
        found = self.place(use)
        if found is None:
            return self.kind(use)
        return f"layer {found[1]}" if len(self.lists) == 1 else f"{found[0]} {found[1]}"
