"""forces(): which token of an update moves which token of another answer, and how much."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ._arguments import size_in_bytes
from .exact import CH2, Asked, Problem, Progress, Scope, ScoredProblem, UnscoredProblem
from .exact.contexts import by_context
from .exact.destination import PARTS, Destination
from .exact.engines import reduce as reduced
from .exact.groups import context_table, group_labels, group_table
from .exact.parts import By
from .exact.problem import Reduction
from .exact.sides import with_sides
from .live import Live, Vocabulary, fingerprint
from .model.optimizer import learning_rate
from .model.trace import trace
from .objective import Objective
from .objectives import SFT
from .observables import Function, LogProb, Observable
from .observables import observable as as_observable
from .runs import frames
from .runs.explain import Explanation
from .runs.folder import FORMAT, read_about, read_folder, require_finite, write_folder
from .runs.notebook import forces_html
from .runs.schema import require_forces
from .runs.shards import Shards
from .sequences import Chi


@dataclass(frozen=True, eq=False)
class Forces:
    """Forces of the tokens of an update on observed tokens; nats per unit learning rate, positive lifts.

    Under an optimizer they are the parts of its coming step: nats per unit of `lr`.

    Attributes:
        matrix: F [M, L] ([M, G] of groups), or None when a reduction was asked for or it was written to a folder.
        vector: Σ_l F [M] (reduce="update"), Σ_m w_m F [L] (reduce="observe"), Σ_m Σ_l w_m F [] (reduce="both"), or None.
        c: weight of each update token, -dL/dlog pi (its first target's where it has several), [L].
        observed, updated: row tables (pyarrow) with sequence, position, token_id, token, log_prob and the token statistics.
        coverage: parameter name -> the rule it took part by, or why it took no part.
        scope, method, reduce: as asked.
        groups: the column of each update token, -1 for none, or None where each has its own.
        shards: the matrix on disk, where it was written to a folder.
        lr: the learning rate that the optimizer will take (the largest of its groups), or None without one.
        parts: name -> its share of the matrix or vector, in the model's order (Shards where the matrix is in a folder); they
            add up to it. None without `by`.
        observable: what is watched: name, arguments, label, and the unit that stands for nats above.
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
    parts: dict[str, Tensor | Shards] | None = None
    observable: dict[str, Any] = field(default_factory=LogProb().describe)
    _live: Live | None = field(default=None, repr=False)

    def predict(self, eta: float | None = None) -> Float[Tensor, " M"]:
        """First-order change of every observed log-probability (or what else is watched), eta Σ_l F[m,l], in nats.

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
        if self.reduce in ("observe", "both"):
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
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        return self._of_model(m, l, "vocabulary").vocabulary(m, l, k)

    def explain(self, m: int | None = None, l: int | None = None, k: int = 5) -> Explanation:  # noqa: E741
        """Why update token l moves observed token m: the card of the pair (docs/explain.md), as sentence, text, dict and HTML.

        Args:
            m, l: row and column, a token's or a group's; the strongest of the matrix when absent.
            k: how many tokens that rise and fall at m because of l.

        Raises:
            ValueError: as `vocabulary`; a reduced result without m and l; a pair without a force.

        Cost: three backward passes, a tangent pass over m's sequence, a forward pass over each side.
        """
        if m is None or l is None:
            if self.matrix is None:
                raise ValueError("explain needs m and l where there is no matrix in memory")
            m, l = divmod(int(self.matrix.abs().argmax()), self.matrix.shape[1])  # noqa: E741
        return self._of_model(m, l, "explain").explain(m, l, k, self.observable)

    def _of_model(self, m: int | None, l: int | None, what: str) -> Live:  # noqa: E741
        """The model behind, once the arguments are checked."""
        if self.scope == CH2:
            raise ValueError(f'scope="ch2" estimates forces on the observed tokens alone: {what}() needs an exact scope')
        if self._live is None:
            raise ValueError(f"{what}() needs the model: call it on the result of forces(), not on one read from disk")
        for name, index, size in (("m", m, self.observed.num_rows), ("l", l, self.updated.num_rows)):
            if index is not None and not 0 <= index < size:
                raise ValueError(f"{name} must lie in [0, {size}), got {index}")
        return self._live

    def tokens(self) -> Any:
        """Both row tables as one (pyarrow), with the columns `side` and `row`."""
        return with_sides(self.updated, self.observed)

    def to_dataframe(self) -> Any:
        """The matrix as a long pandas table (one row per pair), or the reduced forces with their row table; a column a part.

        Raises:
            ImportError: pandas is not installed (`pip install "tokdyn[dataframe]"`).
        """
        matrix = self.matrix if self.shards is None else self.shards.tensor()
        parts = {name: _whole(part) for name, part in (self.parts or {}).items()}
        if matrix is not None:
            return frames.pairs(self.observed, self.updated, force=matrix, **parts)
        assert self.vector is not None
        pandas = frames.pandas()
        if self.reduce == "both":
            whole = {"force": float(self.vector)} | {name: float(part) for name, part in parts.items()}
            return pandas.DataFrame({"part": list(whole), "force": list(whole.values())})
        table = self.observed if self.reduce == "update" else self.updated
        columns = {"force": self.vector, **parts}
        return table.to_pandas().assign(**{name: column.cpu().numpy() for name, column in columns.items()})

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
            lr=self.lr, parts=None if self.parts is None else list(self.parts), observable=self.observable,
        )  # fmt: skip
        require_finite(matrix=self.matrix, vector=self.vector, c=self.c)
        given = {"c": self.c, "matrix": self.matrix, "vector": self.vector, "groups": self.groups}
        tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
        if self.shards is None:
            tensors |= {f"part {name}": _whole(part).contiguous() for name, part in (self.parts or {}).items()}
            write_folder(Path(path), about, self.tokens(), tensors)
            return
        shards = self.shards
        if Path(path) != shards.path:
            shards = shards.copy_to(path)
            for part in (self.parts or {}).values():
                assert isinstance(part, Shards)
                part.copy_to(shards.path / part.path.name)
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
        whole = tensors if shards is None else tensors | {"matrix": shards}
        require_forces(Path(path), about, table, whole)
        sides = []
        for side in ("updated", "observed"):
            rows = table.filter([value == side for value in table["side"].to_pylist()]).drop_columns(["side", "row"])
            other = ("c", "size", "tokens", "tokens_c") if side == "observed" else ("value",)
            sides.append(rows.drop_columns([name for name in other if name in rows.column_names]))
        parts: dict[str, Tensor | Shards] | None = None
        if about.get("parts"):
            parts = {
                name: tensors[f"part {name}"] if shards is None else Shards(Path(path) / _folder(shards, name))
                for name in about["parts"]
            }
        reduced = tensors.get("matrix"), tensors.get("vector"), tensors["c"]
        observable = about.get("observable") or LogProb().describe()
        return cls(
            *reduced, sides[1], sides[0], about["coverage"], about["scope"], about["method"], about.get("reduce"),
            tensors.get("groups"), shards, about.get("lr"), parts, observable,
        )  # fmt: skip


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
    by: By | None = None,
    observable: Observable | Function | str = LogProb(),  # noqa: B008
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
            each update token on the summed (or weighted) observed log-probability; "both" -> their sum [].
        method: "tangent" (exact: docs/exact.md), "naive" (exact: one gradient per token per side; the
            oracle), "fd" (real parameter steps, extrapolated; reductions only).
        optimizer: an Adam, AdamW, RMSprop or SGD, before or after its first step, which is left as it is. The kernel is then
            J_o P J_uᵀ instead of J_o J_uᵀ, P the diagonal of its coming step on this update
            (`model.optimizer.preconditioner`). P depends on the whole update through the second moment v', and so on the
            loss's scale: give the loss as it is trained on. It is held fixed when tokens are told apart, so that F is each
            token's share in the step, not what the step would lack without the token. `Forces.predict()` is then the change
            by that step.
        reference: model of log pi_ref for the sequences that do not bring it; the policy itself when absent.
        weights: weight of each observed token in reduce="observe" and "both", [M].
        groups: one column for each group of update tokens instead of each token: "sequence", "response", "sentence", "context"
            or labels [L] (groups.group_labels); `matrix` is then [M, G] and `updated` has a row for each group. Tokens of one
            "context" stand behind the same ids; their forces at the logits are added, and what cancels there is gone.
        by: divide F by what moves (exact/parts.py), into Forces.parts: "layer", "module", "kind" (embedding, attention q, MLP
            up, norms, …) or name -> regular expression over parameter names, the first that is found counting. An adapter
            counts where it is put; the two uses of a tied embedding are told apart, and what each does to the other is "tied".
        observable: what is watched at the observed tokens (observables.py): LogProb(), Entropy(), Margin(), Mass(tokens),
            Logit(token), or a function logits [N, V] -> [N]. All is then in its unit per unit learning rate.
        memory: bytes ("2GiB") that method="tangent" may take for cotangents and tangents, "naive" for gradients.
        out: an [M, L] (or [M, G]) tensor to fill as the matrix is computed (what is there when interrupted is right), or a
            new folder to which it goes in blocks of rows as they are done; `shards` reads it, `matrix` is then None. With
            `by` a tensor is filled at the end, and the parts lie in folders inside.
        resume: go on with the folder `out` that an interrupted call of the same left; rows that are there are not made again.
        progress: called with (done, total).

    Raises:
        ValueError: an unknown option, sequences that do not fit the objective or the model, a model that is not finite.

    Cost: a reduction is a backward pass over one side and a tangent pass over the other (and a forward pass over an update of
    several batches that c depends on together), "both" a backward pass over each side, a group one of each; an optimizer takes
    a backward pass over the update and a forward pass over the observed side more. A matrix by "tangent" is about one backward
    pass without weight gradients per token of both sides (docs/exact.md), by "naive" one full backward pass per token of both
    sides and 2·M·L·P flops. Parts cost a matrix the memory of one each, a reduction a tangent pass each, "both" nothing.
    """
    if reduce not in (None, "update", "observe", "both"):
        raise ValueError(f'reduce must be None, "update", "observe" or "both", got {reduce!r}')
    if method not in ("tangent", "naive", "fd"):
        raise ValueError(f'method must be "tangent", "naive" or "fd", got {method!r}')
    if method == "fd" and reduce is None:
        raise ValueError('method="fd" measures reductions: add reduce="update" or reduce="observe"')
    if weights is not None and reduce not in ("observe", "both"):
        raise ValueError('weights belong to reduce="observe" or "both"')
    if reduce is not None and (groups is not None or out is not None):
        raise ValueError(f"{'groups' if groups is not None else 'out'} belongs to the matrix: leave reduce={reduce!r} out")
    if scope == CH2 and (method != "tangent" or optimizer is not None or by is not None):
        raise ValueError(f'scope="ch2" is an estimate in closed form: leave method={method!r}, optimizer and by out')
    memory, asked, method = size_in_bytes(memory), method, CH2 if scope == CH2 else method
    watched = as_observable(observable)
    with trace(model) as tracer:
        moving = Scope(tracer, {}, None) if method == CH2 else Scope.named(tracer, scope, by)
        unscored = UnscoredProblem.about(Asked(update, observe, objective, reference, weights, optimizer, watched), moving)
        labels = None if groups is None else group_labels(groups, unscored.updated.chis)
        matrix, vector, shards, parts = None, None, None, None
        if reduce is not None:
            over: Reduction = reduce  # type: ignore[assignment]
            vector, problem, rules = reduced(unscored, method, over, memory=memory, progress=progress)
            if moving.parts is not None:
                parts, vector = dict(zip(moving.parts.names, vector, strict=True)), vector.sum(0)
        else:
            problem = unscored.scored()
            same = {"made of": identity(problem, scope, asked, labels)} if isinstance(out, (str, Path)) else {}
            to = Destination(*_columns(problem, groups, labels), out, same, resume)
            rules = to.fill(method, memory, progress)
            matrix, shards, parts = to.matrix, to.shards, to.parts
        u, updated = problem.updated, problem.updated.table(with_c=True)
        if labels is not None:
            updated = (context_table if _by_context(groups) else group_table)(updated, labels)
        found = Forces(
            matrix, vector, u.c, problem.observed.table(with_c=False), updated, problem.coverage(scope, rules),
            scope, asked, reduce, labels, shards, None if optimizer is None else learning_rate(optimizer, tracer.trained),
            parts, watched.describe(), Live(model, problem, labels, fingerprint(tracer)),
        )  # fmt: skip
    if shards is not None:
        found.save(shards.path)
    return found


def identity(problem: ScoredProblem, scope: str, method: str, labels: Tensor | None) -> str:
    """A checksum of what the rows of a matrix follow from: weights, both sides, P, scope, method, groups, parts."""
    parts = None if problem.parts is None else sorted(problem.parts.of.items())
    digest = hashlib.sha256(repr((scope, method, None if labels is None else labels.tolist(), parts)).encode())
    for chi in [*problem.observed.chis, *problem.updated.chis]:
        digest.update(repr((chi.ids.tolist(), chi.scored.tolist())).encode())
    P = [] if problem.P is None else [x.double().sum().cpu() for x in problem.P.values()]
    watched = [] if problem.observed.watched is None else [problem.observed.watched]
    for tensor in (fingerprint(problem.tracer), problem.updated.c, *watched, *P):
        digest.update(tensor.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()


def _by_context(groups: Any) -> bool:
    return isinstance(groups, str) and groups == "context"


def _columns(problem: Problem, groups: Any, labels: Tensor | None) -> tuple[Problem, Tensor | None]:
    """The problem whose columns are wanted, and the labels by which to add them up; contexts are added up already."""
    if labels is None or not _by_context(groups):
        return problem, labels
    merged = by_context(problem.updated, labels)
    return Problem(problem.tracer, problem.uses, problem.P, problem.observed, merged, parts=problem.parts), None


def _folder(shards: Shards, name: str) -> str:
    """Where inside the folder of a matrix one of its parts lies.

    Raises:
        ValueError: its record does not say.
    """
    try:
        return str(shards.about[PARTS][name])
    except (KeyError, TypeError):
        raise ValueError(f"{shards.path} is damaged: its record names no folder of the part {name!r}") from None


def _whole(part: Tensor | Shards) -> Tensor:
    return part.tensor() if isinstance(part, Shards) else part
