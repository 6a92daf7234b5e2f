"""What a capture holds: one forward pass of training as (h, y, c, v) of its scored tokens, and the arithmetic that checks it.

    -∂L/∂h_l = c_l b_l + v_l b'_l + u_l b''_l,     b = Jᵀ(e_y - pi),  b' = Jᵀ pi ⊙ (log pi + H),  b'' = Jᵀ(1/V - pi)

with J the Jacobian of z' = softcap(scale (W h + b)) / temperature, and c, v, u as in `GTerm`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..model.readout import Readout
from ..objective import GTerm
from ..ops import TokenStats, token_stats
from ..sequences import Chi
from .layout import Layout

ROWS = 512  # rows of logits looked at together


@dataclass(frozen=True)
class Check:
    """How far the gradient rebuilt from c, v and u is from the one that autograd sent: sums of squares, ‖·‖².

    Args:
        misfit, sampled: of the difference and of the gradient itself, on a sample of the scored tokens.
        scored: of the gradient on all scored tokens; NaN where no check was made.
        unscored: of the gradient on tokens taken for unscored.
        beside: of what reaches the backbone's output without coming through the readout: no part of the others.
    """

    misfit: float = 0.0
    sampled: float = 0.0
    scored: float = float("nan")
    unscored: float = 0.0
    beside: float = 0.0

    @property
    def total(self) -> float:
        """‖∂L/∂h‖² of the pass, the part through the readout and the part beside it."""
        return self.scored + self.unscored + self.beside

    @property
    def residual(self) -> float:
        """‖what c, v and u say ∂L/∂h is - ∂L/∂h‖ / ‖∂L/∂h‖, NaN where no check was made.

        The misfit on the sample, scaled to all scored tokens, and everything that fell on tokens taken for unscored, or that
        did not come through the readout.
        """
        inside = self.misfit / self.sampled * self.scored if self.sampled else self.scored
        return _root(inside + self.unscored + self.beside, self.total)

    @property
    def outside(self) -> float:
        """Share of ‖∂L/∂h‖ on tokens taken for unscored: a wrong mask, or a loss that reads hidden states itself."""
        return _root(self.unscored, self.total)

    @property
    def past_readout(self) -> float:
        """Share of ‖∂L/∂h‖ that does not come through the readout: a term on hidden_states[-1], a value head."""
        return _root(self.beside, self.total)


@dataclass(eq=False)
class Forward:
    """One forward pass of a training loss and, after its backward pass, the weights of its N scored tokens.

    Flat, with many attributes: most are columns over the tokens, which `keep` filters all at once.

    Attributes:
        route: how c was captured: "log_probs", "logits", "tap" or "least squares".
        rows: which hidden state scores each token, an index into the B·W of the pass, [N].
        targets: the tokens, [N]. batch, column: where they stand in the batch as the trainer has it, [N].
        stats: statistics of pi under the weights of this pass, each [N].
        square: ‖h‖² [N]. hidden: h [N, d], where it was asked for.
        c, v, u: -∂L/∂log pi(y), ∂L/∂H and -∂L/∂(mean log pi), [N], per unit of the scalar that was backpropagated.
        vocabulary: V. moments: Σ pi² (log pi + H) and Σ pi² (log pi + H)², [N, 2], where there is an entropy term.
        check: the self-check against ∂L/∂h.
        eps: unit roundoff of the pass, bfloat16's under autocast. given: log-probs as the output or `tap` has them, [N].
            log_prob_error: largest difference between them and ours. readout_error: of the output's logits from
            softcap(scale (W h + b)), relative.
        metadata: what the training loop said about the pass. micro_batch: its number in the step.
        superseded: its loss went through `tap`, which made a record of its own. touched: which tokens got a gradient, where
            nobody said which are scored.
    """

    route: str
    layout: Layout
    rows: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]
    batch: Int[Tensor, " N"]
    column: Int[Tensor, " N"]
    stats: TokenStats
    vocabulary: int
    temperature: float
    square: Float[Tensor, " N"] | None = None
    hidden: Float[Tensor, "N d"] | None = None
    c: Float[Tensor, " N"] | None = None
    v: Float[Tensor, " N"] | None = None
    u: Float[Tensor, " N"] | None = None
    moments: Float[Tensor, "N 2"] | None = None
    check: Check = Check()
    eps: float = 0.0
    log_prob_error: float = 0.0
    readout_error: float = 0.0
    given: Float[Tensor, " N"] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    micro_batch: int = 0
    superseded: bool = False
    touched: Bool[Tensor, " N"] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sequence(self) -> Int[Tensor, " N"]:
        """Sequence of each token: that of the hidden state which scores it."""
        return self.layout.sequence[self.batch, (self.column - 1).clamp(min=0)]

    @property
    def position(self) -> Int[Tensor, " N"]:
        """Position of each token in its sequence."""
        before = self.layout.position[self.batch, (self.column - 1).clamp(min=0)]
        return torch.where(self.column > 0, before + 1, before)

    @property
    def residual(self) -> float:
        """The self-check in one number, see `Check.residual`."""
        return self.check.residual

    @property
    def outside(self) -> float:
        """See `Check.outside`."""
        return self.check.outside

    @property
    def norm_of_G(self) -> Float[Tensor, " N"]:
        """‖G‖ of each token: ‖c (e_y - pi) + v pi ⊙ (log pi + H) + u (1/V - pi)‖ / temperature."""
        assert self.c is not None
        p, g, V = self.stats.log_prob.exp(), self.stats.g_norm, self.vocabulary
        square = (self.c * g).square()
        if self.v is not None and self.moments is not None:
            first, second = self.moments.unbind(1)
            own = p * (self.stats.log_prob + self.stats.entropy)
            square = square + self.v.square() * second + 2 * self.c * self.v * (own - first)
            if self.u is not None:
                square = square - 2 * self.v * self.u * first
        if self.u is not None:
            square = (
                square + self.u.square() * (self.stats.collision - 1 / V) + 2 * self.c * self.u * (self.stats.collision - p)
            )
        return square.clamp(min=0).sqrt() / self.temperature

    def keep(self, index: Tensor) -> None:
        """Drop all tokens but these."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                setattr(self, f.name, value[index])
        self.stats = TokenStats(*(x[index] for x in self.stats))

    def settle(self) -> None:
        """Drop the tokens that the loss does not score, as the mask of the metadata says, or else the gradients."""
        mask = self.metadata.get("mask")
        if mask is not None:
            B, T = self.layout.real.shape
            if mask.dim() != 2 or len(mask) != B:
                raise ValueError(f"mask must have shape [B, k], B={B}, for the last k tokens, got {list(mask.shape)}")
            index = self.column - (T - mask.shape[1])
            scored = (index >= 0) & mask.to(index.device).bool()[self.batch, index.clamp(min=0)]
            self.touched = None
            self.keep(scored.nonzero().squeeze(1))
        elif self.touched is not None:
            self.keep(self.touched.nonzero().squeeze(1))

    def touch(self, which: Tensor) -> None:
        """Note which tokens got a gradient, now or before."""
        self.touched = which if self.touched is None else self.touched | which

    def add(self, name: str, grad: Float[Tensor, " N"]) -> None:
        """Add to c or v: a second backward pass through the same graph adds to the first."""
        before = getattr(self, name)
        setattr(self, name, grad if before is None else before + grad)

    def set_fitted(self, x: Float[Tensor, "N K"]) -> None:
        """c, or c, v and u, as least squares found them."""
        self.c = x[:, 0]
        self.v, self.u = (x[:, 1], x[:, 2]) if x.shape[1] == 3 else (None, None)

    def of_rows(self, values: Tensor) -> Tensor:
        """A quantity per sequence [B], or per token and right-aligned to the batch [B, k], at each scored token, [N].

        Raises:
            ValueError: it has another shape.
        """
        values = values.to(self.batch.device)
        (B, T), n = self.layout.real.shape, self.layout.sequences
        if values.dim() == 1 and len(values) == n:
            return values[self.sequence]
        if values.dim() == 2 and len(values) == B:
            index = self.column - (T - values.shape[1])
            return values[self.batch, index.clamp(min=0)]
        raise ValueError(
            f"metadata must have shape [B]=[{n}] or [B, k], one row per sequence of the batch, got {list(values.shape)}"
        )

    def coefficients(self, sample: Int[Tensor, " S"], K: int) -> Float[Tensor, "S K"] | None:
        """c, or c and v, of some tokens as K columns; None before c has come."""
        if self.c is None:
            return None
        return torch.stack([self.c, torch.zeros_like(self.c) if self.v is None else self.v], 1)[sample, :K]

    def chis(self) -> list[Chi]:
        """The sequences of the pass with their scored tokens, padding and packing undone.

        Raises:
            ValueError: the model was called without ids, or with positions that jump, or a token is scored from another
                document's last hidden state.
        """
        if self.layout.ids is None:
            raise ValueError("the model was called with inputs_embeds: its sequences cannot be replayed")
        chis, sequence, position = [], self.sequence, self.position
        for s in range(self.layout.sequences):
            ids = self.layout.ids[(self.layout.sequence == s) & self.layout.real].cpu()
            places = position[sequence == s].cpu()
            if len(places) and int(places.max()) >= len(ids):
                raise ValueError("a token is scored across the border of two packed documents: mask the first label of each")
            scored = torch.zeros(len(ids), dtype=torch.bool)
            scored[places] = True
            chis.append(Chi(ids, scored, group=s, padding=self.layout.padding_of(s)))
        return chis

    def gterm(self, scale: float = 1.0) -> GTerm:
        """The loss at the logits, c, v and u times `scale`."""
        assert self.c is not None
        v, u = (None if x is None else scale * x for x in (self.v, self.u))
        return GTerm(self.targets, scale * self.c, v, u, self.temperature)


