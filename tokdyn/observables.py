"""What is watched at an observed token m: a function O_m of the logits that score it, [N, V] -> [N].

    F_O[m,l] = <∇θ O_m, -∇θ L_l>,    ΔO_m ≈ eta Σ_l F_O[m,l]

Beside the log-probability of the token that stands there (the default) an update moves the entropy, the distance to another
token, the mass of a set of tokens. Each is given to the engine by its cotangent ∂O/∂z at the logits, in closed form; that of a
function of your own is made by autograd.

| | O | ∂O/∂z | unit |
|---|---|---|---|
| LogProb() | log pi(y) | e_y - pi | nats |
| Entropy() | H = -Σ pi log pi | -pi ⊙ (log pi + H) | nats |
| Margin(against) | z_y - z_b | e_y - e_b | nats: log pi(y)/pi(b) |
| Mass(tokens) | log Σ_S pi | pi_S / Σ_S pi - pi | nats |
| Logit(token) | z_v | e_v | logits |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ._arguments import check_observable
from .objective import GTerm
from .ops import token_stats
from .ops.rows import blocks
from .sequences import Chi, context_numbers

Cotangent = Callable[[Tensor, Tensor], Tensor]  # logits [N, V], tokens [N] or [N, K] -> ∂O/∂z [N, V]
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class WatchedTerm(GTerm):
    """The cotangent of an observable that is no sum of a GTerm's kinds: c_n ∂O_n/∂z_n, made of the logits when it is wanted.

    Args:
        cotangent: of the logits and the targets.
    """

    cotangent: Cotangent | None = field(default=None, kw_only=True)

    def logit_force(self, logits: Float[Tensor, "L V"]) -> Float[Tensor, "L V"]:
        """See GTerm."""
        assert self.cotangent is not None
        z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return self.c.to(z.dtype)[:, None] * self.cotangent(z, self.targets)

    @property
    def is_plain(self) -> bool:
        """See GTerm."""
        return False

    @property
    def is_closed(self) -> bool:
        """See GTerm."""
        return False


class Observable:
    """A function of the logits that score a token. Subclasses are frozen dataclasses whose fields say which.

    Class attributes: `label`, what it is called in a sentence; `unit`, that of a change of it.
    """

    label: ClassVar[str] = "observable"
    unit: ClassVar[str] = "nats"

    def tokens(self, chis: Sequence[Chi], others: Sequence[Chi] = ()) -> Int[Tensor, " N"] | Int[Tensor, "N K"]:
        """The tokens that the observable is about at each scored token of the sequences; the token itself by default.

        Args:
            chis: the observed sequences.
            others: those of the update, in which a partner may be found.
        """
        return torch.cat([chi.ids[chi.scored] for chi in chis])

    def term(self, logits: Float[Tensor, "N V"], tokens: Tensor) -> GTerm:
        """The cotangent ∂O/∂z of each row, as the engine takes it; its targets are what `values` is given.

        Raises:
            ValueError: a token outside the vocabulary.
        """
        raise NotImplementedError

    def values(self, logits: Float[Tensor, "N V"], targets: Tensor) -> Float[Tensor, " N"]:
        """O of each row."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Name, constants, label and unit, as a run records them."""
        arguments = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        arguments = {k: v if isinstance(v, (int, float, str, tuple)) else repr(v) for k, v in arguments.items()}
        return {"name": type(self).__name__, "arguments": arguments, "label": self.label, "unit": self.unit}


@dataclass(frozen=True)
class LogProb(Observable):
    """log pi(y_m) of the token that stands there."""

    label: ClassVar[str] = "log-probability"

    def term(self, logits: Float[Tensor, "N V"], tokens: Tensor) -> GTerm:
        """See Observable: e_y - pi."""
        return GTerm(tokens, _ones(logits))

    def values(self, logits: Float[Tensor, "N V"], targets: Tensor) -> Float[Tensor, " N"]:
        """See Observable."""
        return token_stats(logits, targets).log_prob


@dataclass(frozen=True)
class Entropy(Observable):
    """H = -Σ_v pi_v log pi_v of the distribution at the token, whose fall to nothing ends RL runs."""

    label: ClassVar[str] = "entropy"

    def term(self, logits: Float[Tensor, "N V"], tokens: Tensor) -> GTerm:
        """See Observable: -pi ⊙ (log pi + H), as the entropy term of a loss L = -H."""
        return GTerm(tokens, _ones(logits) * 0, v=-_ones(logits))

    def values(self, logits: Float[Tensor, "N V"], targets: Tensor) -> Float[Tensor, " N"]:
        """See Observable."""
        return token_stats(logits, targets).entropy


