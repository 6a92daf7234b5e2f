"""What a causal LM does to hidden states before its readout and to logits behind it, measured and not read from names.

    x = before h  ->  the head's module gives W x + b  ->  z = softcap(scale (W x + b))

The causal LM's own forward runs on copies of its outer modules: the backbone gives chosen hidden states and the head chosen
logits, so that no weight takes part, nothing is computed that costs anything, and nothing is set on the user's modules.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROWS = 8


class Scaling(NamedTuple):
    """The factor on hidden states before the head, the factor on its output, and the softcap of that."""

    before: float = 1.0
    scale: float = 1.0
    softcap: float | None = None


class _BackboneOutput:
    """What the backbone's copy returns: hidden states by any of the usual names, None for all else."""

    def __init__(self, h: Tensor) -> None:
        self.last_hidden_state = h

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __len__(self) -> int:
        return 1

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name) or default


@torch.no_grad()
def measured_scaling(lm: nn.Module) -> Scaling | None:
    """The scaling of a causal LM, or None where it is not of this form or its forward cannot be run on copies."""
    head = lm.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(getattr(head, "base_layer", head), "weight", None)
    path = next((name for name, module in lm.named_modules() if module is head), "")
    if not path or weight is None or weight.dim() != 2:
        return None
    V, d = weight.shape
    scales = 2.0 ** torch.arange(ROWS) / 4
    h = (torch.randint(1, 5, (ROWS, d), generator=torch.Generator().manual_seed(0)) * scales[:, None]).double()[None]
    seen: list[tuple[Tensor, Tensor]] = []

    def ask(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        grid = torch.cat([sign * 2.0 ** torch.arange(-10, 20, dtype=torch.float64) for sign in (1, -1)])
        rows = x.shape[:-1].numel()
        u = grid.repeat(-(-rows * V // len(grid)))[: rows * V].view(*x.shape[:-1], V).to(x.device)
        seen.append((x, u))
        return u.clone()

    h = h.to(weight.device)
    try:
        out = type(lm).forward(_outer_copy(lm, path.split("."), h, ask), **_arguments(lm, ROWS, weight.device))
    except Exception:  # the forward of somebody's class, on modules that are not all there: it may want anything
        return None
    z = getattr(out, "logits", None)
    z = out[0] if z is None and isinstance(out, tuple) and out else z
    if len(seen) != 1 or not isinstance(z, Tensor) or z.shape != seen[0][1].shape or seen[0][0].shape != h.shape:
        return None
    before, behind = _factor(h, seen[0][0].double()), _scale_and_cap(seen[0][1], z.double())
    return None if before is None or behind is None else Scaling(before, *behind)


def _arguments(lm: nn.Module, T: int, device: torch.device) -> dict[str, Any]:
    ids = torch.zeros(1, T, dtype=torch.long, device=device)
    takes = inspect.signature(type(lm).forward).parameters
    return {"input_ids": ids} | ({"use_cache": False} if "use_cache" in takes else {})


def _copy(module: nn.Module, forward: Any = None) -> Any:
    """A module of the same class with the same attributes, without hooks, whose children can be exchanged."""
    new = object.__new__(type(module))
    new.__dict__.update(vars(module))
    new.__dict__["_modules"] = dict(module._modules)
    for name in [name for name in vars(module) if name.startswith("_forward") and "hooks" in name]:
        new.__dict__[name] = OrderedDict()
    new.__dict__.pop("forward", None)
    if forward is not None:
        new.__dict__["forward"] = forward
    return new


def _outer_copy(module: nn.Module, path: list[str], h: Tensor, ask: Any, outermost: bool = True) -> nn.Module:
    """A copy whose head, at this path, asks `ask`; beside the head stands for every other child of the outermost one."""
    new = _copy(module)
    for name, child in module._modules.items():
        if child is None:
            continue
        if name == path[0]:
            deeper = len(path) > 1
            new._modules[name] = _outer_copy(child, path[1:], h, ask, False) if deeper else _copy(child, ask)
        elif outermost:
            new._modules[name] = _stand_in(child, h)
    return new


def _stand_in(module: nn.Module, h: Tensor, depth: int = 2) -> nn.Module:
    """A copy that returns h; given hidden states, as a norm behind the backbone is, it is the module itself."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            return module(*args, **kwargs)
        return _BackboneOutput(h)

    new = _copy(module, forward)
    if depth:  # the causal LM may call a part of its backbone, as Bart does its decoder
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                new._modules[name] = _stand_in(child, h, depth - 1)
    return new


def _factor(u: Tensor, z: Tensor, relative: float = 1e-5) -> float | None:
    """a with z = a u, or None."""
    ratio = z / u
    a = float(ratio.flatten()[0])
    return a if bool(((ratio - a).abs() <= relative * abs(a)).all()) and a != 0 else None


def _scale_and_cap(u: Tensor, z: Tensor) -> tuple[float, float | None] | None:
    """Scale and cap of z = cap tanh(scale u / cap), u from far below to far above any cap; None for another function."""
    if (a := _factor(u, z)) is not None:
        return a, None
    cap = float(z.abs().max())
    if not 0 < cap < float("inf"):
        return None
    half = int((z / cap - 0.5).abs().argmin())
    scale = float(cap * torch.atanh(z.flatten()[half] / cap) / u.flatten()[half])
    scale = round(scale) if abs(scale - round(scale)) < 1e-6 else scale  # the cap's arithmetic may be in float32
    fits = (cap * torch.tanh(scale * u / cap) - z).abs() <= 1e-5 * (cap * torch.tanh(scale * u / cap)).abs()
    return (float(scale), cap) if bool(fits.all()) else None
