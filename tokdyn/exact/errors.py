"""Why a structured engine gives up: caught in engines.py, where a slower exact way takes over."""

from __future__ import annotations


class Unsupported(Exception):
    """The structured engines do not cover this model; one direction per token does."""


class NotReplayable(Unsupported):
    """A module, called again by itself, returns something else: it depends on what an outer module does meanwhile.

    PEFT's nested adapters of an expert stack are such modules.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"{name or 'the model'} does not repeat its output when it is called again")
        self.name = name
