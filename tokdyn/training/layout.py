"""Where the tokens of a batch stand: padding and packing undone, labels aligned with hidden states, which tokens are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

IGNORED = -100
JUMPS = -1


@dataclass(frozen=True)
class Layout:
    """Which sequence each place of a batch belongs to and its position there, with padding and packing undone.

    `padding` says for each sequence at which position the model was told that it begins, or else how many places of padding
    stand before it (`Chi.padding`); JUMPS where the model was told positions that do not follow one another.
    """

    ids: Int[Tensor, "B T"] | None
    real: Bool[Tensor, "B T"]
    sequence: Int[Tensor, "B T"]
    position: Int[Tensor, "B T"]
    padding: Int[Tensor, " S"]

    @classmethod
    def of(cls, shape: tuple[int, int], ids: Tensor | None, mask: Any, positions: Tensor | None) -> Layout:
        """From what the model was called with. A row without mask whose positions start again holds several documents."""
        B, T = shape
        device = next((x.device for x in (ids, mask, positions) if isinstance(x, Tensor)), torch.device("cpu"))
        masked = isinstance(mask, Tensor) and mask.shape == (B, T)
        real = mask.bool() if masked else torch.ones(B, T, dtype=torch.bool, device=device)
        if not masked and positions is not None and positions.shape == (B, T) and bool((positions[:, 1:] == 0).any()):
            starts = positions == 0
            starts[:, 0] = True
            sequence = starts.flatten().cumsum(0).reshape(B, T) - 1
            return cls(ids, real, sequence, positions.long(), torch.zeros_like(sequence[starts]))
        rows = torch.arange(B, device=device)[:, None].expand(B, T)
        first = real.int().argmax(1, keepdim=True)
        padding = first.squeeze(1)
        if positions is not None and positions.shape in ((B, T), (1, T)):
            told = positions.long().expand(B, T)
            padding = told.gather(1, first).squeeze(1)
            jumps = (told != padding[:, None] + real.long().cumsum(1) - 1) & real
            padding = padding.masked_fill(jumps.any(1), JUMPS)
        return cls(ids, real, rows, torch.arange(T, device=device) - first, padding)

    def padding_of(self, sequence: int) -> int:
        """`Chi.padding` of a sequence.

        Raises:
            ValueError: its positions jump.
        """
        n = int(self.padding[sequence])
        if n == JUMPS:
            raise ValueError("position_ids that jump inside a sequence: it cannot be replayed")
        return n

    @property
    def sequences(self) -> int:
        """How many sequences the batch holds."""
        return int(self.sequence.max()) + 1

    def following(self) -> Int[Tensor, "B T"]:
        """The token after each place, IGNORED where none of the same sequence follows.

        Raises:
            ValueError: the model was called without ids.
        """
        if self.ids is None:
            raise ValueError("the model was called with inputs_embeds and without labels: which tokens it scores is unknown")
        after = torch.full_like(self.ids, IGNORED)
        same = (self.sequence[:, 1:] == self.sequence[:, :-1]) & self.real[:, 1:] & self.real[:, :-1]
        after[:, :-1] = torch.where(same, self.ids[:, 1:], after[:, 1:])
        return after


@dataclass(frozen=True)
class Scored:
    """The N tokens that a loss scores, or may score, and which of the hidden states [B, W] scores each.

    Args:
        picked: where each stands in the grid of labels [B, G] that it was read from, an index into B·G, [N].
        rows: the hidden state that scores it, an index into B·W, [N].
        targets: the tokens, [N].
        width: W.
        temperature: what the loss divides their logits by.
        guessed: nobody said which tokens count, so those that get no gradient are dropped in the end.
    """

    picked: Int[Tensor, " N"]
    rows: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]
    width: int
    temperature: float
    guessed: bool

    @classmethod
    def of(
        cls, labels: Int[Tensor, "B G"], mask: Tensor, width: int, *, temperature: float = 1.0, guessed: bool = False
    ) -> Scored:
        """The labels under a mask [B, G], in a grid of all W hidden states of a row, or of the last G before its end."""
        G = labels.shape[1]
        picked = mask.reshape(-1).nonzero().squeeze(1)
        first = 0 if G == width else width - 1 - G
        rows = picked // G * width + picked % G + first
        return cls(picked, rows, labels.reshape(-1)[picked], width, temperature, guessed)

    def batch(self) -> Int[Tensor, " N"]:
        """The row of the batch that each token stands in."""
        return self.rows // self.width

    def column(self, T: int) -> Int[Tensor, " N"]:
        """Where each token stands in a row of T ids, of which the hidden states are the last W."""
        return self.rows % self.width + 1 + T - self.width


def right_aligned(y: Int[Tensor, "B T"], width: int) -> Int[Tensor, "B W"]:
    """The last `width` columns, or the same with IGNORED columns put before them."""
    T = y.shape[1]
    return y[:, T - width :] if width <= T else torch.nn.functional.pad(y, (width - T, 0), value=IGNORED)


def shifted(labels: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """The label that each place predicts; IGNORED at the last."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
