"""A causal LM as a pure function of its parameters.

    with trace(model) as tracer:
        z = tracer.logits(batch)                       # [N, V] at the scored tokens
        z = tracer.logits(batch, {"lm_head.weight": W})  # the same with other weights; the model's own are not touched

Inside the block the model is in eval mode with the tracing attention (attention.py), or with eager or torch's plain attention
where that gives other logits or is not taken: fused attention has no forward derivative. Both are put back on exit, also after
an error; parameters, gradients, requires_grad, buffers and random state are never written. A traced model was compared with the
untouched one (checks.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ..ops import TokenStats, token_stats
from ..sequences import Batch, Chi, collate
from . import adjoint, checks
from .calls import Call, floats, map_floats, require_every_position, shaped_like
from .forward_ad import traceable, with_modes
from .hooks import hooked
from .layered import layers_made_again
from .readout import output_embeddings, traced_readout
from .remembered import found_before
from .sharded import Along, any_sharded, moved, require_adjoint, require_fully_sharded, reshard
from .unroll import GraphRecorder, Place, ReplaceInput, ReplaceOutput, Unrolled
from .unwrap import is_plain, swap_names, whole
from .usage import Chain, parameter_uses

Parameters = Mapping[str, Any]  # tensors; of a sharded model `Along`


class Tracer:
    """A causal LM as a function of its parameters; made by `trace`.

    Attributes:
        model: the causal LM.
        params: every parameter under every name it has, detached; tied tensors appear under each of their names.
        owner: for each of those names the first name of the same tensor.
        opaque: parameters that are no plain floating-point tensors (quantised weights), which stay in the model as they are.
        trainable: the first names of the tensors that require a gradient.
        readout: the readout.
        device, dtype: of the readout's weight, where logits and hidden states are.
        precision: float32, or float64 where the model is in it: what half-precision numbers are summed in.
        vocabulary: how many token ids the model takes.
        sharded: whether its weights are spread over ranks (sharded.py); the readout's are whole here.
        found: what was found of the model (checks.py); given to another trace of it, nothing is looked at again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.found = model, checks.Found()
        reshard(model)
        every = list(model.named_parameters(remove_duplicate=False))
        self.opaque = frozenset(name for name, p in every if not is_plain(p))
        if moving := [name for name, p in every if name in self.opaque and p.requires_grad]:
            raise ValueError(
                f"parameter {moving[0]} is quantised and requires a gradient: only frozen weights may be quantised"
            )
        named = [(name, p) for name, p in every if name not in self.opaque]
        first: dict[int, str] = {}
        self.owner = {name: first.setdefault(id(p), name) for name, p in named}
        self.params = {name: p.detach() for name, p in named}
        self.sharded = any_sharded(model)
        if self.sharded:
            require_fully_sharded(model)
        self.trainable = frozenset(self.owner[name] for name, p in named if p.requires_grad)
        self._swap_name = swap_names(model, self.params)
        self._head_name, self._head = output_embeddings(model)
        self.readout = traced_readout(model, self.params, self.owner)
        if self.sharded:
            bias = self.readout.bias
            self.readout = replace(self.readout, weight=whole(self.readout.weight), bias=None if bias is None else whole(bias))
        self.device, self.dtype = self.readout.weight.device, self.readout.weight.dtype
        self.precision = torch.promote_types(self.dtype, torch.float32)
        self.vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
        for name, p in self.params.items():
            finite = bool(whole(p.sum()).isfinite())  # one pass; a sum of finite numbers may overflow
            if not finite and not bool(whole(torch.isfinite(p).all())):
                raise ValueError(f"parameter {name} holds NaN or inf: the model cannot be traced")

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The model's own parameters that require a gradient, by their first name."""
        reshard(self.model)  # a pass may have left whole weights in their place
        return {name: p for name, p in self.model.named_parameters() if name in self.trainable}

    def batches(self, chis: Sequence[Chi], tokens: int = 4096) -> list[Batch]:
        """The sequences in order, in batches of at most `tokens` padded positions that score a token (one sequence at least).

        Each is alone where padding behind it could change what the model makes of it (`checks.Selecting`).

        Raises:
            ValueError: a token id outside the vocabulary; padding was on the left, and what the model makes of it is not known.
        """
        count = any(chi.padding for chi in chis) and self.counts_padding
        for i, chi in enumerate(chis):
            if int(chi.ids.max()) >= self.vocabulary or int(chi.ids.min()) < 0:
                raise ValueError(
                    f"sequence {i} holds token ids from {int(chi.ids.min())} to {int(chi.ids.max())}, the model's vocabulary "
                    f"is [0, {self.vocabulary}): were they made by another model's tokenizer?"
                )
        batches, start = [], 0
        while start < len(chis):
            stop, longest = start, 0
            while stop < len(chis):
                longest = max(longest, chis[stop].ids.numel() - 1)  # the last token scores none
                if stop > start and (longest * (stop + 1 - start) > tokens or self.found.selects):
                    break
                stop += 1
            batches.append(collate(chis[start:stop], first=start, count_padding=count))
            start = stop
        return batches

    @property
    def counts_padding(self) -> bool:
        """Whether padding on the left moves the positions of the tokens behind it; see `checks.counts_padding`."""
        if self.found.counts_padding is None:
            self.found.counts_padding = checks.counts_padding(self.model, self._piece, self._eps)
        return self.found.counts_padding

    def why_not_tangents(self, uses: Collection[str]) -> str:
        """Why tangents in these parameters cannot be trusted, "" if they can."""
        return self.derivatives(uses).why_not_tangents

    def derivatives(self, uses: Collection[str]) -> adjoint.Derivatives:
        """How the velocities of the logits along these parameters are made; see `adjoint.derivatives`."""
        known, key, batch = self.found.derivatives, frozenset(uses), self._every_row_of_a_piece
        if key not in known and self.sharded:
            some = adjoint.smallest({self.owner[use]: self.params[use] for use in uses})
            named = {name: tensor for name, tensor in self.owner.items() if tensor in some}
            require_adjoint(self.model, partial(self.logits, batch), some, named, self.same)
            known[key] = adjoint.Derivatives()
        elif key not in known:
            moving = {use: self.params[use] for use in uses}

            def stepped(direction: Parameters, step: float) -> Parameters:
                return self.stepped(direction, {use: use for use in direction}, step)

            known[key] = adjoint.derivatives(self.model, partial(self.logits, batch), moving, stepped, self._eps, self.same)
        return known[key]

    def faithful_attention(self) -> str:
        """The attention to trace the untouched model with; see `checks.faithful_attention`."""
        if self.found.attention is None:
            self.found.attention, self.found.selects = checks.faithful_attention(
                self.model, self._piece, lambda ids, rows: self.logits(_every_row(ids, rows)), self._eps, self.device
            )
        return self.found.attention

    @property
    def _every_row_of_a_piece(self) -> Batch:
        ids = self._piece.ids[:1]
        return _every_row(ids, torch.arange(ids.shape[1]))

    @cached_property
    def _piece(self) -> checks.Piece:
        return checks.Piece.of(self.model, self.vocabulary)

    @property
    def _eps(self) -> float:
        coarsest = max({p.dtype for p in self.params.values() if p.is_floating_point()}, key=lambda of: torch.finfo(of).eps)
        return checks.roundoff(coarsest, self.device)  # a float32 head may stand on a bfloat16 body

    def stepped(self, direction: Parameters, uses: Mapping[str, str], step: float) -> Parameters:
        """Parameters after a step along a direction, for `logits`; a half-precision model in float32, which holds the step.

        Raises:
            ValueError: a half-precision model whose weights are spread over ranks.
        """
        if self.sharded:
            if self.dtype != self.precision:
                raise ValueError(f"real steps of a model under FSDP2 need weights in float32, these are in {self.dtype}")
            return {use: Along(direction[tensor], step) for use, tensor in uses.items()}
        once = {of: torch.add(self.params[of].to(self.precision), direction[of], alpha=step) for of in set(uses.values())}
        moved = {use: once[of] for use, of in uses.items()}
        return moved if self.dtype == self.precision else {n: p.to(self.precision) for n, p in self.params.items()} | moved

    def logits(self, batch: Batch, params: Parameters | None = None, again: bool = False) -> Float[Tensor, "N V"]:
        """Logits that score each token of the batch, differentiable in `params` (a part of the parameters, by any name).

        again: of each layer the graph keeps what enters it, and the backward pass makes the rest anew (layered.py).
        """

        def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            require_every_position(batch, args[0])
            return (args[0].flatten(0, -2)[batch.rows.to(args[0].device)][None],)

        return self._run(batch, params, select, again).flatten(0, -2)

    def hidden(self, batch: Batch, params: Parameters | None = None) -> Float[Tensor, "N d"]:
        """Input of the readout that scores each token of the batch."""
        kept: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            require_every_position(batch, args[0])
            kept.append(args[0].flatten(0, -2)[batch.rows.to(args[0].device)])
            return (args[0][..., :1, :] * 0,)  # the readout still runs, on one row instead of all

        self._run(batch, params, keep)
        return kept[0]

    @torch.no_grad()
    def record(self, batch: Batch, names: Collection[str], copied: Collection[str] = ()) -> tuple[Tensor, list[Call]]:
        """Hidden states at the scored tokens, [N, d], and every call of the named modules in the order they were made.

        copied: modules whose outputs the model writes to in place (`overwritten`): it is given a copy.
        """
        calls: list[Call] = []

        def keep(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            call = Call(name, module, args, kwargs, output, *batch.ids.shape).for_each()
            calls.append(call.returned(call.output))
            return map_floats(Tensor.clone, output) if name in copied else None

        with hooked(self.model, after={name: partial(keep, name) for name in names}):
            return self.hidden(batch), calls

    @torch.no_grad()
    def overwritten(self, batch: Batch, names: Collection[str]) -> frozenset[str]:
        """Those of the named modules whose outputs the model writes to in place (CTRL's lookup, times a constant)."""
        seen: list[tuple[str, Tensor, int]] = []

        def keep(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.extend((name, x, x._version) for x in floats(output))

        with hooked(self.model, after={name: partial(keep, name) for name in names}):
            self.hidden(batch)
        return frozenset(name for name, x, version in seen if x._version != version)

    @torch.enable_grad()
    def unroll(
        self,
        batch: Batch,
        names: Collection[str],
        *,
        replace_outputs: Mapping[str, ReplaceOutput] | None = None,
        replace_inputs: Mapping[Place, ReplaceInput] | None = None,
        places: Collection[Place] | None = None,
        start_at: Place | None = None,
        stop_at: Place | None = None,
        copied: Collection[str] = (),
    ) -> Unrolled:
        """Hidden states at the scored tokens in a graph that starts at the named modules' outputs, and their calls.

        The keywords are those of `GraphRecorder`, which says what each is told and returns.
        """
        recorder = GraphRecorder(
            names, replace_outputs or {}, replace_inputs or {}, places, start_at, stop_at, copied, batch.ids.shape
        )
        return recorder.record(self.model, partial(self.hidden, batch, self.params))

    def steer(self, batch: Batch, names: Collection[str], additions: Sequence[Tensor]) -> Float[Tensor, "N d"]:
        """Hidden states at the scored tokens when something is added to what the named modules return.

        Args:
            batch: the sequences.
            names: modules.
            additions: a tensor for each floating-point output of each of their calls, in the order of `record`. The result
                is differentiable in them, also forward: their tangents move the hidden states.
        """
        waiting = iter(additions)

        def add(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return map_floats(lambda x: x + shaped_like(next(waiting), x), output)

        with hooked(self.model, after=dict.fromkeys(names, add)):
            return self.hidden(batch)

    @torch.no_grad()
    def usage(self, batches: Iterable[Batch]) -> tuple[dict[str, set[Chain]], list[Float[Tensor, "N d"]]]:
        """How the parameters are used below the readout, and the readout's input of each batch.

        By first name the chains of running modules that contain a parameter: a chain goes from the model inwards, one for each
        use. Its last module owns the parameter, or is one around the owner that reads the weight without calling its module
        (Mamba's convolution).
        """
        hidden: list[Tensor] = []

        def forward() -> None:
            hidden.extend(self.hidden(batch) for batch in batches)

        found = parameter_uses(self.model, self.owner, forward)
        return {name: {chain for chain in chains if chain[-1] != self._head_name} for name, chains in found.items()}, hidden

    def _run(self, batch: Batch, params: Parameters | None, hook: Any, again: bool = False) -> Tensor:
        handle = self._head.register_forward_pre_hook(hook)
        try:
            ids = batch.ids.to(self.device)
            options: dict[str, Any] = dict(use_cache=False)
            if batch.position_ids is not None:
                options["position_ids"] = batch.position_ids.to(self.device)
            with with_modes():
                out = self._call(ids, options, params or {}, again)
            return out.logits if hasattr(out, "logits") else out[0]
        except IndexError as error:
            T, most = batch.ids.shape[1], getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
            if most is not None and T > most:
                raise ValueError(f"a sequence of {T} tokens is longer than the {most} positions the model has") from error
            raise
        finally:
            handle.remove()

    def _call(self, ids: Tensor, options: dict[str, Any], params: Parameters, again: bool) -> Any:
        if self.sharded:
            with moved(self.model, params):
                return self.model(ids, **options)
        swapped = {self._swap_name[name]: value for name, value in params.items()}
        with layers_made_again(self.model, swapped if again else None):
            return functional_call(self.model, swapped, (ids,), options, tie_weights=False)

    def score(self, chis: Sequence[Chi], tokens: int = 4096) -> Iterator[tuple[Batch, Float[Tensor, "N V"], TokenStats]]:
        """Batch by batch its logits and their statistics, checked to be finite.

        Raises:
            ValueError: a row of logits that is no distribution (NaN or inf), with the sequence it belongs to.
        """
        for batch in self.batches(chis, tokens):
            with torch.no_grad():
                z = self.logits(batch)
                stats = finite_stats(batch, z)
            yield batch, z, stats

    @torch.no_grad()
    def readout_residual(self, batch: Batch) -> float:
        """‖z_formula - z_model‖/‖z_model‖ on one batch: scale, softcap and bias are known where it is below `readout_bound`."""
        return self.readout.residual(self.hidden(batch), self.logits(batch))

    @property
    def same(self) -> float:
        """How far two ways of computing the same hidden states may lie apart; see `checks.bound`."""
        return checks.bound(self.model, self._eps)

    @property
    def readout_bound(self) -> float:
        """See `readout_residual`."""
        return torch.finfo(self.dtype).eps ** 0.5


def finite_stats(batch: Batch, logits: Float[Tensor, "N V"]) -> TokenStats:
    """Statistics of a batch's logits, checked to be finite.

    Raises:
        ValueError: a row that is no distribution (NaN or inf), with the sequence it belongs to.
    """
    stats = token_stats(logits, batch.targets.to(logits.device))
    bad = ~stats.logsumexp.isfinite()
    if bool(bad.any()):
        n = int(bad.nonzero()[0])
        raise ValueError(
            f"the logits of sequence {int(batch.sequence[n])} at position {int(batch.position[n])} hold NaN or inf "
            f"although every parameter is finite: the forward pass overflows in {logits.dtype}"
        )
    return stats


@contextlib.contextmanager
def trace(model: nn.Module, found: checks.Found | None = None) -> Iterator[Tracer]:
    """Trace a causal LM for the length of a block (see the module's docstring).

    Args:
        model: a transformers causal LM, or any module that takes ids [B, T] and use_cache, returns logits [B, T, V] (as
            `.logits` or first), and has get_output_embeddings.
        found: `Tracer.found` of an earlier trace, whose checks are not repeated; None looks for one (remembered.py).

    Raises:
        ValueError: no output embeddings, or NaN or inf in a parameter (named); see also checks.py.

    Cost: three forward passes of at most 3 x 16 tokens, where no earlier trace has made them.
    """
    training = {module: module.training for module in model.modules()}
    tracer = Tracer(model)
    try:
        model.eval()
        tracer.found = found or found_before(model)
        with torch.inference_mode(False):
            attention = tracer.faithful_attention()
            with traceable(model, attention):
                yield tracer
    finally:
        if tracer.sharded:
            reshard(model)
        for module, mode in training.items():
            module.training = mode


def _every_row(ids: Tensor, rows: Tensor) -> Batch:
    """A batch whose logits are asked for at these places, whatever follows."""
    y = ids.flatten()[rows]
    return Batch(ids, rows, y, torch.zeros_like(y), torch.zeros_like(y))
