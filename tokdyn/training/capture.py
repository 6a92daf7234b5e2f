"""Capture: the training-time counterpart of model/trace.py. Hooks on a causal LM in, (h, y, c, v) of every scored token out.

c = -∂L/∂log pi(y) and v = ∂L/∂H come from the backward pass that the trainer runs anyway, by what the model's output offers,
never by a version:

    log_probs       the output carries log_probs (a fused head): tensor hooks on them and on their entropy
    logits          the output carries logits: one tensor hook, reduced to ‖G‖ and G_y on the spot
    tap             the loss is made of log-probs built elsewhere, marked with `tap(logp, labels, mask)`
    least squares   none of these (a fully fused loss): c from (h, ∂L/∂h, W, y)

Every capture checks itself against the ∂L/∂h that autograd sent (`Forward.residual`). Logits are looked at where they exist and
never kept. Weights are read inside the forward pass, the one place where FSDP2 and ZeRO-3 have them whole. Hooks return None,
do nothing unless `recording`, and an exception inside one is kept for later: it never reaches the user's training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..kernels.readout_forces.reference import logit_force
from ..model.readout import Readout, readout_of, scale_and_cap
from ..model.unwrap import backbone, base_layer, is_sharded, unwrap
from ..ops import TokenStats
from . import diagnosis
from .forward import IGNORED, Forward, Layout, basis, fit, moments, right_aligned, shifted, stats_of_logits

SAMPLE = 32  # tokens of a forward pass on which a capture checks itself
SAMPLED_LOGITS = 1 << 22  # at most so many of their logits, where the check is made at the logits

_active: list[Capture] = []


class Capture:
    """Hooks on a causal LM that turn a step's forward and backward passes into `Forward` records.

    Args:
        model: the module the loss is computed with: a causal LM, or PEFT's, DDP's or torch.compile's wrapper around one.
        temperature: what the trainer divides the logits by.

    Attributes:
        recording: whether hooks do anything.
        forwards: the passes of this step that carry gradients.
        seen, excluded: how many passes ran, and how many of them without gradients (generation, reference, evaluation).
        aux: whether a loss of the router is among the outputs, which goes past the logits.
        failure: the first exception inside a hook.
        grouped: passes belong to one micro-batch until told otherwise; each is one of its own if not.
        known: metadata of the passes to come.
        three: fit c, v and u by least squares (set when c alone does not explain the gradient, as with label smoothing).
        postponed: weights are sharded, and what this pass showed can be acted on in the next alone.
        unread: the loss is made inside the model and does not read its output, so that c is fitted.

    Raises:
        ValueError: there is no causal LM with output embeddings inside.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        self.lm, self.outer, self.compiled = unwrap(model)
        self.head: Any = self.lm.get_output_embeddings()  # type: ignore[operator]
        self.temperature, self.recording, self.three, self.unread = temperature, False, False, False
        self._handles: list[Any] = []
        self.start()

    def start(self, keep_hidden: bool = False) -> None:
        """Forget the last step. keep_hidden: keep h of the scored tokens of the coming one."""
        self.forwards: list[Forward] = []
        self._taken: list[Forward] | None = None
        self.seen, self.excluded, self.captured = 0, 0, 0
        self.micro_batch, self.grouped = 0, False
        self.known: dict[str, Any] = {}
        self.failure: Exception | None = None
        self.blind, self.aux, self.postponed = "", False, False
        self.keep_hidden = keep_hidden
        self._h: Tensor | None = None
        self._z: Tensor | None = None
        self._unscaled: Tensor | None = None
        self._eps = 0.0
        self._head_called = self._inner_done = False
        self._last: tuple[Tensor, Layout] | None = None

    def take(self) -> list[Forward]:
        """The passes of this step whose backward pass has come, each with the tokens that its loss scores."""
        if self._taken is None:
            self._taken = [f for f in self.forwards if f.c is not None and not f.superseded]
            with self.guarded():
                for forward in self._taken:
                    forward.settle()
            self.captured, self.forwards, self._last = len(self.forwards), [], None
        return self._taken

    def why_nothing(self) -> str:
        """The likely cause when `take` is empty."""
        return diagnosis.nothing(self)

    # ---------------------------------------------------------------- hooks

    def install(self) -> None:
        """Set the hooks; `remove` takes them off."""
        add = self._handles.append
        if self.compiled is not None:  # hooks inside are ignored, or break the graph
            add(self.compiled.register_forward_hook(self._on_output, with_kwargs=True))
        else:
            if (inner := backbone(self.lm)) is not None:
                add(inner.register_forward_hook(self._on_backbone, prepend=True))
            add(self.head.register_forward_pre_hook(self._on_head))
            add(self.head.register_forward_hook(self._on_head_output, prepend=True))
            add(self.lm.register_forward_hook(self._on_output, with_kwargs=True, prepend=True))
            for module in self.outer:
                add(module.register_forward_hook(self._on_outer, with_kwargs=True))
        _active.append(self)

    def remove(self) -> None:
        """Take all hooks off and let go of every tensor."""
        while self._handles:
            self._handles.pop().remove()
        if self in _active:
            _active.remove(self)
        self.recording = False
        self.start()

    def _on_backbone(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inner_done = self._head_called = False
        if self.recording and torch.is_grad_enabled():
            self._eps = _autocast_roundoff(self.head.weight)
            h = getattr(output, "last_hidden_state", output[0] if isinstance(output, tuple) else output)
            self._h = h if isinstance(h, Tensor) else None

    def _on_head(self, module: nn.Module, args: Any) -> None:
        if self.recording and torch.is_grad_enabled() and args:
            self._h, self._head_called, self._eps = args[0], True, _autocast_roundoff(self.head.weight)

    def _on_head_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.recording and torch.is_grad_enabled() and isinstance(output, Tensor):
            self._z = output

    def _on_outer(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._inner_done:  # PEFT up to 0.20 calls model.forward, which fires none of the causal LM's own hooks
            self._on_output(module, args, kwargs, output)

    def _on_output(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._inner_done = True
        if not self.recording:
            return
        self.seen += 1
        if not torch.is_grad_enabled():
            self.excluded += 1
            return
        (h, self._h), (self._unscaled, self._z) = (self._h, None), (self._z, None)
        with self.guarded():
            dtypes = [self.head.weight.dtype] + ([h.dtype] if h is not None else [])
            self._eps = max(self._eps, *(torch.finfo(dtype).eps for dtype in dtypes))
            self._read(args, kwargs, output, h)
        self._eps, self._unscaled = 0.0, None

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """For arithmetic of our own: no graph, no autocast; an exception is kept, not raised."""
        try:
            with torch.no_grad(), torch.autocast(self.head.weight.device.type, enabled=False):
                yield
        except Exception as error:
            self.failure = self.failure or error

    # ---------------------------------------------------------------- what a pass offers

    def _read(self, args: Any, kwargs: Any, output: Any, h: Tensor | None) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        labels, given = kwargs.get("labels"), kwargs.get("shift_labels")
        like = next((x for x in (ids, labels, given, kwargs.get("inputs_embeds")) if isinstance(x, Tensor)), None)
        if like is None:
            raise ValueError("the model was called without input_ids, labels or inputs_embeds: what it scores is unknown")
        layout = Layout.of((like.shape[0], like.shape[1]), ids, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        self._last = (h, layout) if h is not None else None
        aux = getattr(output, "aux_loss", None)
        self.aux = self.aux or isinstance(aux, Tensor) and aux.requires_grad
        log_probs, logits = getattr(output, "log_probs", None), _logits(output)
        y = given if given is not None else None if labels is None else shifted(labels)
        if log_probs is not None and log_probs.requires_grad:
            guessed = y is None  # verl's fused head: log-probs of whatever follows in its input
            y = layout.following() if y is None else y
            row = given is not None or guessed and log_probs.shape[1] == layout.real.shape[1]
            y = right_aligned(y if row else y[:, :-1], log_probs.shape[1])
            mask = getattr(output, "label_mask", None)
            if h is None:
                h = self._replay(ids, kwargs)
            self._weigh(
                "log_probs", h, layout, log_probs, tuple(log_probs.shape), y, y != IGNORED if mask is None else mask,
                getattr(output, "entropy", None), float(kwargs.get("temperature") or self.temperature), guessed,
            )  # fmt: skip
        elif logits is not None and logits.requires_grad:
            self._read_logits(h, layout, logits, layout.following() if y is None else y, guessed=y is None)
        elif h is not None and h.requires_grad and y is not None:
            y = right_aligned(y, h.shape[1])
            rows = (y.reshape(-1) != IGNORED).nonzero().squeeze(1)
            self.forwards.append(self._forward("least squares", h, layout, rows, y.reshape(-1)[rows], h.shape[1]))
        else:
            self.blind = (
                "the model's output has neither log_probs nor logits that carry gradients"
                + (", and it was given no labels to fit the loss to" if y is None else ", and its hidden states carry none")
                + ": log-probs of your own go through td.tap(logp, labels, mask)"
            )

    def _replay(self, ids: Tensor | None, kwargs: Any) -> Tensor:
        """Hidden states of a compiled model, from one pass through its uncompiled backbone."""
        inner = backbone(self.lm)
        if inner is None or ids is None:
            raise ValueError("the hidden states of this compiled model are out of sight: leave it uncompiled, or use td.tap")
        devices = [ids.device.index] if ids.device.type == "cuda" else []
        more = {name: kwargs[name] for name in ("attention_mask", "position_ids") if kwargs.get(name) is not None}
        with torch.random.fork_rng(devices):
            return inner(input_ids=ids, use_cache=False, **more).last_hidden_state

    def _weigh(
        self, route: str, h: Tensor, layout: Layout, log_probs: Tensor, grid: tuple[int, ...], y: Tensor, mask: Tensor,
        entropy: Tensor | None, temperature: float, guessed: bool,
    ) -> None:  # fmt: skip
        """c and v from hooks on log-probs in a grid [B, T']: of all hidden states, or of the last T' before the end.

        guessed: nobody said which tokens count, so those are dropped that get no gradient.
        """
        picked = mask.reshape(-1).nonzero().squeeze(1)
        T, Th = grid[1], h.shape[1]
        first = 0 if T == Th else Th - 1 - T
        rows = picked // T * Th + picked % T + first
        uncertain = entropy is not None and entropy.requires_grad
        forward = self._forward(route, h, layout, rows, y.reshape(-1)[picked], Th, temperature=temperature, entropy=uncertain)
        states = h.detach().reshape(-1, h.shape[-1])[rows] if uncertain else h[:0]
        given, own = log_probs.detach().reshape(-1)[picked].float(), forward.stats.log_prob.float()
        forward.log_prob_error = float((own - given).abs().max()) if len(picked) else 0.0
        if not h.requires_grad:  # compiled, or a frozen backbone: the log-probs themselves are the check
            forward.misfit, forward.scored = float((own - given).square().sum()), float(given.square().sum())
            forward.sampled = forward.scored

        def arrival(name: str, sign: int) -> Callable[[Tensor], None]:
            def hook(grad: Tensor | None) -> None:
                if grad is None:  # a compiled graph passes on what was never asked for
                    return
                with self.guarded():
                    g, old = sign * grad.reshape(-1)[picked].float(), getattr(forward, name)
                    setattr(forward, name, g if old is None else old + g)
                    if guessed:
                        forward.touch(g != 0)
                    if name == "v" and forward.moments is None and bool(g.any()):
                        forward.moments = moments(self.readout(), states, forward.temperature)

            return hook

        log_probs.register_hook(arrival("c", -1))
        if entropy is not None and uncertain:
            entropy.register_hook(arrival("v", 1))
        self.forwards.append(forward)

    def _read_logits(self, h: Tensor | None, layout: Layout, logits: Tensor, y: Tensor, guessed: bool) -> None:
        """c from the gradient at the logits: for G = -c (e_y - pi)/T, |c| = T ‖G‖/‖pi - e_y‖ and its sign is that of -G_y.

        The hook is on the head's own output where nothing but a scale lies between: a loss inside the model reads that, and the
        output is a copy of it under autocast. guessed: no labels were given, so every next token is a candidate, and those
        that get no gradient are not scored.
        """
        Th, T = logits.shape[1], self.temperature
        y = right_aligned(y, Th)
        rows = (y.reshape(-1) != IGNORED).nonzero().squeeze(1)
        targets = y.reshape(-1)[rows]
        if (self.three or self.unread) and h is not None:
            self.forwards.append(self._forward("least squares", h, layout, rows, targets, Th, guessed=guessed))
            return
        flat = logits.detach().reshape(-1, logits.shape[-1])
        forward = self._forward("logits", h, layout, rows, targets, Th, stats=stats_of_logits(flat, rows, targets, T))
        at_logits = h is None or not h.requires_grad
        sample = _sample(len(rows), rows.device, min(SAMPLE, max(1, SAMPLED_LOGITS // flat.shape[1])))
        z = flat[rows[sample]].float() if at_logits else None
        scale, softcap = scale_and_cap(self.lm)
        own_output = self._unscaled is not None and self._unscaled.shape == logits.shape and softcap is None
        seen, scale = (self._unscaled, scale) if own_output and self._unscaled is not None else (logits, 1.0)

        def hook(G: Tensor | None) -> None:
            if G is None or forward.superseded:
                return
            with self.guarded():
                wide = torch.promote_types(G.dtype, torch.float32)
                G = G.reshape(-1, G.shape[-1])
                norms = _norms(G, wide)[rows]
                g = forward.stats.g_norm.to(wide)
                c = -T / scale * G[rows, targets].sign() * torch.where(g > 0, norms / g, torch.zeros_like(g))
                forward.c = c if forward.c is None else forward.c + c
                if guessed:
                    forward.touch(norms > 0)
                if z is not None:
                    own = G[rows[sample]].to(wide)
                    misfit = own + logit_force(z / T, targets[sample], c[sample]) * scale / T
                    forward.misfit, forward.sampled = float(misfit.square().sum()), float(own.square().sum())
                    forward.scored = float(norms.square().sum())
                    forward.astray = float(_norms(G, wide).index_fill(0, rows, 0.0).square().sum())

        seen.register_hook(hook)
        self.forwards.append(forward)

    def _forward(
        self, route: str, h: Tensor | None, layout: Layout, rows: Tensor, targets: Tensor, Th: int, *,
        temperature: float | None = None, stats: TokenStats | None = None, guessed: bool = False, entropy: bool = False,
    ) -> Forward:  # fmt: skip
        """A record with the statistics of its scored tokens and the basis of its check, made while the weights are at hand."""
        T = self.temperature if temperature is None else temperature
        hidden = None if h is None else h.detach().reshape(-1, h.shape[-1])[rows]
        column = rows % Th + 1 + layout.real.shape[1] - Th
        readout = self.readout()
        if stats is None:
            assert hidden is not None
            wide = torch.promote_types(hidden.dtype, readout.weight.dtype)
            x, W = hidden.to(wide), readout.weight.to(wide)
            stats = ops.linear_token_stats(x, W, targets, temperature=T, **readout.options)
        V = readout.weight.shape[0]
        forward = Forward(
            route, layout, rows, targets, rows // Th, column, stats, V, T, micro_batch=self.micro_batch, eps=self._eps
        )
        forward.metadata |= self.known
        self.micro_batch += not self.grouped
        if hidden is not None:
            forward.square = hidden.float().square().sum(1)
            forward.hidden = hidden if self.keep_hidden else None
        if h is not None and h.requires_grad and hidden is not None:
            every = route == "least squares"
            # an entropy term's moments wait for its gradient, unless the weights are gathered, which all ranks do or none
            if every and self.three or entropy and is_sharded(base_layer(self.head).weight):
                forward.moments = moments(readout, hidden, T)
            sample = _sample(len(rows), rows.device, len(rows) if every else SAMPLE)
            K = 3 if every and self.three else 2 if entropy else 1
            self._watch(forward, h, sample, basis(readout, hidden[sample], targets[sample], T, K), guessed)
        return forward

    def _watch(self, forward: Forward, h: Tensor, sample: Tensor, b: Tensor, guessed: bool) -> None:
        """Compare ∂L/∂h, when it comes, with what c and v say it is; least squares fits them to it first."""
        so_far: list[Tensor] = []
        states = h.detach()  # a hook that held h itself would keep the whole graph alive

        def hook(dh: Tensor | None) -> None:
            if dh is None or forward.superseded:
                return
            with self.guarded():
                g = dh.reshape(-1, dh.shape[-1])
                squares = _norms(g, torch.promote_types(g.dtype, torch.float32)).square()
                own: Tensor = sum(so_far, g[forward.rows[sample]].to(b.dtype))
                so_far[:] = [own]  # a second backward pass through the same graph adds to the first
                at, x = b, -fit(b, own) if forward.route == "least squares" else forward.gterm_on(sample, b.shape[1])
                K = 0
                if x is None:  # the loss is made inside the model, of something else than its output
                    K, self.unread = 1, True
                elif forward.route == "logits" and _misfit(at, x, own) > forward.eps * _square(own):  # not of log-probs alone
                    K, self.three = 3, True
                if K and is_sharded(base_layer(self.head).weight):  # gathering is for all ranks, and this may be so on some
                    K, self.postponed = 0, True
                if K:
                    hidden, readout = states.reshape(-1, states.shape[-1])[forward.rows], self.readout()
                    at = basis(readout, hidden, forward.targets, forward.temperature, K)
                    own = g[forward.rows].to(at.dtype)
                    forward.route, x = "least squares", -fit(at, own)
                    forward.moments = moments(readout, hidden, forward.temperature) if K == 3 else None
                if x is None:
                    return
                if forward.route == "least squares":
                    forward.c, (forward.v, forward.u) = x[:, 0], (x[:, 1], x[:, 2]) if x.shape[1] == 3 else (None, None)
                    if guessed:
                        forward.touch(squares[forward.rows] > 0)
                forward.misfit, forward.sampled = _misfit(at, x, own), _square(own)
                forward.scored = float(squares[forward.rows].sum())
                forward.astray = float(squares.index_fill(0, forward.rows, 0.0).sum())

        h.register_hook(hook)

    # ---------------------------------------------------------------- the readout, and log-probs built elsewhere

    def readout(self) -> Readout:
        """The readout as this pass uses it (`readout_of`); every rank must ask where it is sharded."""
        return readout_of(self.lm, self._head_called)

    def tapped(
        self, logp: Tensor, labels: Tensor | None, mask: Tensor | None, temperature: float, entropy: Tensor | None
    ) -> None:
        """See `tap`."""
        if self._last is None:
            raise ValueError(
                "td.tap found no hidden states of the model: call it after the model's own forward pass with gradients, on "
                "log-probs of its output (torch.compile of the whole model hides them)"
            )
        h, layout = self._last
        B, T = h.shape[:2]
        flat = logp.dim() == 1 and len(logp) == B * T
        if not flat and not (logp.dim() == 2 and logp.shape[0] == B and logp.shape[1] <= T):
            raise ValueError(
                f"td.tap: log-probs of shape {list(logp.shape)} do not fit hidden states [B, T]={[B, T]}; give [B, T] or [B·T] "
                "with shifted labels, or [B, k] for the last k < T tokens"
            )
        for name, x in (("labels", labels), ("mask", mask), ("entropy", entropy)):
            if x is not None and x.shape != logp.shape:
                raise ValueError(f"td.tap: {name} must have the log-probs' shape {list(logp.shape)}, got {list(x.shape)}")
        grid = (B, T) if flat else (B, logp.shape[1])
        guessed = labels is None
        if labels is None:
            following = right_aligned(layout.following(), T)
            labels = following if grid[1] == T else following[:, T - 1 - grid[1] : T - 1]
        y = labels.reshape(grid)
        keep = y != IGNORED if mask is None else (y != IGNORED) & mask.reshape(grid).bool()
        for forward in self.forwards:
            forward.superseded = forward.superseded or forward.layout is layout
        self._weigh("tap", h, layout, logp, grid, y, keep, entropy, temperature, guessed=mask is None and guessed)


def tap(
    logp: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    entropy: Tensor | None = None,
) -> Tensor:
    """Tell tokdyn that the loss is made of these log-probs; they are returned as they are.

    For stacks that build log-probs themselves (verl, OpenRLHF, your own loop). c = -∂L/∂logp is captured in the backward pass.
    Without a `Monitor` at work, or without gradients, nothing happens.

    Args:
        logp: log pi of the labels: [B, T] with labels already shifted (or all B·T in a row), or [B, k] of the last k tokens.
        labels: the tokens, of the same shape, -100 where one does not count; when absent, those that follow in the input.
        mask: which count in the loss, of the same shape. All labels when absent; without labels too, those that get a gradient
            (a clipped token gets none, so that clipped shares need one or the other).
        temperature: what the logits were divided by.
        entropy: the entropies of the loss's bonus, of the same shape.

    Raises:
        Nothing: a wrong shape is reported by the monitor at the end of the step.
    """
    for capture in _active:
        if capture.recording and torch.is_grad_enabled() and logp.requires_grad:
            with capture.guarded():
                capture.tapped(logp, labels, mask, temperature, entropy)
    return logp


def _autocast_roundoff(weight: Tensor) -> float:
    kind = weight.device.type
    return torch.finfo(torch.get_autocast_dtype(kind)).eps if torch.is_autocast_enabled(kind) else 0.0


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


def _logits(output: Any) -> Tensor | None:
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, tuple):
        found = next((x for x in output if isinstance(x, Tensor) and x.dim() == 3), None)
    return found
