"""What a run's files must hold to be shown, checked when they are read: whoever reads them later finds what is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .folder import ABOUT, FORCES, TOKENS

NUMBER, TEXT, OBJECT = "a number", "a text", "an object"
# name -> what must be there. "?" before it: or null, or left out. A mapping is an object of these; {"*": x} one of any names;
# a list of one is a list of these.
PROFILE: Mapping[str, Any] = {
    "status": TEXT,
    "objective": {"name": TEXT, "arguments": OBJECT},
    "model": {"name": TEXT},
    "settings": {"eta": f"?{NUMBER}"},
    "sequences": [{"side": TEXT, "sequence": NUMBER, "role": f"?{TEXT}", "prompt": f"?{TEXT}", "response": f"?{TEXT}"}],
    "findings": [{"title": TEXT, "text": TEXT}],
    "checks": {"*": f"?{NUMBER}"},
    "seconds": {"*": NUMBER},
    "verify": f"?{OBJECT}",
    "observable": f"?{OBJECT}",
    "pairs": f"?{OBJECT}",
}
FORCES_OF = {"coverage": {"*": TEXT}, "scope": TEXT, "method": TEXT, "reduce": f"?{TEXT}", "lr": f"?{NUMBER}",
             "observable": f"?{OBJECT}"}  # fmt: skip
SCAN = {"groups": [{"name": TEXT, "tokens": NUMBER}], "settings": {"rows": f"?{NUMBER}", "block": NUMBER}}
COLUMNS = tuple("side row sequence position token token_id role group force predicted actual risers fallers c".split())


def require(value: Any, form: Any, where: str) -> None:
    """Raise unless a value read from JSON has a form.

    Args:
        value: any.
        form: as in PROFILE.
        where: its path, for the message.

    Raises:
        ValueError: which part is missing, or of another type.
    """
    if isinstance(form, str):
        if value is None and form.startswith("?"):
            return
        form = form.removeprefix("?")
        fits = {NUMBER: _is_number(value), TEXT: isinstance(value, str), OBJECT: isinstance(value, dict)}[form]
        if not fits:
            raise ValueError(f"{where} must be {form}, it is {_short(value)}")
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, it is {_short(value)}")
        for i, item in enumerate(value):
            require(item, form[0], f"{where}[{i}]")
    else:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, it is {_short(value)}")
        inside = f"{where}." if where else ""
        for name, part in {name: form["*"] for name in value}.items() if "*" in form else form.items():
            if name in value:
                require(value[name], part, f"{inside}{name}")
            elif not (isinstance(part, str) and part.startswith("?")):
                raise ValueError(f"{inside}{name} is missing")


def require_columns(table: Any, names: tuple[str, ...] = COLUMNS) -> None:
    """Raise unless a table (pyarrow) has these columns.

    Raises:
        ValueError: the first that is missing.
    """
    for name in names:
        if name not in table.column_names:
            raise ValueError(f"has no column {name}: it has {', '.join(table.column_names[:8])} …")


def require_profile(path: Path, about: Mapping[str, Any], tokens: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless what was read from a folder is a profile whose parts fit one another.

    Raises:
        ValueError: which file does not, and where.
    """
    if about.get("kind") != "profile" or "vector" not in shapes:
        raise ValueError(f"{path} holds {about.get('kind')}, not a profile: read it with td.Forces.load")
    where = f"{path / ABOUT}: "
    try:
        require(about, PROFILE, "")
        where = f"{path / TOKENS} "
        require_columns(tokens)
        where, sides = f"{path / FORCES}: ", tokens["side"].to_pylist()
        M, L = sides.count("observed"), sides.count("updated")
        if shapes["vector"] != (M,):
            raise ValueError(f"vector must be [M]=[{M}], as the table has observed tokens, it is {list(shapes['vector'])}")
        if shapes.get("matrix", (M, L)) != (M, L):
            raise ValueError(f"matrix must be [M, L]=[{M}, {L}], as the table has tokens, it is {list(shapes['matrix'])}")
        _require_pairs(about, shapes)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def _require_pairs(about: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless the pairs that a profile keeps, if it does, are named in its record and fit one another."""
    if "pairs" not in shapes:
        return
    names = (about.get("pairs") or {}).get("parts")
    if not isinstance(names, list) or not all(isinstance(of, list) and len(of) == 2 for of in names):
        raise ValueError(f"pairs are kept, and {ABOUT} does not say by pairs.parts which layer and kind their numbers are of")
    K = shapes["pairs"][:1]
    for name, shape in (("pairs", (*K, 2)), ("pairs.parts", (*K, len(names))), ("pairs.kernel", (*K, 3))):
        if shapes.get(name) != shape:
            raise ValueError(f"{name} must be {list(shape)}, it is {list(shapes.get(name, ()))}")


def require_forces(path: Path, about: Mapping[str, Any], tokens: Any, tensors: Mapping[str, Any]) -> None:
    """Raise unless what was read from a folder of forces is some, and its parts fit one another.

    Args:
        path: the folder.
        about: its run.json.
        tokens: the token table (pyarrow).
        tensors: what has a shape: c [L], and as far as there are any matrix [M, G], vector [M] or [L], groups [L].

    Raises:
        ValueError: what does not, and where.
    """
    where = f"{path / ABOUT}: "
    try:
        require(about, FORCES_OF, "")
        where = f"{path / TOKENS} "
        require_columns(tokens, ("side", "row"))
        where, sides = f"{path / FORCES}: ", tokens["side"].to_pylist()
        M, L = sides.count("observed"), sides.count("updated")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        of_tokens = shapes.get("groups", (L,))  # where columns are groups, the table has a row for each of those
        if len(of_tokens) != 1 or shapes.get("c") != of_tokens:
            raise ValueError(f"c must be [L]={list(of_tokens)}, one number a token of the update, it is {shapes.get('c')}")
        if shapes.get("matrix", (M, L)) != (M, L):
            raise ValueError(f"matrix must be [{M}, {L}], as the table has rows, it is {list(shapes['matrix'])}")
        if shapes.get("vector", (M,)) not in ((M,), (L,), ()):
            raise ValueError(f"vector must be [M]=[{M}] or [L]=[{L}] or one number, it is {list(shapes['vector'])}")
        if not {"matrix", "vector"} & shapes.keys():
            raise ValueError("it holds neither a matrix nor a vector")
        _require_parts(about, shapes, sharded=bool(about.get("sharded")))
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def _require_parts(about: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], sharded: bool) -> None:
    """Raise unless the parts of forces, if they are divided, are there and of the shape of the whole."""
    names = about.get("parts")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"parts must be a list of texts, it is {_short(names)}")
    whole = shapes.get("matrix", shapes.get("vector"))
    for name in names or []:
        if not sharded and shapes.get(f"part {name}") != whole:
            raise ValueError(f"part {name} must be {list(whole or ())}, it is {list(shapes.get(f'part {name}', ()))}")


def require_scan(path: Path, about: Mapping[str, Any]) -> None:
    """Raise unless run.json is a scan's.

    Raises:
        ValueError: what it lacks.
    """
    try:
        require(about, SCAN, "")
        if about["settings"]["block"] < 1:
            raise ValueError(f"settings.block must be at least 1, it is {about['settings']['block']}")
    except ValueError as error:
        raise ValueError(f"{path / ABOUT}: {error}") from None


def require_shape(value: Any, where: str) -> tuple[int, int]:
    """The shape of a matrix as JSON has it.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(n, int) and 0 <= n < 1 << 62 for n in value):
        raise ValueError(f"{where} must be two whole numbers, it is {_short(value)}")
    return value[0], value[1]


def _is_number(value: Any) -> bool:
    """Whether JSON's value is a number that a float can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = (
        repr(value)
        if not isinstance(value, int) or abs(value) < 10**60
        else f"a number of {value.bit_length() * 3 // 10} digits"
    )
    return text if len(text) <= 60 else text[:57] + "..."
