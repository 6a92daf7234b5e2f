"""`tokdyn check FILE --model M`: the data, the template and the tokenizer of a training that has not begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data import checked_row, objects
from ..loading import facts_of, load_tokenizer
from ..objective import Objective
from ..objectives import by_name
from . import contents, data, template
from .finding import WRONG, Finding, Report
from .run import run
from .texts import Texts

NEEDS = {"preference": ("chosen", "rejected"), "rollouts": ("completions", "rewards")}


def check_file(
    path: str | Path,
    tokenizer: Any,
    *,
    objective: Objective | None = None,
    rows: int | None = None,
    max_length: int | None = None,
    assistant_only: bool = False,
    vocabulary: int | None = None,
    eos: frozenset[int] = frozenset(),
) -> Report:
    """What is wrong with a data file under a tokenizer and its template; no model is needed.

    Args:
        path: a file as `tokdyn profile` takes it.
        tokenizer: of the model that will be trained.
        objective: the loss: a row that it cannot use is wrong.
        rows: so many rows at most, spread over the file; all when absent.
        max_length: longest sequence in tokens of the training.
        assistant_only: the training takes its mask from the template's generation marks (TRL's assistant_only_loss).
        vocabulary: rows of the model's embedding. eos: ids at which its generation ends, besides the tokenizer's.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it cannot be read at all.
    """
    numbered = objects(path)
    if rows is not None and rows < len(numbered):
        numbered = [numbered[i * len(numbered) // rows] for i in range(rows)]
    good, bad = [], []
    for where, row in numbered:
        try:
            good.append(checked_row(row, where))
        except ValueError as error:
            bad.append(str(error))
    texts = Texts(tokenizer, good, max_length, assistant_only, vocabulary, eos, bad)
    report = run((*data.CHECKS, *contents.CHECKS, *template.CHECKS), texts)
    if objective is not None and objective.reads in NEEDS:
        report.add(_unusable(texts, objective))
    return report


def check_named(path: str | Path, model: str, objective: str | None = None, **options: Any) -> Report:
    """`check_file` with tokenizer, vocabulary and end ids of a model by name, and an objective by name; options are its."""
    loss = None if objective is None else by_name(objective)
    return check_file(path, load_tokenizer(model), objective=loss, **facts_of(model), **options)


def _unusable(texts: Texts, objective: Objective) -> list[Finding]:
    """Rows that an objective cannot use."""
    wanted = NEEDS[objective.reads]
    pair, labelled = NEEDS["preference"], ("completion", "label")
    forms = [wanted, pair, *([labelled] if type(objective).__name__ == "KTO" else [])]
    poor = [row.where for row in texts.rows if not any(all(row.get(k) is not None for k in form) for form in forms)]
    if not poor:
        return []
    what = f"{type(objective).__name__} needs {' and '.join(wanted)} in every row"
    return [Finding("rows", WRONG, what, poor[0], len(poor), "rows", "give another objective, or other data")]
