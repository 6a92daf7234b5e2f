"""The two sides of a decomposition: tokens with a force at their logits, before and after their logits were seen.

gather          sequences, objective -> Observed, Update: checked and in batches, no model has run
.score(tracer)  a forward pass over one of them -> ScoredSide: statistics, c of the loss, the row table
.score_batch    the same for one batch whose logits some other pass has made (products.vjp_scored, jvp_scored)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..model.trace import Tracer, finite_stats, trace
from ..objective import GTerm, Objective, Scores
from ..observables import LogProb, Observable, values
from ..ops import TokenStats, topk_log_probs
from ..ops.rows import blocks
from ..sequences import Batch, Chi

BATCH = 2048  # padded positions of a batch


@dataclass(frozen=True)
class Side:
    """Tokens with a force at their logits: batches and, for each, the GTerm of its tokens."""

    batches: Sequence[Batch]
    terms: Sequence[GTerm]

    def __len__(self) -> int:
        return sum(len(batch.targets) for batch in self.batches)

    @property
    def where(self) -> list[Int[Tensor, " N"]]:
        """By batch, the places of its tokens on this side's axis of F."""
        return list(torch.arange(len(self)).split([len(batch.targets) for batch in self.batches]))

    def part(self, weights: Float[Tensor, " N"]) -> Side:
        """The tokens with their forces times a weight each; batches of which all weights are 0 are left out."""
        batches, terms = [], []
        sizes = [len(batch.targets) for batch in self.batches]
        for batch, term, w in zip(self.batches, self.terms, weights.split(sizes), strict=True):
            if bool(w.any()):
                batches.append(batch)
                terms.append(term.times(w))
        return Side(batches, terms)

    def logit_force(self, b: int, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Γ of the tokens of batch b, in float32 at least."""
        return _force(self.terms[b], logits)

    def work(self, b: int, logits: Float[Tensor, "N V"], velocity: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """<Γ_n, ż_n> of the tokens of batch b; their Γ are never held at once."""
        return _work(self.terms[b], logits, velocity)

    def one_by_one(self) -> Side:
        """The same tokens in the same order with every sequence in a batch of its own, cut behind its last scored token."""
        batches, terms = [], []
        for batch, term in zip(self.batches, self.terms, strict=True):
            row = batch.rows // batch.ids.shape[1]
            for k in row.unique().tolist():
                batches.append(batch.alone(k))
                terms.append(term.rows((row == k).nonzero().flatten().to(term.c.device)))
        return Side(batches, terms)

    def row_blocks(self, rows: int) -> Iterator[Side]:
        """Whole sequences, as many as have at most so many tokens (one at least)."""
        singles = self.one_by_one()
        start = 0
        while start < len(singles.batches):
            stop, n = start, 0
            while stop < len(singles.batches) and (stop == start or n + len(singles.batches[stop].targets) <= rows):
                n += len(singles.batches[stop].targets)
                stop += 1
            yield Side(singles.batches[start:stop], singles.terms[start:stop])
            start = stop

    def hidden(self, tracer: Tracer) -> Float[Tensor, "N d"]:
        """The readout's input at all tokens."""
        return torch.cat([tracer.hidden(batch) for batch in self.batches]).to(tracer.precision)

    def ids(self, device: torch.device) -> Int[Tensor, " I"]:
        """All ids that the sequences hold, each once and in order."""
        return torch.cat([batch.ids.flatten() for batch in self.batches]).unique().to(device)


def _force(term: GTerm, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    out = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
    for rows in blocks(logits):
        out[rows] = term.rows(rows).logit_force(logits[rows])
    return out


def _work(term: GTerm, logits: Float[Tensor, "N V"], velocity: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    return torch.cat([(term.rows(rows).logit_force(logits[rows]) * velocity[rows]).sum(1) for rows in blocks(logits)])


class ScoredBatch(NamedTuple):
    """What the logits of a batch gave: their statistics, the force of its tokens, and the observable's values where watched."""

    stats: TokenStats
    term: GTerm
    watched: Tensor | None = None

    def logit_force(self, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Γ of the tokens, in float32 at least."""
        return _force(self.term, logits)

    def work(self, logits: Float[Tensor, "N V"], velocity: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """<Γ_n, ż_n> of the tokens."""
        return _work(self.term, logits, velocity)


@dataclass(frozen=True)
class ScoredSide(Side):
    """A side whose logits were seen, with the sequences it is made of and the statistics of each scored token.

    Attributes:
        chis, stats: see above.
        observable: what is watched at its tokens; None of an update.
        watched: its values [N].
    """

    chis: Sequence[Chi]
    stats: TokenStats
    observable: Observable | None = None
    watched: Tensor | None = None

    @property
    def c(self) -> Float[Tensor, " N"]:
        """c of the tokens themselves, where an objective has further targets."""
        return torch.cat([term.own_c for term in self.terms])

    def table(self, with_c: bool) -> Any:
        """Row table (pyarrow) of the tokens, with or without the column c."""
        table = row_table(self.batches, self.stats, self.chis, self.c if with_c else None)
        if self.watched is None or isinstance(self.observable, LogProb):
            return table
        return table.append_column("value", [self.watched.tolist()])

    def values(self, b: int, logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """The observable of the tokens of batch b at other logits, in float64: for differences over one small step."""
        assert self.observable is not None
        return values(self.observable, logits, self.terms[b].targets)


@dataclass(frozen=True)
class Unscored:
    """Sequences in batches whose logits no pass has seen yet."""

    batches: list[Batch]
    chis: Sequence[Chi]

    @property
    def is_by_batch(self) -> bool:
        """Whether a batch can be scored without the others, by any pass that makes its logits."""
        return True

    @property
    def watches(self) -> Observable | None:
        """What is watched at the tokens, if something is."""
        return None

    def score_batch(self, b: int, logits: Float[Tensor, "N V"]) -> ScoredBatch:
        """Statistics and forces of batch b from its logits (detached).

        Raises:
            ValueError: NaN logits; a c that is not finite, or sequences that do not fit the objective.
        """
        raise NotImplementedError

    def side(self, scored: Sequence[ScoredBatch]) -> ScoredSide:
        """The side, once every batch is scored."""
        stats, terms, watched = zip(*scored, strict=True)
        found = None if watched[0] is None else torch.cat(watched)
        return ScoredSide(self.batches, list(terms), self.chis, TokenStats.joined(stats), self.watches, found)

    @torch.no_grad()
    def score(self, tracer: Tracer) -> ScoredSide:
        """Score all batches in a forward pass of its own; the logits of one batch are held at a time."""
        return self.side([self.score_batch(b, tracer.logits(batch)) for b, batch in enumerate(self.batches)])


class Asked(NamedTuple):
    """What a user asks about."""

    update: Sequence[Chi]
    observe: Sequence[Chi]
    objective: Objective
    reference: nn.Module | None = None
    weights: Tensor | None = None
    optimizer: torch.optim.Optimizer | None = None
    observable: Observable = LogProb()


@dataclass(frozen=True)
class Observed(Unscored):
    """Tokens at which something is watched, each with a weight: Γ = w ∂O/∂z, w (e_y - pi) of a log-probability.

    Attributes:
        weights, tokens: by batch; the tokens that the observable is about.
        observable: what is watched.
    """

    weights: Sequence[Tensor]
    tokens: Sequence[Tensor]
    observable: Observable

    @classmethod
    def of(
        cls,
        tracer: Tracer,
        chis: Sequence[Chi],
        observable: Observable = LogProb(),  # noqa: B008
        weights: Float[Tensor, " M"] | None = None,
        others: Sequence[Chi] = (),
    ) -> Observed:
        """The sequences in batches, what is watched at their tokens (others: the update's sequences), and their weights.

        Raises:
            ValueError: ids outside the vocabulary, weights of another length; see the observable's `tokens`.
        """
        batches = tracer.batches(chis, BATCH)
        sizes = [len(batch.targets) for batch in batches]
        M = sum(sizes)
        ones = torch.ones(M, dtype=tracer.precision, device=tracer.device)
        w = ones if weights is None else weights.to(tracer.device, tracer.precision)
        if w.shape != (M,):
            raise ValueError(f"weights must have shape [M]=({M},), one per observed token, got {list(w.shape)}")
        tokens = observable.tokens(chis, others)
        return cls(batches, chis, w.split(sizes), tokens.split(sizes), observable)

    @property
    def watches(self) -> Observable | None:
        """See Unscored."""
        return self.observable

    def score_batch(self, b: int, logits: Float[Tensor, "N V"]) -> ScoredBatch:
        """See Unscored.

        Raises:
            ValueError: see Unscored, and the observable's own.
        """
        stats = finite_stats(self.batches[b], logits)
        term = self.observable.term(logits, self.tokens[b].to(logits.device))
        if isinstance(self.observable, LogProb):
            watched = stats.log_prob
        else:
            watched = torch.cat([self.observable.values(logits[rows], term.targets[rows]) for rows in blocks(logits)])
        return ScoredBatch(stats, term.times(self.weights[b]), watched)


@dataclass(frozen=True)
class Update(Unscored):
    """An update, whose objective is asked for c once the logits that c depends on have been seen."""

    objective: Objective

    @property
    def is_by_batch(self) -> bool:
        """Whether c of a batch depends on no other batch."""
        return self.objective.by_sequence or len(self.batches) == 1

    def score_batch(self, b: int, logits: Float[Tensor, "N V"]) -> ScoredBatch:
        """See Unscored; for objectives whose sequences do not meet, or an update of one batch."""
        stats = finite_stats(self.batches[b], logits)
        return ScoredBatch(stats, self._ask([b], stats, _scores(self.objective, logits, stats)))

    @torch.no_grad()
    def score(self, tracer: Tracer) -> ScoredSide:
        """See Unscored. Where sequences of several batches meet, the objective is asked once, for all of them."""
        if self.is_by_batch:
            return super().score(tracer)
        stats, scores = [], []
        for batch in self.batches:
            logits = tracer.logits(batch)
            stats.append(finite_stats(batch, logits))
            scores.append(_scores(self.objective, logits, stats[-1]))
        term = self._ask(range(len(self.batches)), TokenStats.joined(stats), Scores.joined(scores))
        terms = term.split([len(batch.targets) for batch in self.batches])
        return self.side([ScoredBatch(*of) for of in zip(stats, terms, strict=True)])

    def _ask(self, which: Sequence[int], stats: TokenStats, scores: Scores) -> GTerm:
        sequence = torch.cat([self.batches[b].sequence for b in which])
        term = self.objective.g_terms(stats.log_prob, [self.chis[s] for s in sequence.unique().tolist()], scores)
        broken = ~term.c.reshape(len(sequence), -1).isfinite().all(1)
        if bool(broken.any()):
            raise ValueError(
                f"{type(self.objective).__name__} gives sequence {int(sequence[broken.cpu()][0])} a weight c that is not "
                "finite: its constants, its advantage, or its reference or old log-probs are far out of range"
            )
        return term


def gather(tracer: Tracer, asked: Asked) -> tuple[Observed, Update]:
    """Both sides, checked and in batches; no forward pass has been made, but one of a reference over what lacks its log-probs.

    Raises:
        ValueError: an empty side, ids outside the vocabulary, weights of another length; NaN logits of the reference.
    """
    update = asked.update if asked.reference is None else with_reference(asked.update, asked.reference)
    observe = asked.observe
    for name, chis in (("update", update), ("observe", observe)):
        if not chis or not sum(len(chi) for chi in chis):
            raise ValueError(f"{name} holds no scored token: give at least one sequence with a response")
        if not all(len(chi) for chi in chis):
            raise ValueError(f"sequence {[len(chi) for chi in chis].index(0)} of {name} holds no scored token: leave it out")
    observed = Observed.of(tracer, observe, asked.observable, asked.weights, asked.update)
    return observed, Update(tracer.batches(update, BATCH), update, asked.objective)


def _scores(objective: Objective, z: Float[Tensor, "N V"], stats: TokenStats) -> Scores:
    """What the objective reads of a batch's logits beside log-probs."""
    return Scores.needed(
        objective,
        entropy=lambda: stats.entropy,
        mean_log_prob=lambda: z.mean(1) - stats.logsumexp,
        candidates=lambda k: topk_log_probs(z, k),
    )


def with_reference(chis: Sequence[Chi], reference: nn.Module) -> list[Chi]:
    """The sequences with log pi_ref of a reference model filled in, where they do not bring their own."""
    if all(chi.reference_log_probs is not None for chi in chis):
        return list(chis)
    with trace(reference) as tracer:
        return referred(chis, tracer)


def referred(chis: Sequence[Chi], reference: Tracer) -> list[Chi]:
    """The same of a reference that is traced already."""
    wanting = [i for i, chi in enumerate(chis) if chi.reference_log_probs is None]
    filled = list(chis)
    if wanting:
        log_probs = torch.cat([stats.log_prob for _, _, stats in reference.score([chis[i] for i in wanting])])
        for i, part in zip(wanting, log_probs.split([len(chis[i]) for i in wanting]), strict=True):
            filled[i] = chis[i].with_(reference_log_probs=part)
    return filled


def row_table(batches: Sequence[Batch], stats: TokenStats, chis: Sequence[Chi], c: Tensor | None = None) -> Any:
    """One row per scored token (pyarrow): where it stands, what it is, and its statistics under the model."""
    import pyarrow as pa

    sequence, position, ids = (
        torch.cat([getattr(batch, name) for batch in batches]).tolist() for name in ("sequence", "position", "targets")
    )
    own = [chis[s] for s in sequence]
    columns: dict[str, list[Any]] = dict(
        sequence=sequence, group=[chi.group for chi in own], role=[chi.role for chi in own], position=position, token_id=ids,
        token=[chi.tokens[t] if chi.tokens else f"<{y}>" for chi, t, y in zip(own, position, ids, strict=True)],
    )  # fmt: skip
    columns |= {key: column.tolist() for key, column in stats._asdict().items()}
    if c is not None:
        columns["c"] = c.tolist()
    return pa.table(columns)


def with_sides(updated: Any, observed: Any) -> Any:
    """Both row tables as one: `side` says which, `row` is the index on the matrix axis of that side."""
    import pyarrow as pa

    tables = []
    for side, table in (("updated", updated), ("observed", observed)):
        n = table.num_rows
        table = table.add_column(0, "row", pa.array(range(n), pa.int64()))
        tables.append(table.add_column(0, "side", pa.array([side] * n, pa.string())))
    return pa.concat_tables(tables, promote_options="default")
