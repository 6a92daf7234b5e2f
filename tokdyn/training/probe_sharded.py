"""What a step does to a probe on a sharded model (FSDP2, tensor parallel), from plain forward passes that every rank makes.

No tangent pass goes through sharded parameters. log pi at θ ± Δθ and θ ± Δθ/2 gives the derivative by extrapolated central
differences, error O(Δθ⁵), and the weights are put back bit by bit. Of the forces of single tokens there is the readout's part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..exact.sides import row_table
from ..model.optimizer import steps_of
from ..model.readout import Readout
from ..model.sharded import any_sharded as any_sharded
from ..model.sharded import reshard
from ..model.unwrap import whole
from ..objective import GTerm
from ..ops import token_stats
from ..ops.rows import log_probs
from ..sequences import Chi, collate
from .capture import Capture
from .forward import ROWS, Forward
from .observation import Blame, Observation, Update, through_readout


@dataclass(frozen=True)
class Reading:
    """What a forward pass says of a probe: log-probs [M], inputs of the readout [M, d] and logits [M, V] of its tokens."""

    log_probs: Float[Tensor, " M"]
    hidden: Float[Tensor, "M d"]
    logits: Float[Tensor, "M V"]


@dataclass(frozen=True)
class Start:
    """Where a step began: the trainable weights by name, and what `read` gave there."""

    saved: Mapping[str, Tensor]
    reading: Reading


@dataclass(frozen=True)
class Watched:
    """The sequences of a probe, and which of their tokens [M] each group holds that update tokens are asked about."""

    chis: Sequence[Chi]
    blamed: Mapping[str, Tensor]


def read(model: nn.Module, capture: Capture, chis: Sequence[Chi]) -> Reading:
    """The probe under the present weights, without dropout. Every rank must call it."""
    kept: list[Tensor] = []
    handle = capture.head.register_forward_pre_hook(lambda module, args: kept.append(args[0].detach()))
    modes = {module: module.training for module in model.modules()}
    parts = []
    try:
        model.eval()
        for start in range(0, len(chis), 8):
            batch = collate(chis[start : start + 8])
            ids = batch.ids.to(capture.head.weight.device)
            with torch.no_grad():
                z = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[batch.rows.to(ids.device)].float()
            parts.append((log_probs(z, batch.targets).cpu(), kept.pop().flatten(0, 1)[batch.rows.to(ids.device)], z))
    finally:
        handle.remove()
        for module, mode in modes.items():
            module.training = mode
        reshard(model)
    return Reading(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.no_grad()
def observe(model: nn.Module, capture: Capture, watched: Watched, update: Update, start: Start) -> Observation:
    """What a step did to the probe: θ is where it led, `start` where it began. Every rank must call it."""
    named = {name: p for name, p in capture.lm.named_parameters() if name in start.saved}
    new = {name: p.detach().clone() for name, p in named.items()}
    at = {1.0: read(model, capture, watched.chis).log_probs}
    try:
        for share in (-1.0, 0.5, -0.5):
            for name, p in named.items():
                p.copy_(start.saved[name] + share * (new[name] - start.saved[name]))
            at[share] = read(model, capture, watched.chis).log_probs
    finally:
        for name, p in named.items():
            p.copy_(new[name])
    far, near = (at[1.0] - at[-1.0]) / 2, at[0.5] - at[-0.5]
    batch, reading = collate(watched.chis), start.reading
    table = row_table([batch], token_stats(reading.logits.cpu(), batch.targets), watched.chis)
    found = Observation(table, reading.log_probs, at[1.0], (4 * near - far) / 3)
    name = next((n for n, p in named.items() if p is capture.head.weight), "")
    if not name:
        return found
    old = replace(capture.readout(), weight=whole(start.saved[name]))
    y, z = batch.targets.to(reading.logits.device), reading.logits
    force = GTerm(y, torch.ones(len(y), device=z.device)).logit_force(z)
    moved = whole(new[name]) - old.weight
    found = replace(found, readout=through_readout(old, reading.hidden, z, force, moved, None).cpu())
    try:
        P = whole(steps_of(update.optimizer, {name: named[name]}, update.first)[name])
        pulled, forces = old.pull_back(z, force), dict[str, Tensor]()
        for group, own in watched.blamed.items():
            own = own.to(z.device)
            D = P * (pulled[own].T @ reading.hidden[own].to(z.dtype))
            forces[group] = _readout_forces(update, old, D)
    except ValueError as error:
        return replace(found, problem=f"no forces of single update tokens: {error}")
    problem = "the model is sharded: forces of single update tokens are the readout's part alone"
    return replace(found, blame=Blame(forces), problem=problem)


def _readout_forces(update: Update, readout: Readout, D: Float[Tensor, "V d"]) -> Float[Tensor, " L"]:
    """Γ_lᵀ D h_l: what each update token does along D, where only the readout moves."""
    parts = [_pass_forces(f, readout, D, update.scale) for f in update.forwards]
    return torch.cat(parts).cpu() if parts else torch.zeros(0)


def _pass_forces(f: Forward, readout: Readout, D: Float[Tensor, "V d"], scale: float) -> Float[Tensor, " N"]:
    assert f.hidden is not None
    states, parts = f.hidden.split(ROWS), []
    for h, term in zip(states, f.gterm(scale).split([len(h) for h in states]), strict=True):
        z = readout.logits(h)
        parts.append((readout.pull_back(z, term.logit_force(z)) * (h.to(D.dtype) @ D.T)).sum(1))
    return torch.cat(parts)
