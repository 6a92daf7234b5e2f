"""forces(): which token of an update moves which token of another answer, and how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import exact, ops
from .exact import Progress, Side
from .exact.matrix import matrix as exact_matrix
from .exact.naive import naive_matrix
from .exact.readout import readout_matrix
from .objectives import SFT, GTerm, Objective, Scores
from .precondition import preconditioner
from .sequences import Batch, Chi
from .store import FORMAT, read_folder, write_folder
from .trace import Tracer, trace


class Vocabulary(NamedTuple):
    """The tokens whose log-probability rises and falls most; ids and nats per unit learning rate, each [.., k]."""

    rising: Int[Tensor, "*m k"]
    rise: Float[Tensor, "*m k"]
    falling: Int[Tensor, "*m k"]
    fall: Float[Tensor, "*m k"]


@dataclass(frozen=True)
class Sides:
    """Both sides of a decomposition, ready for the engine, with what the update's objective made of it."""

    update: Sequence[Chi]
    observe: Sequence[Chi]
    u: Side
    o: Side
    gterm: GTerm
    updated: Any  # pyarrow.Table
    observed: Any  # pyarrow.Table
    y: Int[Tensor, " M"]


def prepare(
    tracer: Tracer,
    update: Sequence[Chi],
    observe: Sequence[Chi],
    objective: Objective,
    *,
    reference: nn.Module | None = None,
    weights: Tensor | None = None,
    tokens: int = 2048,
) -> Sides:
    """Score both sides once, ask the objective for c, and lay out the row tables.

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
    scored = tracer.score(update, tokens)
    log_probs, scores = _scores(scored, objective)
    gterm = objective.g_terms(log_probs, update, scores)
    broken = ~gterm.c.reshape(len(log_probs), -1).isfinite().all(1)
    if bool(broken.any()):
        s = int(torch.cat([batch.sequence for batch, _ in scored])[broken.cpu()][0])
        raise ValueError(
            f"{type(objective).__name__} gives sequence {s} a weight c that is not finite: its constants, its advantage, or "
            "its reference or old log-probs are far out of range"
        )
    sizes = [len(batch.targets) for batch, _ in scored]
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
    seen = tracer.score(observe, tokens)
    y = torch.cat([batch.targets for batch, _ in seen]).to(tracer.device)
    w = (
        torch.ones(len(y), dtype=tracer.precision, device=tracer.device)
        if weights is None
        else weights.to(tracer.device, tracer.precision)
    )
    if w.shape != y.shape:
        raise ValueError(f"weights must have shape [M]=({len(y)},), one per observed token, got {list(w.shape)}")
    o_sizes = [len(batch.targets) for batch, _ in seen]
    o_terms = [GTerm(a, b) for a, b in zip(y.split(o_sizes), w.split(o_sizes), strict=True)]
    return Sides(
        update, observe,
        Side([batch for batch, _ in scored], terms), Side([batch for batch, _ in seen], o_terms),
        gterm, row_table(scored, update, gterm.c), row_table(seen, observe), y,
    )  # fmt: skip


def with_reference(chis: Sequence[Chi], reference: nn.Module) -> list[Chi]:
    """The sequences with log pi_ref of a reference model filled in, where they do not bring their own."""
    wanting = [i for i, chi in enumerate(chis) if chi.reference_log_probs is None]
    filled = list(chis)
    if wanting:
        with trace(reference) as tracer:
            scored = tracer.score([chis[i] for i in wanting])
        log_probs = torch.cat([ops.token_stats(z, batch.targets.to(z.device)).log_prob for batch, z in scored])
        for i, part in zip(wanting, log_probs.split([len(chis[i]) for i in wanting]), strict=True):
            filled[i] = chis[i].with_(reference_log_probs=part)
    return filled


def _scores(scored: list[tuple[Batch, Tensor]], objective: Objective) -> tuple[Tensor, Scores]:
    parts: dict[str, list[Tensor]] = {name: [] for name in ("log_prob", *objective.needs)}
    for batch, z in scored:
        stats = ops.token_stats(z, batch.targets.to(z.device))
        parts["log_prob"].append(stats.log_prob)
        if "entropy" in parts:
            parts["entropy"].append(stats.entropy)
        if "mean_log_prob" in parts:
            parts["mean_log_prob"].append(z.mean(1) - stats.logsumexp)
        if "candidates" in parts:
            values, ids = ops.topk_log_probs(z, objective.n_candidates)
            parts["candidates"].append(ids)
            parts["candidate_log_probs"].append(values)
    joined = {name: torch.cat(part) for name, part in parts.items()}
    return joined.pop("log_prob"), Scores(**joined)


def row_table(scored: list[tuple[Batch, Tensor]], chis: Sequence[Chi], c: Tensor | None = None) -> Any:
    """One row per scored token: where it stands, what it is, and its statistics under the model."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {}
    for batch, z in scored:
        stats = ops.token_stats(z, batch.targets.to(z.device))
        rows = zip(batch.sequence.tolist(), batch.position.tolist(), batch.targets.tolist(), strict=True)
        for s, t, token_id in rows:
            chi = chis[s]
            values = dict(sequence=s, group=chi.group, role=chi.role, position=t, token_id=token_id,
                          token=chi.tokens[t] if chi.tokens else f"<{token_id}>")  # fmt: skip
            for key, value in values.items():
                columns.setdefault(key, []).append(value)
        for key, column in stats._asdict().items():
            columns.setdefault(key, []).extend(column.tolist())
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