@dataclass(frozen=True)
class Margin(Observable):
    """z_y - z_b = log pi(y)/pi(b): how far the token is ahead of another one.

    Args:
        against: b, a token id; "argmax", the most likely other token before the step, held fixed; or "rejected", the token that
            the rejected answer of the same group has behind the same context. Where it has none there (all places behind the
            one where the answers part) or the same one, the margin is 0 and nothing moves it.
    """

    against: int | str = "argmax"
    label: ClassVar[str] = "margin"

    def __post_init__(self) -> None:
        if isinstance(self.against, str) and self.against not in ("argmax", "rejected"):
            raise ValueError(f'Margin: against must be "argmax", "rejected" or a token id, got {self.against!r}')

    def tokens(self, chis: Sequence[Chi], others: Sequence[Chi] = ()) -> Int[Tensor, " N"] | Int[Tensor, "N K"]:
        """See Observable: the token, and the other one where the texts say it.

        Raises:
            ValueError: against="rejected", and no observed token has a rejected one behind its context.
        """
        y = super().tokens(chis)
        if self.against == "argmax":
            return y
        if self.against != "rejected":
            return torch.stack([y, torch.full_like(y, int(self.against))], 1)
        every = [*chis, *others]
        numbers = context_numbers(every).split([len(chi) for chi in every])
        rejected: dict[tuple[int, int], int] = {}
        for chi, contexts in zip(every, numbers, strict=True):
            if chi.role == "rejected":
                found = zip(contexts.tolist(), chi.ids[chi.scored].tolist(), strict=True)
                rejected |= {(chi.group, context): token for context, token in found}
        keys = [(chi.group, x) for chi, contexts in zip(chis, numbers, strict=False) for x in contexts.tolist()]
        other = torch.tensor([rejected.get(key, token) for key, token in zip(keys, y.tolist(), strict=True)])
        if torch.equal(other, y):
            raise ValueError(
                'Margin(against="rejected"): no observed token has another one of the rejected answer of its group behind the '
                "same context: build pairs with td.preference, and observe the chosen answer"
            )
        return torch.stack([y, other], 1)

    def term(self, logits: Float[Tensor, "N V"], tokens: Tensor) -> GTerm:
        """See Observable: e_y - e_b."""
        if tokens.dim() == 1:
            rival = logits.scatter(1, tokens[:, None], -torch.inf).argmax(1)
            tokens = torch.stack([tokens, rival], 1)
        _require_known(tokens, logits, self)
        return GTerm(tokens, torch.stack([_ones(logits), -_ones(logits)], 1))

    def values(self, logits: Float[Tensor, "N V"], targets: Tensor) -> Float[Tensor, " N"]:
        """See Observable."""
        z = logits.gather(1, targets)
        return z[:, 0] - z[:, 1]


@dataclass(frozen=True)
class Mass(Observable):
    """log Σ_{v in S} pi_v: the probability that any token of a set comes next, whatever stands there.

    Args:
        token_ids: S.
    """

    token_ids: tuple[int, ...]
    label: ClassVar[str] = "log-probability of a set"

    def __init__(self, tokens: Sequence[int]) -> None:
        object.__setattr__(self, "token_ids", tuple(sorted({int(token) for token in tokens})))
        if not self.token_ids:
            raise ValueError("Mass: give at least one token id")

    def tokens(self, chis: Sequence[Chi], others: Sequence[Chi] = ()) -> Int[Tensor, " N"] | Int[Tensor, "N K"]:
        """See Observable: the set, at every token."""
        return torch.tensor(self.token_ids).repeat(sum(len(chi) for chi in chis), 1)

    def term(self, logits: Float[Tensor, "N V"], tokens: Tensor) -> GTerm:
        """See Observable: pi_S / Σ_S pi - pi."""
        _require_known(tokens, logits, self)
        return WatchedTerm(tokens, _ones(logits), cotangent=self._cotangent)

    @staticmethod
    def _cotangent(logits: Tensor, tokens: Tensor) -> Tensor:
        """pi_S (1 - Σ_S pi) / Σ_S pi inside and -pi outside: no difference of nearly equal numbers where S has all the mass."""
        e = (logits - logits.max(1, keepdim=True).values).exp()
        inside = torch.zeros_like(e).scatter(1, tokens, e.gather(1, tokens))
        outside = e.scatter(1, tokens, 0.0)
        S, R = inside.sum(1, keepdim=True), outside.sum(1, keepdim=True)
        return (inside * (R / S) - outside) / (S + R)

    def values(self, logits: Float[Tensor, "N V"], targets: Tensor) -> Float[Tensor, " N"]:
        """See Observable."""
        outside = logits.scatter(1, targets, -torch.inf).logsumexp(1)
        return -torch.nn.functional.softplus(outside - logits.gather(1, targets).logsumexp(1))


