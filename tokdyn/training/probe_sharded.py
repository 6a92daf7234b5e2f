"""What a step does to a probe on a sharded model (FSDP2, tensor parallel), from plain forward passes that every rank makes.

No tangent pass goes through sharded parameters. log pi at θ ± Δθ and θ ± Δθ/2 gives the derivative by extrapolated central
differences, error O(Δθ⁵), and the weights are put back bit by bit. Of the forces of single tokens there is the readout's part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..exact.sides import row_table
from ..kernels.readout_forces.reference import logit_force
from ..model.optimizer import steps_of
from ..model.readout import Readout
from ..model.unwrap import is_sharded, whole
from ..ops import token_stats
from ..ops.rows import log_probs
from ..sequences import Chi, collate
from .capture import Capture
from .forward import ROWS, Forward
from .observation import Seen, through_readout

Read = tuple[Tensor, Tensor, Tensor]


def any_sharded(lm: nn.Module) -> bool:
    """Whether any parameter is a DTensor."""
    return any(is_sharded(p) for p in lm.parameters())


def read(model: nn.Module, capture: Capture, chis: Sequence[Chi]) -> Read:
    """Log-probs [M], inputs of the readout [M, d] and logits [M, V] of the scored tokens."""
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
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


@torch.no_grad()
def mirrored(
    model: nn.Module, capture: Capture, optimizer: torch.optim.Optimizer, scale: float, chis: Sequence[Chi],
    blamed: Mapping[str, Tensor], saved: Mapping[str, Tensor], start: Read,
) -> Seen:  # fmt: skip
    """What a step did to the probe: θ is where it led, `saved` where it began, `start` what `read` gave there.

    Every rank must call it. blamed: which probe tokens [M] each blamed group holds.
    """
    named = {name: p for name, p in capture.lm.named_parameters() if name in saved}
    new = {name: p.detach().clone() for name, p in named.items()}
    at = {1.0: read(model, capture, chis)[0]}
    try:
        for share in (-1.0, 0.5, -0.5):
            for name, p in named.items():
                p.copy_(saved[name] + share * (new[name] - saved[name]))
            at[share] = read(model, capture, chis)[0]
    finally:
        for name, p in named.items():
            p.copy_(new[name])
    far, near = (at[1.0] - at[-1.0]) / 2, at[0.5] - at[-0.5]
    before, h, z = start
    batch = collate(chis)
    y = batch.targets.to(z.device)
    force = logit_force(z, y, torch.ones(len(y), device=z.device))
    seen = Seen(row_table([batch], token_stats(z.cpu(), batch.targets), chis), before, at[1.0], (4 * near - far) / 3, None)
    name = next((n for n, p in named.items() if p is capture.head.weight), "")
    if name:
        head = capture.readout()
        old = replace(head, weight=whole(saved[name]))
        seen.readout = through_readout(old, h, z, force, whole(new[name]) - old.weight, None).cpu()
        seen.problem = "the model is sharded: forces of single update tokens are the readout's part alone"
        try:
            P = whole(steps_of(optimizer, SimpleNamespace(model=capture.lm, trainable=frozenset(named)))[name])
            for group, own in blamed.items():
                own = own.to(z.device)
                D = P * (old.pull_back(z, force)[own].T @ h[own].to(z.dtype))
                parts = [_readout_forces(f, old, D, scale) for f in capture.take()]
                seen.forces[group] = torch.cat(parts).cpu() if parts else torch.zeros(0)
        except ValueError as error:
            seen.problem = f"no forces of single update tokens: {error}"
    return seen


def _readout_forces(f: Forward, readout: Readout, D: Float[Tensor, "V d"], scale: float) -> Float[Tensor, " L"]:
    """Γ_lᵀ D h_l: what each update token does along D, where only the readout moves."""
    assert f.hidden is not None
    term, parts, start = f.gterm(scale), [], 0
    for h in f.hidden.split(ROWS):
        rows = term.rows(slice(start, start + len(h)))
        z = readout.logits(h)
        force = rows.force(z)
        parts.append((readout.pull_back(z, force) * (h.to(D.dtype) @ D.T)).sum(1))
        start += len(h)
    return torch.cat(parts)


def reshard(model: nn.Module) -> None:
    """Give back the whole weights that a forward pass outside training left on FSDP2's modules.

    Without it the root stays unsharded between backward and optimizer step, and the next forward trains on stale weights.
    """
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()  # type: ignore[operator]
