"""Rows to tables: a traced model with its groups pulled back, for the blocks of a scan and for batches of other frameworks."""

from __future__ import annotations

import contextlib
import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import data
from .._arguments import size_in_bytes
from ..exact import Scope
from ..exact.parts import By
from ..exact.products import way
from ..exact.scanning import Pulled, Row, packed
from ..exact.sides import referred
from ..live import fingerprint
from ..model.trace import Tracer, trace
from ..objective import Objective
from ..observables import Function, Observable
from ..observables import observable as as_observable
from ..record import model_facts, run_head
from ..runs.scans import SEPARATOR
from ..sequences import Chi, context_numbers

PROMPT = 200  # characters of a prompt's end that the row table keeps


@dataclass(frozen=True, eq=False)
class Scanner:
    """Rows to tables: a traced model with its groups pulled back; made by `opened`, which holds the model as it must be.

    Attributes:
        pulled: the groups' directions.
        objective, tokenizer, optimizer, step_rows, memory, encoding: as in `scan`.
        reference: the reference model traced, or None.
        record: entries of run.json: versions, model, coverage.
        identity: entries that all processes of a folder must agree on: objective, groups, parameters.
    """

    pulled: Pulled
    objective: Objective
    tokenizer: Any
    optimizer: torch.optim.Optimizer | None
    step_rows: int
    memory: int
    encoding: Mapping[str, Any]
    reference: Tracer | None
    record: dict[str, Any]
    identity: dict[str, Any]

    def tables(self, places: Sequence[tuple[str, Any]], first: int = 0) -> tuple[Any, Any]:
        """The token table and the row table (pyarrow) of rows with their places; `first` is the number of the first one."""
        kept: list[Row | None] = []
        heads = []
        for n, (where, raw) in enumerate(places, first):
            row, head = self.encoded(where, raw)
            heads.append({"row": n, "where": where} | head)
            kept.append(row)
        numbers = [n for n, row in enumerate(kept, first) if row is not None]
        usable = [row for row in kept if row is not None]
        step = self.step_rows if self.optimizer is not None else max(1, len(usable))
        tokens, sums = [], dict[int, dict[str, float]]()
        for start in range(0, len(usable), step):
            made, of_row = self._update(numbers[start : start + step], usable[start : start + step])
            tokens.append(made)
            sums |= of_row
        return self._token_table(tokens), self._row_table(heads, sums)

    def encoded(self, where: str, raw: Any) -> tuple[Row | None, dict[str, Any]]:
        """A row's sequences, or the reason why there are none, with the first entries of its line in the row table."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            problem, chis = None, list[Chi]()
            try:
                chis = self._sequences(where, raw)
            except ValueError as error:
                problem = str(error)
        notes = "; ".join(dict.fromkeys(str(note.message) for note in said)) or None
        head = {
            "problem": problem, "note": notes, "prompt": chis[0].prompt[-PROMPT:] if chis else None, "sequences": len(chis),
            "tokens": sum(len(chi) for chi in chis), "truncated": sum(chi.truncated for chi in chis),
        }  # fmt: skip
        return (None if problem else Row(where, chis)), head

    def _sequences(self, where: str, raw: Any) -> list[Chi]:
        if isinstance(raw, ValueError):
            raise raw
        if isinstance(raw, Sequence) and not isinstance(raw, str) and raw and all(isinstance(chi, Chi) for chi in raw):
            chis = [chi.with_(group=0) if self.objective.reads != "rollouts" else chi for chi in raw]
        elif self.tokenizer is None:
            raise ValueError(f"{where}: rows of text need tokenizer=")
        else:
            chis = data.row_sequences(self.tokenizer, raw, self.objective, where, **self.encoding)
        if not all(len(chi) for chi in chis):
            raise ValueError(f"{where}: a sequence has no scored token")
        return chis if self.reference is None else referred(chis, self.reference)

    def _update(self, numbers: list[int], rows: list[Row]) -> tuple[dict[str, Any], dict[int, dict[str, float]]]:
        """The columns of the tokens of some rows in the order of the data, and the sums of each row."""
        update = packed(self.pulled.tracer, rows, self.objective)
        F, side = self.pulled.forces(update, self.optimizer, self.memory)
        number = {id(row): n for n, row in zip(numbers, rows, strict=True)}
        row_of = torch.tensor([number[id(row)] for row in update.rows])[update.row_of()]
        order = torch.argsort(row_of, stable=True)
        F, row_of, stats = F.cpu()[..., order], row_of[order], side.stats
        if self.pulled.parts is not None:
            F = torch.cat([F.sum(0, keepdim=True), F])
        columns: dict[str, Any] = {"row": row_of.numpy()} | _places(rows)
        for name in ("log_prob", "entropy", "rank", "argmax"):
            columns[name] = getattr(stats, name).cpu()[order].numpy()
        columns["c"] = side.c.cpu()[order].numpy()
        sums = {n: dict[str, float]() for n in numbers}
        contexts = torch.from_numpy(columns["context"])
        for name, of in zip(self._forces, F.flatten(0, -2), strict=True):
            columns[f"force_{name}"] = of.numpy()
            for n, found in zip(numbers, _sums(of.double(), row_of, contexts), strict=True):
                sums[n] |= {f"{what}_{name}": value for what, value in found.items()}
        return columns, sums

    @property
    def _forces(self) -> list[str]:
        """What the forces on each group are called, then those of each part on each group."""
        parts = () if self.pulled.parts is None else self.pulled.parts.names
        return [*self.pulled.names, *(f"{name}{SEPARATOR}{part}" for part in parts for name in self.pulled.names)]

    def _token_table(self, parts: list[dict[str, Any]]) -> Any:
        import numpy as np
        import pyarrow as pa

        wide = pa.float64() if self.pulled.tracer.precision == torch.float64 else pa.float32()
        kinds = dict(row=pa.int64(), sequence=pa.int32(), role=pa.string(), position=pa.int32(), token_id=pa.int32(),
                     token=pa.string(), context=pa.int32(), log_prob=wide, entropy=wide, rank=pa.int32(), argmax=pa.int32(),
                     c=wide)  # fmt: skip
        kinds |= {f"force_{name}": wide for name in self._forces}
        columns = {}
        for name, kind in kinds.items():
            values = [part[name] for part in parts]
            if kind == pa.string():
                columns[name] = pa.array([text for part in values for text in part], kind)
            else:
                columns[name] = pa.array(np.concatenate(values) if values else [], from_pandas=False).cast(kind)
        return pa.table(columns)

    def _row_table(self, heads: list[dict[str, Any]], sums: Mapping[int, Mapping[str, float]]) -> Any:
        import pyarrow as pa

        kinds = dict(row=pa.int64(), where=pa.string(), problem=pa.string(), note=pa.string(), prompt=pa.string(),
                     sequences=pa.int32(), tokens=pa.int32(), truncated=pa.int32())  # fmt: skip
        kinds |= {f"{what}_{name}": pa.float64() for name in self._forces for what in ("force", "size", "net")}
        lines = [head | dict(sums.get(head["row"], {})) for head in heads]
        return pa.table({name: pa.array([line.get(name) for line in lines], kind) for name, kind in kinds.items()})


def _places(rows: Sequence[Row]) -> dict[str, Any]:
    """Where the tokens of rows stand and what they are, row by row."""
    import numpy as np

    found: dict[str, list[Any]] = {name: [] for name in ("sequence", "role", "position", "token_id", "token", "context")}
    for row in rows:
        found["context"].append(context_numbers(row.chis).numpy())
        for s, chi in enumerate(row.chis):
            at = chi.scored.nonzero().flatten()
            ids = chi.ids[at]
            found["sequence"].append(np.full(len(at), s))
            found["position"].append(at.numpy())
            found["token_id"].append(ids.numpy())
            found["role"] += [chi.role] * len(at)
            found["token"] += [chi.tokens[t] for t in at.tolist()] if chi.tokens else [f"<{y}>" for y in ids.tolist()]
    joined = ("sequence", "position", "token_id", "context")
    return {name: np.concatenate(column) if name in joined else column for name, column in found.items()}


def _sums(F: Tensor, row_of: Tensor, contexts: Tensor) -> Iterator[dict[str, float]]:
    """Of every row: Σ F, Σ |F|, and Σ over contexts of |Σ F in it|, what is left where tokens behind the same ids cancel."""
    for n in row_of.unique().tolist():
        own = row_of == n
        f, context = F[own], contexts[own].long()
        net = torch.zeros(int(context.max()) + 1, dtype=F.dtype).index_add_(0, context, f)
        yield {"force": float(f.sum()), "size": float(f.abs().sum()), "net": float(net.abs().sum())}


# ---------------------------------------------------------------- a scanner


@contextlib.contextmanager
def opened(
    model: nn.Module,
    groups: Mapping[str, Sequence[Chi]],
    objective: Objective,
    *,
    tokenizer: Any = None,
    scope: str = "full",
    optimizer: torch.optim.Optimizer | None = None,
    step_rows: int = 32,
    reference: nn.Module | None = None,
    memory: int | str = "4GiB",
    observable: Observable | Function | str = "log-prob",
    by: By | None = None,
    **encoding: Any,
) -> Iterator[Scanner]:
    """The groups pulled back, ready for rows; arguments as in `scan`. The model is traced inside the block.

    Raises:
        ValueError: see `scan`.
    """
    with contextlib.ExitStack() as stack:
        tracer = stack.enter_context(trace(model))
        if tracer.sharded:
            raise ValueError("a scan needs the model whole on every rank, its weights are spread over them (FSDP2)")
        other = None if reference is None or reference is model else stack.enter_context(trace(reference))
        moving, watched = Scope.named(tracer, scope, by), as_observable(observable)
        pulled = Pulled.of(moving, groups, watched, size_in_bytes(memory))
        listed = [
            {"name": name, "sequences": len(chis), "tokens": size, "ids": _digest(_content(chis))}
            for (name, chis), size in zip(groups.items(), pulled.sizes, strict=True)
        ]
        identity = {
            "kind": "scan",
            "objective": objective.describe(),
            "observable": watched.describe(),
            "parts": None if moving.parts is None else list(moving.parts.names),
            "groups": listed,
            "parameters": _digest(fingerprint(tracer).numpy().tobytes()),
            "reference": None if other is None else _digest(fingerprint(other).numpy().tobytes()),
            "optimizer": None if optimizer is None else _of_optimizer(optimizer),
        }
        record = run_head("scan") | {
            "model": model_facts(tracer),
            "coverage": moving.coverage(scope, way(tracer, moving.uses, "autograd")),
        }
        yield Scanner(pulled, objective, tokenizer, optimizer, step_rows, size_in_bytes(memory), encoding, other, record,
                      identity)  # fmt: skip


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _content(chis: Sequence[Chi]) -> bytes:
    return b"|".join(chi.ids.numpy().tobytes() + chi.scored.numpy().tobytes() for chi in chis)


def _of_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its kind, learning rates, and a checksum of the squares it has seen."""
    kept = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    total = math.fsum(float(x.double().sum()) for x in kept)
    return {"name": type(optimizer).__name__, "lr": [group["lr"] for group in optimizer.param_groups], "state": total}
