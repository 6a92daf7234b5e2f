"""The checks of which tokens are scored: roles, beginnings and ends, padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..training import diagnosis
from ..turns import Turns
from .finding import FINE, SUSPICIOUS, WRONG, Finding, rows_of
from .seen import Seen, SeenRow

OTHERS = ("system", "user", "tool")


def capture(seen: Seen) -> list[Finding]:
    """Whether the loss could be captured, and whether what was captured explains its gradient."""
    if not seen.forwards:
        raise ValueError(f"nothing was captured: {diagnosis.explain_empty(seen.summary)}")
    if wrong := diagnosis.failed_self_check(seen.forwards):
        do = "see docs/training.md, What the messages mean: labels, mask or temperature are not those of the loss"
        worst = max(f.residual for f in seen.forwards)
        return [Finding("gradient", WRONG, wrong[0], "", worst, "relative", do)]
    worst = max(f.residual for f in seen.forwards)
    return [Finding("gradient", FINE, "c of the scored tokens explains the loss's whole gradient", "", worst, "relative")]


def scored_roles(seen: Seen) -> list[Finding]:
    """The share of scored tokens by role, and the first that is scored or left out by mistake."""
    scored, every = sum(sum(row.scored) for row in seen.rows), sum(len(row.ids) for row in seen.rows)
    if not scored:
        do = "look at labels or mask: is the prompt's laid over the answer too?"
        return [Finding("roles", WRONG, "no token of the batch is scored: the step learns nothing", "", 0, "tokens", do)]
    turns = Turns.of(seen.tokenizer) if seen.tokenizer is not None else None
    counts, totals, wrongly, left_out = Counter[str](), Counter[str](), list[str](), list[str]()
    for row in seen.rows:
        roles = turns.roles(row.tokens) if turns is not None else None
        if roles is None:
            continue
        totals.update(roles)
        counts.update(role for role, on in zip(roles, row.scored, strict=True) if on)
        wrongly += [row.around(t) for t, (role, on) in enumerate(zip(roles, row.scored, strict=True)) if on and role in OTHERS]
        left_out += [row.around(t) for t in _left_out(row, roles)]
    share = scored / max(every, 1)
    if not totals:
        return [Finding("roles", FINE, f"{scored} of {every} tokens are scored", "", share, "of the tokens")]
    shares, found = ", ".join(f"{role} {counts[role]}/{n}" for role, n in totals.items()), list[Finding]()
    if wrongly:
        whole = scored >= every - len(seen.rows)  # but for first tokens, which nothing precedes
        level = WRONG if whole or seen.rows[0].role != "response" or seen.rows[0].advantage is not None else SUSPICIOUS
        what = f"tokens of other turns than the assistant's are scored ({shares})"
        do = "score answers alone: assistant_only_loss or completion_only_loss in TRL, or prompt and completion in the data"
        found.append(Finding("roles", level, what, wrongly[0], len(wrongly), "tokens", do))
    if left_out:
        what = "tokens inside scored turns are left out: the mask was made from another tokenisation, or is shifted"
        do = "make mask and ids in one tokenisation, and shift neither: label t is scored by the logits at t - 1"
        found.append(Finding("roles", WRONG, what, left_out[0], len(left_out), "tokens", do))
    return found or [Finding("roles", FINE, f"the assistant's turns alone are scored ({shares})", "", share, "of the tokens")]


def _left_out(row: SeenRow, roles: Sequence[str]) -> list[int]:
    """Places that are not scored in turns of the assistant of which others are; white space does not count."""
    found, start = list[int](), 0
    while start < len(roles):
        end = start
        while end < len(roles) and (roles[end] in ("assistant", "thinking")) == (roles[start] in ("assistant", "thinking")):
            end += 1
        if roles[start] in ("assistant", "thinking") and any(row.scored[start:end]):
            last = max(t for t in range(start, end) if row.scored[t])
            inside = [t for t in range(start, last) if not row.scored[t] and row.tokens[t].strip() and t]
            found += [t for t in inside if roles[t] == "assistant"]
        start = end
    return found


def padding(seen: Seen) -> list[Finding]:
    """Whether padding is scored."""
    pad, eos = (_special(seen, f"{name}_token_id") for name in ("pad", "eos"))
    outside = sum(row.padding for row in seen.rows)
    inside = [(row, t) for row in seen.rows for t in _scored_padding(row, pad, eos)]
    if not outside and not inside:
        return [Finding("padding", FINE, "no padding is scored")]
    what = "padding is scored: the model is trained to write it, and the mean over tokens counts it"
    do = "set labels to -100 where the attention mask is 0"
    where = inside[0][0].around(inside[0][1]) if inside else ""
    return [Finding("padding", WRONG, what, where, outside + len(inside), "tokens", do)]


def _special(seen: Seen, name: str) -> int | None:
    """A special token's id as the tokenizer has it; without one, as the model's generation does."""
    found: Any = getattr(seen.tokenizer or getattr(seen.lm, "generation_config", None), name, None)
    return found if isinstance(found, int) else None


def _scored_padding(row: SeenRow, pad: int | None, eos: int | None) -> list[int]:
    """Scored places of padding that the attention mask does not show: the run of it that ends the row, but for one end token.

    A rollout ends where its mask does: what stands there was sampled.
    """
    if row.advantage is not None or pad is None:
        return []
    tail = len(row.ids)
    while tail and row.ids[tail - 1] == pad:
        tail -= 1
    return [t for t in range(tail + (pad == eos), len(row.ids)) if row.scored[t]]


def beginning(seen: Seen) -> list[Finding]:
    """Whether a sequence begins with two beginning-of-sequence tokens."""
    bos = getattr(seen.tokenizer, "bos_token_id", None)
    if bos is None:
        return []
    twice = [row.where for row in seen.rows if row.ids[:2] == [bos, bos]]
    if not twice:
        return [Finding("BOS", FINE, "no sequence begins with two of them")]
    what = f"sequences begin with {seen.tokenizer.bos_token} twice"
    do = "tokenise what the chat template made with add_special_tokens=False"
    return [Finding("BOS", WRONG, what, rows_of(twice), len(twice), "sequences", do)]


def ending(seen: Seen) -> list[Finding]:
    """Whether answers end with a token that ends generation, and whether that is scored."""
    ends = _ends(seen)
    rows = [row for row in seen.rows if any(row.scored)]
    if not ends or not rows:
        return []
    last = [max(t for t, on in enumerate(row.scored) if on) for row in rows]
    closed = [row for row, t in zip(rows, last, strict=True) if _ends_soon(row, t, ends)]
    unscored = [row for row, t in zip(rows, last, strict=True)
                if row not in closed and t + 1 < len(row.ids) and row.ids[t + 1] in ends]  # fmt: skip
    if unscored:
        what = "answers end with a token that ends generation, and it is not scored: the model does not learn to stop"
        row = unscored[0]
        do = "do not mask it as padding: give the tokenizer a padding token of its own, and mask by the attention mask"
        where = row.around(1 + max(t for t, on in enumerate(row.scored) if on))
        return [Finding("EOS", WRONG, what, where, len(unscored), f"of {len(rows)} answers", do)]
    if not closed:
        rollout = any(row.advantage is not None for row in rows)
        what = "no answer of the batch ends with a token that ends generation" + (": all were cut" if rollout else "")
        do = (
            "raise max_completion_length"
            if rollout
            else "append tokenizer.eos_token to answers, and score it; or raise max_length"
        )
        return [Finding("EOS", SUSPICIOUS, what, rows[0].around(last[0]), len(rows), "answers", do)]
    return [Finding("EOS", FINE, "answers end with a token that ends generation", "", len(closed), f"of {len(rows)} answers")]


def _ends_soon(row: SeenRow, t: int, ends: set[int]) -> bool:
    """Whether the last scored token ends generation, or white space behind one that does."""
    while t > 0 and row.scored[t] and not row.tokens[t].strip():
        t -= 1
    return row.scored[t] and row.ids[t] in ends


def _ends(seen: Seen) -> set[int]:
    """Ids that end generation: the tokenizer's, and the model's."""
    own = getattr(seen.tokenizer, "eos_token_id", None)
    given = getattr(getattr(seen.lm, "generation_config", None), "eos_token_id", None)
    return {i for i in [own, *(given if isinstance(given, list) else [given])] if i is not None}


def pairs(seen: Seen) -> list[Finding]:
    """Chosen equal to rejected, and answers without a token."""
    if not any(row.role == "chosen" for row in seen.rows):
        return []
    of: dict[tuple[str, int], dict[str, SeenRow]] = {}
    for row in seen.rows:
        of.setdefault((row.where.rsplit(" sequence", 1)[0], row.group), {})[row.role] = row
    both = [pair for pair in of.values() if {"chosen", "rejected"} <= pair.keys()]
    same = [pair["chosen"].where for pair in both if pair["chosen"].ids == pair["rejected"].ids]
    empty = [row.where for row in seen.rows if not any(row.scored)]
    found = []
    if same:
        what = "chosen and rejected are the same tokens: their pushes cancel"
        found.append(Finding("pairs", WRONG, what, rows_of(same), len(same), "pairs", "drop these rows, or raise max_length"))
    if empty:
        what = "answers have no scored token"
        found.append(Finding("pairs", WRONG, what, rows_of(empty), len(empty), "answers", "raise max_length, or drop them"))
    return found or [Finding("pairs", FINE, "chosen and rejected differ in every pair", "", len(both), "pairs")]
