"""Hooks that weigh the gradient of each token where a forward pass makes log-probs or logits; its outputs stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..model.unwrap import unwrap


class TokenWeights:
    """The hooks of `interventions.weighted` on a model, between `install` and `remove`.

    Args:
        model: a causal LM, or PEFT's, DDP's or torch.compile's wrapper of one.
        weights: one for each token of the batch as the model's ids stand, [B, T].
    """

    def __init__(self, model: nn.Module, weights: Tensor) -> None:
        self.lm, self.outer, self.compiled = unwrap(model)
        self.weights = weights.detach()
        self.of_next = pad(self.weights[:, 1:], (0, 1), value=1.0)  # the weight of the token that each place scores
        self.inputs: Mapping[str, Any] = {}  # of the pass that is running
        self.done = False  # it has been weighed
        self._handles: list[Any] = []

    def install(self) -> None:
        """Set the hooks."""
        add = self._handles.append
        for module in [self.compiled] if self.compiled is not None else [self.lm, *self.outer]:
            add(module.register_forward_pre_hook(self._on_input, with_kwargs=True, prepend=True))
            add(module.register_forward_hook(self._on_output, with_kwargs=True, prepend=True))
        if self.compiled is None:
            head: Any = self.lm.get_output_embeddings()  # type: ignore[operator]
            add(head.register_forward_hook(self._on_head_output, prepend=True))

    def remove(self) -> None:
        """Take them off."""
        while self._handles:
            self._handles.pop().remove()

    def _on_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.inputs, self.done = kwargs, False
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and torch.is_grad_enabled() and ids.shape != self.weights.shape:
            raise ValueError(
                f"weights must have shape [B, T]={list(ids.shape)}, one for each token of the batch, got "
                f"{list(self.weights.shape)}"
            )

    def _on_head_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad and output.dim() == 3:
            self._weigh(output, self.of_next)

    def _on_output(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Where the head's module was not called: weigh what the model returns."""
        if not torch.is_grad_enabled() or self.done:
            return
        found = {name: getattr(output, name, None) for name in ("log_probs", "entropy", "logits")}
        live = {name: x for name, x in found.items() if isinstance(x, Tensor) and x.requires_grad}
        if not live:
            raise ValueError(
                "neither log-probs nor logits appear in this forward pass (a loss fused with the readout), so no token can be "
                "weighted: turn the fusion off, or weigh log-probs of your own (td.interventions.weigh)"
            )
        for name in ["log_probs", "entropy"] if "log_probs" in live else ["logits"]:
            if name in live:
                self._weigh(live[name], self.of_next if self._has_last_place(name, live[name]) else self.of_next[:, :-1])

    def _has_last_place(self, name: str, x: Tensor) -> bool:
        """Whether an output has a place for the last token of a row, which scores nothing; a fused head may leave it out."""
        unlabelled = self.inputs.get("labels") is None and x.shape[1] == self.of_next.shape[1]
        return name == "logits" or self.inputs.get("shift_labels") is not None or unlabelled

    def _weigh(self, x: Tensor, weights: Tensor) -> None:
        """Weights on a tensor [B, k, ...] whose k places are the last of theirs."""
        if len(x) != len(weights) or x.shape[1] > self.of_next.shape[1]:
            raise ValueError(
                f"weights must be one for each token of the batch, [B, T]; they are {list(self.weights.shape)} and the model "
                f"made {list(x.shape)}"
            )
        w = weights[:, weights.shape[1] - x.shape[1] :]
        x.register_hook(lambda grad: grad * (w if grad.dim() == 2 else w[..., None]).to(grad))
        self.done = True
