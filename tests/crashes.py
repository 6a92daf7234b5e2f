"""Calls to the system, so that a test can look at a folder, or fail, at each of them."""

import contextlib
import os

import pytest

CALLS = ("open", "fsync", "replace", "close", "unlink", "remove")  # of the system, that a write makes


@contextlib.contextmanager
def before_each_call(act):
    """Have `act(n)` run before the n-th call to the system, and after the last."""
    made, real = [], {name: getattr(os, name) for name in CALLS}

    def patched(name):
        def call(*args, **options):
            made.append(name)
            act(len(made))
            return real[name](*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, patched(name))
        yield made
