"""Sequences: a prompt with a response, which of its tokens are scored, and what training knows about it.

A `Chi` is the paper's chi = [x; y]. Token t is scored by the logits at t - 1, so token 0 is never scored. The boundary
between prompt and response is found by character offsets in ONE tokenisation of the whole text: a token that holds any
character of the response is scored, also when a BPE merge starts it inside the prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ._arguments import printable
from ._encoding import Text, as_answer, plain, render, tokenise


@dataclass(frozen=True, eq=False)
class Chi:
    """One sequence [x; y] with its scored tokens and its training metadata.

    Args:
        ids: token ids [T].
        scored: which tokens are scored [T]; token 0 cannot be, since no logits precede it.
        role: what the objective calls it: "response", "chosen", "rejected" or "reference".
        group: which prompt it answers; pairs and rollout groups share it.
        advantage: A of this response (policy-gradient objectives).
        reference_log_probs: log pi_ref of the scored tokens [n]; the policy itself when absent.
        old_log_probs: log pi_old of the scored tokens [n] (the sampler's); the policy itself when absent.
        tokens: text of every token [T], for tables and pages.
        prompt, response: the texts, for tables and pages.
        truncated: how many tokens were cut to fit max_length.
        padding: how many places of padding the loss had before it: a model that counts them (GPT-2) sees its tokens so much
            later, here too.

    Raises:
        ValueError: a shape does not fit, or token 0 is marked as scored.
    """

    ids: Int[Tensor, " T"]
    scored: Bool[Tensor, " T"]
    role: str = "response"
    group: int = 0
    advantage: float | None = None
    reference_log_probs: Float[Tensor, " n"] | None = None
    old_log_probs: Float[Tensor, " n"] | None = None
    tokens: tuple[str, ...] | None = None
    prompt: str = ""
    response: str = ""
    truncated: int = 0
    padding: int = 0

    def __post_init__(self) -> None:
        T = self.ids.numel()
        if self.ids.dim() != 1 or self.ids.dtype != torch.long:
            raise ValueError(f"ids must be int64 of shape [T], got {self.ids.dtype} {list(self.ids.shape)}")
        if self.scored.shape != self.ids.shape or self.scored.dtype != torch.bool:
            raise ValueError(f"scored must be bool of shape [T]=({T},), got {self.scored.dtype} {list(self.scored.shape)}")
        if T and bool(self.scored[0]):
            raise ValueError("scored[0] must be False: no logits precede the first token")
        for name in ("reference_log_probs", "old_log_probs"):
            value = getattr(self, name)
            if value is not None and value.shape != (len(self),):
                raise ValueError(f"{name} must have shape [n]=({len(self)},), one per scored token, got {list(value.shape)}")

    def __len__(self) -> int:
        """Number of scored tokens."""
        return int(self.scored.sum())

    def with_(self, **changes: Any) -> Chi:
        """A copy with some fields replaced."""
        return replace(self, **changes)


def by_group(chis: Sequence[Chi]) -> list[list[int]]:
    """Which sequences share a group, as their places in the list; groups in the order in which they appear."""
    members: dict[int, list[int]] = {}
    for i, chi in enumerate(chis):
        members.setdefault(chi.group, []).append(i)
    return list(members.values())


def required_advantage(chi: Chi, message: str) -> float:
    """A of a sequence.

    Raises:
        ValueError: it has none; `message` says who needs one.
    """
    if chi.advantage is None:
        raise ValueError(message)
    return chi.advantage


def visible(token: str) -> str:
    """A token's text with its white space made visible, and control characters and marks of direction escaped."""
    return printable(token.replace("\n", "↵").replace(" ", "␣"))


def context_numbers(chis: Sequence[Chi]) -> Int[Tensor, " N"]:
    """The context of each scored token of all sequences: 0, 1, … in order of appearance.

    Tokens have one context where the ids before them are the same and stand at the same positions. They share their logits and
    Jacobian, so that their forces at the logits add up; the tokens themselves may differ.

    Cost: a dictionary entry for each distinct prefix.
    """
    children, number, found = dict[tuple[int, int], int](), dict[int, int](), list[int]()
    for chi in chis:
        prefix = 0
        for token, scored in zip(chi.ids.tolist(), chi.scored.tolist(), strict=True):
            if scored:
                found.append(number.setdefault(prefix, len(number)))
            prefix = children.setdefault((prefix, token), len(children) + 1)
    return torch.tensor(found, dtype=torch.long)


def prefix_keys(ids: Sequence[int]) -> list[int]:
    """A 61-bit key of the ids before each token: equal where the ids before are the same, in any batch, step or process."""
    keys = [1]
    for token in ids:
        keys.append((keys[-1] * 1_000_003 + token + 1) % ((1 << 61) - 1))
    return keys[:-1]


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences and where their N scored tokens lie.

    Right padding needs no mask: in a causal model no earlier position sees a later one, and padded rows are never scored.
    """

    ids: Int[Tensor, "B T"]
    rows: Int[Tensor, " N"]  # index into the B·T positions: the logits that score the token
    targets: Int[Tensor, " N"]
    sequence: Int[Tensor, " N"]
    position: Int[Tensor, " N"]
    position_ids: Int[Tensor, "B T"] | None = None  # what the model is told, where it is not to count from 0

    @cached_property
    def slot(self) -> Int[Tensor, " N"]:
        """Which one of its sequence's scored tokens each token is, from 0."""
        row = self.rows // self.ids.shape[1]
        return torch.arange(len(row)) - torch.searchsorted(row, row)

    @property
    def slots(self) -> int:
        """The most scored tokens of a sequence."""
        return int(self.slot.max()) + 1

    def only(self, tokens: Int[Tensor, " n"]) -> Batch:
        """Some of the scored tokens."""
        own = {name: getattr(self, name)[tokens] for name in ("rows", "targets", "sequence", "position")}
        return replace(self, **own)

    def alone(self, k: int) -> Batch:
        """Sequence k by itself, cut after the last position that scores a token."""
        T = self.ids.shape[1]
        mine = self.only((self.rows // T == k).nonzero().squeeze(1))
        positions = None if self.position_ids is None else self.position_ids[k : k + 1]
        return replace(mine, ids=self.ids[k : k + 1], rows=mine.rows - k * T, position_ids=positions).upto(slice(None))

    def upto(self, slots: slice) -> Batch:
        """Some scored tokens of every sequence, by slot, with the sequences cut after the last position that scores one."""
        batch = self.only(torch.isin(self.slot, torch.arange(self.slots)[slots]).nonzero().squeeze(1))
        row, at = batch.rows // self.ids.shape[1], batch.rows % self.ids.shape[1]
        T = int(at.max()) + 1
        positions = None if self.position_ids is None else self.position_ids[:, :T]
        return replace(batch, ids=self.ids[:, :T], rows=row * T + at, position_ids=positions)

    def numbered_from(self, first: int) -> Batch:
        """The same batch of a longer list: its sequences are numbered from `first` on."""
        return replace(self, sequence=self.sequence + first)


def collate(chis: Sequence[Chi], first: int = 0, count_padding: bool = False) -> Batch:
    """Stack sequences into one batch.

    Args:
        chis: the sequences.
        first: the number of the first of them in a longer list.
        count_padding: tell the model the positions that tokens have behind `Chi.padding`.
    """
    T = max(chi.ids.numel() for chi in chis)
    ids = torch.stack([torch.nn.functional.pad(chi.ids, (0, T - chi.ids.numel())) for chi in chis])
    where = [chi.scored.nonzero().squeeze(1) for chi in chis]
    return Batch(
        ids=ids,
        rows=torch.cat([b * T + t - 1 for b, t in enumerate(where)]),
        targets=torch.cat([chi.ids[t] for chi, t in zip(chis, where, strict=True)]),
        sequence=torch.cat([torch.full_like(t, first + b) for b, t in enumerate(where)]),
        position=torch.cat(where),
        position_ids=_behind_padding(chis, T) if count_padding else None,
    )


def _behind_padding(chis: Sequence[Chi], T: int) -> Int[Tensor, "B T"]:
    """Positions that go on counting from the padding before each sequence; behind its end the last one."""
    return torch.stack([torch.arange(T).clamp(max=chi.ids.numel() - 1) + chi.padding for chi in chis])


def encode(
    tokenizer: Any,
    prompt: Text,
    response: Text,
    *,
    eos: bool = True,
    max_length: int | None = None,
    truncate: str = "end",
    template: Mapping[str, Any] | None = None,
    **metadata: Any,
) -> Chi:
    """Tokenise a prompt with its response once, as one text, and mark the tokens of the response as scored.

    Args:
        tokenizer: a fast transformers tokenizer. One without offsets serves as long as the prompt's own tokens are
            a prefix of the whole text's.
        prompt: text, or a list of chat messages, rendered with the tokenizer's chat template. The content of a message is
            text, or a list of parts of type "text".
        response: text, or a list of the assistant's messages. A text answers chat messages as the assistant.
        eos: close a plain response with the end-of-sequence token, where the tokenizer has one. A chat template
            closes its own turns.
        max_length: longest sequence in tokens; what is cut is said in a warning and recorded in `Chi.truncated`.
        truncate: "end" cuts the end of the response, "start" the start of the prompt.
        template: what the chat template is told besides the messages: `tools`, `enable_thinking` …
        metadata: role, group, advantage and the other fields of Chi.

    The first token of a sequence has no logits before it: where the prompt is empty and the tokenizer puts no BOS, the
    response's first token is not scored, and a warning names it. Trainers, which shift labels by one, do the same in silence.

    Raises:
        ValueError: no token of the response is left to score, a message of it is not the assistant's, a chat template is
            missing or fails, the tokenizer fails, or the boundary cannot be placed.
    """
    if truncate not in ("end", "start"):
        raise ValueError(f'truncate must be "end" or "start", got {truncate!r}')
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    chat = not isinstance(prompt, str)
    answer = [{"role": "assistant", "content": response}] if isinstance(response, str) else as_answer(response)
    if isinstance(prompt, str):
        if len(answer) != 1:
            raise ValueError(f"a response to a plain prompt must be text or one assistant message, got {len(answer)} messages")
        before, whole = prompt, prompt + answer[0]["content"]
    else:
        before, whole = render(tokenizer, plain(prompt), answer, template or {})
    ids, scored = tokenise(tokenizer, before, whole, specials=not chat)
    end, start = tokenizer.eos_token_id, tokenizer.bos_token_id
    if not chat and start is not None and ids[:2] == [start, start]:
        warnings.warn(
            f"the prompt begins with {tokenizer.bos_token} and the tokenizer adds another: the model sees two. Give a chat as "
            "messages, not as the text that its template makes",
            stacklevel=2,
        )
    if eos and not chat and end is not None and (not ids or ids[-1] != end):
        ids, scored = [*ids, end], [*scored, True]
    unpreceded = bool(ids) and scored[0]
    if unpreceded:
        scored[0] = False
    cut = 0 if max_length is None else max(0, len(ids) - max_length)
    if cut:
        keep = slice(None, len(ids) - cut) if truncate == "end" else slice(cut, None)
        kept = [False, *scored[keep][1:]]  # no logits precede the token that now comes first
        warnings.warn(
            f"max_length={max_length} cut {cut} of {len(ids)} tokens at the {truncate} "
            f"({sum(scored) - sum(kept)} of the {sum(scored)} scored ones)",
            stacklevel=2,
        )
        ids, scored = ids[keep], kept
    first = f"the response's first token, {token_texts(tokenizer, ids[:1])[0]!r}," if unpreceded else ""
    remedy = "no token stands before it. Begin the prompt with one, tokenizer.bos_token for instance"
    if not any(scored):
        if unpreceded and not cut:
            raise ValueError(f"{first} is all there is to score, and cannot be: {remedy}")
        reason = f"after truncation to max_length={max_length}" if cut else "in the text given"
        raise ValueError(f"the response is empty {reason}: no token is left to score (prompt: {_shorten(before)!r})")
    if unpreceded:
        warnings.warn(f"{first} is not scored (nor is it in a trainer, which shifts its labels): {remedy}", stacklevel=2)
    texts = dict(prompt=before, response=whole[len(before) :])
    return Chi(torch.tensor(ids), torch.tensor(scored), tokens=token_texts(tokenizer, ids), truncated=cut, **(texts | metadata))


def preference(tokenizer: Any, prompt: Text, chosen: Text, rejected: Text, *, group: int = 0, **options: Any) -> list[Chi]:
    """A preference pair as [chosen, rejected] Chi of one group; options as in `encode`."""
    return [
        encode(tokenizer, prompt, text, role=role, group=group, **options)
        for role, text in (("chosen", chosen), ("rejected", rejected))
    ]


def rollouts(
    tokenizer: Any,
    prompt: Text,
    completions: Sequence[Text],
    rewards: Sequence[float],
    *,
    scale: bool = True,
    std: str = "sample",
    group: int = 0,
    **options: Any,
) -> list[Chi]:
    """A group of G sampled completions with group-relative advantages A_i = (r_i - mean r) / std r.

    A group of equal rewards has advantage 0.

    Args:
        tokenizer, prompt, completions, rewards: G answers to one prompt and what each earned.
        scale: False leaves out the division (Dr. GRPO).
        std: "sample" divides by G - 1 inside the root, as TRL, verl and OpenRLHF do; "population" by G, which makes advantages
            larger by sqrt(G/(G - 1)).
        group: number of the prompt.
        options: as in `encode`.

    Raises:
        ValueError: completions and rewards differ in number, or std is neither.
    """
    if std not in ("sample", "population"):
        raise ValueError(f'std must be "sample" or "population", got {std!r}')
    if len(completions) != len(rewards):
        raise ValueError(f"one reward per completion: got {len(completions)} completions and {len(rewards)} rewards")
    r = torch.tensor(rewards, dtype=torch.float64)
    advantages = r - r.mean() if len(set(rewards)) > 1 else torch.zeros_like(r)  # equal rewards have a mean that may round
    if scale and bool(advantages.any()):
        advantages = advantages / r.std(correction=int(std == "sample"))
    return [
        encode(tokenizer, prompt, text, advantage=float(a), group=group, **options)
        for text, a in zip(completions, advantages, strict=True)
    ]


def from_batch(
    input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None = None, labels: Tensor | None = None, tokenizer: Any = None
) -> list[Chi]:
    """Sequences of a padded batch, as collators make them: padding on either side is taken off, that on the left is noted.

    Args:
        input_ids: [B, T].
        attention_mask: [B, T], 1 where a token is real; everything when absent (then pad tokens are NOT guessed).
        labels: [B, T], -100 where a token is not scored; every token but the first when absent.
        tokenizer: for the token texts.

    Raises:
        ValueError: labels score no token at all.
    """
    if labels is not None and not bool((labels[:, 1:] != -100).any()):
        raise ValueError("every label is -100: no token is scored. Is the prompt's mask laid over the answer too?")
    chis = []
    for b in range(input_ids.shape[0]):
        real = attention_mask[b].bool() if attention_mask is not None else torch.ones_like(input_ids[b], dtype=torch.bool)
        ids = input_ids[b][real].cpu()
        scored = labels[b][real].cpu() != -100 if labels is not None else torch.ones_like(ids, dtype=torch.bool)
        if ids.numel():
            scored[0] = False
        texts = token_texts(tokenizer, ids.tolist()) if tokenizer is not None else None
        chis.append(Chi(ids, scored, group=b, tokens=texts, padding=int(real.int().argmax())))
    return chis


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token; joined they spell the sequence wherever tokens are whole characters.

    Each is decoded after an anchor token, since many decoders strip the space at the start of a text.
    """
    special, anchor = set(tokenizer.all_special_ids), tokenizer("a", add_special_tokens=False).input_ids[-1:]

    def text(*more: int) -> str:
        return tokenizer.decode([*anchor, *more], clean_up_tokenization_spaces=False)

    start = len(text())
    return tuple(tokenizer.convert_ids_to_tokens(i) if i in special else text(i)[start:] for i in ids)


def _shorten(text: str, n: int = 60) -> str:
    """The last n characters of a text, for error messages."""
    return text if len(text) <= n else "…" + text[-n:]
