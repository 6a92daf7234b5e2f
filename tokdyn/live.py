"""What can be asked of forces while the model is there: another vjp and jvp for one pair of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import ops
from .exact import ScoredProblem
from .exact.pair import look
from .exact.sides import with_sides
from .model.trace import Tracer, trace
from .model.unwrap import is_sharded, whole
from .runs.by_sequence import BySequence
from .runs.explain import Explanation, facts_of
from .sequences import Chi, context_numbers

PART = 1 << 20  # numbers of a parameter that are looked at in float64 at a time


class Vocabulary(NamedTuple):
    """The tokens whose log-probability rises and falls most; ids and nats per unit learning rate, each [.., k]."""

    rising: Int[Tensor, "*m k"]
    rise: Float[Tensor, "*m k"]
    falling: Int[Tensor, "*m k"]
    fall: Float[Tensor, "*m k"]


@dataclass(frozen=True)
class Live:
    """The model and the scored problem behind a Forces, so that more passes can be made for one pair."""

    model: nn.Module
    problem: ScoredProblem
    labels: Tensor | None
    fingerprint: Tensor

    def vocabulary(self, m: int | None, l: int | None, k: int) -> Vocabulary:  # noqa: E741
        """See Forces.vocabulary."""
        with self.traced() as problem:
            o, u = problem.observed, problem.updated
            if l is None:
                direction = problem.vjp(u)
            elif self.labels is not None:
                direction = problem.vjp(u.part((self.labels == l).to(u.c)))
            else:
                direction = next(problem.vjp_each(u, l, l + 1))
            batches = o.batches
            if m is not None:
                sequence = int(torch.cat([b.sequence for b in batches])[m])
                batches = problem.tracer.batches([o.chis[sequence]])
                m = m - sum(len(chi) for chi in o.chis[:sequence])
            parts = []
            for batch in batches:
                moved = ops.apply_A(*problem.jvp_logits(batch, problem.preconditioned(direction)))
                moved = moved if m is None else moved[m : m + 1]
                rise, fall = moved.topk(min(k, moved.shape[1])), (-moved).topk(min(k, moved.shape[1]))
                parts.append((rise.indices, rise.values, fall.indices, -fall.values))
        joined = [torch.cat(part) for part in zip(*parts, strict=True)]
        return Vocabulary(*(x[0] for x in joined)) if m is not None else Vocabulary(*joined)

    def explain(self, m: int, l: int, k: int, observable: Mapping[str, Any]) -> Explanation:  # noqa: E741
        """See Forces.explain."""
        words = self.vocabulary(m, l, k)
        with self.traced() as problem:
            o, u = problem.observed, problem.updated
            one = torch.arange(len(u), device=u.c.device) if self.labels is None else self.labels.to(u.c.device)
            found = look(problem, m, (one == l).to(u.c))
        members = (one == l).nonzero().flatten().tolist()
        table = with_sides(u.table(with_c=True), o.table(with_c=False))
        table = table.append_column("context", [context_numbers([*u.chis, *o.chis]).tolist()])
        text = _texts([*u.chis, *o.chis])
        found["observable"] = dict(observable)
        found["vocabulary"] = {
            name: [(text.get(i, f"<{i}>"), x) for i, x in zip(ids.tolist(), rates.tolist(), strict=True)]
            for name, ids, rates in (("rising", words.rising, words.rise), ("falling", words.falling, words.fall))
        }
        prompts = [
            {"side": side, "sequence": s, "prompt": chi.prompt}
            for side, chis in (("updated", u.chis), ("observed", o.chis))
            for s, chi in enumerate(chis)
        ]
        return Explanation(facts_of(BySequence.of(table, None), m, members, found, prompts))

    @contextmanager
    def traced(self) -> Iterator[ScoredProblem]:
        """The problem with its model traced again.

        Raises:
            ValueError: the model has changed.
        """
        with trace(self.model, self.problem.tracer.found) as tracer:
            if not torch.equal(fingerprint(tracer), self.fingerprint):
                raise ValueError("the model's parameters have changed since these forces were computed: compute them again")
            yield replace(self.problem, tracer=tracer)


def _texts(chis: Sequence[Chi]) -> dict[int, str]:
    """The texts of the tokens that occur."""
    return {i: text for chi in chis if chi.tokens for i, text in zip(chi.ids.tolist(), chi.tokens, strict=True)}


def fingerprint(tracer: Tracer) -> Tensor:
    """A checksum of all parameters, to notice that a model has moved."""
    own = (tracer.params[name] for name, owner in tracer.owner.items() if name == owner)
    return torch.stack([_sum_and_norm(p) for p in own])


def _sum_and_norm(p: Tensor) -> Tensor:
    """Both in float64, of a part at a time where the tensor is whole: a copy of an embedding is twice its size."""
    wide = torch.float64
    if is_sharded(p):
        return torch.stack([whole(p.sum(dtype=wide)), whole(torch.linalg.vector_norm(p, dtype=wide))])
    parts = (x.to(wide) for x in p.reshape(-1).split(PART))
    sums = torch.stack([torch.stack([x.sum(), x.square().sum()]) for x in parts]).sum(0)
    return torch.stack([sums[0], sums[1].sqrt()])
