"""Sizes of memory as users write them."""

from __future__ import annotations

import re


def size_in_bytes(memory: int | str) -> int:
    """Bytes of 4294967296, "4GiB", "512 MiB" or "2GB".

    Raises:
        ValueError: no such size, or not positive.
    """
    units = {"": 1, "b": 1, **{x + y: b ** (i + 1) for y, b in (("b", 1000), ("ib", 1024)) for i, x in enumerate("kmgt")}}
    found = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", str(memory))
    if found is None or found[2].lower() not in units or found[1].count(".") > 1 or float(found[1]) <= 0:
        raise ValueError(f'memory must be a number of bytes or a size such as "2GiB" or "500MB", got {memory!r}')
    return int(float(found[1]) * units[found[2].lower()])
