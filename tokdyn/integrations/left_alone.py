"""Leave a trainer as it was: what its training step writes besides gradients is put back."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

DEEP, LONG = 4, 1000  # containers inside containers that are remembered, and how long they may be


@contextlib.contextmanager
def left_as_it_was(trainer: Any) -> Iterator[None]:
    """Random states, modes, buffers and gradients of the model, counters and metrics of the trainer and its accelerator."""
    undo: list[Callable[[], None]] = [_random_states()]
    models = [m for m in (trainer.model, getattr(trainer, "ref_model", None)) if isinstance(m, torch.nn.Module)]
    for model in models:
        undo += [_modes(model), _buffers(model), _gradients(model)]
    accelerator = trainer.accelerator
    for owner in (trainer, trainer.state, trainer.control, trainer.callback_handler, accelerator,
                  getattr(accelerator, "gradient_state", None)):  # fmt: skip
        if owner is not None:
            undo.append(_container(vars(owner), DEEP))
    try:
        yield
    finally:
        for each in reversed(undo):
            each()


def _random_states() -> Callable[[], None]:
    """Python's, NumPy's and torch's, on every device."""
    import numpy

    python, array, torches = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None

    def undo() -> None:
        random.setstate(python)
        numpy.random.set_state(array)
        torch.set_rng_state(torches)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return undo


def _modes(model: torch.nn.Module) -> Callable[[], None]:
    """Which modules train, and which parameters ask for gradients."""
    training, asked = [(m, m.training) for m in model.modules()], [(p, p.requires_grad) for p in model.parameters()]

    def undo() -> None:
        for module, was in training:
            module.training = was
        for p, was in asked:
            p.requires_grad_(was)

    return undo


def _buffers(model: torch.nn.Module) -> Callable[[], None]:
    """What a pass writes into buffers: running means, a router's balance."""
    kept = [(b, b.detach().clone()) for b in model.buffers()]

    def undo() -> None:
        with torch.no_grad():
            for b, was in kept:
                if b.shape == was.shape and not torch.equal(b, was):
                    b.copy_(was)

    return undo


def _gradients(model: torch.nn.Module) -> Callable[[], None]:
    """Gradients set aside, so that a backward pass adds to none of them."""
    kept = [(p, p.grad) for p in model.parameters()]
    for p, _ in kept:
        p.grad = None

    def undo() -> None:
        for p, grad in kept:
            p.grad = grad

    return undo


def _container(held: Any, deep: int) -> Callable[[], None]:
    """A dict, list, deque or set with those inside it; what else it holds is put back as the same object."""
    items = list(held.items()) if isinstance(held, dict) else list(held)
    values = [value for _, value in items] if isinstance(held, dict) else items
    inside = [
        _container(value, deep - 1)
        for value in values
        if deep and isinstance(value, (dict, list, deque, set)) and len(value) <= LONG
    ]

    def undo() -> None:
        if isinstance(held, dict):
            for key in [key for key in held if key not in dict(items)]:
                del held[key]
            held.update(items)
        else:
            held.clear()
            (held.update if isinstance(held, set) else held.extend)(items)
        for each in inside:
            each()

    return undo
