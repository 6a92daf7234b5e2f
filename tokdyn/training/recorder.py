"""One forward pass of a training loss, watched until its gradients come: c, v and u of its tokens, checked against ∂L/∂h.

    route              hooks on                          c
    log_probs, tap     log pi(y), and its entropy        -∂L/∂log pi(y), and v = ∂L/∂H
    logits             the logits                        from ‖G‖ and the sign of G_y
    least squares      nothing but the hidden states     fitted to ∂L/∂h, with v and u where c alone does not explain it

Every route has a hook on the hidden states besides. It compares what c, v and u say ∂L/∂h is with what autograd sent, and takes
the pass over to least squares where a nearer route gave nothing, or not enough.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import ops
from ..model.readout import Readout, readout_of, scale_and_cap
from ..model.unwrap import base_layer, is_sharded
from ..objective import GTerm
from ..ops import TokenStats
from .forward import Check, Forward, basis, fit, moments, stats_of_logits
from .layout import Layout, Scored
from .step_log import LossFacts, StepLog

SAMPLE = 32  # tokens of a forward pass on which a capture checks itself
SAMPLED_LOGITS = 1 << 22  # at most so many of their logits, where the check is made at the logits


@dataclass(frozen=True)
class Pass:
    """A forward pass of the model as hooks saw it.

    Args:
        lm: the causal LM.
        layout: how its batch is laid out.
        hidden: the inputs of its readout [B, W, d], in the graph; None where a compiled model hides them.
        output: what the backbone returned [B, T, d], of which hidden is the end; None where they are one tensor, or another.
        head_output: what the readout's module returned, in the graph; the model may scale it.
        head_called: whether that module was called, which is when an adapter around it acts.
        eps: unit roundoff of the pass, bfloat16's under autocast.
    """

    lm: nn.Module
    layout: Layout
    hidden: Tensor | None = None
    output: Tensor | None = None
    head_output: Tensor | None = None
    head_called: bool = False
    eps: float = 0.0

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient will come to the hidden states."""
        return self.hidden is not None and self.hidden.requires_grad

    def readout(self) -> Readout:
        """The readout as this pass used it (`readout_of`); every rank must ask where it is sharded."""
        return readout_of(self.lm, self.head_called)

    def is_sharded(self) -> bool:
        """Whether the readout's weights are spread over ranks, which must all ask for them or none."""
        return is_sharded(base_layer(self.lm.get_output_embeddings()).weight)  # type: ignore[operator]

    def detached(self) -> Pass:
        """The same without a hold on the graph."""
        hidden = None if self.hidden is None else self.hidden.detach()
        return replace(self, hidden=hidden, output=None, head_output=None)


