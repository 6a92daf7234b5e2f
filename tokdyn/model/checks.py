"""What a traced model must satisfy before a number is computed with it, looked at on a short piece of random tokens.

    same logits    traced, the model gives the logits that it gives untouched: its attention and its experts are other code, and
                   a family may ask which code runs                                                        `faithful_attention`
    causal         a later token changes no earlier logit: sequences are padded on the right without mask  `faithful_attention`
    adjoint        <w, J d> = <Jᵀ w, d> for random w and d: forward and backward mode derive one function  `adjoint.derivatives`
    positions      what the model makes of padding on the left                                             `counts_padding`
    selection      whether it takes the largest of scores of positions: which of equal ones depends on how many there
                   are, padding included, so that its sequences are computed alone                         `Selecting`

Cost: PASSES_AT_ENTRY forward passes for a model, on at most three rows of PIECE tokens, and for each scope that is derived a
backward pass and a tangent pass on one row. What an earlier trace found is not looked at again (remembered.py).
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .adjoint import Derivatives
from .attention import ATTENTION, NotComputed
from .forward_ad import traceable, traceable_attention

PIECE = 16  # tokens of the piece
PASSES_AT_ENTRY = 3  # calls of the model at its first trace: untouched on the piece and on its beginning, traced on both
PASSES_OF_ADJOINT = 2  # for each scope whose derivatives are taken: with a backward pass, and with tangents

NAMES = {ATTENTION: "the tracing", "eager": "eager", "sdpa": "torch's"}


@dataclass
class Found:
    """What was found of a model so far, filled in by `Tracer`.

    Attributes:
        attention: the attention under which the traced model gives its own logits.
        derivatives: for each scope, by the names that move, how the velocities of its logits are made.
        counts_padding: whether padding on the left moves the positions of the tokens behind it.
        layers_again: whether gradients are the same when layers are made again in the backward pass (layered.py).
        selects: whether it takes the largest of scores of positions (`Selecting`); known when `attention` is.
    """

    attention: str | None = None
    selects: bool = False
    derivatives: dict[frozenset[str], Derivatives] = field(default_factory=dict)
    counts_padding: bool | None = None
    layers_again: bool | None = None


class Piece(NamedTuple):
    """A sequence, the same with another last token, and the same cut short and padded, as `collate` pads."""

    ids: Int[Tensor, "3 T"]
    short: int  # tokens before the padding

    @property
    def rows(self) -> Int[Tensor, " N"]:
        """The places that hold a token, in the flat [3·T]."""
        T = self.ids.shape[1]
        return torch.cat([torch.arange(2 * T), 2 * T + torch.arange(self.short)])

    @classmethod
    def of(cls, model: nn.Module, vocabulary: int) -> Piece:
        """Random tokens; none that the configuration gives a meaning to (padding, images), where there are others."""
        configs = [c for c in (getattr(module, "config", None) for module in model.modules()) if hasattr(c, "__dict__")]
        known = [value for c in configs for name, value in vars(c).items() if name.endswith("token_id")]
        special = {value for value in known if isinstance(value, int)} | {0}
        plain = torch.tensor([i for i in range(min(vocabulary, 4096)) if i not in special] or list(range(vocabulary)))
        most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        T = max(2, min(PIECE, most if isinstance(most, int) else PIECE))
        draw = plain[torch.randint(len(plain), (T + 1,), generator=torch.Generator().manual_seed(0))]
        ids, short = draw[:T].repeat(3, 1), (T + 1) // 2
        others = plain[plain != ids[1, -1]]
        ids[1, -1] = others[int(draw[-1]) % len(others)] if len(others) else ids[1, -1]
        ids[2, short:] = 0
        return cls(ids, short)


# ---------------------------------------------------------------- what rounding may do


def roundoff(dtype: torch.dtype, device: torch.device) -> float:
    """The unit in which the model's numbers are rounded: float32's at best, since norms and angles are computed in it."""
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    if device.type == "cuda" and dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        eps = 2.0**-10
    if torch.is_autocast_enabled(device.type):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(device.type)).eps)
    return eps


def bound(model: nn.Module, eps: float) -> float:
    """How far two ways of computing the same logits may lie apart, relative to their norm.

    Each of n modules rounds what it returns. Roundings that follow one another add up like their root, and a badly conditioned
    model may amplify them a hundredfold; half of the digits, √eps, are never lost to them.
    """
    return min(eps**0.5, 100 * len(list(model.modules())) ** 0.5 * eps)


def _difference(a: Float[Tensor, "N V"], b: Float[Tensor, "N V"], eps: float) -> float:
    """‖a - b‖/‖b‖ of logits without their mean, which no probability sees.

    In half precision that of the median row: rounding may turn a router's choice, which is another model for that token.
    """
    a, b = (x.double() - x.double().mean(1, keepdim=True) for x in (a, b))
    apart, size = (a - b).norm(dim=1), b.norm(dim=1)
    if eps > 1e-4:
        return float((apart / size.clamp(min=1e-30)).median())
    return float(apart.norm() / size.norm().clamp(min=1e-30))


# ---------------------------------------------------------------- same logits, and causal


class Selecting(TorchFunctionMode):
    """Notes among how many candidates the largest are taken inside: of positions where it is another number for more tokens."""

    FUNCTIONS = (torch.topk, torch.Tensor.topk, torch.kthvalue, torch.Tensor.kthvalue)

    def __init__(self) -> None:
        super().__init__()
        self.candidates = set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in self.FUNCTIONS:
            scores = args[0] if args else given["input"]
            dim = given.get("dim", args[2] if len(args) > 2 else -1)
            self.candidates.add(scores.shape[dim] if scores.dim() else 1)
        return func(*args, **given)


def faithful_attention(
    model: nn.Module, piece: Piece, run: Callable[[Tensor, Tensor], Tensor], eps: float, device: torch.device
) -> tuple[str, bool]:
    """The attention under which the traced model gives the untouched model's logits, the tracing attention if it does.

    Else eager attention, or torch's own where the model has that: its plain kernel has both derivatives, and some families are
    another model under eager attention (transformers 5.23 adds Falcon's ALiBi twice). And whether the model selects among
    positions, see `Selecting`.

    Args:
        model: in eval mode, untouched.
        piece: what to run it on.
        run: ids and rows -> the traced model's logits at these rows, called where the model is traceable.
        eps: see `roundoff`.
        device: where ids go.

    Raises:
        ValueError: it gives other logits under each of them, or a later token changes earlier logits.
    """
    T, most = piece.ids.shape[1], bound(model, eps)
    with torch.no_grad(), random_state_kept(device):
        with Selecting() as of_all:
            own = untouched(model, piece.ids[:1].to(device))
        with Selecting() as of_some:
            beginning = untouched(model, piece.ids[:1, : piece.short].to(device))
        selects = of_all.candidates != of_some.candidates
        if not bool(own.isfinite().all()):  # scoring names where
            return traceable_attention(model), selects
        apart = dict[str, float]()
        for attention in dict.fromkeys((traceable_attention(model), "eager", *(["sdpa"] if uses_sdpa(model) else []))):
            try:
                with traceable(model, attention):
                    z = run(piece.ids, piece.rows)
            except NotComputed:
                apart[attention] = float("inf")
                continue
            whole, changed, padded = z[:T], z[T : 2 * T], z[2 * T :]
            apart[attention] = _difference(whole, own, eps)
            if not apart[attention] <= most:
                continue
            later = max(_difference(changed[:-1], whole[:-1], eps), _difference(padded, whole[: piece.short], eps))
            cut = 0.0 if selects else _difference(beginning, own[: piece.short], eps)  # there it is another model by itself
            if not later <= min(most, 4 * torch.finfo(torch.bfloat16).eps) or not cut <= most:  # rows of one pass: equal sums
                raise ValueError(_not_causal(type(model).__name__, max(later, cut)))
            if len(apart) > 1:
                first = next(iter(apart))
                _say_other(type(model).__name__, f"{NAMES[first]} attention (by {apart[first]:.1e} of their norm)", attention)
            return attention, selects
    found = ", ".join(f"by {x:.1e} with {NAMES[name]} attention" for name, x in apart.items())
    raise ValueError(
        f"{type(model).__name__} gives other logits when it is traced than by itself: {found} (relative; rounding makes "
        f"{most:.0e} at most). Its forces would be another model's. Load it with attn_implementation='eager' and train it "
        "so; if that does not help, its logits depend on the other sequences of a batch or on chance, or it computes its "
        "attention in a way that cannot be traced"
    )


def _not_causal(name: str, apart: float) -> str:
    """What is said of a model whose earlier logits change with what stands behind."""
    return (
        f"{name} is not causal: other tokens behind, or none, change earlier logits by {apart:.1e} of their norm. A force on "
        "log pi(y_m) needs logits that depend on the tokens before y_m alone: build the model as a decoder (is_decoder=True "
        "where its configuration has it), or take a causal model"
    )


def uses_sdpa(model: nn.Module) -> bool:
    """Whether the model's own attention is torch's."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == "sdpa"


def untouched(model: nn.Module, ids: Int[Tensor, "1 T"]) -> Float[Tensor, "T V"]:
    """The model's own logits of a sequence, by its eager form where its own does not run.

    Flash attention does not in float32, a grouped product of experts not in float64.

    Raises:
        ValueError: there are not as many rows of logits as tokens.
    """
    try:
        out = model(ids, use_cache=False)
    except (RuntimeError, ValueError) as error:
        kinds = (getattr(getattr(model, "config", None), f"_{kind}_implementation", None) for kind in ("attn", "experts"))
        if all(kind in (None, "eager") for kind in kinds):
            raise
        logging.getLogger(__name__).warning("%s: compared with its eager form, since %s", type(model).__name__, error)
        with traceable(model, "eager"):
            out = model(ids, use_cache=False)
    z = out.logits if hasattr(out, "logits") else out[0]
    if z.shape[:-1] != ids.shape:
        raise ValueError(
            f"{type(model).__name__} gives logits {list(z.shape)} for {ids.shape[1]} tokens: their rows are not the tokens'. "
            "With virtual tokens (PEFT's prompt tuning, P-tuning) logits stand behind a prefix that no sequence holds: tokdyn "
            "does not resolve their forces; use LoRA or prefix tuning"
        )
    return z[0]


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Whatever a model draws inside leaves the random state as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@functools.cache  # once for each kind of model
def _say_other(model: str, other: str, attention: str) -> None:
    logging.getLogger(__name__).warning(
        "%s gives other logits under %s: it is traced with %s attention, which keeps T x T numbers for every head and tangent",
        model, other, NAMES[attention],
    )  # fmt: skip


# ---------------------------------------------------------------- positions


@torch.no_grad()
def counts_padding(model: nn.Module, piece: Piece, eps: float) -> bool:
    """Whether padding on the left, under a mask, moves the positions of the tokens behind it (GPT-2: yes; OPT, rotary: no).

    Raises:
        ValueError: behind padding the logits are those of no positions that the model can be told.
    """
    device, most = next(model.parameters()).device, bound(model, eps)
    pads = piece.ids.shape[1] - piece.short
    ids = piece.ids[:1, : piece.short].to(device)
    padded = torch.nn.functional.pad(ids, (pads, 0))
    mask = (torch.arange(padded.shape[1], device=device) >= pads).long()[None]

    def run(tokens: Tensor, **options: Tensor) -> Tensor:
        out = model(tokens, use_cache=False, **options)
        return (out.logits if hasattr(out, "logits") else out[0])[0, -piece.short :]

    truth = run(padded, attention_mask=mask)
    if _difference(run(ids), truth, eps) <= most:
        return False
    shifted = torch.arange(pads, pads + piece.short, device=device)[None]
    with contextlib.suppress(TypeError):  # it takes no position_ids
        if _difference(run(ids, position_ids=shifted), truth, eps) <= most:
            return True
    raise ValueError(
        f"behind padding on the left {type(model).__name__} gives logits that it gives without padding under no positions: the "
        "sequences of this batch cannot be replayed one by one; pad on the right, or pass position_ids that count real tokens"
    )
