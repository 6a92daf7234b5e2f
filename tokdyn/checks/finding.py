"""A finding of a check, and the report that holds them all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

WRONG, SUSPICIOUS, FINE = "wrong", "suspicious", "fine"
LEVELS = (WRONG, SUSPICIOUS, FINE)


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Args:
        check: its name, a row of docs/check.md.
        level: "wrong" (the training is not what it is meant to be), "suspicious" (it may be), "fine".
        what: a sentence.
        where: row, token and the text around it.
        number: the number that shows it.
        unit: what it counts.
        do: what to do; empty where nothing is to be done.
    """

    check: str
    level: str
    what: str
    where: str = ""
    number: float | None = None
    unit: str = ""
    do: str = ""

    def __post_init__(self) -> None:
        assert self.level in LEVELS, self.level

    def __str__(self) -> str:
        shown = "" if self.number is None else f" [{self.number:.4g}{' ' if self.unit else ''}{self.unit}]"
        lines = [f"{self.level.upper() if self.level == WRONG else self.level}  {self.check}: {self.what}{shown}"]
        lines += [f"    where: {self.where}"] if self.where else []
        return "\n".join(lines + ([f"    do: {self.do}"] if self.do else []))


@dataclass
class Report(Sequence[Finding]):
    """The findings of all checks, the worst first.

    Attributes:
        findings: all of them, those that are fine too.
        skipped: why a check did not run, by its name.
    """

    findings: list[Finding] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, found: Iterable[Finding]) -> None:
        """Take in what a check found; the worst stay first."""
        self.findings = sorted([*self.findings, *found], key=lambda finding: LEVELS.index(finding.level))

    def __len__(self) -> int:
        return len(self.findings)

    def __getitem__(self, index: Any) -> Any:
        return self.findings[index]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def of(self, level: str) -> list[Finding]:
        """The findings of one level."""
        return [finding for finding in self.findings if finding.level == level]

    @property
    def wrong(self) -> list[Finding]:
        """What makes the training another one than is meant."""
        return self.of(WRONG)

    @property
    def suspicious(self) -> list[Finding]:
        """What may be meant, and often is not."""
        return self.of(SUSPICIOUS)

    @property
    def silent(self) -> bool:
        """Whether there is nothing to say."""
        return not self.wrong and not self.suspicious

    def json(self) -> str:
        """All of it as JSON: {"wrong": n, "suspicious": n, "findings": [...], "skipped": {...}}."""
        counts: dict[str, Any] = {level: len(self.of(level)) for level in LEVELS}
        return json.dumps(counts | dict(findings=[asdict(f) for f in self.findings], skipped=self.skipped), indent=1)

    def __str__(self) -> str:
        lines = [str(f) for f in self.findings] + [f"not checked  {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        """One line: how many findings of each level."""
        return f"{len(self.wrong)} wrong, {len(self.suspicious)} suspicious, {len(self.of(FINE))} fine"


def rows_of(places: Sequence[str], most: int = 3) -> str:
    """The first of some places, and how many more there are."""
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return ", ".join(places[:most]) + more


def excerpt(text: str, most: int = 80) -> str:
    """A text on one line, cut in the middle."""
    shown = text.replace("\n", "↵")
    return shown if len(shown) <= most else f"{shown[: most // 2]}…{shown[-most // 2 :]}"


def around(where: str, tokens: Sequence[str], t: int, width: int = 4) -> str:
    """A token with the text around it, the token in «»."""
    before, after = "".join(tokens[max(t - width, 0) : t]), "".join(tokens[t + 1 : t + 1 + width])
    return f"{where} @{t}: {before}«{tokens[t]}»{after}".replace("\n", "↵")
