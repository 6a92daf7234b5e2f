"""forces(): which token of an update moves which token of another answer, and how much."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import ops
from ._arguments import size_in_bytes
from .exact import CH2, Asked, Problem, Progress, Scope, ScoredProblem, UnscoredProblem, choose
from .exact.contexts import by_context
from .exact.engines import reduce as reduced
from .exact.groups import context_table, group_labels, group_table
from .exact.problem import Coverage
from .exact.progress import share
from .exact.sides import with_sides
from .model.optimizer import learning_rate
from .model.trace import Tracer, trace
from .objective import Objective
from .objectives import SFT
from .runs import frames
from .runs.folder import FORMAT, read_about, read_folder, require_finite, write_folder
from .runs.notebook import forces_html
from .runs.shards import Shards
from .sequences import Chi


class Vocabulary(NamedTuple):
    """The tokens whose log-probability rises and falls most; ids and nats per unit learning rate, each [.., k]."""

    rising: Int[Tensor, "*m k"]
    rise: Float[Tensor, "*m k"]
    falling: Int[Tensor, "*m k"]
    fall: Float[Tensor, "*m k"]


@dataclass(frozen=True, eq=False)
class Forces:
    """Forces of the tokens of an update on observed tokens; nats per unit learning rate, positive lifts.

    Under an optimizer they are the parts of its coming step: nats per unit of `lr`.

    Attributes:
        matrix: F [M, L] ([M, G] of groups), or None when a reduction was asked for or it was written to a folder.
        vector: Σ_l F [M] (reduce="update"), Σ_m w_m F [L] (reduce="observe"), or None.
        c: weight of each update token, -dL/dlog pi (its first target's where it has several), [L].
        observed, updated: row tables (pyarrow) with sequence, position, token_id, token, log_prob and the token statistics.
        coverage: parameter name -> the rule it took part by, or why it took no part.
        scope, method, reduce: as asked.
        groups: the column of each update token, -1 for none, or None where each has its own.
        shards: the matrix on disk, where it was written to a folder.
        lr: the learning rate that the optimizer will take (the largest of its groups), or None without one.
    """

    matrix: Float[Tensor, "M G"] | None
    vector: Tensor | None
    c: Float[Tensor, " L"]
    observed: Any
    updated: Any
    coverage: dict[str, str]
    scope: str
    method: str
    reduce: str | None
    groups: Int[Tensor, " L"] | None = None
    shards: Shards | None = None
    lr: float | None = None
    _live: _Live | None = field(default=None, repr=False)

    def predict(self, eta: float | None = None) -> Float[Tensor, " M"]:
        """First-order change of every observed log-probability, eta Σ_l F[m,l], in nats.

        Under an optimizer this is what its coming step makes of the update's own gradient, each group at its learning rate,
        with bias corrections; not what momentum of earlier steps and weight decay add.

        Args:
            eta: the step size; needed where no optimizer was given. With one it stands for the largest learning rate of its
                groups, and the step is the coming one when absent.

        Raises:
            ValueError: the result was reduced over the observed tokens, or eta is missing.
        """
        eta = self.lr if eta is None else eta
        if eta is None:
            raise ValueError(
                "predict needs the step size: predict(eta), or forces(optimizer=...) whose learning rates it takes"
            )
        if self.reduce == "observe":
            raise ValueError('predict needs forces on each observed token: use reduce=None or reduce="update"')
        if self.shards is not None:
            return eta * torch.cat([self.shards[a:z].sum(1) for a, z, _ in self.shards.blocks])
        total = self.vector if self.matrix is None else self.matrix.sum(1)
        assert total is not None
        return eta * total

    def vocabulary(self, m: int | None = None, l: int | None = None, k: int = 10) -> Vocabulary:  # noqa: E741
        """The k tokens whose log-probability at an observed position rises and falls most.

        Args:
            m: row of the observed token; None for all of them, results [M, k].
            l: column of one update token, or of one group; None for the whole step.
            k: how many.

        Raises:
            ValueError: m or l out of range, the result was read from disk, or the model has changed since.

        Cost: one backward pass and one tangent pass; with m given, over its own sequence only.
        """
        if self.scope == CH2:
            raise ValueError('scope="ch2" estimates forces on the observed tokens alone: vocabulary() needs an exact scope')
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
        matrix = self.matrix if self.shards is None else self.shards.tensor()
        if matrix is not None:
            return frames.pairs(self.observed, self.updated, force=matrix)
        assert self.vector is not None
        frames.pandas()
        table = self.observed if self.reduce == "update" else self.updated
        return table.to_pandas().assign(force=self.vector.cpu().numpy())

    def _repr_html_(self) -> str:
        """What a notebook shows: the matrix small, and the strongest pairs; of a reduction its tokens, coloured."""
        return forces_html(self)

    def save(self, path: str | Path) -> None:
        """Write run.json, tokens.parquet and forces.safetensors into a new folder.

        Raises:
            FileExistsError: the folder exists. ValueError: the forces are not finite.
        """
        about = dict(
            format=FORMAT, kind="forces", scope=self.scope, method=self.method, reduce=self.reduce, coverage=self.coverage,
            lr=self.lr,
        )  # fmt: skip
        require_finite(matrix=self.matrix, vector=self.vector, c=self.c)
        given = {"c": self.c, "matrix": self.matrix, "vector": self.vector, "groups": self.groups}
        tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
        if self.shards is None:
            write_folder(Path(path), about, self.tokens(), tensors)
        else:
            shards = self.shards if Path(path) == self.shards.path else self.shards.copy_to(path)
            shards.describe(about | {"sharded": True}, self.tokens(), tensors)

    @classmethod
    def load(cls, path: str | Path) -> Forces:
        """Read what `save` wrote; `vocabulary` then needs the model and is not available.

        Raises:
            FileNotFoundError: the folder holds nothing that was saved.
            ValueError: it holds something other than forces, or cannot be read.
        """
        about, shards = read_about(Path(path)), None
        if about.get("kind") != "forces":
            raise ValueError(f"{path} holds a {about.get('kind')}, not forces: read it with td.load")
        if about.get("sharded"):
            shards = Shards(path)
            table, tensors = shards.read_description()
        else:
            about, table, tensors = read_folder(Path(path))
        sides = []
        for side in ("updated", "observed"):
            rows = table.filter([value == side for value in table["side"].to_pylist()]).drop_columns(["side", "row"])
            other = [name for name in ("c", "size", "tokens", "tokens_c") if name in rows.column_names]
            sides.append(rows.drop_columns(other if side == "observed" else []))
        asked = about["coverage"], about["scope"], about["method"], about["reduce"]
        reduced = tensors.get("matrix"), tensors.get("vector"), tensors["c"]
        return cls(*reduced, sides[1], sides[0], *asked, tensors.get("groups"), shards, about.get("lr"))


@dataclass(frozen=True)
class _Live:
    """The model and the scored problem behind a Forces, so that `vocabulary` can run another vjp and jvp."""

    model: nn.Module
    problem: ScoredProblem
    labels: Tensor | None
    fingerprint: Tensor

    def vocabulary(self, m: int | None, l: int | None, k: int) -> Vocabulary:  # noqa: E741
        with trace(self.model, self.problem.tracer.found) as tracer:
            if not torch.equal(fingerprint(tracer), self.fingerprint):
                raise ValueError("the model's parameters have changed since these forces were computed: compute them again")
            problem = replace(self.problem, tracer=tracer)
            o, u = problem.observed, problem.updated
            if l is None:
                direction = problem.vjp(u)
            elif self.labels is not None:
                direction = problem.vjp(u.part((self.labels == l).to(u.c)))
            else:
                direction = next(problem.vjp_each(u, l, l + 1))
            batches = o.batches
            if m is not None:
                sequence = int(torch.cat([b.sequence for b in batches])[m])
                batches = tracer.batches([o.chis[sequence]])
                m = m - sum(len(chi) for chi in o.chis[:sequence])
            parts = []
            for batch in batches:
                moved = ops.apply_A(*problem.jvp_logits(batch, problem.preconditioned(direction)))
                moved = moved if m is None else moved[m : m + 1]
                rise, fall = moved.topk(min(k, moved.shape[1])), (-moved).topk(min(k, moved.shape[1]))
                parts.append((rise.indices, rise.values, fall.indices, -fall.values))
        joined = [torch.cat(part) for part in zip(*parts, strict=True)]
        return Vocabulary(*(x[0] for x in joined)) if m is not None else Vocabulary(*joined)


def fingerprint(tracer: Tracer) -> Tensor:
    """A checksum of all parameters, to notice that a model has moved."""
    wide = torch.float64
    own = (tracer.params[name] for name, owner in tracer.owner.items() if name == owner)
    return torch.stack([torch.stack([p.sum(dtype=wide), torch.linalg.vector_norm(p, dtype=wide)]) for p in own])


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
    groups: str | Sequence[int] | Tensor | None = None,
    memory: int | str = "4GiB",
    out: Tensor | str | Path | None = None,
    resume: bool = False,
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
            before it; "ch2" an estimate of the backbone's (exact/ch2.py), good for ranking at best: report it with its
            correlation to the exact one; or a regular expression over parameter names.
        reduce: None -> matrix [M, L]; "update" -> vector [M], the whole step on each observed token; "observe" -> vector [L],
            each update token on the summed (or weighted) observed log-probability.
        method: "tangent" (exact: docs/exact.md), "naive" (exact: one gradient per token per side; the
            oracle), "fd" (real parameter steps, extrapolated; reductions only).
        optimizer: an Adam, AdamW, RMSprop or SGD, before or after its first step, which is left as it is. The kernel is then
            J_o P J_uᵀ instead of J_o J_uᵀ, P the diagonal of its coming step on this update
            (`model.optimizer.preconditioner`). P depends on the whole update through the second moment v', and so on the
            loss's scale: give the loss as it is trained on. It is held fixed when tokens are told apart, so that F is each
            token's share in the step, not what the step would lack without the token. `Forces.predict()` is then the change
            by that step.
        reference: model of log pi_ref for the sequences that do not bring it; the policy itself when absent.
        weights: weight of each observed token in reduce="observe", [M].
        groups: one column for each group of update tokens instead of each token: "sequence", "response", "sentence", "context"
            or labels [L] (groups.group_labels); `matrix` is then [M, G] and `updated` has a row for each group. Tokens of one
            "context" stand behind the same ids; their forces at the logits are added, and what cancels there is gone.
        memory: bytes ("2GiB") that method="tangent" may take for cotangents and tangents, "naive" for gradients.
        out: an [M, L] (or [M, G]) tensor to fill as the matrix is computed (what is there when interrupted is right), or a
            new folder to which it goes in blocks of rows as they are done; `shards` reads it, `matrix` is then None.
        resume: go on with the folder `out` that an interrupted call of the same left; rows that are there are not made again.
        progress: called with (done, total).

    Raises:
        ValueError: an unknown option, sequences that do not fit the objective or the model, a model that is not finite.

    Cost: a reduction is a backward pass over one side and a tangent pass over the other (and a forward pass over an update of
    several batches that c depends on together), a group one of each; an optimizer takes a backward pass over the update and a
    forward pass over the observed side more. A matrix by "tangent" is about
    one backward pass without weight gradients per token of both sides (docs/exact.md), by "naive" one full backward pass per
    token of both sides and 2·M·L·P flops.
    """
    if reduce not in (None, "update", "observe"):
        raise ValueError(f'reduce must be None, "update" or "observe", got {reduce!r}')
    if method not in ("tangent", "naive", "fd"):
        raise ValueError(f'method must be "tangent", "naive" or "fd", got {method!r}')
    if method == "fd" and reduce is None:
        raise ValueError('method="fd" measures reductions: add reduce="update" or reduce="observe"')
    if weights is not None and reduce != "observe":
        raise ValueError('weights belong to reduce="observe"')
    if reduce is not None and (groups is not None or out is not None):
        raise ValueError(f"{'groups' if groups is not None else 'out'} belongs to the matrix: leave reduce={reduce!r} out")
    if scope == CH2 and (method != "tangent" or optimizer is not None):
        raise ValueError(f'scope="ch2" is an estimate in closed form: leave method={method!r} and optimizer out')
    memory, asked, method = size_in_bytes(memory), method, CH2 if scope == CH2 else method
    with trace(model) as tracer:
        moving = Scope(tracer, {}, None) if method == CH2 else Scope.named(tracer, scope)
        unscored = UnscoredProblem.about(Asked(update, observe, objective, reference, weights, optimizer), moving)
        labels = None if groups is None else group_labels(groups, unscored.updated.chis)
        matrix, vector, shards = None, None, None
        if reduce is not None:
            vector, problem, rules = reduced(
                unscored, method, "update" if reduce == "update" else "observe", memory=memory, progress=progress
            )
        else:
            problem = unscored.scored()
            same = {"made of": _identity(problem, scope, asked, labels)} if isinstance(out, (str, Path)) else {}
            to = _Destination(*_columns(problem, groups, labels), out, same, resume)
            rules = to.fill(method, memory, progress)
            matrix, shards = to.matrix, to.shards
        u, updated = problem.updated, problem.updated.table(with_c=True)
        if labels is not None:
            updated = (context_table if _by_context(groups) else group_table)(updated, labels)
        found = Forces(
            matrix, vector, u.c, problem.observed.table(with_c=False), updated, problem.coverage(scope, rules),
            scope, asked, reduce, labels, shards, None if optimizer is None else learning_rate(optimizer, tracer.trained),
            _Live(model, problem, labels, fingerprint(tracer)),
        )  # fmt: skip
    if shards is not None:
        found.save(shards.path)
    return found


def _identity(problem: ScoredProblem, scope: str, method: str, labels: Tensor | None) -> str:
    """A checksum of what the rows of a matrix follow from: weights, sequences, c, the optimizer's P, scope, method, groups."""
    digest = hashlib.sha256(repr((scope, method, None if labels is None else labels.tolist())).encode())
    for chi in [*problem.observed.chis, *problem.updated.chis]:
        digest.update(repr((chi.ids.tolist(), chi.scored.tolist())).encode())
    P = [] if problem.P is None else [x.double().sum().cpu() for x in problem.P.values()]
    for tensor in (fingerprint(problem.tracer), problem.updated.c, *P):
        digest.update(tensor.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()


def _by_context(groups: Any) -> bool:
    return isinstance(groups, str) and groups == "context"


def _columns(problem: Problem, groups: Any, labels: Tensor | None) -> tuple[Problem, Tensor | None]:
    """The problem whose columns are wanted, and the labels by which to add them up; contexts are added up already."""
    if labels is None or not _by_context(groups):
        return problem, labels
    return Problem(problem.tracer, problem.uses, problem.P, problem.observed, by_context(problem.updated, labels)), None


class _Destination:
    """Where a matrix goes: a tensor of the caller's or of our own, or a folder, in blocks of rows as they are done.

    Raises:
        ValueError: the caller's tensor has another shape. FileExistsError: the folder exists.
    """

    def __init__(
        self, problem: Problem, labels: Tensor | None, out: Tensor | str | Path | None, same: dict[str, str], resume: bool
    ) -> None:
        self.problem, self.labels = problem, labels
        self.shape = (problem.shape[0], problem.shape[1] if labels is None else int(labels.max()) + 1)
        self.shards = Shards.create(out, self.shape, same, resume=resume) if isinstance(out, (str, Path)) else None
        if isinstance(out, Tensor) and out.shape != self.shape:
            names = f"[M, {'L' if labels is None else 'G'}]"
            raise ValueError(f"out must have shape {names}={self.shape}, got {list(out.shape)}")
        self.matrix = None if self.shards is not None else out if isinstance(out, Tensor) else self._empty(self.shape[0])

    def _empty(self, rows: int) -> Tensor:
        """Rows of the matrix, NaN where nothing has been computed."""
        tracer = self.problem.tracer
        return torch.full((rows, self.shape[1]), torch.nan, dtype=tracer.precision, device=tracer.device)

    def fill(self, method: str, memory: int, progress: Progress | None) -> Coverage:
        """Fill the tensor or the shards; returns the coverage."""
        if self.matrix is not None:
            return choose(self.problem, method, self.labels)(self.problem, self.matrix, memory=memory, progress=progress)
        assert self.shards is not None
        coverage, first, M = Coverage(), 0, self.shape[0]
        for part in self.problem.row_blocks(max(1, memory // 4 // (self.shape[1] * self.problem.tracer.precision.itemsize))):
            n, done = part.shape[0], self.shards.rows - first  # rows of the part that an interrupted call has made
            if done < n or first + n == M and not coverage:  # the last part again where all is there: for the rules it goes by
                block, fill = self._empty(n), choose(part, method, self.labels)
                coverage |= fill(part, block, memory=memory, progress=share(progress, first, n, M))
            if done < n:
                self.shards.append(block[max(0, done) :])
            first += n
        return coverage
