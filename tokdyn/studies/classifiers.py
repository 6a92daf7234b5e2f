"""Small classifiers for the studies that are not about language: real digits, a plain network, gradient descent written out.

Everything is float64 and deterministic given a seed. A network's Jacobians J = ∂z/∂θ [N, C, P] are dense, so that
tokdyn.dynamics gives A, K and G as on the paper's page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import dynamics
from ..objective import GTerm


class Data(NamedTuple):
    """Images x [N, 64] and their classes y [N]."""

    x: Tensor
    y: Tensor


def digits(seed: int, train: int = 1200, *, centred: bool = False) -> tuple[Data, Data]:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels in [0, 1], shuffled, as a training and a test part.

    `centred` subtracts the mean training image from both.
    """
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    x, y = torch.tensor(images), torch.tensor(classes).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x, y = x[order] / 16, y[order]
    x = x - x[:train].mean(0) if centred else x
    return Data(x[:train], y[:train]), Data(x[train:], y[train:])


def network(sizes: Iterable[int], seed: int) -> nn.Sequential:
    """Linear layers with tanh between them, weights N(0, 1/width), biases 0."""
    generator, layers = torch.Generator().manual_seed(seed), []
    sizes = list(sizes)
    for a, b in zip(sizes, sizes[1:], strict=False):
        layer = nn.Linear(a, b, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(b, a, generator=generator, dtype=torch.float64) / a**0.5)
            layer.bias.zero_()
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def cross_entropy(z: Float[Tensor, "N C"], targets: Tensor) -> Tensor:
    """Mean cross-entropy with classes [N] or distributions [N, C]."""
    return nn.functional.cross_entropy(z, targets)


def descend(
    model: nn.Module, x: Tensor, targets: Tensor, eta: float, steps: int, after: Callable[[int], None] | None = None, *,
    batch: int | None = None, seed: int = 0,
) -> None:  # fmt: skip
    """Plain gradient descent on the mean cross-entropy: θ ← θ - eta ∇L, `steps` times.

    Args:
        model: the network, changed in place.
        x, targets: inputs, and classes or distributions.
        eta, steps: size and number of the steps.
        after: called with the number of steps done, from 0 on.
        batch: examples drawn for each step; all of them when absent.
        seed: of the draws.
    """
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    if after:
        after(0)
    for step in range(1, steps + 1):
        drawn = slice(None) if batch is None else torch.randint(0, len(x), (batch,), generator=generator)
        gradients = torch.autograd.grad(cross_entropy(model(x[drawn]), targets[drawn]), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.sub_(eta * g)
        if after:
            after(step)


def jacobians(model: nn.Module, x: Tensor) -> Float[Tensor, "N C P"]:
    """∂z/∂θ of the network's outputs at each input, all parameters in one row."""
    from torch.func import functional_call, jacrev, vmap

    params = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(values: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, values, (one[None],)).squeeze(0)

    found = vmap(jacrev(outputs), in_dims=(None, 0))(params, x)
    return torch.cat([found[name].flatten(2) for name in params], 2)


def hard(y: Int[Tensor, " N"]) -> GTerm:
    """The objective "cross-entropy with labels y, summed over examples", whose G is pi - e_y."""
    return GTerm(y, torch.ones(len(y), dtype=torch.float64))


@torch.no_grad()
def pieces(model: nn.Module, x_o: Tensor, x_u: Tensor, y_u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of -η A K G as tokdyn.dynamics defines them: A [M, C, C], K [M, L, C, C] and G [L, C]."""
    z_o, z_u = model(x_o), model(x_u)
    return dynamics.A(z_o), dynamics.K(jacobians(model, x_o), jacobians(model, x_u)), dynamics.G(z_u, hard(y_u))
