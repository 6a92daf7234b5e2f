"""A step's record, of what a capture saw: columns, figures, notes, and what does not add up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..sequences import token_texts
from ..turns import Turns
from . import columns, diagnosis, distributed
from .capture import Capture
from .fallen import ALARM
from .forward import Forward
from .probe import Probe
from .steps import Step


class Texts:
    """The texts of tokens, each read from the tokenizer once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, ids: Tensor) -> list[str]:
        """The text of each token."""
        unknown = [i for i in ids.unique().tolist() if i not in self._known]
        self._known |= dict(zip(unknown, token_texts(self.tokenizer, unknown), strict=True))
        return [self._known[i] for i in ids.tolist()]

    @cached_property
    def turns(self) -> Turns | None:
        """What the tokenizer's template writes before each role's content."""
        return Turns.of(self.tokenizer)

    def turns_of(self, forwards: Sequence[Forward]) -> list[str]:
        """In whose turn of its conversation each scored token of some passes stands; "" where the template does not tell."""
        found = list[str]()
        for f in forwards:
            layout, roles = f.layout, dict[int, list[str]]()
            if self.turns is not None and layout.ids is not None:
                for s in range(layout.sequences):
                    own = layout.ids[(layout.sequence == s) & layout.real]
                    roles[s] = self.turns.roles(self(own)) or []
            places = zip(f.sequence.tolist(), f.position.tolist(), strict=True)
            found += [roles[s][t] if s in roles and t < len(roles[s]) else "" for s, t in places]
        return found


def make_record(
    capture: Capture, number: int, scale: float, *, skipped: bool, texts: Texts | None
) -> tuple[Step, tuple[str, str] | None]:
    """The record of the present step, and what its self-check found wrong (see `diagnosis.failed_self_check`).

    Args:
        capture: what was seen.
        number: of the step.
        scale: brings c to the loss whose gradient the optimizer sees.
        skipped: the GradScaler skipped the step.
        texts: for the texts of the tokens.

    Raises:
        ValueError: a hook failed, or nothing was captured; with the likely cause.
    """
    forwards, seen = capture.take(), capture.summary()
    diagnosis.require_forwards(forwards, seen)
    of = columns.token_columns(forwards, scale)
    if texts is not None:
        of |= dict(token=texts(of["token_id"]), turn=texts.turns_of(forwards))
    of |= {name: torch.full_like(of["position"], n) for name, n in (("step", number), ("rank", distributed.rank()))}
    own, notes = columns.sums(of, forwards), diagnosis.known_gaps(forwards, seen)
    if skipped:
        notes.append("the optimizer skipped this step: its gradients overflowed in half precision")
    if wrong := diagnosis.failed_self_check(forwards):
        notes.append(wrong[0])
    if own["fallen"]:
        notes.append(ALARM.format(share=own["fallen"] / own["rewarded"]))
    figures, routes = columns.metrics(own), tuple(dict.fromkeys(f.route for f in forwards))
    step = Step(
        number, figures.get("residual", math.nan), of["c"].float(), of, figures, routes,
        passes=len(forwards), excluded=seen.excluded, notes=notes, sums=own,
    )  # fmt: skip
    return step, wrong


def merged(sums: Mapping[str, float], probe: Probe | None) -> dict[str, float]:
    """The figures of a process's sums over all processes, each of which must call this."""
    names = [*columns.SUMS, *(probe.names if probe is not None else [])]
    values = torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64)
    of = dict(zip(names, distributed.total(values).tolist(), strict=True))
    of["steps"] /= distributed.world()
    return columns.metrics(of) | (probe.metrics(of) if probe is not None else {})
