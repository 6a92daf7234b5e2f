"""Modules that make what they return of one linear product z = W x + b alone (routers): Ẇ = Σ_s δz_s x_sᵀ.

δz is the cotangent at z, pulled back from the module's outputs through whatever it does to z. Where in the module z is made is
found in the graph of a replay: it is what the gradient of W passes through.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.func import vmap

from ...model.calls import Call, floats
from ..graph import Node
from ..products import Direction
from .base import OuterProduct, OuterProducts, Outputs, as_function, is_close, own_parameters
from .linear import Linear
from .local import Local


class Router(Local):
    """A linear product and a function of it. Its tangent is the module's own jvp along the direction that the product gives."""

    label = Linear.label
    tells_sequences = True

    def __init__(self, calls: Sequence[Call], moves: set[str], P: Direction | None = None) -> None:
        super().__init__(calls, moves, P)
        self.has_outer_products = P is None
        self.moves = moves

    def direction(self, calls: Sequence[Call], delta: Outputs) -> Direction:
        """Σ_s δz_s x_sᵀ and Σ_s δz_s."""
        found: Direction = {}
        for call, cotangents in zip(calls, delta, strict=True):
            z = product_cotangents(call, cotangents).unflatten(1, (call.sequences, -1))
            x = call.by_sequence(call.inputs[0]).to(z.dtype)
            steps = {"weight": torch.matmul(z.mT, x), "bias": z.sum(2)}
            found = {name: found[name] + steps[name] if found else steps[name] for name in sorted(self.moves)}
        return {name: x.flatten(0, 1) for name, x in found.items()}

    def outer_products(
        self, call: Call, delta: Sequence[Float[Tensor, "T ..."]], at: Int[Tensor, " N"], preconditioned: bool
    ) -> OuterProducts:
        """See Rule."""
        d = product_cotangents(call, [x.view(1, *y.shape) for x, y in zip(delta, call.outputs, strict=True)])[0][at]
        a = call.inputs[0].flatten(0, -2)[at].to(d.dtype)
        return [OuterProduct(x, d) for name, x in (("weight", a), ("bias", torch.ones_like(a[:, :1]))) if name in self.moves]


def product_cotangents(call: Call, cotangents: Sequence[Tensor]) -> Float[Tensor, "b N q"]:
    """The cotangents [b, N, q] at z of cotangents [b, *output] at what the call returned."""
    with torch.enable_grad():
        own = {name: p.requires_grad_() for name, p in own_parameters(call).items()}
        outputs = [x for x in as_function(call)(own)]
    edge = _product(outputs, own["weight"])
    assert edge is not None
    moved = [i for i, x in enumerate(outputs) if x.requires_grad]

    def one(*v: Tensor) -> Tensor:
        return torch.autograd.grad([outputs[i] for i in moved], edge, v, retain_graph=True)[0]

    return vmap(one)(*(cotangents[i].to(outputs[i].dtype) for i in moved)).flatten(1, -2)


def _product(outputs: Sequence[Tensor], weight: Tensor) -> GradientEdge | None:
    """The linear product that a weight enters, in a graph of these outputs; None if it enters none or several."""
    behind: dict[Node, set[Node]] = {}
    waiting: list[Node] = [x.grad_fn for x in outputs if x.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        for deeper, _ in node.next_functions:
            if deeper is not None:
                if deeper not in behind:
                    waiting.append(deeper)
                behind.setdefault(deeper, set()).add(node)
    users = next((of for node, of in behind.items() if getattr(node, "variable", None) is weight), set[Node]())
    while len(users) == 1:
        (node,) = users
        if any(kind in type(node).__name__ for kind in ("Mm", "mm", "Linear")):
            return GradientEdge(node, 0)
        users = behind.get(node, set())
    return None


def is_router(call: Call) -> bool:
    """Whether the parameters act by one product W x + b of the input, seen in their gradients of a random cotangent."""
    own = own_parameters(call)
    W, x = own.get("weight"), call.inputs[0] if call.inputs else None
    if W is None or W.dim() != 2 or set(own) - {"weight", "bias"} or x is None or not x.is_floating_point():
        return False
    if x.shape[-1] != W.shape[1]:
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        leaves = {name: p.requires_grad_() for name, p in own.items()}
        outputs = floats(as_function(call)(leaves))
        if not any(y.requires_grad for y in outputs) or _product(outputs, leaves["weight"]) is None:
            return False
        cotangents = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
        moved = [i for i, y in enumerate(outputs) if y.requires_grad]
        pairs = [outputs[i] for i in moved], list(leaves.values()), [cotangents[i] for i in moved]
        truth = dict(zip(leaves, torch.autograd.grad(*pairs, allow_unused=True), strict=True))
    z, x = product_cotangents(call, [v[None] for v in cotangents])[0], x.flatten(0, -2)
    if len(z) != len(x) or any(g is None for g in truth.values()):
        return False
    return all(is_close(z.T @ x.to(z.dtype) if name == "weight" else z.sum(0), g.to(z.dtype)) for name, g in truth.items())
