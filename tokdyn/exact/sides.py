"""Both sides of a decomposition: sequences scored once, c from the objective, and their row tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import ops
from ..model.trace import Tracer, finite_stats, trace
from ..objective import GTerm, Objective, Scores
from ..sequences import Batch, Chi
from . import Side


@dataclass(frozen=True)
class Noted(Side):
    """A side that keeps the statistics of the logits it is asked about: a pass over it need not be repeated for them.

    Raises:
        ValueError: NaN logits, when they are seen.
    """

    stats: dict[int, ops.TokenStats] = field(default_factory=dict)  # by batch

    def force(self, b: int, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """As in Side."""
        self.note(b, logits)
        return super().force(b, logits)

    def work(self, b: int, logits: Float[Tensor, "N V"], velocity: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """As in Side."""
        self.note(b, logits)
        return super().work(b, logits, velocity)

    def note(self, b: int, logits: Float[Tensor, "N V"]) -> None:
        """Keep the statistics of a batch's logits."""
        if b not in self.stats:
            self.stats[b] = finite_stats(self.batches[b], logits.detach())

    @torch.no_grad()
    def look(self, tracer: Tracer) -> None:
        """A forward pass over all of it, the logits of one batch held at a time."""
        for b, batch in enumerate(self.batches):
            self.note(b, tracer.logits(batch))

    def joined(self) -> ops.TokenStats:
        """The statistics of all tokens, once every batch has been seen."""
        return ops.TokenStats.joined(self.stats[b] for b in range(len(self.batches)))


@dataclass(frozen=True, kw_only=True)
class Asking(Noted):
    """An update, whose objective is asked for c as soon as the logits it depends on have been seen.

    That is batch by batch for an objective in which sequences do not meet, and else with the last batch.

    Raises:
        ValueError: a c that is not finite, or sequences that do not fit the objective, when it is asked.
    """

    chis: Sequence[Chi]
    objective: Objective
    scores: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # by batch

    @property
    def at_once(self) -> bool:
        """Whether c of a batch needs no other batch: any pass over the update can then make it on its way."""
        return self.objective.by_sequence or len(self.batches) == 1

    def note(self, b: int, logits: Float[Tensor, "N V"]) -> None:
        """Keep what the objective reads of a batch's logits, and ask it."""
        if b in self.stats:
            return
        super().note(b, logits)
        self.scores[b] = _scores(self.objective, logits.detach(), self.stats[b])
        every = len(self.stats) == len(self.batches)
        which = [b] if self.objective.by_sequence else list(range(len(self.batches))) if every else []
        if which:
            self.terms.extend(self._ask(which).split([len(self.batches[i].targets) for i in which]))

    def _ask(self, which: Sequence[int]) -> GTerm:
        sequence = torch.cat([self.batches[b].sequence for b in which])
        log_probs = torch.cat([self.stats[b].log_prob for b in which])
        scores = {name: torch.cat([self.scores[b][name] for b in which]) for name in self.scores[which[0]]}
        term = self.objective.g_terms(log_probs, [self.chis[s] for s in sequence.unique().tolist()], Scores(**scores))
        broken = ~term.c.reshape(len(log_probs), -1).isfinite().all(1)
        if bool(broken.any()):
            raise ValueError(
                f"{type(self.objective).__name__} gives sequence {int(sequence[broken.cpu()][0])} a weight c that is not "
                "finite: its constants, its advantage, or its reference or old log-probs are far out of range"
            )
        return term


@dataclass(frozen=True)
class Sides:
    """Both sides of a decomposition, ready for the engine; their row tables once both have been seen."""

    update: Sequence[Chi]
    observe: Sequence[Chi]
    u: Asking
    o: Noted

    @property
    def c(self) -> Float[Tensor, " L"]:
        """c of the updated tokens themselves, where an objective has further targets."""
        return torch.cat([term.own_c for term in self.u.terms])

    @cached_property
    def updated(self) -> Any:
        """Row table (pyarrow) of the updated tokens."""
        return row_table(self.u.batches, self.u.joined(), self.update, self.c)

    @cached_property
    def observed(self) -> Any:
        """Row table (pyarrow) of the observed tokens."""
        return row_table(self.o.batches, self.o.joined(), self.observe)


def prepare(
    tracer: Tracer,
    update: Sequence[Chi],
    observe: Sequence[Chi],
    objective: Objective,
    *,
    reference: nn.Module | None = None,
    weights: Tensor | None = None,
    tokens: int = 2048,
    passes: bool = False,
) -> Sides:
    """Both sides scored, with c from the objective.

    With `passes` both are about to be passed over once, the one after the other: what those will see is left to them, and
    they raise what seeing it would have raised.

    Raises:
        ValueError: an empty side, ids outside the vocabulary, NaN logits, sequences that do not fit the objective.
    """
    for name, chis in (("update", update), ("observe", observe)):
        if not chis or not sum(len(chi) for chi in chis):
            raise ValueError(f"{name} holds no scored token: give at least one sequence with a response")
        if not all(len(chi) for chi in chis):
            raise ValueError(f"sequence {[len(chi) for chi in chis].index(0)} of {name} holds no scored token: leave it out")
    if reference is not None:
        update = with_reference(update, reference)
    u = Asking(tracer.batches(update, tokens), [], chis=update, objective=objective)
    seen = tracer.batches(observe, tokens)
    y = torch.cat([batch.targets for batch in seen]).to(tracer.device)
    ones = torch.ones(len(y), dtype=tracer.precision, device=tracer.device)
    w = ones if weights is None else weights.to(tracer.device, tracer.precision)
    if w.shape != y.shape:
        raise ValueError(f"weights must have shape [M]=({len(y)},), one per observed token, got {list(w.shape)}")
    sizes = [len(batch.targets) for batch in seen]
    o = Noted(seen, GTerm(y, w).split(sizes))
    if not (passes and u.at_once):
        u.look(tracer)
    if not passes:
        o.look(tracer)
    return Sides(update, observe, u, o)


def _scores(objective: Objective, z: Float[Tensor, "N V"], stats: ops.TokenStats) -> dict[str, Tensor]:
    """What else than log-probs the objective needs of a batch's logits."""
    found: dict[str, Tensor] = {}
    if "entropy" in objective.needs:
        found["entropy"] = stats.entropy
    if "mean_log_prob" in objective.needs:
        found["mean_log_prob"] = z.mean(1) - stats.logsumexp
    if "candidates" in objective.needs:
        found["candidate_log_probs"], found["candidates"] = ops.topk_log_probs(z, objective.n_candidates)
    return found


def with_reference(chis: Sequence[Chi], reference: nn.Module) -> list[Chi]:
    """The sequences with log pi_ref of a reference model filled in, where they do not bring their own."""
    wanting = [i for i, chi in enumerate(chis) if chi.reference_log_probs is None]
    filled = list(chis)
    if wanting:
        with trace(reference) as tracer:
            log_probs = torch.cat([stats.log_prob for _, _, stats in tracer.score([chis[i] for i in wanting])])
        for i, part in zip(wanting, log_probs.split([len(chis[i]) for i in wanting]), strict=True):
            filled[i] = chis[i].with_(reference_log_probs=part)
    return filled


def row_table(batches: Sequence[Batch], stats: ops.TokenStats, chis: Sequence[Chi], c: Tensor | None = None) -> Any:
    """One row per scored token: where it stands, what it is, and its statistics under the model."""
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
