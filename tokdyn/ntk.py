"""The empirical neural tangent kernel between tokens: its size per pair, and how far it drifts during training.

    K_{m,l} = J_m P J_lᵀ    [V, V],    J = ∂z/∂θ the Jacobian of the logits that score a token

The force F[m,l] = -[A_m K_{m,l} G_l]_{y_m} holds only while K stands still; Ren & Sutherland (arXiv 2407.10490) assume that it
nearly does. A block is never written down: K_{m,l} ε is one vjp of the probe ε at token l and one jvp over the observed
sequences, for all m at once. With every e_w for ε that is exact, with random signs it is Hutchinson's estimator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .exact import Asked, Problem, Progress, Scope, UnscoredProblem
from .exact.products import vjp_probes
from .model.trace import Tracer, trace
from .objective import Objective
from .objectives import SFT
from .runs import frames
from .runs.notebook import kernel_html
from .sequences import Chi

Probes = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True, eq=False)
class Kernel:
    """Size of K_{m,l} for every pair of tokens, per unit learning rate.

    Attributes:
        trace: K_trace = tr K_{m,l}, [M, L].
        norm: ‖K_{m,l}‖_F, [M, L].
        trace_error, norm_error: their standard errors, zero where every probe was used.
        observed, updated: row tables (pyarrow) of the tokens on both axes.
        scope, samples: as asked.
    """

    trace: Float[Tensor, "M L"]
    norm: Float[Tensor, "M L"]
    trace_error: Float[Tensor, "M L"]
    norm_error: Float[Tensor, "M L"]
    observed: Any
    updated: Any
    scope: str
    samples: int | None

    def to_dataframe(self) -> Any:
        """One row for each pair of tokens: trace and norm with their standard errors (pandas)."""
        return frames.pairs(
            self.observed, self.updated, trace=self.trace, norm=self.norm, trace_error=self.trace_error,
            norm_error=self.norm_error,
        )  # fmt: skip

    def _repr_html_(self) -> str:
        """What a notebook shows: the norms as a small matrix, and the largest."""
        return kernel_html(self)


@dataclass(frozen=True, eq=False)
class KernelDrift:
    """How far K_{m,l} has moved from a model a to a model b.

    Attributes:
        change: ‖K_b - K_a‖_F / ‖K_a‖_F, [M, L].
        cosine: <K_a, K_b>_F / (‖K_a‖_F ‖K_b‖_F), [M, L].
        change_error, cosine_error: their standard errors, zero where every probe was used.
        observed, updated: row tables (pyarrow) of the tokens on both axes, under model a.
        scope, samples: as asked.
    """

    change: Float[Tensor, "M L"]
    cosine: Float[Tensor, "M L"]
    change_error: Float[Tensor, "M L"]
    cosine_error: Float[Tensor, "M L"]
    observed: Any
    updated: Any
    scope: str
    samples: int | None


def kernel(
    model: nn.Module,
    update: Sequence[Chi],
    observe: Sequence[Chi],
    objective: Objective = SFT(),  # noqa: B008
    *,
    scope: str = "full",
    samples: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Kernel:
    """Trace and Frobenius norm of K_{m,l} = J_m P J_lᵀ for every observed token m and update token l.

        exact       tr K = Σ_w e_w·K e_w          ‖K‖² = Σ_w ‖K e_w‖²
        sampled     tr K = E ε·Kε                 ‖K‖² = E ‖Kε‖²           ε uniform on {-1, 1}^V

    Args:
        model: a causal LM (see `trace`); it is left as it was.
        update, observe: the sequences whose scored tokens are l and m.
        scope: which parameters J is taken by, as in `forces`.
        samples: None for the exact values; n for n probes, the same ones for all tokens. The trace and ‖K‖² are unbiased, the
            norm itself is low by norm_error²/(2 norm) to leading order; the errors come from the spread of the n values, the
            norm's by the delta method.
        objective: the loss of the update, which K itself does not know: an optimizer's P does.
        optimizer: an Adam, AdamW, RMSprop or SGD, whose coming step on the update has the diagonal P (as in `forces`); the
            identity when absent.
        seed: of the probes.
        progress: called with (done, total) in tokens of the shorter side.

    Raises:
        ValueError: fewer than 2 samples; as `forces` for scope, sequences, optimizer and model.

    Cost: with n probes (n = V when exact), n backward passes per token of the shorter side and n tangent passes over the other
    one for each: exact is for small vocabularies. At V = 32768 one token takes 32768 of both. Memory: a few directions of the
    size of the chosen parameters, and n M numbers.
    """
    _check(samples)
    with trace(model) as tracer:
        unscored = UnscoredProblem.about(Asked(update, observe, objective, optimizer=optimizer), Scope.named(tracer, scope))
        problem = unscored.scored()
        swap = len(problem.observed) < len(problem.updated)  # K_{l,m} is K_{m,l} transposed: the same trace and norm
        looped = problem.transposed() if swap else problem
        products, n = _kernel_products(looped, _probes(tracer, samples, seed)), samples or len(tracer.readout.weight)
        traces, norms = [], []
        for i in range(len(looped.updated)):
            t, q = torch.stack([torch.stack([v @ e, v.square().sum(1)]) for e, v in islice(products, n)], 1)
            traces.append(_total(t, samples))
            norms.append(_root(*_total(q, samples)))
            if progress:
                progress(i + 1, len(looped.updated))
        (tr, tr_error), (norm, norm_error) = (_joined(parts, swap, tracer.precision) for parts in (traces, norms))
    observed, updated = (side.table(with_c=False) for side in (problem.observed, problem.updated))  # K knows no loss
    return Kernel(tr, norm, tr_error, norm_error, observed, updated, scope, samples)


def kernel_drift(
    model_a: nn.Module,
    model_b: nn.Module,
    update: Sequence[Chi],
    observe: Sequence[Chi],
    *,
    scope: str = "full",
    samples: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> KernelDrift:
    """Relative change and cosine of K_{m,l} between two checkpoints, for every pair of tokens.

    With D = K_b - K_a: change = (‖D‖²/‖K_a‖²)^½ and cosine = <K_a, K_b>/(‖K_a‖ ‖K_b‖), from ‖X‖² = Σ ‖X ε‖² and
    <X, Y> = Σ Xε·Yε over the same probes on both models, so that a model has not drifted from itself whatever the sample. Where
    ‖K_a‖ is 0 (a scope in which two tokens share nothing) the change is not finite, and the cosine is NaN where either is.

    Args:
        model_a, model_b: the two models, with one vocabulary.
        update, observe, scope, samples, seed, progress: as in `kernel`; the errors of these ratios are by the delta method.

    Raises:
        ValueError: as `kernel`; the models have different vocabularies.

    Cost: `kernel` of both models.
    """
    _check(samples)
    with trace(model_a) as a, trace(model_b) as b:
        if len(a.readout.weight) != len(b.readout.weight):
            raise ValueError(
                f"kernel_drift compares blocks [V, V] of one vocabulary: the models have {len(a.readout.weight)} and "
                f"{len(b.readout.weight)} logits"
            )
        asked = Asked(update, observe, SFT())
        problem, there = (UnscoredProblem.about(asked, Scope.named(tracer, scope)).scored() for tracer in (a, b))
        swap = len(problem.observed) < len(problem.updated)
        looped = [of.transposed() if swap else of for of in (problem, there)]
        products_a, products_b = (_kernel_products(of, _probes(of.tracer, samples, seed)) for of in looped)
        n = samples or len(a.readout.weight)
        changes, cosines = [], []
        for i in range(len(looped[0].updated)):
            pairs = ((x, y.to(x)) for (_, x), (_, y) in zip(islice(products_a, n), islice(products_b, n), strict=True))
            ratios = _ratios(torch.stack([_products(x, y) for x, y in pairs], 1), samples)
            changes.append(ratios[0])
            cosines.append(ratios[1])
            if progress:
                progress(i + 1, len(looped[0].updated))
        (change, change_error), (cosine, cosine_error) = (_joined(x, swap, a.precision) for x in (changes, cosines))
    observed, updated = (side.table(with_c=False) for side in (problem.observed, problem.updated))
    return KernelDrift(change, cosine, change_error, cosine_error, observed, updated, scope, samples)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two influences: Pearson's of their ranks, ties at the average rank.

    Args:
        a, b: real numbers of one shape, e.g. F of the same tokens at two checkpoints.

    NaN where all values of a or of b are equal.

    Raises:
        ValueError: the shapes differ, fewer than two values, or NaN among them.
    """
    _check_pair(a, b, "rank_correlation", least=2)
    x, y = (_ranks(values) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x.square().sum() * y.square().sum()).sqrt())