class Recorder:
    """Makes the record of one pass, and fills it as gradients come.

    One of `read_log_probs`, `read_logits` and `fit` is called inside the forward pass, the one place where FSDP2 and ZeRO-3
    have the weights whole. The record is in `step` from then on.

    Args:
        seen: the pass.
        scored: its tokens.
        step: the step it belongs to.
        facts: what earlier passes showed of the loss; what this one shows is added.
    """

    forward: Forward
    sample: Int[Tensor, " S"]  # the tokens on which the pass checks itself
    basis: Float[Tensor, "S K d"]  # ∂L/∂h of them per unit of -c, -v and -u
    gradient: Float[Tensor, "S d"] | None = None  # ∂L/∂h of them so far
    sampled_logits: Float[Tensor, "S V"] | None = None  # where the check is made at the logits
    logit_scale: float = 1.0  # of the logits beside the tensor that the hook is on
    output_watched: bool = False  # whether a gradient will come to the backbone's output, after the one at h
    through: Float[Tensor, "B W d"] | None = None  # that one, until then

    def __init__(self, seen: Pass, scored: Scored, step: StepLog, facts: LossFacts) -> None:
        self.seen, self.scored, self.step, self.facts = seen, scored, step, facts

    # ---------------------------------------------------------------- the routes

    def fit(self) -> None:
        """Least squares: c, or c, v and u, from the hidden states and their gradient alone."""
        self._begin("least squares", 3 if self.facts.fit_v_and_u else 1)

    def read_log_probs(self, route: str, log_probs: Tensor, entropy: Tensor | None) -> None:
        """c from the gradient at log-probs in the grid of the labels, [B, G] or flat; v from the one at their entropies."""
        checked = self.seen.has_gradient
        uncertain = entropy is not None and entropy.requires_grad
        forward = self._begin(route, 2 if uncertain else 1)
        given, own = log_probs.detach().reshape(-1)[self.scored.picked].float(), forward.stats.log_prob.float()
        forward.given = given
        forward.log_prob_error = float((own - given).abs().max()) if len(given) else 0.0
        if not checked:  # compiled, or a frozen backbone: the log-probs themselves are the check
            size = _square(given)
            forward.check = Check(misfit=_square(own - given), sampled=size, scored=size)
        self.step.listen(log_probs, self.on_log_probs_grad)
        if entropy is not None and uncertain:
            self.step.listen(entropy, self.on_entropy_grad)

    def read_logits(self, logits: Float[Tensor, "B W V"]) -> None:
        """c from the gradient at the logits: for G = -c (e_y - pi)/T, |c| = T ‖G‖/‖pi - e_y‖ and its sign is that of -G_y.

        The hook is on the head's own output where nothing but a scale lies between: a loss inside the model reads that, and the
        output is a copy of it under autocast.
        """
        if (self.facts.fit_v_and_u or self.facts.loss_ignores_output) and self.seen.hidden is not None:
            self.fit()
            return
        checked, target = self.seen.has_gradient, logits
        scale, softcap = scale_and_cap(self.seen.lm)
        raw = self.seen.head_output
        if raw is not None and raw.shape == logits.shape and softcap is None:
            target, self.logit_scale = raw, scale
        flat, rows = logits.detach().reshape(-1, logits.shape[-1]), self.scored.rows
        self._begin("logits", 1, stats_of_logits(flat, rows, self.scored.targets, self.scored.temperature), flat)
        if not checked:
            self.sample = _sample(len(rows), rows.device, min(SAMPLE, max(1, SAMPLED_LOGITS // flat.shape[1])))
            self.sampled_logits = flat[rows[self.sample]].float()
        self.step.listen(target, self.on_logits_grad)

    def _readout_error(self, readout: Readout, states: Float[Tensor, "N d"], flat: Float[Tensor, "R V"]) -> float:
        """How far logits are from softcap(scale (W h + b)) on a few tokens, relative: c, and its check, rest on that form."""
        few = _sample(len(states), states.device, max(1, min(SAMPLE, SAMPLED_LOGITS // flat.shape[1])))
        z = flat[self.scored.rows[few]].float()
        own = readout.logits(states[few].to(readout.weight.dtype)).float()
        return float((own - z).norm() / z.norm()) if own.shape == z.shape else float("inf")

    def _begin(
        self, route: str, columns: int, stats: TokenStats | None = None, logits: Float[Tensor, "R V"] | None = None
    ) -> Forward:
        """The record with the statistics of its tokens, and the basis of its check with so many columns (c; v; u).

        The readout is asked for once, whatever the route: where it is sharded every rank gathers it in step with the others.
        """
        scored, seen, T = self.scored, self.seen, self.scored.temperature
        readout, states = seen.readout(), self._states()
        if stats is None:
            assert states is not None
            wide = torch.promote_types(states.dtype, readout.weight.dtype)
            x, W = states.to(wide), readout.weight.to(wide)
            stats = ops.linear_token_stats(x, W, scored.targets, temperature=T, **readout.options)
        batch, column = scored.batch(), scored.column(seen.layout.real.shape[1])
        forward = Forward(
            route, seen.layout, scored.rows, scored.targets, batch, column, stats, readout.weight.shape[0], T, eps=seen.eps
        )
        self.forward = forward
        if states is not None:
            forward.square = states.float().square().sum(1)
            forward.hidden = states if self.step.keep_hidden else None
            if logits is not None and len(states):
                forward.readout_error = self._readout_error(readout, states, logits)
        if seen.hidden is not None and states is not None and seen.has_gradient:
            # an entropy term's moments wait for its gradient, unless the weights are gathered, which all ranks do or none
            if columns == 3 or columns == 2 and seen.is_sharded():
                forward.moments = moments(readout, states, T)
            self.sample = _sample(len(states), states.device, len(states) if route == "least squares" else SAMPLE)
            self.basis = basis(readout, states[self.sample], scored.targets[self.sample], T, columns)
            self.step.listen(seen.hidden, self.on_hidden_grad)
            self.output_watched = seen.output is not None
            if seen.output is not None:
                self.step.listen(seen.output, self.on_output_grad)
        self.seen = seen.detached()  # hooks hold this object: with tensors of the graph they would keep it alive
        self.step.add(forward)
        return forward

    def _states(self) -> Float[Tensor, "N d"] | None:
        """The hidden state that scores each token."""
        h = self.seen.hidden
        return None if h is None else h.detach().reshape(-1, h.shape[-1])[self.scored.rows]

    # ---------------------------------------------------------------- hooks on gradients

    def on_log_probs_grad(self, grad: Tensor) -> None:
        """c += -∂L/∂log pi(y)."""
        self._add("c", -grad)

    def on_entropy_grad(self, grad: Tensor) -> None:
        """v += ∂L/∂H."""
        v, states = self._add("v", grad), self._states()
        if self.forward.moments is None and states is not None and bool(v.any()):
            self.forward.moments = moments(self.seen.readout(), states, self.forward.temperature)

    def _add(self, name: str, grad: Tensor) -> Float[Tensor, " N"]:
        g = grad.reshape(-1)[self.scored.picked].float()
        self.forward.add(name, g)
        if self.scored.guessed:
            self.forward.touch(g != 0)
        return g

    def on_logits_grad(self, G: Tensor) -> None:
        """c of G = ∂L/∂z [B, W, V], and the check at the logits where none comes at the hidden states."""
        forward, rows, targets, T = self.forward, self.scored.rows, self.scored.targets, self.scored.temperature
        if forward.superseded:
            return
        wide = torch.promote_types(G.dtype, torch.float32)
        G = G.reshape(-1, G.shape[-1])
        every = _norms(G, wide)
        norms, g = every[rows], forward.stats.g_norm.to(wide)
        c = -T / self.logit_scale * G[rows, targets].sign() * torch.where(g > 0, norms / g, torch.zeros_like(g))
        forward.add("c", c)
        if self.scored.guessed:
            forward.touch(norms > 0)
        if self.sampled_logits is not None:
            own, term = G[rows[self.sample]].to(wide), GTerm(targets, c, temperature=T).rows(self.sample)
            misfit = own + term.logit_force(self.sampled_logits) * self.logit_scale
            unscored = every.index_fill(0, rows, 0.0)
            forward.check = Check(_square(misfit), _square(own), _square(norms), _square(unscored))

    def on_hidden_grad(self, dh: Tensor) -> None:
        """Compare ∂L/∂h [B, W, d] with what c and v say it is; least squares fits them to it first."""
        forward, rows = self.forward, self.scored.rows
        if forward.superseded:
            return
        self.through = dh if self.output_watched else None
        dh = dh.reshape(-1, dh.shape[-1])
        every = _norms(dh, torch.promote_types(dh.dtype, torch.float32))
        new = dh[rows[self.sample]].to(self.basis.dtype)
        self.gradient = new if self.gradient is None else new + self.gradient  # a second backward pass adds to the first
        nearer = forward.route != "least squares" and forward.c is not None  # a gradient nearer to the loss came first
        x = None if forward.route == "least squares" else forward.coefficients(self.sample, self.basis.shape[1])
        if forward.route != "least squares" and (columns := self._columns_to_fit(x, self.gradient)):
            self._take_over(columns, dh[rows])
        if forward.route == "least squares":
            x = -fit(self.basis, self.gradient)
            forward.set_fitted(x)
        if x is None:
            return
        if self.scored.guessed and not nearer:
            forward.touch(every[rows] > 0)
        scored, unscored = every[rows].square().sum(), every.square().index_fill(0, rows, 0.0).sum()
        misfit = _misfit(self.basis, x, self.gradient)
        forward.check = Check(misfit, _square(self.gradient), float(scored), float(unscored), forward.check.beside)

    def on_output_grad(self, grad: Float[Tensor, "B T d"]) -> None:
        """What of ∂L/∂(the backbone's output) did not come through the readout, which autograd has told of before."""
        through, self.through = self.through, None
        if self.forward.superseded:
            return
        beside = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        if through is not None:
            beside[:, grad.shape[1] - through.shape[1] :] -= through
        self.forward.check = replace(self.forward.check, beside=self.forward.check.beside + _square(beside))

    def _columns_to_fit(self, x: Tensor | None, gradient: Tensor) -> int:
        """How many of c, v and u least squares must find, 0 if none; `x` is what this route found on the sample."""
        if x is None:  # the loss is made inside the model, of something else than its output
            self.facts.loss_ignores_output, columns = True, 1
        elif self.forward.route == "logits" and _misfit(self.basis, x, gradient) > self.forward.eps * _square(gradient):
            self.facts.fit_v_and_u, columns = True, 3  # the loss is not one of log-probs alone
        else:
            return 0
        if self.seen.is_sharded():  # gathering is for all ranks, and this may be so on some
            self.facts.retry_next_step = True
            return 0
        return columns

    def _take_over(self, columns: int, gradient: Tensor) -> None:
        """Go on by least squares with so many columns: on all tokens, not on a sample of them."""
        readout, states, T = self.seen.readout(), self._states(), self.forward.temperature
        assert states is not None
        self.sample = torch.arange(len(states), device=states.device)
        self.basis = basis(readout, states, self.scored.targets, T, columns)
        self.gradient = gradient.to(self.basis.dtype)
        self.forward.moments = moments(readout, states, T) if columns == 3 else None
        self.forward.route = "least squares"


def _norms(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, dtype=dtype)


def _square(x: Tensor) -> float:
    return float(x.square().sum())


def _misfit(basis: Tensor, x: Tensor, target: Tensor) -> float:
    """‖target + Σ_k x_k basis_k‖²."""
    return _square(target + (x.to(basis.dtype)[:, :, None] * basis).sum(1))


def _sample(N: int, device: torch.device, most: int) -> Tensor:
    n = min(N, most)
    return torch.arange(n, device=device) * N // max(n, 1)
