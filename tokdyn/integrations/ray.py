"""Ray: a scan inside a Ray job, as a Ray Data `map_batches` over actors that each hold the model.

    tokens = tokdyn.integrations.ray.scan(
        ray.data.read_parquet("pairs/"), "my-model", lambda tokenizer: td.probes.load(tokenizer, "probe.jsonl"), DPO(),
        keep=("id",), concurrency=4, num_gpus=1,
    )
    tokens.write_parquet("forces/")

What is done to a batch of rows is `tokdyn.scan`'s own; what Ray does with it (where it runs, retries, writing) is Ray's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..loading import load_model
from ..objective import Objective
from ..objectives import DPO
from ..scan.scanner import opened
from ..sequences import Chi

Groups = Mapping[str, Sequence[Chi]]
BATCH = 64  # rows given to an actor at a time
TABLES = ("tokens", "rows")


def scan(
    dataset: Any,
    model: str | Callable[[], tuple[Any, Any]],
    observe: Groups | Callable[[Any], Groups],
    objective: Objective = DPO(),  # noqa: B008
    *,
    table: str = "tokens",
    keep: Sequence[str] = (),
    batch_size: int = BATCH,
    concurrency: Any = None,
    remote: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Force of every token of every row of a Ray dataset on groups of observed answers, as a Ray dataset (lazy).

    Args:
        dataset: a ray.data.Dataset of rows as `data.read` takes them.
        model: a name that `load_model` takes, or a function that makes a model and its tokenizer; called on each actor.
        observe: groups of sequences by name, or a function of the tokenizer that makes them.
        objective: the loss of a row.
        table: "tokens", one row a token, or "rows", one row an example with its sums (docs/runs.md).
        keep: columns of the dataset that are repeated on each line of the result, an id for instance: Ray numbers no rows.
        batch_size: rows that an actor takes at a time.
        concurrency: number of actors, or (least, most), as `map_batches` takes it.
        remote: further options of `map_batches`: num_cpus, num_gpus, memory.
        options: of `td.scan`: scope, reference (a function that makes the model), memory, max_length, truncate.

    Raises:
        ValueError: another table. What is wrong with groups, model or loss is raised by the actors when the result is read.
    """
    if table not in TABLES:
        raise ValueError(f'table must be "tokens" or "rows", got {table!r}')
    given = dict(model=model, observe=observe, objective=objective, table=table, keep=tuple(keep), options=options)
    return dataset.map_batches(
        ScanBatches, fn_constructor_kwargs=given, batch_size=batch_size, batch_format="pyarrow", concurrency=concurrency,
        **dict(remote or {}),
    )  # fmt: skip


class ScanBatches:
    """What an actor does: it loads the model and pulls the groups back once, and makes a table of every batch of rows.

    Args: as of `scan`.
    """

    def __init__(
        self, model: Any, observe: Any, objective: Objective, table: str, keep: Sequence[str], options: Mapping[str, Any]
    ) -> None:
        lm, tokenizer = load_model(model) if isinstance(model, str) else model()
        groups = observe(tokenizer) if callable(observe) else observe
        made = {name: value() if name == "reference" and callable(value) else value for name, value in options.items()}
        self.table, self.keep = table, tuple(keep)
        self.stack = contextlib.ExitStack()
        self.scanner = self.stack.enter_context(opened(lm, groups, objective, tokenizer=tokenizer, **made))

    def __call__(self, batch: Any) -> Any:
        """The table of a batch (pyarrow), with the columns that are kept in front."""
        rows = batch.to_pylist()
        missing = [name for name in self.keep if name not in batch.column_names]
        if missing:
            raise ValueError(f"the dataset has no column {missing[0]!r} to keep: it has {', '.join(batch.column_names)}")
        names = [
            " ".join(f"{name}={row[name]}" for name in self.keep) or f"row {n + 1} of a batch" for n, row in enumerate(rows)
        ]
        made = self.scanner.tables(list(zip(names, rows, strict=True)))[TABLES.index(self.table)]
        number = made["row"].to_pylist()
        made = made.drop_columns(["row"])
        for name in reversed(self.keep):
            made = made.add_column(0, name, batch[name].combine_chunks().take(number) if number else batch[name].slice(0, 0))
        return made
