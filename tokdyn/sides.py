"""Both sides of a decomposition: sequences scored once, c from the objective, and their row tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import ops
from .exact import Side
from .objectives import GTerm, Objective, Scores
from .sequences import Batch, Chi
from .trace import Tracer, trace


@dataclass(frozen=True)
class Noted(Side):
    """A side that keeps the statistics of the logits it is asked about: a pass over it need not be repeated for them."""

    stats: dict[int, ops.TokenStats] = field(default_factory=dict)  # by batch

    def force(self, b: int, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """As in Side."""
        self._note(b, logits)
        return super().force(b, logits)

    def work(self, b: int, logits: Float[Tensor, "N V"], velocity: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """As in Side."""
        self._note(b, logits)
        return super().work(b, logits, velocity)

    def _note(self, b: int, logits: Float[Tensor, "N V"]) -> None:
        if b not in self.stats:
            self.stats[b] = ops.token_stats(logits.detach(), self.batches[b].targets.to(logits.device))


@dataclass(frozen=True)
class Sides:
    """Both sides of a decomposition, ready for the engine, with what the update's objective made of it."""

    update: Sequence[Chi]
    observe: Sequence[Chi]
    u: Side
    o: Noted
    gterm: GTerm
    updated: Any  # pyarrow.Table
    observed: Any  # the same; None where it is to come from a pass over that side (`seen`)
    y: Int[Tensor, " M"]

    def seen(self, tracer: Tracer) -> Any:
        """The observed side's row table from a pass that went over it.

        Raises:
            ValueError: NaN logits.
        """
        stats = ops.TokenStats(*map(torch.cat, zip(*(self.o.stats[b] for b in range(len(self.o.batches))), strict=True)))
        tracer.require_finite(self.o.batches, stats.logsumexp)
        return row_table(self.o.batches, stats, self.observe)


def prepare(
    tracer: Tracer,
    update: Sequence[Chi],
    observe: Sequence[Chi],
    objective: Objective,
    *,
    reference: nn.Module | None = None,
    weights: Tensor | None = None,
    tokens: int = 2048,
    unseen: bool = False,
) -> Sides:
    """Score both sides once (`unseen`: the update alone), ask the objective for c, and lay out the row tables.

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
    batches, stats, scores = _scored(tracer, update, tokens, objective)
    gterm = objective.g_terms(stats.log_prob, update, scores)
    broken = ~gterm.c.reshape(len(stats.log_prob), -1).isfinite().all(1)
    if bool(broken.any()):
        s = int(torch.cat([batch.sequence for batch in batches])[broken.cpu()][0])
        raise ValueError(
            f"{type(objective).__name__} gives sequence {s} a weight c that is not finite: its constants, its advantage, or "
            "its reference or old log-probs are far out of range"
        )
    sizes = [len(batch.targets) for batch in batches]
    terms = [
        GTerm(*parts)
        for parts in zip(
            gterm.targets.split(sizes),
            gterm.c.split(sizes),
            gterm.v.split(sizes) if gterm.v is not None else [None] * len(sizes),
            gterm.uniform.split(sizes) if gterm.uniform is not None else [None] * len(sizes),
            strict=True,
        )
    ]
    if unseen:
        seen, observed = tracer.batches(observe, tokens), None
    else:
        seen, seen_stats, _ = _scored(tracer, observe, tokens)
        observed = row_table(seen, seen_stats, observe)
    y = torch.cat([batch.targets for batch in seen]).to(tracer.device)
    w = (
        torch.ones(len(y), dtype=tracer.precision, device=tracer.device)
        if weights is None
        else weights.to(tracer.device, tracer.precision)
    )
    if w.shape != y.shape:
        raise ValueError(f"weights must have shape [M]=({len(y)},), one per observed token, got {list(w.shape)}")
    o_sizes = [len(batch.targets) for batch in seen]
    o_terms = [GTerm(a, b) for a, b in zip(y.split(o_sizes), w.split(o_sizes), strict=True)]
    return Sides(
        update, observe,
        Side(batches, terms), Noted(seen, o_terms), gterm, row_table(batches, stats, update, gterm.c), observed, y,
    )  # fmt: skip


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


def _scored(
    tracer: Tracer, chis: Sequence[Chi], tokens: int, objective: Objective | None = None
) -> tuple[list[Batch], ops.TokenStats, Scores]:
    """Batches, statistics and what else an objective needs, the logits of one batch held at a time."""
    needs = objective.needs if objective else ()
    batches, found = [], []
    parts: dict[str, list[Tensor]] = {name: [] for name in needs}
    for batch, z, stats in tracer.score(chis, tokens):
        batches.append(batch)
        found.append(stats)
        if "entropy" in parts:
            parts["entropy"].append(stats.entropy)
        if "mean_log_prob" in parts:
            parts["mean_log_prob"].append(z.mean(1) - stats.logsumexp)
        if objective and "candidates" in parts:
            values, ids = ops.topk_log_probs(z, objective.n_candidates)
            parts["candidates"].append(ids)
            parts["candidate_log_probs"].append(values)
    joined = {name: torch.cat(part) for name, part in parts.items()}
    return batches, ops.TokenStats(*map(torch.cat, zip(*found, strict=True))), Scores(**joined)


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
        columns["c"] = (c[:, 0] if c.dim() == 2 else c).tolist()
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
