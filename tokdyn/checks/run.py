"""Run checks one after the other: what one of them raises is noted in the report and stops none of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from .finding import Finding, Report

T = TypeVar("T")
Check = Callable[[T], Sequence[Finding]]


def run(checks: Iterable[Check[T]], about: T) -> Report:
    """The report of some checks about one thing."""
    report = Report()
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            report.add(check(about))
        except Exception as error:
            report.skipped[name] = " ".join((str(error) or repr(error)).split())[:300]
    return report
