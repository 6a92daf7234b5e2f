"""The one module that touches an nn.Module: a causal LM as a pure function of its parameters.

    with trace(model) as tracer:
        z = tracer.logits(batch)                       # [N, V] at the scored tokens
        z = tracer.logits(batch, {"lm_head.weight": W})  # the same with other weights; the model's own are not touched

Inside the block the model is in eval mode with the tracing attention (attention.py), or with eager attention where it takes
no other: fused attention has no forward derivative. Both are put back on exit, also after an error; parameters, gradients,
requires_grad, buffers and random state are never written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..kernels.readout_forces.reference import readout_logits
from ..ops import TokenStats, token_stats
from ..sequences import Batch, Chi, collate
from .calls import Call, floats, map_floats
from .forward_ad import traceable

Parameters = Mapping[str, Tensor]
Hook = Callable[[nn.Module, Any, Any, Any], Any]


@dataclass(frozen=True)
class Readout:
    """The map from the final hidden state to the logits, z = softcap(scale (W h + b)).

    Args:
        weight_name, bias_name: names of W and b among the model's parameters.
        tied: names under which the same W is used elsewhere (the input embedding).
    """

    weight: Float[Tensor, "V d"]
    bias: Float[Tensor, " V"] | None
    scale: float
    softcap: float | None
    weight_name: str
    bias_name: str | None
    tied: tuple[str, ...]

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the readout operators."""
        return dict(bias=self.bias, scale=self.scale, softcap=self.softcap)

    def logits(self, hidden: Float[Tensor, "N d"]) -> Float[Tensor, "N V"]:
        """z of given hidden states."""
        return readout_logits(hidden, self.weight, **self.options)

    def uncapped(self, hidden: Float[Tensor, "N d"]) -> Float[Tensor, "N V"]:
        """scale (W h + b)."""
        return readout_logits(hidden, self.weight, bias=self.bias, scale=self.scale)

    def cap(self, z: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """The softcap, where there is one."""
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def pull_back(self, logits: Float[Tensor, "N V"], force: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """A force at the logits as a force at W h + b, through softcap and scale."""
        slope = self.scale if self.softcap is None else self.scale * (1 - (logits / self.softcap).square())
        return slope * force


Place = tuple[str, int, int]  # what a module was given: its name, how often it had been called, which of the tensors


class _Reached(Exception):
    """A forward pass has come as far as it has to."""


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter.rpartition('.')[2]}" if module else parameter


class Tracer:
    """A causal LM as a function of its parameters; made by `trace`.

    Attributes:
        params: every parameter under every name it has, detached; tied tensors appear under each of their names.
        owner: for each of those names the first name of the same tensor.
        trainable: the first names of the tensors that require a gradient.
        readout: the readout.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        named = list(model.named_parameters(remove_duplicate=False))
        first: dict[int, str] = {}
        self.owner = {name: first.setdefault(id(p), name) for name, p in named}
        self.params = {name: p.detach() for name, p in named}
        self.trainable = frozenset(self.owner[name] for name, p in named if p.requires_grad)
        modules: dict[int, str] = {}  # a module under two names is swapped under the first, or swapping back would break it
        for name, module in model.named_modules(remove_duplicate=False):
            modules.setdefault(id(module), name)
        self._slot = {name: _join(modules[id(model.get_submodule(name.rpartition(".")[0]))], name) for name, _ in named}
        self._head_name, self._head = _output_embeddings(model)
        self.readout = self._find_readout()
        self.device, self.dtype = self.readout.weight.device, self.readout.weight.dtype
        self.precision = torch.promote_types(self.dtype, torch.float32)
        self.vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
        for name, p in self.params.items():
            if not bool(p.sum().isfinite()) and not bool(torch.isfinite(p).all()):  # the sum is one pass, and may overflow
                raise ValueError(f"parameter {name} holds NaN or inf: the model cannot be traced")

    def _find_readout(self) -> Readout:
        scale, softcap = scale_and_cap(self.model)
        weight_name, bias_name = f"{self._head_name}.weight", f"{self._head_name}.bias"
        if weight_name not in self.params:
            raise ValueError(
                f"the output embedding {self._head_name} is a {type(self._head).__name__} with no weight of its own: its "
                "forces cannot be resolved; leave it out of PEFT's target_modules and modules_to_save, or merge the adapter"
            )
        tied = tuple(n for n, o in self.owner.items() if o == self.owner[weight_name] and n != weight_name)
        return Readout(
            weight=self.params[weight_name],
            bias=self.params.get(bias_name),
            scale=scale,
            softcap=softcap,
            weight_name=weight_name,
            bias_name=bias_name if bias_name in self.params else None,
            tied=tied,
        )

    def batches(self, chis: Sequence[Chi], tokens: int = 4096) -> list[Batch]:
        """The sequences in order, in batches of at most `tokens` padded positions (one sequence at least).

        Raises:
            ValueError: a token id outside the vocabulary.
        """
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
                longest = max(longest, chis[stop].ids.numel())
                if stop > start and longest * (stop + 1 - start) > tokens:
                    break
                stop += 1
            batches.append(collate(chis[start:stop], first=start))
            start = stop
        return batches

    def stepped(self, direction: Parameters, uses: Mapping[str, str], step: float) -> Parameters:
        """Parameters after a step along a direction, for `logits`; a half-precision model in float32, which holds the step."""
        moved = {use: self.params[use].to(self.precision) + step * direction[tensor] for use, tensor in uses.items()}
        return moved if self.dtype == self.precision else {n: p.to(self.precision) for n, p in self.params.items()} | moved

    def logits(self, batch: Batch, params: Parameters | None = None) -> Float[Tensor, "N V"]:
        """Logits that score each token of the batch, differentiable in `params` (a part of the parameters, by any name)."""

        def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (args[0].flatten(0, -2)[batch.rows.to(args[0].device)][None],)

        return self._run(batch, params, select).flatten(0, -2)

    def hidden(self, batch: Batch, params: Parameters | None = None) -> Float[Tensor, "N d"]:
        """Input of the readout that scores each token of the batch."""
        kept: list[Tensor] = []

        def divert(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            kept.append(args[0].flatten(0, -2)[batch.rows.to(args[0].device)])
            return (args[0][..., :1, :] * 0,)  # the readout itself is not wanted: one row keeps every head happy

        self._run(batch, params, divert)
        return kept[0]

    @torch.no_grad()
    def record(self, batch: Batch, names: Collection[str]) -> tuple[Tensor, list[Call]]:
        """Hidden states at the scored tokens, and every call of the named modules in the order they were made."""
        calls: list[Call] = []

        def keep(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append(Call(name, module, args, kwargs, output))

        with self._hooked({name: partial(keep, name) for name in names}):
            return self.hidden(batch), calls

    @torch.enable_grad()
    def unroll(
        self,
        batch: Batch,
        names: Collection[str],
        through: Mapping[str, Callable[[Call], Tensor | None]] | None = None,
        instead: Mapping[Place, Callable[[Tensor, list[Call]], Tensor]] | None = None,
        places: Collection[Place] | None = None,
        bottom: Place | None = None,
        top: Place | None = None,
    ) -> tuple[Tensor, list[Call], dict[Place, Tensor]]:
        """Hidden states at the scored tokens in a graph that starts at the named modules' outputs, and their calls.

        Also what was given to modules at some places, or at all: where the graph can be cut. `through` gives modules whose
        output is to be taken with another graph than the one they made, `instead` what to give at some places instead of a
        tensor; it is told the calls so far and may change the list. With `bottom` the graph starts at the tensor that was
        given there, with `top` the pass ends at that one, and returns it; both are among the places.
        """
        calls: list[Call] = []
        given: dict[Place, Tensor] = {}
        count: dict[str, int] = {}
        instead = instead or {}
        everywhere = [name for name, _ in self.model.named_modules()]
        entered = everywhere if places is None else {name for name, _, _ in [*places, *instead]}

        def start(x: Tensor) -> Tensor:  # an alias each: no output lies on another's path
            return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()

        def keep(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if bottom is not None and bottom not in given:
                return None
            call = Call(name, module, args, kwargs, output)
            other = through[name](call) if through and name in through else None
            calls.append(replace(call, output=map_floats(start, output if other is None else other)))
            return calls[-1].output

        def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
            count[name] = count.get(name, 0) + 1
            now: dict[int, Tensor] = {}
            for i, x in enumerate(floats((args, kwargs))):
                place = (name, count[name], i)
                if place in instead and x.requires_grad:
                    old, x = x, instead[place](x, calls)
                    now[id(old)] = x
                if places is None or place in places:
                    given[place] = x
                if place == bottom:
                    x.requires_grad_()
                if place == top:
                    raise _Reached
            return map_floats(lambda x: now.get(id(x), x), (args, kwargs)) if now else None

        with contextlib.ExitStack() as hooks:
            for name in entered:
                module = self.model.get_submodule(name)
                hooks.callback(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True).remove)
            hooks.enter_context(self._hooked({name: partial(keep, name) for name in names}))
            try:
                return self.hidden(batch, self.params), calls, given
            except _Reached:
                assert top is not None
                return given[top], calls, given

    def steer(self, batch: Batch, names: Collection[str], additions: Sequence[Tensor]) -> Float[Tensor, "N d"]:
        """Hidden states at the scored tokens when the calls of the named modules have these tensors added to their outputs."""
        waiting = iter(additions)

        def add(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return map_floats(lambda x: x + next(waiting), output)

        with self._hooked(dict.fromkeys(names, add)):
            return self.hidden(batch)

    @torch.no_grad()
    def usage(self, batches: Iterable[Batch]) -> dict[str, set[tuple[str, ...]]]:
        """Tensor name -> for each use before the readout the running modules it belongs to, from the model inwards.

        The last one of them is the module that owns it, or one around that which reads the weight without calling its
        module (Mamba's convolution). It is seen in the forward pass, not guessed from names.
        """
        tensors = {id(p): self.owner[name] for name, p in self.model.named_parameters(remove_duplicate=False)}
        inside = {name: {id(p) for p in module.parameters()} for name, module in self.model.named_modules()}
        running: list[str] = []
        seen: dict[str, set[tuple[str, ...]]] = {}

        class Watch(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                for p in {id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, nn.Parameter)} & tensors.keys():
                    if floats(result):  # not a look at its dtype or shape
                        seen.setdefault(tensors[p], set()).add(tuple(name for name in running if p in inside[name]))
                return result

        def enter(name: str, module: nn.Module, args: Any) -> None:
            running.append(name)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            running.pop()

        handles = []
        try:
            for name, module in self.model.named_modules():
                handles.append(module.register_forward_pre_hook(partial(enter, name)))
                handles.append(module.register_forward_hook(leave))
            for batch in batches:
                with Watch():
                    self.hidden(batch)
        finally:
            for handle in handles:
                handle.remove()
        return {tensor: {use for use in uses if use[-1] != self._head_name} for tensor, uses in seen.items()}

    @contextlib.contextmanager
    def _hooked(self, hooks: Mapping[str, Hook]) -> Iterator[None]:
        handles = []
        try:
            for name, hook in hooks.items():
                handles.append(self.model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, batch: Batch, params: Parameters | None, hook: Any) -> Tensor:
        handle = self._head.register_forward_pre_hook(hook)
        try:
            ids = batch.ids.to(self.device)
            swapped = {self._slot[name]: value for name, value in (params or {}).items()}
            out = functional_call(self.model, swapped, (ids,), dict(use_cache=False), tie_weights=False)
            return out.logits if hasattr(out, "logits") else out[0]
        except IndexError as error:
            T, most = batch.ids.shape[1], getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
            if most is not None and T > most:
                raise ValueError(f"a sequence of {T} tokens is longer than the {most} positions the model has") from error
            raise
        finally:
            handle.remove()

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
        """‖z_formula - z_model‖/‖z_model‖ on one batch: whether scale, softcap and bias of the readout are all known.

        They are when it stays below `readout_bound`, the square root of the unit roundoff.
        """
        z = self.logits(batch)
        return float((self.readout.logits(self.hidden(batch)) - z).norm() / z.norm())

    @property
    def readout_bound(self) -> float:
        """See `readout_residual`."""
        return torch.finfo(self.dtype).eps ** 0.5


def finite_stats(batch: Batch, logits: Float[Tensor, "N V"]) -> TokenStats:
    """Statistics of a batch's logits.

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
def trace(model: nn.Module) -> Iterator[Tracer]:
    """Trace a causal LM; see the module's text.

    Args:
        model: a transformers causal LM, or any module that takes ids [B, T] and use_cache, returns logits [B, T, V] (as
            `.logits` or first), and has get_output_embeddings.

    Raises:
        ValueError: no output embeddings, or NaN or inf in a parameter (named).
    """
    training = {module: module.training for module in model.modules()}
    tracer = Tracer(model)
    try:
        model.eval()
        with traceable(model), torch.inference_mode(False):
            yield tracer
    finally:
        for module, mode in training.items():
            module.training = mode


def scale_and_cap(lm: nn.Module) -> tuple[float, float | None]:
    """Scale and softcap of the logits, as the configuration names them."""
    config: Any = getattr(lm, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier"):
        if value := getattr(config, name, None):
            divides = name == "logits_scaling" and getattr(config, "model_type", "") != "hyperclovax"  # that one multiplies
            scale *= 1 / value if divides else value
    return scale, getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None) or None


def _output_embeddings(model: nn.Module) -> tuple[str, nn.Module]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings: tokdyn needs a causal language model with a readout"
        )
    for name, module in model.named_modules():
        if module is head:
            return name, head
    raise ValueError(f"the output embeddings of {type(model).__name__} are not one of its modules")