def stats_of_logits(
    logits: Float[Tensor, "R V"], rows: Int[Tensor, " N"], targets: Int[Tensor, " N"], temperature: float
) -> TokenStats:
    """token_stats of some rows, divided by the temperature, without a copy of the logits.

    Where most rows are wanted all are looked at in one go, else one run of neighbouring rows after the other.
    """
    if temperature == 1 and 4 * len(rows) >= 3 * len(logits) > 0:
        every = torch.zeros(len(logits), dtype=targets.dtype, device=targets.device).index_copy(0, rows, targets)
        return TokenStats(*(x[rows] for x in token_stats(logits, every)))
    parts = []
    for run, y in zip(runs(rows), targets.split([len(run) for run in runs(rows)]), strict=True):
        z = logits[int(run[0]) : int(run[0]) + len(run)]
        parts.append(token_stats(z if temperature == 1 else z.float() / temperature, y))
    if not parts:
        return token_stats(logits[:0], targets)
    return TokenStats.joined(parts)


def runs(rows: Int[Tensor, " N"]) -> list[Tensor]:
    """The same numbers split where they do not follow one another."""
    if not len(rows):
        return []
    return list(rows.tensor_split(((rows[1:] != rows[:-1] + 1).nonzero().squeeze(1) + 1).cpu()))


