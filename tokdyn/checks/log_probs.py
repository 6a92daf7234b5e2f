"""The checks of log-probs: the loss's against the model's own, and old ones against new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..training.forward import Forward
from .finding import FINE, SUSPICIOUS, WRONG, Finding
from .seen import Seen, bound_of

SAMPLE = 32  # tokens whose logits are computed anew
SAMPLED_OLD = 256  # tokens on which old log-probs are explained
TEMPERATURES = tuple(0.3 * 1.02**n for n in range(120))  # 0.3 to 3.2
TOP_P = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
TOP_K = (1, 2, 5, 10, 20, 40, 50, 64, 100)


def log_probs(seen: Seen) -> list[Finding]:
    """The log-probs that the loss reads against those of the model's logits, on 32 tokens of each pass.

    A logit is off by eps |z| in its dtype, and by √d eps32 ‖h‖‖w‖ in its sum; log π is a difference of two, over T.
    """
    found, worst, compared = list[Finding](), 0.0, 0
    for f in seen.forwards:
        if f.given is None or f.hidden is None or seen.readout is None or not len(f):
            continue
        few = torch.arange(min(len(f), SAMPLE), device=f.targets.device) * len(f) // min(len(f), SAMPLE)
        z, given, y = _logits(seen, f.hidden[few]), f.given[few].to(torch.float32), f.targets[few]
        own, bound = _log_probs(z, y, f.temperature), _rounding(seen, f, z, few)
        difference = (own - given).abs()
        worst, compared = max(worst, float(difference.max())), compared + len(few)
        if bool((given > bound).any()):
            what = "log-probs above 0 nats: they are not normalised over the vocabulary"
            found.append(Finding("log-probs", WRONG, what, "", float(given.max()), "nats", "see what the loss gathers from"))
        elif bool((difference > bound).any()):
            T = _temperature(z, given, y)
            told = _rms(_log_probs(z, y, T) - given) < 0.1 * _rms(own - given)
            cause = f"they are those at temperature {T:.3g}, and {f.temperature:g} is what the trainer names" if told else (
                "a fused or chunked head, other weights, or a mask that is shifted makes them")  # fmt: skip
            do = "divide by one temperature in sampling and loss" if told else "compare with log_softmax of the model's logits"
            what = f"the log-probs that the loss reads are not those of the model's logits: {cause}"
            found.append(Finding("log-probs", WRONG, what, "", float(difference.max()), "nats", do))
    if found or not compared:
        return found[:1]
    return [Finding("log-probs", FINE, f"{compared} log-probs of the loss are those of the model's logits", "", worst, "nats")]


def _logits(seen: Seen, hidden: Tensor) -> Float[Tensor, "N V"]:
    """The logits of some hidden states, in float32."""
    readout = seen.readout
    assert readout is not None
    z = torch.nn.functional.linear(
        hidden.float(), readout.weight.float(), None if readout.bias is None else readout.bias.float()
    )
    return readout.cap(readout.scale * z)


def _log_probs(z: Float[Tensor, "N V"], y: Tensor, temperature: float) -> Float[Tensor, " N"]:
    return (z / temperature).log_softmax(1).gather(1, y[:, None]).squeeze(1)


def _rounding(seen: Seen, f: Forward, z: Tensor, few: Tensor) -> Float[Tensor, " N"]:
    """By how many nats rounding may move a log-prob of a pass."""
    assert f.hidden is not None and seen.readout is not None
    single = torch.finfo(torch.float32).eps
    summed = z.shape[1] ** 0.5 * single + f.hidden.shape[1] ** 0.5 * single
    size = f.hidden[few].float().norm(dim=1) * float(seen.readout.weight.float().norm(dim=1).max()) * seen.readout.scale
    return 2 * (f.eps * z.abs().amax(1) + summed * size) / min(f.temperature, 1.0) + f.eps * f.given.abs()[few]  # type: ignore[union-attr]


def _temperature(z: Float[Tensor, "N V"], given: Float[Tensor, " N"], y: Tensor) -> float:
    """The temperature at which logits come nearest to given log-probs."""
    coarse = min(TEMPERATURES, key=lambda T: _rms(_log_probs(z, y, T) - given))
    fine = [coarse * (1 + 0.001 * n) for n in range(-20, 21)]
    return min(fine, key=lambda T: _rms(_log_probs(z, y, T) - given))


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


# ---------------------------------------------------------------- old against new


def old_log_probs(seen: Seen) -> list[Finding]:
    """At a rollout's first step old and new log-probs are one; where they are not, what explains the difference.

    Sampling at a temperature divides the logits, top-p and top-k renormalise what they keep: each is computed from the model's
    logits and compared with the old log-probs. Noise alone has two sides, truncation one.
    """
    if not seen.first:
        return []
    parts = [(f, f.of_rows(old)) for f in seen.forwards if (old := _old(f)) is not None and len(f)]
    if not parts:
        rollout = any(row.advantage is not None for row in seen.rows)
        return [Finding("old log-probs", FINE, "none are given: the new ones stand for them")] if rollout else []
    gap = torch.cat([f.stats.log_prob.float() - old.float() for f, old in parts]).cpu()
    bound, size = bound_of(seen.forwards), _rms(gap)
    if size <= bound:
        largest = float(gap.abs().max())
        return [Finding("old log-probs", FINE, "old log-probs are the new ones at the first step", "", largest, "nats at most")]
    q = gap.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    spread = f"new - old: mean {gap.mean():+.3g}, 5 % {q[0]:+.3g}, median {q[1]:+.3g}, 95 % {q[2]:+.3g} nats"
    cause, do = _explained(seen, parts, gap)
    what = f"old log-probs are not the new ones before the first step, so that every ratio is off; {cause}"
    level = WRONG if do else SUSPICIOUS
    do = do or "compute old log-probs with the training's own forward pass, or correct for the sampler's (importance sampling)"
    return [Finding("old log-probs", level, what, spread, size, "nats rms", do)]


def _old(f: Forward) -> Tensor | None:
    """The old log-probs that a batch holds, of the sampler where it says them."""
    batch = f.metadata.get("batch") or {}
    sampled = batch.get("sampling_per_token_logps") if hasattr(batch, "get") else None
    return sampled if isinstance(sampled, Tensor) else f.metadata.get("old_log_probs")


@dataclass(frozen=True)
class _Sampler:
    """A way of sampling: what it makes of log-probs at the trainer's temperature, and what to do about it."""

    what: str
    log_probs: Callable[[Tensor, Tensor, float], Tensor]
    do: str


