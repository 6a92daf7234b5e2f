"""What a study hands back, and how a number measured over seeds is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MINUS = "\N{MINUS SIGN}"


class Verdict(StrEnum):
    """What the data say of a claim: it holds, it does not, or they do not decide it."""

    HOLDS = "holds"
    NO = "no"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, and what was measured.

    Attributes:
        claim: one sentence, with paper and section.
        oracle: what has to be seen for the claim to hold; where theory contradicts the paper, what theory says.
        measured: the value in words, with units and its 95% interval where it is statistical.
        verdict: made by `above`, `below`, `told` and `both` from the interval and the oracle's threshold.
    """

    claim: str
    oracle: str
    measured: str
    verdict: Verdict


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
    """A mean over independent units and the half width of its 95% interval (Student's t).

    One unit alone has no interval: its half width is 0, `words` says that it is one, and it decides nothing.

    Attributes:
        mean, half: of the values.
        n: number of units.
        of: what they are, in the plural.
    """

    mean: float
    half: float
    n: int
    of: str = "seeds"

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

    def words(self, unit: str = "", digits: int = 3) -> str:
        """Format as '0.52 ± 0.03 nats (95%, 5 seeds)', rounded to the two leading digits of the half width."""
        if self.n == 1:
            one = self.of if " " in self.of else self.of.removesuffix("s")
            return f"{self.mean:+.{digits}f}{' ' + unit if unit else ''} (one {one})".replace("-", MINUS)
        if 0 < self.half < 1e-6:
            value = f"{self.mean:.{digits}g} ± {self.half:.1g}"
        elif self.half > 0:
            places = max(0, min(8, 1 - math.floor(math.log10(self.half))))
            value = f"{self.mean:.{places}f} ± {self.half:.{places}f}"
        else:
            value = f"{self.mean:.{digits}g} ± 0"
        return f"{value}{' ' + unit if unit else ''} (95%, {self.n} {self.of})".replace("-", MINUS)


def estimate(values: Iterable[float], of: str = "seeds") -> Estimate:
    """Mean of independent values and its 95% interval, t_{n-1} s/√n; of one value, the value.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    values = [float(value) for value in values]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"an estimate needs finite values, got {values}")
    if len(values) == 1:
        return Estimate(values[0], 0.0, 1, of)
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Estimate(mean, _t(n) * spread / math.sqrt(n), n, of)


def of_runs(runs: Iterable[Iterable[float]], of: str = "answers") -> Estimate:
    """The estimate over the means of several runs (seeds), or of one run alone over its own values, `of` what they are."""
    found = [[float(value) for value in run] for run in runs]
    if len(found) == 1:
        return estimate(found[0], of)
    return estimate(math.fsum(run) / len(run) for run in found)


def jackknife(units: Sequence[Any], statistic: Callable[[Sequence[Any]], float], of: str) -> Estimate:
    """A statistic of independent units and its 95% interval, t_{n-1} times the standard error of leaving one unit out.

    SE² = (n-1)/n Σ_i (T_{-i} - mean T_{-i})², for statistics that are no mean of the units, as a correlation. Fewer than five
    units give no interval: four stand in one order by chance once in 24 times. (Efron & Stein, Annals of Statistics 9, 1981.)
    """
    whole, n = statistic(units), len(units)
    if n < 5:
        return Estimate(whole, 0.0, 1, f"set of {n} {of}")
    left = [statistic([*units[:i], *units[i + 1 :]]) for i in range(n)]
    mean = math.fsum(left) / n
    return Estimate(whole, _t(n) * math.sqrt((n - 1) / n * math.fsum((x - mean) ** 2 for x in left)), n, of)


def _t(n: int) -> float:
    """Student's t at 97.5% with n - 1 degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf(0.975, n - 1))


def above(value: Estimate, threshold: float = 0.0) -> Verdict:
    """Whether a mean lies above a threshold: holds if its interval does, no if none of the interval does, else undecided."""
    if value.n == 1:
        return Verdict.UNDECIDED
    return Verdict.HOLDS if value.low > threshold else Verdict.NO if value.high <= threshold else Verdict.UNDECIDED


def below(value: Estimate, threshold: float = 0.0) -> Verdict:
    """Whether a mean lies below a threshold; as `above`."""
    return above(Estimate(-value.mean, value.half, value.n), -threshold)


def told(met: bool) -> Verdict:
    """The verdict of an oracle without chance: an identity, a count of exceptions, every one of the cases named."""
    return Verdict.HOLDS if met else Verdict.NO


def both(*verdicts: Verdict) -> Verdict:
    """The verdict of a claim with several parts: no if one part is no, else undecided if one is, else it holds."""
    return next((v for v in (Verdict.NO, Verdict.UNDECIDED) if v in verdicts), Verdict.HOLDS)
