"""Forces of a training's steps token by token, and net of what tokens behind the same text take back from one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..runs.by_sequence import sequence_names
from ..runs.contexts import listed

MAPS, MAP_TOKENS = 9, 1500  # steps whose forces are shown token by token, and how many tokens of each
ON = "on "  # prefix of the token table's columns of forces, one for each probe group


def probe_groups(tokens: Any) -> list[str]:
    """The probe groups that the token table has forces on."""
    return [] if tokens is None else [name[len(ON) :] for name in tokens.column_names if name.startswith(ON)]


def token_maps(tokens: Any, wanted: Sequence[int] | None, own: Mapping[str, set[int]]) -> list[dict[str, Any]]:
    """Forces on each group at a few steps: tokens in the order of their sequences, values [group][token], and `net` of them.

    Args:
        tokens: the token table of the training; None without one.
        wanted: the steps; up to nine evenly spaced ones when absent.
        own: see `own_contexts`.

    Raises:
        ValueError: a step of `wanted` has no forces.
    """
    import pyarrow.compute as pc

    names = probe_groups(tokens)
    if not names:
        if wanted:
            raise ValueError(f"no step of this run has forces, so {list(wanted)} cannot be shown: train with a probe")
        return []
    known = pc.is_valid(tokens[ON + names[0]])
    for name in names[1:]:
        known = pc.or_(known, pc.is_valid(tokens[ON + name]))
    tokens = tokens.filter(known)
    steps = sorted(set(tokens["step"].to_pylist()))
    if missing := [step for step in wanted or () if step not in steps]:
        raise ValueError(f"step {missing[0]} has no forces; those that have are {', '.join(map(str, steps))}")
    if wanted is None:
        n = min(MAPS, len(steps))
        wanted = sorted({steps[round(k * (len(steps) - 1) / max(n - 1, 1))] for k in range(n)})
    maps = []
    for step in wanted:
        table = tokens.filter(pc.equal(tokens["step"], step))
        order = [(key, "ascending") for key in ("rank", "group", "role", "sequence", "position") if key in table.column_names]
        groups = [name for name in names if table[ON + name].null_count < table.num_rows]  # of this step: answers that fell
        whole, table = table.num_rows, table.sort_by(order).slice(0, MAP_TOKENS)
        rows = table.to_pylist()
        sequences: list[dict[str, Any]] = []
        for index, row in enumerate(rows):
            key = [row.get("rank"), row["sequence"]]
            if not sequences or sequences[-1]["key"] != key:
                sequences.append({"key": key, "role": row["role"], "group": row["group"], "start": index})
            sequences[-1]["stop"] = index + 1
        for name, sequence in zip(sequence_names((s["role"], s["group"]) for s in sequences), sequences, strict=True):
            sequence["name"] = name
        maps.append(
            {
                "step": step,
                "left_out": whole - len(rows),
                "groups": groups,
                "sequences": sequences,
                "tokens": [row.get("token") or f"<{row['token_id']}>" for row in rows],
                "c": [row["c"] for row in rows],
                "log_prob": [row["log_prob"] for row in rows],
                "pull": [row.get("force") for row in rows],
                "values": [[row[ON + name] for row in rows] for name in groups],
                "net": _net(rows, sequences, groups, own),
            }
        )
    return maps


def own_contexts(probe: Any) -> dict[str, set[int]]:
    """The contexts that the answers of each probe group stand in; none where an older version wrote the table."""
    found: dict[str, set[int]] = {}
    if probe is not None and "context" in probe.column_names:
        for name, context in zip(probe["probe"].to_pylist(), probe["context"].to_pylist(), strict=True):
            found.setdefault(name, set()).add(context)
    return found


def _net(
    rows: Sequence[Mapping[str, Any]],
    sequences: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    own: Mapping[str, set[int]],
) -> dict[str, Any] | None:
    """Columns are contexts: tokens behind the same ids share their logits, so that c and forces add up and may cancel.

    A block holds the contexts that the same sequences share. `own` [group][context] says which of them a watched answer of the
    group stands in itself. None where the table does not know contexts.
    """
    if any(row.get("context") is None for row in rows):
        return None
    members: dict[int, list[int]] = {}
    for n, row in enumerate(rows):
        members.setdefault(row["context"], []).append(n)
    of_row = [s for s, sequence in enumerate(sequences) for _ in range(sequence["start"], sequence["stop"])]
    bands: dict[tuple[int, ...], list[int]] = {}
    for context, tokens in members.items():
        bands.setdefault(tuple(dict.fromkeys(of_row[n] for n in tokens)), []).append(context)
    order = [context for contexts in bands.values() for context in contexts]
    blocks, start = [], 0
    for which, contexts in bands.items():
        roles = {sequences[s]["role"] for s in which}
        name = listed([sequences[s]["name"] for s in which])
        role = roles.pop() if len(roles) == 1 else None
        blocks.append({"name": name, "role": role, "start": start, "stop": start + len(contexts)})
        start += len(contexts)

    def added(column: str) -> list[float | None]:
        parts: list[list[Any]] = [[rows[n].get(column) for n in members[context]] for context in order]
        return [None if None in part else sum(part) for part in parts]

    def texts(context: int) -> str:
        tokens = dict.fromkeys(rows[n].get("token") or f"<{rows[n]['token_id']}>" for n in members[context])
        return "/".join(tokens)

    alone = [members[context][0] if len(members[context]) == 1 else None for context in order]
    return {
        "sequences": blocks,
        "tokens": [texts(context) for context in order],
        "c": added("c"),
        "log_prob": [None if n is None else rows[n]["log_prob"] for n in alone],
        "pull": added("force"),
        "values": [added(ON + name) for name in names],
        "own": [[context in own.get(name, set()) for context in order] for name in names],
    }
