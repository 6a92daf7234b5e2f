"""What users' arguments mean, which mean nothing, and an error in words; without torch, so that the command line is quick."""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path

# what is not installed with tokdyn itself, and the extra that brings it
EXTRAS = {"accelerate": "trl", "datasets": "trl", "matplotlib": "studies", "pandas": "dataframe", "peft": "trl",
          "scipy": "studies", "starlette": "serve", "uvicorn": "serve", "sklearn": "studies", "trl": "trl"}  # fmt: skip
METHODS = ("tangent", "naive", "none")  # of a profile
UNITS = {"step": "nats after the step", "rate": "nats per unit learning rate"}
PER = ("contexts", "tokens")
BY = ("layer", "module", "kind", "expert")
OBSERVABLE = r"log-prob|entropy|margin(:argmax|:rejected|:\d+)?|mass:\d+(,\d+)*|logit:\d+"
OBSERVABLES = "log-prob, entropy, margin, margin:rejected, margin:TOKEN_ID, mass:ID,ID,… or logit:TOKEN_ID"


def check_eta(eta: float | None) -> None:
    """Refuse a step size that is not a positive number.

    Raises:
        ValueError: it is not.
    """
    if eta is not None and not 0 < eta < math.inf:
        raise ValueError(f"eta must be positive and finite, got {eta}")


def check_method(method: str) -> None:
    """Refuse a way of computing a profile's matrix that there is not.

    Raises:
        ValueError: there is none of that name.
    """
    if method not in METHODS:
        raise ValueError(f'method must be "naive", "tangent" or "none", got {method!r}')


def objective_name(name: str, names: Sequence[str]) -> str:
    """An objective's name as it is spelled among `names`, found in any case.

    Raises:
        ValueError: there is none (the nearest are named).
    """
    known = {each.lower(): each for each in names}
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(known[n] for n in near)}?" if near else f"known: {', '.join(names)}"
        raise ValueError(f"unknown objective {name!r}: {hint}")
    return known[name.lower()]


def objective_names() -> list[str]:
    """The names of objectives, read from their source: to import them is to wait for torch."""
    source = (Path(__file__).parent / "objectives/__init__.py").read_text(encoding="utf-8")
    (names,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    )
    return list(ast.literal_eval(names))


def scope_pattern(scope: str) -> re.Pattern[str]:
    """A scope that is no name as the regular expression that it is.

    Raises:
        ValueError: it is none.
    """
    try:
        return re.compile(scope)
    except re.error as error:
        raise ValueError(
            f'scope must be "full", "readout", "backbone" or a regular expression, got {scope!r}: {error}'
        ) from None


def size_in_bytes(memory: int | str) -> int:
    """Bytes of 4294967296, "4GiB", "512 MiB" or "2GB".

    Raises:
        ValueError: no such size, or not positive.
    """
    units = {"": 1, "b": 1, **{x + y: b ** (i + 1) for y, b in (("b", 1000), ("ib", 1024)) for i, x in enumerate("kmgt")}}
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-zA-Z]*)\s*", str(memory))
    if found is None or found[2].lower() not in units or float(found[1]) <= 0:
        raise ValueError(f'memory must be a number of bytes or a size such as "2GiB" or "500MB", got {memory!r}')
    return int(float(found[1]) * units[found[2].lower()])


def check_observable(name: str) -> None:
    """Refuse words that stand for no observable; observables.observable makes it, and says the same of its numbers.

    Raises:
        ValueError: they are none.
    """
    if not re.fullmatch(OBSERVABLE, name):
        raise ValueError(f"observable must be {OBSERVABLES}, got {name!r}")


def check_by(by: str | None) -> None:
    """Refuse a word by which nothing is divided.

    Raises:
        ValueError: it is none of BY.
    """
    if by is not None and by not in BY:
        words = ", ".join(f'"{name}"' for name in BY[:-1])
        raise ValueError(f'by must be {words}, "{BY[-1]}" or name -> regular expression, got {by!r}')


def check_view(unit: str, per: str) -> None:
    """Refuse what `summary` cannot show.

    Raises:
        ValueError: another unit, or another per.
    """
    if unit not in UNITS:
        raise ValueError(f'unit must be "step" (nats after the step) or "rate" (per unit learning rate), got {unit!r}')
    if per not in PER:
        raise ValueError(f'per must be "contexts" (net of what cancels) or "tokens" (single ones), got {per!r}')


def constants(pairs: list[str]) -> dict[str, float]:
    """Parse --set options such as 'beta=0.1' into keyword arguments."""
    found = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise ValueError(f"--set takes NAME=NUMBER, got {pair!r}") from None
    return found


def shard_of(text: str | None) -> tuple[int, int] | None:
    """(i, n) of "i/n".

    Raises:
        ValueError: it is not that, or i is not one of 0, …, n - 1.
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise ValueError(f"--shard takes i/n with i from 0 to n - 1, as in 0/4, got {text!r}")
    return int(found[1]), int(found[2])


def sentence(error: Exception) -> str:
    """An error as a user reads it: a mistake (ValueError, OSError) says what it is, others with their kind."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        name = error.name.partition(".")[0]
        what = f"'tokdyn[{EXTRAS[name]}]'" if name in EXTRAS else name
        return f"this needs the package {name}, which is not installed: pip install {what}"
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)) and text:
        return text
    return f"{type(error).__name__}{': ' if text else ''}{text[:500]} (tokdyn --debug shows where)"


# C0 without tab and newline, DEL, C1, marks that turn the direction of writing, and halves of surrogate pairs
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text with the characters escaped that would steer a terminal, or mislead who reads it."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def printable_json(text: str) -> str:
    """JSON with the same characters escaped as JSON writes them: they can only stand in its texts, which stay what they are."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
