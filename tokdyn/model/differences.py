"""The derivative of a function of one step size by real steps: right whatever the function is made of, to four digits or so."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Values = list[Tensor]


def slope(at: Callable[[float], Values], first: float, move: float = 0.05) -> Values:
    """d at(h)/dh at h = 0: central differences at two step sizes, extrapolated (Richardson), error O(h⁴).

    Args:
        at: the function of the step size, a list of tensors.
        first: a step size to begin with; it is changed until the values move by about `move`, in logits far above rounding and
            far below curvature.
        move: see first.
    """
    still, h = at(0.0), first
    for _ in range(8):
        change = max(float((a - b).abs().max()) for a, b in zip(at(h), still, strict=True))
        if change == 0:
            h *= 100
        elif 0.5 * move <= change <= 2 * move:
            break
        else:
            h *= min(100.0, max(0.01, move / change))

    def central(step: float) -> Values:
        return [(p - q) / (2 * step) for p, q in zip(at(step), at(-step), strict=True)]

    return [(4 * near - far) / 3 for near, far in zip(central(h / 2), central(h), strict=True)]
