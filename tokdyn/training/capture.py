"""Capture: the training-time counterpart of model/trace.py. Hooks on a causal LM in, (h, y, c, v) of every scored token out.

c = -∂L/∂log pi(y) and v = ∂L/∂H come from the backward pass that the trainer runs anyway, by what the model's output offers,
never by a version:

    log_probs       the output carries log_probs (a fused head): tensor hooks on them and on their entropy
    logits          the output carries logits: one tensor hook, reduced to ‖G‖ and G_y on the spot
    tap             the loss is made of log-probs built elsewhere, marked with `tap(logp, labels, mask)`
    least squares   none of these (a fully fused loss): c from (h, ∂L/∂h, W, y)

Here are the hooks on modules, which see a forward pass and choose its route; recorder.py has the hooks on its gradients. Logits
are looked at where they exist and never kept. Hooks return None, do nothing unless `recording`, and an exception inside one is
kept for later: it never reaches the user's training.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model.readout import Readout, readout_of
from ..model.unwrap import backbone, unwrap
from .forward import Forward
from .gradients import Gradients
from .hooks import Hooks
from .layout import IGNORED, Layout, Scored, right_aligned, shifted
from .recorder import Pass, Recorder
from .step_log import LossFacts, StepLog, StepSummary

_active: weakref.WeakSet[Capture] = weakref.WeakSet()  # one that its user has forgotten keeps no model alive


@dataclass
class _RunningPass:
    """What the hooks inside the model have seen of the forward pass that is running."""

    hidden: Tensor | None = None
    output: Tensor | None = None  # the backbone's
    head_output: Tensor | None = None
    head_called: bool = False
    eps: float = 0.0
    done: bool = False  # the causal LM's own hook has fired


class Capture:
    """Hooks on a causal LM that turn a step's forward and backward passes into `Forward` records.

    Args:
        model: the module the loss is computed with: a causal LM, or PEFT's, DDP's or torch.compile's wrapper around one.
        temperature: what the trainer divides the logits by.

    Attributes:
        lm, outer, compiled: the causal LM, PEFT's wrappers around it, torch.compile's wrapper if any. head: its readout.
        recording: whether hooks do anything.
        step: the passes of the present step. facts: what they and earlier ones showed of the loss.

    Raises:
        ValueError: there is no causal LM with output embeddings inside.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        self.lm, self.outer, self.compiled = unwrap(model)
        self.head: Any = self.lm.get_output_embeddings()  # type: ignore[operator]
        self.temperature, self.recording, self.facts = temperature, False, LossFacts()
        self._hooks, self._gradients = Hooks(self._hook_failed), Gradients(self.lm)
        self.start()

    def start(self, keep_hidden: bool = False) -> None:
        """Forget the last step. keep_hidden: keep h of the scored tokens of the coming one."""
        self.step = StepLog(self.head.weight.device.type, keep_hidden, self._gradients)
        self.facts.retry_next_step = False
        self._gradients.forget()
        self._running = _RunningPass()
        self._latest: Pass | None = None
        self._taken: list[Forward] | None = None

    def take(self) -> list[Forward]:
        """The passes of this step whose backward pass has come, each with the tokens that its loss scores."""
        if self._taken is None:
            self._taken = [f for f in self.step.forwards if f.c is not None and not f.superseded]
            with self.step.guarded():
                for forward in self._taken:
                    forward.settle()
            self.step.forwards, self._latest = [], None
        return self._taken

    def before_step(self) -> None:
        """The optimizer is about to step, on the gradients that are there now."""
        if self._gradients.thrown_away():
            self.step.drop_backward()
        self._gradients.forget()

    def summary(self) -> StepSummary:
        """What was seen in this step, for diagnosis.py to explain."""
        step = self.step
        return StepSummary(
            model=type(self.lm).__name__,
            compiled=self.compiled is not None,
            compiled_in_place=getattr(self.lm, "_compiled_call_impl", None) is not None,
            seen=step.seen,
            excluded=step.excluded,
            captured=step.captured,
            router_loss=step.router_loss,
            why_blind=step.why_blind,
            failure=step.failure,
            thrown_away=step.thrown_away,
            retry_next_step=self.facts.retry_next_step,
        )

    def readout(self) -> Readout:
        """The readout as the latest pass used it (`readout_of`); every rank must ask where it is sharded."""
        return readout_of(self.lm, self._running.head_called)

    # ---------------------------------------------------------------- hooks on modules

    def install(self) -> None:
        """Set the hooks; `remove` takes them off."""
        add = self._hooks.add
        if self.compiled is not None:  # hooks inside are ignored, or break the graph
            add(self.compiled.register_forward_hook, self._on_output, with_kwargs=True)
        else:
            if (inner := backbone(self.lm)) is not None:
                add(inner.register_forward_hook, self._on_backbone, prepend=True)
            add(self.head.register_forward_pre_hook, self._on_head)
            add(self.head.register_forward_hook, self._on_head_output, prepend=True)
            add(self.lm.register_forward_hook, self._on_output, with_kwargs=True, prepend=True)
            for module in self.outer:
                add(module.register_forward_hook, self._on_outer, with_kwargs=True)
        _active.add(self)

    def remove(self) -> None:
        """Take all hooks off and let go of every tensor."""
        self._hooks.remove()
        _active.discard(self)
        self.recording = False
        self.start()

    def _hook_failed(self, error: Exception) -> None:
        self.step.failed(error)

    def _on_backbone(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running = _RunningPass()
        if self.recording and torch.is_grad_enabled():
            h = getattr(output, "last_hidden_state", output[0] if isinstance(output, tuple) else output)
            self._running.hidden = self._running.output = h if isinstance(h, Tensor) else None
            self._running.eps = _autocast_roundoff(self.head.weight)

    def _on_head(self, module: nn.Module, args: Any) -> None:
        if self.recording and torch.is_grad_enabled() and args:
            self._running.hidden, self._running.head_called = args[0], True
            self._running.eps = _autocast_roundoff(self.head.weight)

    def _on_head_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.recording and torch.is_grad_enabled() and isinstance(output, Tensor):
            self._running.head_output = output

    def _on_outer(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._running.done:  # PEFT up to 0.20 calls model.forward, which fires none of the causal LM's own hooks
            self._on_output(module, args, kwargs, output)

    def _on_output(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        running = self._running
        self._running = _RunningPass(head_called=running.head_called, done=True)
        if not self.recording:
            return
        self.step.seen += 1
        if not torch.is_grad_enabled():
            self.step.excluded += 1
            return
        with self.step.guarded():
            inputs = {"input_ids": args[0] if args else None, **kwargs}
            self._record(inputs, output, self._seen(inputs, running))

    # ---------------------------------------------------------------- what a pass offers

    def _seen(self, inputs: Mapping[str, Any], running: _RunningPass) -> Pass:
        """The pass that has just run."""
        names = ("input_ids", "labels", "shift_labels", "inputs_embeds")
        like = next((inputs[name] for name in names if isinstance(inputs.get(name), Tensor)), None)
        if like is None:
            raise ValueError("the model was called without input_ids, labels or inputs_embeds: what it scores is unknown")
        ids, mask, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        layout, h = Layout.of((like.shape[0], like.shape[1]), ids, mask, positions), running.hidden
        dtypes = [self.head.weight.dtype] + ([h.dtype] if h is not None else [])
        eps = max(running.eps, *(torch.finfo(dtype).eps for dtype in dtypes))
        output = running.output if _is_end_of(h, running.output) else None
        seen = Pass(self.lm, layout, h, output, running.head_output, running.head_called, eps)
        self._latest = seen if h is not None else None
        return seen

    def _record(self, inputs: Mapping[str, Any], output: Any, seen: Pass) -> None:
        """Choose the route of a pass by what its output carries, and have it recorded."""
        labels, y = inputs.get("labels"), inputs.get("shift_labels")
        y = shifted(labels) if y is None and labels is not None else y
        aux = getattr(output, "aux_loss", None)
        self.step.router_loss = self.step.router_loss or isinstance(aux, Tensor) and aux.requires_grad
        log_probs, logits = getattr(output, "log_probs", None), _logits(output)
        if log_probs is not None and log_probs.requires_grad:
            self._record_log_probs(inputs, output, seen, y)
        elif logits is not None and logits.requires_grad:
            labelled = right_aligned(seen.layout.following() if y is None else y, logits.shape[1])
            self._recorder(seen, labelled, guessed=y is None).read_logits(logits)
        elif seen.hidden is not None and seen.has_gradient and y is not None:
            self._recorder(seen, right_aligned(y, seen.hidden.shape[1])).fit()
        else:
            self.step.why_blind = (
                "the model's output has neither log_probs nor logits that carry gradients"
                + (", and it was given no labels to fit the loss to" if y is None else ", and its hidden states carry none")
                + ": log-probs of your own go through td.tap(logp, labels, mask)"
            )

    def _recorder(self, seen: Pass, labels: Tensor, *, guessed: bool = False) -> Recorder:
        """For the tokens that labels in the grid of all hidden states name."""
        mask = labels != IGNORED
        scored = Scored.of(labels, mask, labels.shape[1], temperature=self.temperature, guessed=guessed)
        return Recorder(seen, scored, self.step, self.facts)

    def _record_log_probs(self, inputs: Mapping[str, Any], output: Any, seen: Pass, y: Tensor | None) -> None:
        """Log-probs of a fused head: of given labels, or (verl's) of whatever follows in its input."""
        guessed, width = y is None, output.log_probs.shape[1]
        y = seen.layout.following() if y is None else y
        aligned = inputs.get("shift_labels") is not None or guessed and width == seen.layout.real.shape[1]
        y = right_aligned(y if aligned else y[:, :-1], width)
        mask = getattr(output, "label_mask", None)
        mask = y != IGNORED if mask is None else mask
        if seen.hidden is None:
            seen = replace(seen, hidden=self._replay(inputs))
        assert seen.hidden is not None
        temperature = float(inputs.get("temperature") or self.temperature)
        scored = Scored.of(y, mask, seen.hidden.shape[1], temperature=temperature, guessed=guessed)
        recorder = Recorder(seen, scored, self.step, self.facts)
        recorder.read_log_probs("log_probs", output.log_probs, getattr(output, "entropy", None))

    def _replay(self, inputs: Mapping[str, Any]) -> Tensor:
        """Hidden states of a compiled model, from one pass through its uncompiled backbone."""
        inner, ids = backbone(self.lm), inputs["input_ids"]
        if inner is None or ids is None:
            raise ValueError("the hidden states of this compiled model are out of sight: leave it uncompiled, or use td.tap")
        devices = [ids.device.index] if ids.device.type == "cuda" else []
        more = {name: inputs[name] for name in ("attention_mask", "position_ids") if inputs.get(name) is not None}
        with torch.random.fork_rng(devices):
            return inner(input_ids=ids, use_cache=False, **more).last_hidden_state

    def record_tap(
        self, logp: Tensor, labels: Tensor | None, mask: Tensor | None, temperature: float, entropy: Tensor | None
    ) -> None:
        """See `tap`; the arguments are its."""
        if (seen := self._latest) is None or seen.hidden is None:
            raise ValueError(
                "td.tap found no hidden states of the model: call it after the model's own forward pass with gradients, on "
                "log-probs of its output (torch.compile of the whole model hides them)"
            )
        B, W = seen.hidden.shape[:2]
        grid = _grid(logp, B, W)
        for name, x in (("labels", labels), ("mask", mask), ("entropy", entropy)):
            if x is not None and x.shape != logp.shape:
                raise ValueError(f"td.tap: {name} must have the log-probs' shape {list(logp.shape)}, got {list(x.shape)}")
        guessed = labels is None and mask is None
        if labels is None:
            following = right_aligned(seen.layout.following(), W)
            labels = following if grid[1] == W else following[:, W - 1 - grid[1] : W - 1]
        y = labels.reshape(grid)
        keep = y != IGNORED if mask is None else (y != IGNORED) & mask.reshape(grid).bool()
        for forward in self.step.forwards:
            forward.superseded = forward.superseded or forward.layout is seen.layout
        scored = Scored.of(y, keep, W, temperature=temperature, guessed=guessed)
        Recorder(seen, scored, self.step, self.facts).read_log_probs("tap", logp, entropy)


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
            with capture.step.guarded():
                capture.record_tap(logp, labels, mask, temperature, entropy)
    return logp


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Passes inside are not the training's: monitors look away."""
    looking = [(capture, capture.recording) for capture in _active]
    for capture, _ in looking:
        capture.recording = False
    try:
        yield
    finally:
        for capture, was in looking:
            capture.recording = was


def _grid(logp: Tensor, B: int, W: int) -> tuple[int, int]:
    """The shape [B, k] of log-probs given to `tap`, beside hidden states [B, W]."""
    if logp.dim() == 1 and len(logp) == B * W:
        return B, W
    if logp.dim() == 2 and logp.shape[0] == B and logp.shape[1] <= W:
        return B, logp.shape[1]
    raise ValueError(
        f"td.tap: log-probs of shape {list(logp.shape)} do not fit hidden states [B, T]={[B, W]}; give [B, T] or [B·T] "
        "with shifted labels, or [B, k] for the last k < T tokens"
    )


def _autocast_roundoff(weight: Tensor) -> float:
    kind = weight.device.type
    return torch.finfo(torch.get_autocast_dtype(kind)).eps if torch.is_autocast_enabled(kind) else 0.0


def _is_end_of(h: Tensor | None, output: Tensor | None) -> bool:
    """Whether h is another tensor with the last positions of the backbone's output, in its own precision."""
    if h is None or output is None or h is output or not output.requires_grad or h.dim() != output.dim() or h.dim() != 3:
        return False
    end = output.detach()[:, max(0, output.shape[1] - h.shape[1]) :]
    same_memory = (h.data_ptr(), h.stride(), h.shape, h.dtype) == (end.data_ptr(), end.stride(), end.shape, end.dtype)
    return same_memory or torch.equal(h.detach(), end.to(h.dtype))


def _logits(output: Any) -> Tensor | None:
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, tuple):
        found = next((x for x in output if isinstance(x, Tensor) and x.dim() == 3), None)
    return found
