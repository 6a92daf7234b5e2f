"""profile(): the main job. One update, what it does to the observed answers token by token, checked and kept as a Run."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import ops, squeeze, steps
from ._arguments import check_eta, check_method, size_in_bytes
from ._version import __version__
from .exact import Asked, Direction, Scope, ScoredProblem, UnscoredProblem, choose
from .exact.contexts import by_context
from .exact.pair import kernels, layers_and_kinds, split
from .exact.progress import Stage, Stages
from .exact.sides import with_sides
from .forces import Forces, identity
from .model.trace import trace
from .objective import Objective
from .objectives import DPO
from .observables import Function, LogProb, Observable
from .observables import observable as as_observable
from .ops.rows import blocks
from .record import model_facts, run_head, sequence_facts
from .runs import folder as store
from .runs import frames
from .runs.by_sequence import BySequence
from .runs.cards import Cards
from .runs.contexts import Contexts
from .runs.explain import Explanation
from .runs.findings import ROW_SUMS, findings
from .runs.job import Queue
from .runs.manifest import replace as replace_file
from .runs.notebook import run_html
from .runs.pairs import Pairs, strongest
from .runs.scans import Scan
from .runs.schema import require_profile
from .runs.tiles import KeptTiles
from .sequences import Chi, context_numbers, token_texts
from .verify import Verification, against_steps, nothing_moves


@dataclass(eq=False)
class Run:
    """A profiled update.

    Attributes:
        about: what was run, versions, sequences, verification, checks, findings (run.json).
        tokens: one row per updated and per observed token (tokens.parquet, pyarrow).
        vector: Σ_l F, the whole step on each observed token, [M] nats per unit learning rate.
        matrix: F [M, L]; NaN in the cells that an interrupted run did not reach, None when it was not asked for.
        path: the folder that `profile` wrote, None where it wrote none.
        pairs: the strongest pairs by layer and kind, for `explain`; None where there is no complete matrix.
    """

    about: dict[str, Any]
    tokens: Any
    vector: Float[Tensor, " M"]
    matrix: Float[Tensor, "M L"] | None = None
    path: Path | None = None
    pairs: Pairs | None = None

    def explain(
        self,
        m: int | str | None = None,
        l: int | str | None = None,  # noqa: E741
        per: str = "contexts",
        down: bool = False,
    ) -> Explanation:
        """Why an update token moves an observed one: the card of the pair (docs/explain.md).

        Args:
            m, l: which observed and which update token: a place as it is printed ("chosen 1 @14") or a row of the token table.
                An answer ("chosen 1"), a role ("rejected") or nothing: the strongest push from elsewhere among those tokens.
            per: "contexts", net of what update tokens behind the same text as l cancel; "tokens", of l alone.
            down: the strongest that lowers.

        Raises:
            ValueError: the run kept no pairs, or not this one; no token is called m or l; no push of that kind.
        """
        return Cards(self.about, self.tokens, self.matrix, self.pairs).explain(m, l, per, down)

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one self-contained page, written to path when given."""
        from .report import render

        page = render(self.about, self.tokens, None if self.matrix is None else self.matrix.numpy(), self.pairs)
        if path is not None:
            replace_file(Path(path), page.encode())
        return page

    def to_dataframe(self, rows: str = "observed") -> Any:
        """A pandas table: the "observed" or the "updated" tokens, or one row for each of the "pairs" with its force.

        Raises:
            ValueError: another word, or pairs of a run without a matrix. ImportError: pandas is not installed.
        """
        if rows not in ("observed", "updated", "pairs"):
            raise ValueError(f'rows must be "observed", "updated" or "pairs", got {rows!r}')
        sides = {side: self.tokens.filter([of == side for of in self.tokens["side"].to_pylist()])
                 for side in ("observed", "updated")}  # fmt: skip
        if rows != "pairs":
            frames.pandas()
            return sides[rows].to_pandas().dropna(axis=1, how="all")
        if self.matrix is None:
            raise ValueError('the run has no matrix, and so no pairs: profile it with method="tangent"')
        return frames.pairs(sides["observed"], sides["updated"], force=self.matrix)

    def _repr_html_(self) -> str:
        """What a notebook shows: the observed answers coloured by their change, and the findings."""
        return run_html(self)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write run.json, tokens.parquet, forces.safetensors and report.html, all or nothing.

        Raises:
            FileExistsError: the folder exists and overwrite is False, or it is something other than a run.
            ValueError: the forces of a complete run are not finite.
        """
        if self.about["status"] == "complete":
            store.require_finite(vector=self.vector, matrix=self.matrix)
        tensors = {"vector": self.vector} | ({} if self.matrix is None else {"matrix": self.matrix})
        tensors |= {} if self.pairs is None else self.pairs.tensors()
        store.write_folder(Path(path), self.about, self.tokens, tensors, self.to_html(), overwrite)


def load(path: str | Path) -> Any:
    """Read what tokdyn wrote into a folder, whatever its kind.

    Returns:
        A Run of td.profile, Forces of td.forces (its matrix in `shards` where it went to a folder), a Scan of td.scan, or of
        a training the pair (run.json, its tables) that `tokdyn.steps.read` gives.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: it was written by a later format, cannot be read, or is not what its kind holds (which file, and where).
    """
    path = Path(path)
    kind = store.kind_of(path)
    if kind == "forces":
        return Forces.load(path)
    if kind == "scan":
        return Scan(path)
    if kind == "training":
        return steps.read(path)
    return _load_profile(path)


def _load_profile(path: Path) -> Run:
    """A profile's folder as a Run; errors as in `load`."""
    about, tokens, tensors = store.read_folder(path)
    require_profile(path, about, tokens, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return Run(about, tokens, tensors["vector"], tensors.get("matrix"), pairs=Pairs.read(tensors, about))


def profile(
    model: nn.Module,
    update: Sequence[Chi],
    observe: Sequence[Chi],
    objective: Objective = DPO(),  # noqa: B008
    *,
    tokenizer: Any = None,
    eta: float | None = None,
    scope: str = "full",
    method: str = "tangent",
    memory: int | str = "4GiB",
    reference: nn.Module | None = None,
    observable: Observable | Function | str = LogProb(),  # noqa: B008
    pairs: int | None = None,
    k: int = 8,
    about: dict[str, Any] | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    job: Queue | None = None,
    stage: Stage | None = None,
) -> Run:
    """Decompose one update into token-level forces, check it against a real step, and keep everything as a Run.

    Args:
        model, update, observe, objective, scope, reference, observable: as in `forces`.
        tokenizer: for the texts of vocabulary entries; ids are shown without it.
        eta: size of the checking step; by default the one whose largest predicted change is 0.2 nats.
        method: how the matrix is computed, "tangent" or "naive" (the oracle); "none" leaves it out.
        memory: what the matrix may take, as in `forces`. It is made in tiles that fit, and an interrupt keeps whole tiles.
        pairs: of how many pairs (the strongest) to keep the force by layer and kind for `Run.explain`; 2,000 or 10 % of them
            when absent, whichever is more. No further pass: the matrix is made in parts where a quarter of `memory` holds them.
        k: how many rising and falling vocabulary entries to keep per observed token.
        about: further entries of run.json (model, data).
        out: folder to write; nothing is written when absent. Where it cannot be written in the end, a temporary folder is,
            which a warning and `Run.path` name.
        overwrite: replace a run that lies there.
        resume: go on with the tiles of the matrix that a killed or interrupted call of the same left beside `out`
            (runs/tiles.py); the tables and the matrix are those of a call that was not stopped, bit for bit.
        job: of the processes that make this profile together (`tokdyn.runs.job.shared`), all with equal arguments: each makes
            tiles of the matrix, the first one writes the run, the runs of others have no matrix and no path. It is the run
            that one process makes with the same `memory`, bit for bit.
        stage: called with (what, done, total).

    An interrupt (Ctrl-C) while the matrix is computed ends it there: what is done is kept, the run says "partial". Where the
    pushes of the update cancel to rounding (a pair of the same text twice), no step is taken: eta, predicted and actual are
    None, and the run's finding says so.

    Raises:
        ValueError: as `forces`. FileExistsError: see `Run.save`.
    """
    if out is not None:
        partial = resume and store.about_of(Path(out)).get("status") == "partial"
        store.check_free(Path(out), overwrite or partial)
    check_method(method)
    check_eta(eta)
    memory = size_in_bytes(memory)
    stages, watched, first = Stages(stage), as_observable(observable), job is None or not job.rank
    asked = Asked(update, observe, objective, reference, observable=watched)
    with trace(model) as tracer:
        stages("scoring both sides")
        problem = UnscoredProblem.about(asked, Scope.named(tracer, scope)).scored()
        stages("one backward and one tangent pass")
        still, updated = nothing_moves(problem), problem.updated
        direction = problem.vjp(by_context(updated, context_numbers(update)) if still else updated, memory)
        vector, vocabulary = _whole_step(problem, direction, min(k, tracer.vocabulary))
        stages("real steps")
        verification = None if still else against_steps(problem, direction, vector, eta)
        stages("squeezing")
        squeezed = None if verification is None else squeeze.of_updates(problem, verification.eta)
        checks = {"readout formula against the model's logits": tracer.readout_residual(problem.observed.batches[0])}
        tiles = None if out is None else _tiles(problem, Path(out), (scope, method, memory), resume, job)
        makes = first or tiles is not None
        F, rules, status = _force_matrix(replace(problem, tiles=tiles), method if makes else "none", memory, stages)
        if not first:
            F, out = None, None
        matrix = F if F is None or F.dim() == 2 else F.sum(0)
        if matrix is not None and status == "complete":
            checks[ROW_SUMS] = float((matrix.sum(1) - vector).norm() / matrix.abs().sum(1).norm())
        coverage = problem.coverage(scope, rules)
        facts = model_facts(tracer)
        tokens = _tokens(problem, tokenizer, vector, verification, squeezed, vocabulary)
        kept = _kept(problem, F, tokens, pairs) if status == "complete" else None
        stages("writing")
    matrix = None if matrix is None else matrix.cpu()
    record: dict[str, Any] = run_head("profile") | {
        "status": status,
        "objective": objective.describe(),
        "settings": {"scope": scope, "method": method, "eta": None if verification is None else verification.eta},
        "sequences": sequence_facts("updated", update) + sequence_facts("observed", observe),
        "verify": verification and {key: x for key, x in asdict(verification).items() if not isinstance(x, Tensor)},
        "checks": checks,
        "coverage": coverage,
        "observable": watched.describe(),
        "pairs": None if kept is None else {"kept": len(kept.index), "parts": kept.names},
    }
    for key, value in (about or {}).items():
        record[key] = value | record[key] if isinstance(record.get(key), dict) else value
    record["model"] = facts | record.get("model", {})
    record["findings"] = findings(record, tokens, matrix, kept)
    record["seconds"] = stages.seconds()
    run = Run(record, tokens, vector.cpu(), matrix, pairs=kept)
    if out is not None:
        run.path = _save(run, Path(out), overwrite or partial)
        if tiles is not None and status == "complete" and run.path is not None:
            tiles.remove()
    return run


def _save(run: Run, out: Path, overwrite: bool) -> Path | None:
    """Write a run to `out` and say where it is; to a temporary folder where that fails, with a warning: it was long to make."""
    try:
        run.save(out, overwrite)
        return out
    except OSError as error:
        problem = f"the run could not be written to {out} ({error})"
    try:
        place = Path(tempfile.mkdtemp(prefix="tokdyn-")) / (out.name or "run")
        run.save(place)
    except OSError as error:
        warnings.warn(f"{problem}, nor to a temporary folder ({error}); it is in memory alone", stacklevel=3)
        return None
    warnings.warn(f"{problem}; it is in {place}", stacklevel=3)
    return place


def _tiles(problem: ScoredProblem, out: Path, how: tuple[str, str, int], resume: bool, job: Queue | None) -> KeptTiles | None:
    """Where tiles of the matrix are kept beside `out`; None where there are none, or where a job cannot share them.

    One gradient a token has no tiles; where tangents are doubtful the whole matrix is checked by its sum.
    """
    scope, method, memory = how
    shared = job if method == "tangent" and not problem.tracer.why_not_tangents(problem.uses) else None
    if method == "none" or (job is not None and job.rank and shared is None):
        return None
    same = {"made of": identity(problem, scope, method, None), "memory": memory, "tokdyn": __version__}
    return KeptTiles(out, same, resume, shared)


def _force_matrix(
    problem: ScoredProblem, method: str, memory: int, stages: Stages
) -> tuple[Tensor | None, Mapping[str, str], str]:
    """F [M, L] with the rule of each use and whether it is "complete", or "partial" after Ctrl-C; no matrix for "none".

    By "tangent" it is in parts [N, M, L], each kind of each layer, where those fit into a quarter of `memory`.
    """
    if method == "none":
        return None, {}, "complete"
    parts = layers_and_kinds(problem)
    if method == "tangent" and len(parts.names) * math.prod(problem.shape) * problem.tracer.precision.itemsize <= memory // 4:
        problem = replace(problem, parts=parts)
    matrix = problem.empty()
    try:
        stages("force matrix")
        rules = choose(problem, method)(problem, matrix, memory=memory, progress=stages.progress)
        while problem.tiles is not None and problem.tiles.wait():
            rules = choose(problem, method)(problem, matrix, memory=memory, progress=stages.progress)
    except KeyboardInterrupt:
        if problem.tiles is not None:
            problem.tiles.write()
        return matrix, {}, "partial"
    return matrix, rules, "complete"


def _kept(problem: ScoredProblem, F: Tensor | None, tokens: Any, count: int | None) -> Pairs | None:
    """The strongest pairs of a matrix in parts, each with its parts and kernel."""
    if F is None or F.dim() == 2:
        return None
    sequences = sequence_facts("updated", problem.updated.chis) + sequence_facts("observed", problem.observed.chis)
    names = layers_and_kinds(problem).names
    index = strongest(Contexts.of(BySequence.of(tokens, F.sum(0).cpu()), sequences), len(names), count)
    parts = F[:, index[:, 0], index[:, 1]].T
    return Pairs(index, parts.float().cpu().contiguous(), kernels(problem, index).float(), [split(name) for name in names])


def _whole_step(problem: ScoredProblem, direction: Direction, k: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Σ_l F [M] and the k tokens of the vocabulary that rise and fall most, (ids, rates) each [M, k], from one tangent pass."""
    force, rising, falling = [], [], []
    for b, batch in enumerate(problem.observed.batches):
        z, velocity = problem.jvp_logits(batch, direction)
        force.append(problem.observed.work(b, z, velocity))
        for rows in blocks(z):
            moved = ops.apply_A(z[rows], velocity[rows])
            rising.append(moved.topk(k))
            falling.append(moved.topk(k, largest=False))
    sides_of = [(torch.cat([t.indices for t in top]), torch.cat([t.values for t in top])) for top in (rising, falling)]
    return torch.cat(force), sides_of


def _tokens(  # what a run knows of each token, from where it was found
    problem: ScoredProblem, tokenizer: Any, vector: Tensor, verification: Verification | None, squeezed: squeeze.Squeeze | None,
    vocabulary: Any,
) -> Any:  # fmt: skip
    """The token table of a run."""
    import pyarrow as pa

    ids = torch.cat([vocabulary[0][0].flatten(), vocabulary[1][0].flatten()]).tolist()
    updated, observed = problem.updated.table(with_c=True), problem.observed.table(with_c=False)
    ids = sorted({*ids, *updated["argmax"].to_pylist(), *observed["argmax"].to_pylist()})
    texts = token_texts(tokenizer, ids) if tokenizer is not None else [""] * len(ids)
    text = {i: spelled or f"<{i}>" for i, spelled in zip(ids, texts, strict=True)}

    def entries(ids: Tensor, values: Tensor) -> Any:
        rows = zip(ids.tolist(), values.tolist(), strict=True)
        found = [[{"token": text[i], "delta": v} for i, v in zip(*row, strict=True) if v] for row in rows]
        return pa.array(found, pa.list_(pa.struct([("token", pa.string()), ("delta", pa.float64())])))

    for name, source in (
        ("p_target_after", "target_after"),
        ("p_argmax", "argmax_before"),
        ("p_argmax_after", "argmax_after"),
        ("mass_to_argmax", "argmax_gain"),
        ("falling_share", "falling"),
        ("falling_by_sign_rule", "predicted_falling"),
    ):
        updated = updated.append_column(name, _numbers(squeezed, source, updated.num_rows))
    for name, values in (
        ("force", pa.array(vector.tolist())),
        ("predicted", _numbers(verification, "predicted", observed.num_rows)),
        ("actual", _numbers(verification, "actual", observed.num_rows)),
        ("risers", entries(*vocabulary[0])),
        ("fallers", entries(*vocabulary[1])),
    ):
        observed = observed.append_column(name, values)
    updated, observed = (
        t.append_column("argmax_token", pa.array([text[i] for i in t["argmax"].to_pylist()])) for t in (updated, observed)
    )
    contexts = context_numbers([*problem.updated.chis, *problem.observed.chis])
    return with_sides(updated, observed).append_column("context", pa.array(contexts.tolist()))


def _numbers(source: Verification | squeeze.Squeeze | None, name: str, n: int) -> Any:
    """A column of n numbers (pyarrow), null where no step was taken."""
    import pyarrow as pa

    return pa.array([None] * n if source is None else getattr(source, name).tolist(), pa.float64())
