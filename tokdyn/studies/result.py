"""What a study hands back, and how a number measured over seeds is written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, and what was measured.

    Attributes:
        claim: one sentence, with paper and section.
        oracle: what has to be seen for the claim to hold; where theory contradicts the paper, what theory says.
        measured: the value in words, with units and its 95% interval where it is statistical.
        holds: whether the oracle was met.
    """

    claim: str
    oracle: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class Result:
    """A finished study.

    Attributes:
        title: the finding in one sentence.
        claims: what was decided.
        curves: the numbers behind the figures, {name: pyarrow.Table}.
        figures: {name: matplotlib Figure}.
        notes: what a reader has to know besides, as paragraphs.
    """

    title: str
    claims: list[Claim]
    curves: dict[str, Any]
    figures: dict[str, Any]
    notes: str = ""


@dataclass(frozen=True)
class Estimate:
    """A mean over independent runs and the half width of its 95% interval (Student's t); n is their number.

    One run alone has no interval: its half width is 0 and `words` says that it is one.
    """

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half

    def __str__(self) -> str:
        return self.words()

    def words(self, unit: str = "", digits: int = 3, of: str = "seeds") -> str:
        """Format as '0.52 ± 0.03 nats (95%, 5 seeds)', rounded to the two leading digits of the half width."""
        if self.n == 1:
            return f"{self.mean:+.{digits}f}{' ' + unit if unit else ''} (one {of.removesuffix('s')})".replace("-", MINUS)
        if 0 < self.half < 1e-6:
            value = f"{self.mean:.{digits}g} ± {self.half:.1g}"
        elif self.half > 0:
            places = max(0, min(8, 1 - math.floor(math.log10(self.half))))
            value = f"{self.mean:.{places}f} ± {self.half:.{places}f}"
        else:
            value = f"{self.mean:.{digits}g} ± 0"
        return f"{value}{' ' + unit if unit else ''} (95%, {self.n} {of})".replace("-", MINUS)


def estimate(values: Iterable[float]) -> Estimate:
    """Mean of independent values and its 95% interval, t_{n-1} s/√n; of one value, the value.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    values = [float(value) for value in values]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"an estimate needs finite values, got {values}")
    if len(values) == 1:
        return Estimate(values[0], 0.0, 1)
    from scipy.stats import t

    n = len(values)
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Estimate(mean, float(t.ppf(0.975, n - 1)) * spread / math.sqrt(n), n)