def sign_delta(a: Tensor, b: Tensor) -> float:
    """SignDelta: share of the entries of two Δ log pi that have the same sign, in [0, 1].

    1 when every log-probability moves the same way under both, 1/2 for unrelated ones; an entry of exactly 0 agrees with 0
    only. E.g. the change that forces predict against that of a real step, or the same step at two checkpoints.

    Args:
        a, b: changes of log-probabilities, of one shape.

    Raises:
        ValueError: the shapes differ, no values, or NaN among them.
    """
    _check_pair(a, b, "sign_delta", least=1)
    return float((a.sign() == b.sign().to(a.device)).double().mean())


def kernel_lower_bound(
    before: Float[Tensor, "M V"], after: Float[Tensor, "M V"], G: Float[Tensor, " V"]
) -> Float[Tensor, " M"]:
    """LBK: what one real step on one update token tells about the size of its kernel, a lower bound of eta² ‖K_{m,l}‖².

        LBK_m = ‖Δ log pi_m‖² / (‖A_m‖_F² ‖G_l‖²) ≤ eta² ‖K_{m,l}‖_F²        ‖A_m‖_F² = V - 2 + V ‖pi_m‖²

    because Δ log pi_m = -eta A_m K_{m,l} G_l + O(eta²) and ‖A K G‖ ≤ ‖A‖_F ‖K‖_F ‖G‖: it holds to first order in eta. It needs
    forward passes alone, so that K's growth can be followed during training. A = I - 1 piᵀ holds (1 - pi_v)² once and pi_v²
    V - 1 times for each v: Σ_v (1 - 2 pi_v + V pi_v²) = V - 2 + V ‖pi‖².

    Args:
        before, after: log pi(·) at the observed tokens before and after a plain gradient step on token l, [M, V].
        G: gradient of the loss at that token's logits before the step, [V] (dynamics.G; pi - e_y for SFT).

    Raises:
        ValueError: shapes that do not fit, rows that are no log-probabilities, or G is zero.

    Source: the lower bound of the kernel in Ren & Sutherland, arXiv 2407.10490.
    """
    if before.shape != after.shape or before.shape[1:] != G.shape:
        raise ValueError(f"before and after must be [M, V] and G [V], got {[list(x.shape) for x in (before, after, G)]}")
    for name, rows in (("before", before), ("after", after)):
        total = rows.double().exp().sum(1)
        wrong = ~((total - 1).abs() < 0.05)
        if bool(wrong.any()):
            m = int(wrong.nonzero()[0])
            raise ValueError(f"{name} must hold log-probabilities: exp of row {m} sums to {float(total[m]):.3g}, not to 1")
    size = G.double().square().sum()
    if not bool(size > 0):
        raise ValueError("G is zero or not finite: a token without a gradient moves nothing and tells nothing about K")
    V = before.shape[1]
    A = V - 2 + V * before.double().exp().square().sum(1)
    return ((after.double() - before.double()).square().sum(1) / (A * size)).to(before.dtype)