def basis(
    readout: Readout, hidden: Float[Tensor, "N d"], targets: Int[Tensor, " N"], temperature: float, K: int
) -> Float[Tensor, "N K d"]:
    """The first K of b, b' and b'' of the module's text, [N, K, d]."""
    parts = []
    for h, y in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        z = readout.logits(h)
        ones = torch.ones(len(y), dtype=z.dtype, device=z.device)
        terms = [(ones, None, None), (0 * ones, ones, None), (0 * ones, None, ones)][:K]
        forces = [readout.pull_back(z, GTerm(y, *term, temperature).logit_force(z)) for term in terms]
        parts.append(torch.stack(forces, 1) @ readout.weight.to(z.dtype))
    return torch.cat(parts)


def moments(readout: Readout, hidden: Float[Tensor, "N d"], temperature: float) -> Float[Tensor, "N 2"]:
    """Σ pi² (log pi + H) and Σ pi² (log pi + H)² of each row: what the norm of an entropy term needs besides TokenStats."""
    parts = []
    for h in hidden.split(ROWS):
        log_pi = (readout.logits(h) / temperature).log_softmax(1)
        pi = log_pi.exp()
        plogp = torch.where(pi > 0, pi * log_pi, torch.zeros_like(pi))
        x = plogp - pi * plogp.sum(1, keepdim=True)
        parts.append(torch.stack([(pi * x).sum(1), x.square().sum(1)], 1))
    return torch.cat(parts) if parts else hidden.new_zeros(0, 2)


def fit(basis: Float[Tensor, "N K d"], target: Float[Tensor, "N d"]) -> Float[Tensor, "N K"]:
    """Least squares of each target in its own basis; 0 where the basis vanishes."""
    if basis.shape[1] == 1:
        square = basis.square().sum(2)
        return torch.where(square > 0, (basis * target[:, None]).sum(2) / square, torch.zeros_like(square))
    return (torch.linalg.pinv(basis.transpose(1, 2)) @ target[:, :, None]).squeeze(2)


def _root(part: float, whole: float) -> float:
    return (part / whole) ** 0.5 if whole > 0 else float("nan")