def _samplers(T: float) -> Iterable[_Sampler]:
    def kept(what: str, log_kept: Callable[[Tensor], Tensor], do: str) -> _Sampler:
        text = f"they are renormalised over what {what} keeps, which biases every ratio to one side"
        return _Sampler(text, lambda z, y, own: _log_probs(z, y, own) - log_kept(z / own), do)

    text = f"the sampler's temperature is {T:.3g}"
    yield _Sampler(text, lambda z, y, _: _log_probs(z, y, T), "sample and train at one temperature")
    for p in TOP_P:
        yield kept(f"top-p {p:g}", partial(_kept_by_p, p=p), "sample with top_p = 1")
    for k in TOP_K:
        yield kept(f"top-k {k}", partial(_kept_by_k, k=k), "sample with top_k = 0")


def _kept_by_p(z: Float[Tensor, "N V"], p: float) -> Float[Tensor, " N"]:
    """log of the probability that nucleus sampling keeps: the likeliest tokens up to the first that reaches p."""
    ordered = z.softmax(1).sort(1, descending=True).values
    kept = ordered.cumsum(1) - ordered < p
    return (ordered * kept).sum(1).log()


def _kept_by_k(z: Float[Tensor, "N V"], k: int) -> Float[Tensor, " N"]:
    return z.softmax(1).topk(min(k, z.shape[1])).values.sum(1).log()


def _explained(seen: Seen, parts: Sequence[tuple[Forward, Tensor]], gap: Tensor) -> tuple[str, str]:
    """The likely cause, and what to do; "" where none of the known samplers explains the difference."""
    f, old = parts[0]
    if f.hidden is not None and seen.readout is not None:
        few = torch.arange(min(len(f), SAMPLED_OLD), device=f.targets.device) * len(f) // min(len(f), SAMPLED_OLD)
        z, y, given = _logits(seen, f.hidden[few]), f.targets[few], old[few].to(torch.float32)
        before = _rms(_log_probs(z, y, f.temperature) - given)
        ways = {way: _rms(way.log_probs(z, y, f.temperature) - given) for way in _samplers(_temperature(z, given, y))}
        best = min(ways, key=lambda way: ways[way])
        if ways[best] < 0.2 * before:
            return f"{best.what}, which leaves {ways[best]:.2g} of {before:.2g} nats", best.do
    if float((gap < 0).float().mean()) > 0.95:
        return "the difference is one-sided, as of truncated sampling (top-p, top-k, min-p)", ""
    if abs(float(gap.mean())) < 0.3 * _rms(gap):
        return "the difference has two sides: another kernel, precision or dropout", ""
    return "no known way of sampling explains it: other weights, or tokens that are shifted", ""
