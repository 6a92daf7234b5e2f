"""The cards of a run: its pairs, with what its tables say of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from .._arguments import check_view
from .by_sequence import BySequence
from .contexts import Contexts
from .explain import Explanation, facts_of
from .pairs import Pairs
from .watched import watched

WHOLE = {"rising": "risers", "falling": "fallers"}  # what the whole step does to the vocabulary, which is what a run knows


@dataclass(frozen=True)
class Cards:
    """Explanations of a run's pairs.

    Attributes:
        about, tokens, matrix, pairs: of the run.
    """

    about: Mapping[str, Any]
    tokens: Any
    matrix: Tensor | None
    pairs: Pairs | None

    @cached_property
    def contexts(self) -> Contexts:
        """The run's update tokens by context."""
        return Contexts.of(BySequence.of(self.tokens, self.matrix), self.about.get("sequences") or [])

    def explain(self, m: int | None, l: int | None, per: str = "contexts") -> Explanation:  # noqa: E741
        """See Run.explain."""
        check_view("rate", per)
        if self.pairs is None or self.contexts.run.matrix is None:
            raise ValueError(
                "this run kept no pairs by layer and kind: it has no complete matrix by tangents, its parts took more than a "
                "quarter of memory, or an earlier version wrote it; profile the update again"
            )
        run = self.contexts.run
        if m is None or l is None:
            card = self.strongest()
            if card is None:
                raise ValueError("no update token moves a token that stands elsewhere: say which pair, M and L")
            return card
        for name, index, size in (("M", m, len(run.observed)), ("L", l, len(run.updated))):
            if not 0 <= index < size:
                raise ValueError(f"{name} must lie in [0, {size}), got {index}")
        found = self.card(m, [l] if per == "tokens" else self.contexts.members[int(self.contexts.column[l])])
        if found is None:
            raise ValueError(
                f"the pair {m}, {l} is not among the {len(self.pairs.index)} strongest that were kept: profile with more pairs="
            )
        return found

    def strongest(self) -> Explanation | None:
        """The card of the strongest net force from elsewhere, that of the headline; None where there is none.

        What both answers of a pair say alike, place by place, counts as one (Contexts.alike_joined).
        """
        contexts = self.contexts.alike_joined
        if not bool(contexts.others.any()):
            return None
        m, x = divmod(int(contexts.others.abs().argmax()), contexts.others.shape[1])
        return self.card(m, contexts.members[x])

    def strongest_net(self, n: int) -> Iterator[tuple[int, int, Explanation]]:
        """The n strongest net forces from elsewhere that were kept: m, context, card."""
        nets = self.contexts.others
        for cell in nets.abs().flatten().topk(min(n, nets.numel())).indices.tolist():
            m, x = divmod(cell, nets.shape[1])
            card = self.card(m, self.contexts.members[x])
            if card is not None and card.facts["force"]:
                yield m, x, card

    def card(self, m: int, members: list[int]) -> Explanation | None:
        """The card of an observed token and some update tokens together; None where one of the pairs was not kept."""
        kept = None if self.pairs is None else self.pairs.of(m, members)
        if kept is None:
            return None
        parts, kernel = kept
        found: dict[str, Any] = {
            "force": sum(force for _, _, force in parts),
            "eta": self.about["settings"]["eta"],
            "observable": watched(self.about),
            "parts": parts,
            "kernel": kernel,
        }
        o = self.contexts.run.observed[m]
        step = {name: [(e["token"], e["delta"]) for e in o.get(key) or []][:5] for name, key in WHOLE.items()}
        if any(step.values()):
            found["step"] = step
        return Explanation(facts_of(self.contexts.run, m, members, found, self.about.get("sequences") or []))
