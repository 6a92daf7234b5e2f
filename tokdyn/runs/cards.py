"""The cards of a run: its pairs, with what its tables say of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

    def explain(self, m: int | str | None, l: int | str | None, per: str = "contexts", down: bool = False) -> Explanation:  # noqa: E741
        """See Run.explain."""
        check_view("rate", per)
        if self.pairs is None or self.contexts.run.matrix is None:
            raise ValueError(
                "this run kept no pairs by layer and kind: it has no complete matrix by tangents, its parts took more than a "
                "quarter of memory, or an earlier version wrote it; profile the update again"
            )
        run = self.contexts.run
        rows = None if m is None else run.rows_of("observed", m)
        columns = None if l is None else run.rows_of("updated", l)
        if rows is not None and columns is not None and len(rows) == len(columns) == 1:
            pair = rows[0], columns if per == "tokens" else self.contexts.members[int(self.contexts.column[columns[0]])]
        else:
            found = self.strongest(rows, columns, per, down)
            if found is None:
                by, on = f"of {l!r}" if l is not None else "", f"of {m!r}" if m is not None else ""
                raise ValueError(
                    " ".join(f"no update token {by} {'lowers' if down else 'moves'} a token {on} that stands elsewhere".split())
                    + ": say which pair, M and L"
                )
            pair = found
        card = self.card(*pair)
        if card is None:
            raise ValueError(
                f"the pair {pair[0]}, {pair[1][0]} is not among the {len(self.pairs.index)} strongest that were kept: profile "
                "with more pairs="
            )
        return card

    def strongest(
        self,
        rows: Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
        per: str = "contexts",
        down: bool = False,
    ) -> tuple[int, list[int]] | None:
        """The strongest force from elsewhere, as observed token and update tokens; None where there is none.

        What both answers of a pair say alike, place by place, counts as one (Contexts.alike_joined), but for one column alone.

        Args:
            rows, columns: among these; a context is among the columns if all its tokens are, or it is that of the only one.
            per: "contexts", net; "tokens", one by one.
            down: only what lowers.
        """
        of = self.contexts if columns is not None and len(columns) == 1 else self.contexts.alike_joined
        forces, members = of.others, of.members
        if per == "tokens":
            assert of.run.matrix is not None
            forces = of.run.matrix.where(of.column != of.own[:, None], 0.0)
            members = [[l] for l in range(len(of.column))]  # noqa: E741
        asked = set(range(len(of.column)) if columns is None else columns)
        kept = [x for x, of in enumerate(members) if asked.issuperset(of) or len(asked) == 1 and asked.issubset(of)]
        observed = list(range(len(forces)) if rows is None else rows)
        size = forces[observed][:, kept]
        size = -size.clamp(max=0) if down else size.abs()
        if not bool(size.any()):
            return None
        m, x = divmod(int(size.argmax()), size.shape[1])
        return observed[m], members[kept[x]]

    def strongest_net(self, n: int) -> Iterator[tuple[int, int, Explanation]]:
        """The n strongest net forces from elsewhere, and of rejected on chosen tokens, that were kept: m, context, card."""
        cells: dict[int, None] = {}
        for nets in (self.contexts.others, self.contexts.pushed_down):
            cells |= dict.fromkeys(nets.abs().flatten().topk(min(n, nets.numel())).indices.tolist())
        for cell in cells:
            m, x = divmod(cell, self.contexts.others.shape[1])
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