@dataclass(frozen=True)
class Logit(Observable):
    """z_v of one token: what moves before the softmax divides it up. It feels a constant added to all logits.

    Args:
        token: v.
    """

    token: int
    label: ClassVar[str] = "logit"
    unit: ClassVar[str] = "logits"

    def term(self, logits: Float[Tensor, "N V"], tokens: Tensor) -> GTerm:
        """See Observable: e_v."""
        targets = torch.full_like(tokens, self.token)
        _require_known(targets, logits, self)

        def cotangent(z: Tensor, y: Tensor) -> Tensor:
            return torch.zeros_like(z).scatter(1, y[:, None], 1.0)

        return WatchedTerm(targets, _ones(logits), cotangent=cotangent)

    def values(self, logits: Float[Tensor, "N V"], targets: Tensor) -> Float[Tensor, " N"]:
        """See Observable."""
        return logits.gather(1, targets[:, None]).squeeze(1)


@dataclass(frozen=True)
class Custom(Observable):
    """A function of your own, logits [N, V] -> [N], each row by itself; autograd makes its cotangent.

    Args:
        function: the function, of torch operations.
    """

    function: Function
    label: ClassVar[str] = "observable"
    unit: ClassVar[str] = "its own unit"

    def term(self, logits: Float[Tensor, "N V"], tokens: Tensor) -> GTerm:
        """See Observable.

        Raises:
            ValueError: the function gives something else than a finite number a row, or mixes rows.
        """
        found, alone = self.function(logits), self.function(logits[:1])
        if not isinstance(found, Tensor) or found.shape != logits.shape[:1]:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"an observable must give a number for each row of logits, [N]={list(logits.shape[:1])}, got {got}"
            )
        if not bool(found.isfinite().all()) or not torch.allclose(found[:1], alone, rtol=1e-3, atol=1e-5):
            raise ValueError("an observable must give finite numbers, each from its own row of logits alone")
        return WatchedTerm(tokens, _ones(logits), cotangent=self._cotangent)

    def _cotangent(self, logits: Tensor, tokens: Tensor) -> Tensor:
        with torch.enable_grad():
            z = logits.detach().requires_grad_()
            return torch.autograd.grad(self.function(z).sum(), z)[0]

    def values(self, logits: Float[Tensor, "N V"], targets: Tensor) -> Float[Tensor, " N"]:
        """See Observable."""
        return self.function(logits)


def observable(of: Observable | Function | str) -> Observable:
    """What a user means by an observable: one of these, a function, or the command line's words for one.

    The words are "log-prob", "entropy", "margin" (against the most likely other token), "margin:rejected", "margin:17",
    "mass:3,17", "logit:17".

    Raises:
        ValueError: other words.
    """
    if isinstance(of, Observable):
        return of
    if not isinstance(of, str):
        return Custom(of)
    check_observable(of)
    name, _, argument = of.partition(":")
    if name in ("log-prob", "entropy"):
        return LogProb() if name == "log-prob" else Entropy()
    if name == "margin":
        return Margin(int(argument) if argument.isdigit() else argument or "argmax")
    ids = [int(token) for token in argument.split(",")]
    return Mass(ids) if name == "mass" else Logit(*ids)


@torch.no_grad()
def values(of: Observable, logits: Float[Tensor, "N V"], targets: Tensor) -> Float[Tensor, " N"]:
    """O of each row in float64, some rows at a time: for differences of it over one small step; no gradient."""
    y = targets.to(logits.device)
    return torch.cat([of.values(logits[rows].double(), y[rows]) for rows in blocks(logits)])


def _ones(logits: Tensor) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.ones(len(logits), dtype=wide, device=logits.device)


def _require_known(tokens: Tensor, logits: Tensor, of: Observable) -> None:
    V = logits.shape[1]
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < V:
        raise ValueError(f"{of} names token ids from {int(tokens.min())} to {int(tokens.max())}, the vocabulary is [0, {V})")


__all__ = ["Entropy", "LogProb", "Logit", "Margin", "Mass", "Observable", "observable"]
