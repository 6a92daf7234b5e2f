"""What a monitored step leaves: a record, its token table, sums that merge over steps and ranks, and the folder they go to.

A folder holds run.json and, for every rank, parquet files that are each whole or absent:

    tokens-00000-000001.parquet   one row per scored token of the update
    probe-00000-000001.parquet    one row per probe token and probe step
    steps-00000-000001.parquet    one row per recorded step with its sums
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..runs.folder import ABOUT, FORMAT, finite
from .forward import Forward

SUMS = ("steps", "tokens", "c_up", "c_down", "force", "force_up", "entropy", "collision", "log_prob", "p_target", "p_argmax",
        "pushed", "squeezed", "shared", "paired", "clipped", "clippable", "explained", "checked")  # fmt: skip


@dataclass(eq=False)
class Step:
    """One recorded optimizer step.

    Attributes:
        step: its number; the first is 1.
        residual: the capture's self-check, ‖∂L/∂h rebuilt from c and v - ∂L/∂h‖/‖∂L/∂h‖ over the step.
        c: -∂L/∂log pi of each scored token, [tokens], L the loss whose gradient the optimizer sees before clipping.
        tokens: their table (pyarrow), in the same order; read back from the folder once it was written there.
        metrics: the step's own figures, names as in `metrics`, this rank's tokens only.
        routes: how c was captured. passes, excluded: forward passes with gradients, and without.
        notes: what is known to be missing.
        observed: the table of the probe's tokens, [M], with before, after, actual, predicted and predicted_readout.
        predicted, actual: change of their log-probs through this step, first order and real, [M] nats.
        linearity: <predicted, actual>/‖predicted‖².
        forces: nats by which each scored token of this rank moved the blamed group of the probe in this step, [tokens].
        carried: what momentum and weight decay moved it by. accounted: Σ forces of all ranks / what the gradient moved it by.
    """

    step: int
    residual: float
    c: Float[Tensor, " tokens"]
    _tokens: dict[str, Any] | Path | None
    metrics: dict[str, float]
    routes: tuple[str, ...]
    passes: int
    excluded: int
    notes: list[str] = field(default_factory=list)
    observed: Any = None
    predicted: Float[Tensor, " M"] | None = None
    actual: Float[Tensor, " M"] | None = None
    linearity: float | None = None
    forces: Float[Tensor, " tokens"] | None = None
    carried: float | None = None
    accounted: float | None = None
    sums: dict[str, float] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> Any:
        """The table of the update's scored tokens (pyarrow).

        Raises:
            ValueError: it was let go.
        """
        if self._tokens is None:
            raise ValueError(
                f"the token table of step {self.step} was let go to spare memory: give the monitor out=, and all stay on disk"
            )
        if isinstance(self._tokens, Path):
            import pyarrow.parquet as pq

            return pq.read_table(self._tokens, filters=[("step", "=", self.step)])
        return table(self._tokens)

    def let_go(self) -> None:
        """Forget the token table; the figures stay."""
        self._tokens = None

    def sequences(self) -> Any:
        """One row per sequence of the update (pyarrow): how many tokens; sums of c, force, force_up and cancelled; means.

        force_up is the force where c > 0. Means are those of the statistics and, as the share of clipped tokens, of clipped.
        """
        import pyarrow.compute as pc

        tokens = self.tokens
        tokens = tokens.append_column("force_up", pc.if_else(pc.greater(tokens["c"], 0.0), tokens["force"], 0.0))
        keys = ["sequence", "micro_batch", "role", "group"]
        sums = ["c", "force", "force_up", "cancelled"]
        means = ["log_prob", "p_target", "p_argmax", "entropy", "collision", "g_norm", "clipped"]
        wanted = [("c", "count")] + [(name, "sum") for name in sums] + [(name, "mean") for name in means]
        return tokens.group_by(keys, use_threads=False).aggregate(wanted)


def columns(forwards: Sequence[Forward], scale: float) -> dict[str, Any]:
    """Columns of the token table, one tensor or list each; c, v, u and force times `scale`."""
    parts: dict[str, list[Any]] = {}
    first, numbers = 0, sorted({f.micro_batch for f in forwards})
    for f in forwards:
        assert f.c is not None
        n = f.layout.sequences
        zero = torch.zeros_like(f.c)
        p, top = f.stats.log_prob.exp(), f.stats.argmax_log_prob.exp()
        rate = top * (top - f.stats.collision + p) * (f.stats.argmax != f.targets)
        stats = f.stats._asdict()
        values: dict[str, Any] = dict(
            micro_batch=torch.full_like(f.targets, numbers.index(f.micro_batch)),
            sequence=first + f.sequence,
            position=f.position,
            token_id=f.targets,
            c=scale * f.c,
            v=zero if f.v is None else scale * f.v,
            u=zero if f.u is None else scale * f.u,
            force=scale * f.force,
            p_target=p,
            p_argmax=top,
            squeezing=rate * (f.c < 0),
            h_square=zero if f.square is None else f.square,
            token_rank=stats.pop("rank"),  # rank is the process's
        ) | stats  # fmt: skip
        more = f.metadata
        A = None if more.get("advantages") is None else f.of_rows(torch.as_tensor(more["advantages"]))
        values["advantage"] = zero * math.nan if A is None else A.float()
        values["clipped"] = zero * math.nan
        if A is not None and more.get("clip") is not None and f.touched is None:  # else a clipped token is not among them
            old = more.get("old_log_probs")
            moved = zero if old is None else f.stats.log_prob - f.of_rows(old)
            ratio = (_mean_of_each(moved, f.sequence, n) if more.get("level") == "sequence" else moved).exp()
            low, high = more["clip"]
            values["clipped"] = (((A > 0) & (ratio > 1 + high)) | ((A < 0) & (ratio < 1 - low))).float()
        for name, default in (("roles", "response"), ("groups", None)):
            of = more.get(name)
            if of is not None and len(of) != n:
                raise ValueError(f"{name} must name each of the {n} sequences of the batch, got {len(of)}")
            of = list(of) if of is not None else [default] * n if default is not None else list(range(n))
            values[name[:-1]] = [of[s] if name == "roles" else first + of[s] for s in f.sequence.tolist()]
        for name, value in values.items():
            parts.setdefault(name, []).append(value)
        first += n
    of = {
        name: sum(part, []) if isinstance(part[0], list) else torch.cat([x.detach() for x in part]).cpu()
        for name, part in parts.items()
    }
    return of | dict(cancelled=cancelled(of, forwards))


def _mean_of_each(values: Float[Tensor, " N"], sequence: Tensor, n: int) -> Float[Tensor, " N"]:
    sums = torch.zeros(2, n, dtype=values.dtype, device=values.device)
    sums.index_add_(1, sequence, torch.stack([values, torch.ones_like(values)]))
    return (sums[0] / sums[1].clamp(min=1))[sequence]


def table(of: Mapping[str, Any]) -> Any:
    """Columns as a pyarrow table; floats in single precision."""
    import pyarrow as pa

    arrays = {}
    for name, value in of.items():
        if isinstance(value, Tensor):
            value = pa.array((value.float() if value.is_floating_point() else value).numpy())
        arrays[name] = value
    return pa.table(arrays)


def cancelled(of: Mapping[str, Any], forwards: Sequence[Forward]) -> Float[Tensor, " N"]:
    """Force of each token that the other answer of its pair cancels; NaN outside pairs.

    Where chosen and rejected answer begin alike, so do their hidden states, and G⁺ + G⁻ = -(c⁺ + c⁻)(e_y - pi)/temperature:
    (|c⁺| + |c⁻| - |c⁺ + c⁻|) ‖pi - e_y‖/temperature is lost, half of it on either side.
    """
    c, T = of["c"], torch.cat([torch.full_like(f.c, f.temperature) for f in forwards if f.c is not None]).cpu()
    found = torch.full_like(c, math.nan)
    if "chosen" not in of["role"]:
        return found
    ids: dict[int, list[int]] = {}
    first = 0
    for f in forwards:
        if f.layout.ids is not None:
            for s in range(f.layout.sequences):
                ids[first + s] = f.layout.ids[(f.layout.sequence == s) & f.layout.real].tolist()
        first += f.layout.sequences
    rows: dict[tuple[int, str], dict[int, int]] = {}
    where: dict[tuple[int, str], int] = {}
    numbers = (of[name].tolist() for name in ("sequence", "position"))
    for row, (group, role, s, t) in enumerate(zip(of["group"], of["role"], *numbers, strict=True)):
        rows.setdefault((group, role), {})[t] = row
        where[group, role] = s
    for (group, role), plus in rows.items():
        minus = rows.get((group, "rejected"))
        if role != "chosen" or minus is None or where[group, role] not in ids:
            continue
        found[[*plus.values(), *minus.values()]] = 0.0
        a, b = ids[where[group, "chosen"]], ids[where[group, "rejected"]]
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        shared = [t for t in plus if t < same and t in minus]
        up, down = [plus[t] for t in shared], [minus[t] for t in shared]
        half = (c[up].abs() + c[down].abs() - (c[up] + c[down]).abs()) / 2
        for side in (up, down):
            found[side] = half * of["g_norm"][side] / T[side]
    return found


def sums(of: Mapping[str, Any], forwards: Sequence[Forward]) -> dict[str, float]:
    """The quantities that figures are ratios of; they add over ranks and steps."""
    c, force = of["c"].double(), of["force"].double()
    push = (-c).clamp(min=0)
    clipped, lost = of["clipped"], of["cancelled"].double()
    weight = [(f.check.residual, f.check.total) for f in forwards if not math.isnan(f.check.scored)]
    values = dict(
        steps=1.0, tokens=float(len(c)), c_up=float(c.clamp(min=0).sum()), c_down=float(push.sum()),
        force=float(force.sum()), force_up=float(force[c > 0].sum()),
        pushed=float(push.sum()), squeezed=float((push * of["squeezing"]).sum()),
        shared=float(lost.nansum()), paired=float(force[~lost.isnan()].sum()),
        clipped=float(clipped.nansum()), clippable=float((~clipped.isnan()).sum()),
        explained=float(sum(r * r * w for r, w in weight)), checked=float(sum(w for _, w in weight)),
    )  # fmt: skip
    for name in ("entropy", "collision", "log_prob", "p_target", "p_argmax"):
        values[name] = float(of[name].double().sum())
    return values


def metrics(of: Mapping[str, float]) -> dict[str, float]:
    """Figures of one or many steps from their sums.

        c_up, c_down            Σ of c over tokens pulled up, and of -c over those pushed down, per step
        force, force_up_share   Σ ‖G‖ per step, and the share of it that pulls up
        entropy, collision, log_prob, p_target, p_argmax    means over the scored tokens
        squeezing               rate at which a first choice gains probability per unit of push on another token, 0 to 1:
                                Σ_{c<0} |c| p* (p* - ‖pi‖² + p_y) / Σ_{c<0} |c|, p* the argmax, 0 where it is y itself
        shared_prefix           share of the pairs' force that their shared prefixes cancel
        clipped                 share of tokens whose ratio the objective clips
        residual                the captures' self-check

    Those that do not apply are left out.
    """
    n, tokens = of["steps"], of["tokens"]
    if not n or not tokens:
        return {}
    found = dict(
        tokens=tokens / n, c_up=of["c_up"] / n, c_down=of["c_down"] / n, force=of["force"] / n,
        force_up_share=of["force_up"] / of["force"] if of["force"] else math.nan,
    )  # fmt: skip
    found |= {name: of[name] / tokens for name in ("entropy", "collision", "log_prob", "p_target", "p_argmax")}
    for name, part, whole in (("squeezing", "squeezed", "pushed"), ("shared_prefix", "shared", "paired"),
                              ("clipped", "clipped", "clippable")):  # fmt: skip
        if of[whole]:
            found[name] = of[part] / of[whole]
    if of["checked"]:
        found["residual"] = (of["explained"] / of["checked"]) ** 0.5
    return found


class Folder:
    """The folder of a monitored training; every file is written beside its place and then moved there.

    Raises:
        FileExistsError: the path exists.
    """

    def __init__(self, path: Path, rank: int, about: Mapping[str, Any]) -> None:
        self.path, self.rank, self.shards = path, rank, 0
        self.waiting: list[Step] = []
        self.about = {"format": FORMAT, "kind": "training", "status": "running"} | dict(about)
        if rank == 0 and path.exists() and any(path.iterdir()):
            raise FileExistsError(f"{path} exists already: choose another place for this training's records")
        path.mkdir(parents=True, exist_ok=True)
        self._write_about()

    def add(self, step: Step, every: int = 20) -> None:
        """Keep a step; every so many, write them out."""
        self.waiting.append(step)
        if len(self.waiting) >= every:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self.waiting:
            return
        self.shards += 1
        tables = {
            "tokens": [s.tokens for s in self.waiting],
            "probe": [s.observed for s in self.waiting if s.observed is not None],
        }
        tables["steps"] = [pa.Table.from_pylist([self._row(s)]) for s in self.waiting]
        for name, parts in tables.items():
            if parts:
                path = self.path / f"{name}-{self.rank:05d}-{self.shards:06d}.parquet"
                part = path.with_name(f".{path.name}")
                pq.write_table(pa.concat_tables(parts, promote_options="permissive"), part)
                os.replace(part, path)
        for step in self.waiting:
            step._tokens = self.path / f"tokens-{self.rank:05d}-{self.shards:06d}.parquet"
        self.waiting = []

    def _row(self, s: Step) -> dict[str, Any]:
        about = dict(step=s.step, rank=self.rank, passes=s.passes, excluded=s.excluded, routes=" ".join(s.routes))
        probe = dict(linearity=s.linearity, carried=s.carried, accounted=s.accounted)
        return about | s.metrics | probe | {f"sum_{name}": value for name, value in s.sums.items()}

    def close(self, status: str, **about: Any) -> None:
        """Write the rest, and how the training ended."""
        self.flush()
        self.about |= {"status": status} | about
        self._write_about()

    def _write_about(self) -> None:
        if self.rank == 0:
            part = self.path / f".{ABOUT}"
            part.write_text(json.dumps(finite(self.about), indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
            os.replace(part, self.path / ABOUT)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """run.json and the tables "tokens", "probe" and "steps" (pyarrow) of all ranks of a monitored training.

    Raises:
        FileNotFoundError: the folder holds no run. ValueError: it holds something else, or a later format.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not (path / ABOUT).exists():
        raise FileNotFoundError(f"{path} holds no run: {ABOUT} is missing")
    about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    if about.get("kind") != "training" or about.get("format", 0) > FORMAT:
        raise ValueError(f"{path} holds {about.get('kind')} in format {about.get('format')}, not a training in format {FORMAT}")
    tables = {}
    for name in ("tokens", "probe", "steps"):
        parts = [pq.read_table(file) for file in sorted(path.glob(f"{name}-*.parquet"))]
        tables[name] = pa.concat_tables(parts, promote_options="permissive") if parts else None
    return about, tables