@dataclass(frozen=True, eq=False)
class Forces:
    """Forces of the tokens of an update on observed tokens; nats per unit learning rate, positive lifts.

    Attributes:
        matrix: F [M, L], or None when a reduction was asked for.
        vector: Σ_l F [M] (reduce="update"), Σ_m w_m F [L] (reduce="observe"), or None.
        c: weight of each update token, -dL/dlog pi (its first target's where it has several), [L].
        observed, updated: row tables (pyarrow) with sequence, position, token_id, token, log_prob and the token statistics.
        coverage: parameter name -> the rule it took part by, or why it took no part.
        scope, method, reduce: as asked.
    """

    matrix: Float[Tensor, "M L"] | None
    vector: Tensor | None
    c: Float[Tensor, " L"]
    observed: Any
    updated: Any
    coverage: dict[str, str]
    scope: str
    method: str
    reduce: str | None
    _live: _Live | None = field(default=None, repr=False)

    def predict(self, eta: float) -> Float[Tensor, " M"]:
        """First-order change of every observed log-probability, eta Σ_l F[m,l], in nats.

        Raises:
            ValueError: the result was reduced over the observed tokens.
        """
        if self.reduce == "observe":
            raise ValueError('predict needs forces on each observed token: use reduce=None or reduce="update"')
        total = self.vector if self.matrix is None else self.matrix.sum(1)
        assert total is not None
        return eta * total

    def vocabulary(self, m: int | None = None, l: int | None = None, k: int = 10) -> Vocabulary:  # noqa: E741
        """The k tokens whose log-probability at an observed position rises and falls most.

        Args:
            m: row of the observed token; None for all of them, results [M, k].
            l: column of one update token; None for the whole step.
            k: how many.

        Raises:
            ValueError: m or l out of range, the result was read from disk, or the model has changed since.

        Cost: one backward pass and one tangent pass; with m given, over its own sequence only.
        """
        if self._live is None:
            raise ValueError("vocabulary() needs the model: call it on the result of forces(), not on one read from disk")
        for name, index, size in (("m", m, self.observed.num_rows), ("l", l, self.updated.num_rows)):
            if index is not None and not 0 <= index < size:
                raise ValueError(f"{name} must lie in [0, {size}), got {index}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        return self._live.vocabulary(m, l, k)

    def tokens(self) -> Any:
        """Both row tables as one (pyarrow), with the columns `side` and `row`."""
        return with_sides(self.updated, self.observed)

    def to_dataframe(self) -> Any:
        """The matrix as a long pandas table (one row per pair), or the reduced forces with their row table.

        Raises:
            ImportError: pandas is not installed (`pip install "tokdyn[dataframe]"`).
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError('to_dataframe needs pandas: pip install "tokdyn[dataframe]"') from error
        if self.matrix is None:
            assert self.vector is not None
            table = self.observed if self.reduce == "update" else self.updated
            return table.to_pandas().assign(force=self.vector.cpu().numpy())
        M, L = self.matrix.shape
        o, u = self.observed.to_pydict(), self.updated.to_pydict()
        return pd.DataFrame({
            "m": [m for m in range(M) for _ in range(L)],
            "l": list(range(L)) * M,
            "observed": [t for t in o["token"] for _ in range(L)],
            "updated": u["token"] * M,
            "force": self.matrix.cpu().flatten().tolist(),
        })  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write run.json, tokens.parquet and forces.safetensors into a new folder.

        Raises:
            FileExistsError: the folder exists.
        """
        about = dict(
            format=FORMAT, kind="forces", scope=self.scope, method=self.method, reduce=self.reduce, coverage=self.coverage
        )
        tensors = {"c": self.c, "matrix": self.matrix, "vector": self.vector}
        write_folder(Path(path), about, self.tokens(), {k: v for k, v in tensors.items() if v is not None})

    @classmethod
    def load(cls, path: str | Path) -> Forces:
        """Read what `save` wrote; `vocabulary` then needs the model and is not available.

        Raises:
            FileNotFoundError: the folder holds nothing that was saved.
            ValueError: it holds something other than forces, or cannot be read.
        """
        about, table, tensors = read_folder(Path(path))
        if about.get("kind") != "forces":
            raise ValueError(f"{path} holds a {about.get('kind')}, not forces: read it with td.load")
        sides = []
        for side in ("updated", "observed"):
            rows = table.filter([value == side for value in table["side"].to_pylist()]).drop_columns(["side", "row"])
            sides.append(rows if side == "updated" else rows.drop_columns(["c"]))
        return cls(tensors.get("matrix"), tensors.get("vector"), tensors["c"], sides[1], sides[0], about["coverage"],
                   about["scope"], about["method"], about["reduce"])  # fmt: skip


@dataclass(frozen=True)
class _Live:
    """What it takes to go back to the model for one more question."""

    model: nn.Module
    sides: Sides
    scope: str
    P: exact.Direction | None
    fingerprint: Tensor

    def vocabulary(self, m: int | None, l: int | None, k: int) -> Vocabulary:  # noqa: E741
        with trace(self.model) as tracer:
            if not torch.equal(fingerprint(tracer), self.fingerprint):
                raise ValueError("the model's parameters have changed since these forces were computed: compute them again")
            uses = exact.select(tracer, self.scope)
            if l is None:
                direction = exact.pull(tracer, self.sides.u, uses)
            else:
                direction = next(exact.pull_each(tracer, self.sides.u, uses, l, l + 1))
            batches = self.sides.o.batches
            if m is not None:
                sequence = int(torch.cat([b.sequence for b in batches])[m])
                batches = tracer.batches([self.sides.observe[sequence]])
                m = m - sum(len(chi) for chi in self.sides.observe[:sequence])
            parts = []
            for batch in batches:
                z, velocity = exact.push(tracer, batch, exact.scaled(direction, self.P), uses)
                moved = ops.apply_A(z, velocity)
                moved = moved if m is None else moved[m : m + 1]
                rise, fall = moved.topk(min(k, moved.shape[1])), (-moved).topk(min(k, moved.shape[1]))
                parts.append((rise.indices, rise.values, fall.indices, -fall.values))
        joined = [torch.cat(part) for part in zip(*parts, strict=True)]
        return Vocabulary(*(x[0] for x in joined)) if m is not None else Vocabulary(*joined)


def fingerprint(tracer: Tracer) -> Tensor:
    """A checksum of all parameters, to notice that a model has moved."""
    return torch.stack([torch.stack([p.double().sum(), p.double().square().sum()]) for p in tracer.params.values()])


def coverage(tracer: Tracer, uses: dict[str, str], scope: str, rules: dict[str, str] | None = None) -> dict[str, str]:
    """Every parameter name with the rule it took part by, or why it takes no part."""

    def rule(use: str, tensor: str) -> str:
        if use in uses:
            return (rules or {}).get(use, "autograd")
        return f"outside scope {scope!r}" if tensor in tracer.trainable else "frozen"

    return {use: rule(use, tensor) for use, tensor in tracer.owner.items()}


def forces(
    model: nn.Module,
    update: Sequence[Chi],
    observe: Sequence[Chi],
    objective: Objective = SFT(),  # noqa: B008
    *,
    scope: str = "full",
    reduce: str | None = None,
    method: str = "tangent",
    optimizer: torch.optim.Optimizer | None = None,
    reference: nn.Module | None = None,
    weights: Tensor | None = None,
    memory: int = 4 << 30,
    out: Tensor | None = None,
    progress: Progress | None = None,
) -> Forces:
    """Force of every update token on every observed token, F[m,l] = -[A_m K_{m,l} G_l]_{y_m} = <∇ log pi(y_m), -∇L_l>.

    Δ log pi(y_m) ≈ eta Σ_l F[m,l]: nats per unit learning rate, the loss summed over tokens; positive lifts the observed token.

    Args:
        model: a causal LM (see `trace`); it is left as it was.
        update: the sequences trained on, as the objective needs them (pairs for DPO, rollouts for GRPO).
        observe: the sequences watched.
        objective: the loss of the update.
        scope: "full" all trainable parameters; "readout" the output embedding as readout, in closed form; "backbone" all
            before it; or a regular expression over parameter names.
        reduce: None -> matrix [M, L]; "update" -> vector [M], the whole step on each observed token; "observe" -> vector [L],
            each update token on the summed (or weighted) observed log-probability.
        method: "tangent" (exact: structured tangents, see structured.py), "naive" (exact: one gradient per token per side; the
            oracle), "fd" (real parameter steps, extrapolated; reductions only).
        optimizer: an Adam, AdamW or RMSprop with state; the kernel becomes J_o P J_uᵀ at its frozen diagonal P.
        reference: model of log pi_ref for the sequences that do not bring it; the policy itself when absent.
        weights: weight of each observed token in reduce="observe", [M].
        memory: bytes that method="naive" may keep of per-token gradients, "tangent" of a chunk's tangents.
        out: an [M, L] tensor to fill as the matrix is computed (what is there when interrupted is right).
        progress: called with (done, total).

    Raises:
        ValueError: an unknown option, sequences that do not fit the objective or the model, a model that is not finite.

    Cost: a reduction is one backward and one tangent pass over each side. A matrix by "tangent" is about one
    of each per token of one side without its weight gradients, by "naive" one backward pass per token of both sides and
    2·M·L·P flops.
    """
    if reduce not in (None, "update", "observe"):
        raise ValueError(f'reduce must be None, "update" or "observe", got {reduce!r}')
    if method not in ("tangent", "naive", "fd"):
        raise ValueError(f'method must be "tangent", "naive" or "fd", got {method!r}')
    if method == "fd" and reduce is None:
        raise ValueError('method="fd" measures reductions: add reduce="update" or reduce="observe"')
    if weights is not None and reduce != "observe":
        raise ValueError('weights belong to reduce="observe"')
    with trace(model) as tracer:
        sides = prepare(tracer, update, observe, objective, reference=reference, weights=weights)
        uses = exact.select(tracer, scope)
        P = preconditioner(optimizer, tracer) if optimizer is not None else None
        matrix, vector, rules = None, None, dict[str, str]()
        closed_form = scope == "readout" and method == "tangent" and P is None and tracer.readout.weight_name in uses
        if closed_form and tracer.readout_residual(sides.o.batches[0]) < tracer.readout_bound:
            closed, rules = readout_matrix(tracer, sides.o, sides.u, uses, None, reduce), dict.fromkeys(uses, "readout in closed form")
            matrix, vector = (closed, None) if reduce is None else (None, closed)
        elif reduce is None or method == "naive":
            shape = (len(sides.o), len(sides.u))
            if out is not None and out.shape != shape:
                raise ValueError(f"out must have shape [M, L]={shape}, got {list(out.shape)}")
            matrix = torch.full(shape, torch.nan, dtype=tracer.precision, device=tracer.device) if out is None else out
            if method == "naive":
                naive_matrix(tracer, sides.o, sides.u, uses, P, matrix, progress, memory)
            else:
                rules = exact_matrix(tracer, sides.o, sides.u, uses, P, matrix, progress, memory)
            if reduce is not None:
                vector, matrix = matrix.sum(1 if reduce == "update" else 0), None
        else:
            source, sink = (sides.u, sides.o) if reduce == "update" else (sides.o, sides.u)
            direction = exact.scaled(exact.pull(tracer, source, uses), P)
            move = exact.push_all if method == "tangent" else exact.finite_difference
            vector = move(tracer, sink, direction, uses)
        c = sides.gterm.c
        return Forces(
            matrix, vector, c[:, 0] if c.dim() == 2 else c, sides.observed, sides.updated, coverage(tracer, uses, scope, rules),
            scope, method, reduce, _Live(model, sides, scope, P, fingerprint(tracer)),
        )  # fmt: skip