def _check(samples: int | None) -> None:
    if samples is not None and samples < 2:
        raise ValueError(f"samples must be at least 2, or there is no spread to state an error from, got {samples}")


def _check_pair(a: Tensor, b: Tensor, what: str, least: int) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{what} compares values of one shape, got {list(a.shape)} and {list(b.shape)}")
    if a.numel() < least:
        raise ValueError(f"{what} needs at least {least} values, got {a.numel()}")
    if bool(a.isnan().any()) or bool(b.isnan().any()):
        raise ValueError(f"{what} was given NaN")


def _probes(tracer: Tracer, samples: int | None, seed: int) -> Probes:
    """Every e_w, made when its turn comes, or n vectors of signs, the same each time they are asked for."""
    V = len(tracer.readout.weight)
    if samples is None:
        return lambda: (torch.nn.functional.one_hot(torch.tensor(w), V).double() for w in range(V))
    signs = 2.0 * torch.randint(0, 2, (samples, V), generator=torch.Generator().manual_seed(seed)) - 1
    return lambda: signs.double()


def _kernel_products(problem: Problem, probes: Probes) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ε [V], K_{m,l} ε [M, V]) in float64, for every update token l and, within it, every probe."""
    directions = vjp_probes(problem.tracer, problem.updated.batches, probes, problem.uses)
    for _ in range(len(problem.updated)):
        for probe in probes():
            direction = problem.preconditioned(next(directions))
            moved = torch.cat([problem.jvp_logits(batch, direction)[1] for batch in problem.observed.batches]).double()
            yield probe.to(moved), moved


def _products(x: Float[Tensor, "M V"], y: Float[Tensor, "M V"]) -> Float[Tensor, "4 M"]:
    return torch.stack([(x * y).sum(1), x.square().sum(1), y.square().sum(1), (y - x).square().sum(1)])


def _total(values: Float[Tensor, "n M"], samples: int | None) -> tuple[Tensor, Tensor]:
    """The sum over all probes, or the mean over samples with its standard error."""
    if samples is None:
        return values.sum(0), torch.zeros_like(values[0])
    return values.mean(0), values.std(0) / len(values) ** 0.5


def _root(square: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of an estimate, its error by the delta method."""
    root = square.sqrt()
    return root, torch.where(root > 0, error / (2 * root), 0.0)


def _ratios(products: Float[Tensor, "4 n M"], samples: int | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Change and cosine from K_aε·K_bε, ‖K_aε‖², ‖K_bε‖² and ‖(K_b - K_a)ε‖² of each probe, with the errors of these ratios."""
    x, a, b, d = products
    X, A, B, D = products.mean(1)
    size = (A * B).sqrt()
    change, cosine = D / A, X / size
    if samples is None:
        return _root(change, torch.zeros_like(A)), (cosine, torch.zeros_like(A))
    slope = x / size - cosine * (a / A + b / B) / 2
    return _root(change, ((d - change * a) / A).std(0) / samples**0.5), (cosine, slope.std(0) / samples**0.5)


def _joined(columns: list[tuple[Tensor, Tensor]], swap: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Columns of a value and its error as two matrices [M, L]."""
    value, error = (torch.stack(part, 0 if swap else 1).to(dtype) for part in zip(*columns, strict=True))
    return value, error


def _ranks(values: Tensor) -> Float[Tensor, " N"]:
    """Ranks from 1, equal values at their average."""
    _, where, count = values.detach().cpu().flatten().unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[where]
