"""The check of c against the objective that the trainer names: a factor too many, or too few, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..sequences import Chi
from ..training.forward import Forward
from .finding import FINE, SUSPICIOUS, WRONG, Finding
from .named import Named, named_objective, world
from .rows import reference_of
from .seen import Seen, bound_of

LIBRARIES = ("transformers", "trl")


def scale(seen: Seen) -> list[Finding]:
    """c of every token against that of the objective that the trainer names, in the units of the step."""
    known = [(f, named_objective(seen, f)) for f in seen.forwards if f.c is not None]
    pairs = [(f, named, _expected(seen, f, named)) for f, named in known if named is not None]
    if not pairs:
        return []
    c, e = (torch.cat(parts).double().cpu() for parts in zip(*((f.c, e) for f, _, e in pairs), strict=True))  # type: ignore[arg-type]
    name, bound = pairs[0][1].name, 4 * bound_of(seen.forwards)
    shown = f"Σ c {c.sum():+.4g} ({c.clamp(min=0).sum():+.4g}, {c.clamp(max=0).sum():+.4g}), expected {e.sum():+.4g}"
    if not float(e.norm()):
        return []
    factor = float(c @ e / (e @ e))
    rest = float((c - factor * e).norm() / max(float(c.norm()), 1e-300))
    if rest <= bound and abs(factor - 1) <= bound:
        return [Finding("scale", FINE, f"c is that of {name}", shown, factor, "times the expected")]
    if rest <= bound:
        cause = _cause(seen, factor)
        what = f"c is {factor:.4g} times that of {name}{f': {cause}' if cause else ''}"
        level = WRONG if cause or not _custom(seen) else SUSPICIOUS
        do = "divide once: by the number of tokens (or answers) of the whole step, over all accumulated batches and ranks"
        return [Finding("scale", level, what, shown, factor, "times the expected", do)]
    if told := _by_part(pairs, c, e, bound):
        return [Finding("scale", WRONG, f"c is not that of {name}: {told[0]}", shown, rest, "relative", told[1])]
    if _custom(seen):
        return []  # a loss of the user's own, which nobody names
    do = "compare the loss with its paper; where it has a further term on purpose, this is it"
    return [Finding("scale", SUSPICIOUS, f"c is not that of {name}, by no factor", shown, rest, "relative", do)]


def _custom(seen: Seen) -> bool:
    """Whether the loss is made by a class or a function of the user's."""
    made = next((cls for cls in type(seen.trainer).__mro__ if "compute_loss" in vars(cls)), None)
    return made is None or made.__module__.partition(".")[0] not in LIBRARIES or bool(seen.option("compute_loss_func"))


# ---------------------------------------------------------------- c of it, and what c differs by


def _expected(seen: Seen, f: Forward, named: Named) -> Float[Tensor, " N"]:
    """c of a pass's tokens under the named objective."""
    chis = list(sequences(seen, f))
    lp = f.stats.log_prob.double().cpu()
    c = sum((w * term.g_terms(lp, chis).own_c for w, term in named.terms), start=torch.zeros_like(lp))
    return named.factor * c


def sequences(seen: Seen, f: Forward) -> Iterator[Chi]:
    """The scored tokens of each sequence of a pass, with what the trainer says of it; all as one group."""
    known, ref, old = f.metadata, reference_of(seen, f), f.metadata.get("old_log_probs")
    old = None if old is None else f.of_rows(old)
    for s in range(f.layout.sequences):
        own = f.sequence == s
        n = int(own.sum())
        if not n:
            continue
        facts: dict[str, object] = dict(group=known["groups"][s] if "groups" in known else 0)
        if "roles" in known:
            facts["role"] = known["roles"][s]
        if known.get("advantages") is not None and known["advantages"].dim() == 1:
            facts["advantage"] = float(known["advantages"][s])
        if ref is not None:
            facts["reference_log_probs"] = (ref[1][s].expand(n) / n if ref[2] else ref[1][own]).double().cpu()
        if old is not None:
            facts["old_log_probs"] = old[own].double().cpu()
        ids = torch.cat([torch.zeros(1, dtype=torch.long), f.targets[own].cpu()])
        yield Chi(ids, torch.arange(n + 1) > 0, **facts)  # type: ignore[arg-type]


def _cause(seen: Seen, factor: float) -> str:
    """Which of a trainer's numbers a factor is."""
    accumulated, G = int(seen.option("gradient_accumulation_steps", 1) or 1), int(seen.option("num_generations", 1) or 1)
    B = max((f.layout.sequences for f in seen.forwards), default=1)
    T = max((f.temperature for f in seen.forwards), default=1.0)
    known = {"the accumulated batches": accumulated, "num_generations": G, "the ranks": world(seen), "the temperature": T,
             "the sequences of a batch": B, "the pairs of a batch": B / 2, "the passes": len(seen.forwards)}  # fmt: skip
    for what, number in known.items():
        for way, value in (("divided", 1 / number), ("multiplied", float(number))):
            if number != 1 and math.isclose(factor, value, rel_tol=2e-3):
                return f"{way} by {what} ({number:g}) once too often"
    return ""


def _by_part(pairs: Sequence[tuple[Forward, Named, Tensor]], c: Tensor, e: Tensor, bound: float) -> tuple[str, str] | None:
    """Whether a factor of its own fits each batch, or each sequence, and what it goes with."""
    batch = torch.cat([torch.full((len(f),), i) for i, (f, _, _) in enumerate(pairs)])
    first = [0, *torch.tensor([f.layout.sequences for f, _, _ in pairs]).cumsum(0).tolist()]
    sequence = torch.cat([f.sequence.cpu() + at for (f, _, _), at in zip(pairs, first, strict=False)])
    for part, means in ((batch, "each accumulated batch is averaged by itself: tokens of short batches weigh more"),
                        (sequence, "tokens weigh by the length of their answer")):  # fmt: skip
        n = int(part.max()) + 1
        product, square = (torch.zeros(n, dtype=c.dtype).index_add_(0, part, x) for x in (c * e, e * e))
        factor = product / square.clamp(min=1e-300)
        if n == 1 or float((c - factor[part] * e).norm()) > bound * float(c.norm()):
            continue
        length = torch.zeros(n, dtype=c.dtype).index_add_(0, part, torch.ones_like(c))
        power = _power(length[square > 0], factor[square > 0])
        if power is None:
            return None
        low, high = float(factor[square > 0].min()), float(factor[square > 0].max())
        told = f"{means} (factors {low:.3g} to {high:.3g}, as {'1/length' if power < 0 else 'length'})"
        return told, "divide by the number of tokens of the whole step, as the objective has it"
    return None


def _power(length: Tensor, factor: Tensor) -> int | None:
    """+1 or -1 where factors go as length or as its inverse; None elsewhere."""
    for power in (1, -1):
        ratio = factor / length**power
        if len(ratio) > 1 and float(ratio.max() - ratio.min()) <= 1e-2 * float(ratio.abs().max()):
            return power
    return None
