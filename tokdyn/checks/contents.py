"""The checks of what answers say: prompts, turns and ends that stand in them again, texts that are none, ratings, repeats."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from .._encoding import message_text
from .finding import FINE, SUSPICIOUS, WRONG, Finding, excerpt, rows_of
from .texts import Answer, Texts

SHORTEST = 12  # characters of a prompt that an answer does not repeat by chance
NOTHING = {"none", "null", "nan", "n/a", "undefined", "[deleted]", "[removed]"}  # what a missing value becomes as text
NEXT_TURN = re.compile(r"\n\s*(Human|User|Assistant|### ?(Instruction|Response|Human|Assistant|Input))\s*:")
# a character lost, or the UTF-8 of a letter or of a quotation mark that was read as Latin-1 or Windows-1252
BROKEN = re.compile(
    "\ufffd|[\u00c2-\u00c3][\u0080-\u00bf]|\u00e2\u20ac[\u2122\u0153\u017e\u201c\u201d\u02dc\u00a6\u0080-\u009f]"
)
RATINGS = ("score_{}", "{}_score", "rating_{}", "{}_rating", "{}-rating", "reward_{}", "{}_reward")
REPEATED = 0.05  # of all rows


def prompts_again(texts: Texts) -> list[Finding]:
    """Answers that begin with their prompt, which a trainer puts before them once more."""
    long = [a for a in texts.answers if len(_asked(a)) >= SHORTEST]
    found = [a for a in long if a.answer.strip().startswith(_asked(a))]
    if not found:
        return [Finding("prompt again", FINE, "no answer begins with its prompt", "", len(long), "answers")] if long else []
    level = WRONG if 2 * len(found) > len(long) else SUSPICIOUS
    what = "answers begin with their prompt: it is given twice, and scored the second time"
    do = "take the prompt off the answers, or leave the column prompt out: it is then what chosen and rejected begin with"
    where = f"{rows_of([a.where for a in found])}: {excerpt(found[0].whole)}"
    return [Finding("prompt again", level, what, where, len(found), f"of {len(long)} answers", do)]


def _asked(answer: Answer) -> str:
    """The text that an answer answers: the prompt, or its last message."""
    prompt = answer.row["prompt"]
    return (prompt if isinstance(prompt, str) else message_text(prompt[-1]) if prompt else "").strip()


def further_turns(texts: Texts) -> list[Finding]:
    """Answers in which another turn begins, and those that hold the end of a turn besides the template's."""
    given = [a for a in texts.answers if _asked(a) and not a.answer.strip().startswith(_asked(a))]  # else there is more to say
    runs_on = [a for a in given if NEXT_TURN.search(a.answer)]
    token = getattr(texts.tokenizer, "eos_token", None)
    twice = [a for a in texts.answers if token and a.chat and token in a.answer and token in _behind(a)]
    found = []
    for answers, level, what, do in (
        (runs_on, SUSPICIOUS, "answers go on with another turn: the model learns to write the user's words",
         "cut them where the next turn begins"),
        (twice, WRONG, f"answers hold {token} and the template writes it again: the first one ends the turn",
         "take it out of the data"),
    ):  # fmt: skip
        if answers:
            shown = f"{rows_of([a.where for a in answers])}: {excerpt(answers[0].answer)}"
            found.append(Finding("turns", level, what, shown, len(answers), "answers", do))
    return found or [Finding("turns", FINE, "no answer holds another turn", "", len(texts.answers), "answers")]


def _behind(answer: Answer) -> str:
    """What the template writes behind an answer; nothing where it does not write the answer as it is."""
    _, found, behind = answer.whole.rpartition(answer.answer.strip())
    return behind if found else ""


def texts_of_nothing(texts: Texts) -> list[Finding]:
    """Answers that are the name of a missing value, and texts whose characters were lost or read in a wrong encoding."""
    missing = [a for a in texts.answers if a.answer.strip().lower() in NOTHING]
    broken = [(a, m) for a in texts.answers if (m := BROKEN.search(a.whole))]
    found = []
    if missing:
        do = "see whether it is an answer: a missing value that was written as text is one; drop these rows"
        shown = f"{rows_of([a.where for a in missing])}: {missing[0].answer.strip()!r}"
        found.append(Finding("text", SUSPICIOUS, "answers are the name of a missing value", shown, len(missing), "answers", do))
    if broken:
        first, match = broken[0]
        around = excerpt(first.whole[max(match.start() - 20, 0) : match.end() + 20])
        what = "texts hold characters that were lost, or UTF-8 that was read as another encoding"
        do = "read the source as UTF-8; ftfy mends what was read wrongly, what is U+FFFD is lost"
        shown = f"{rows_of([a.where for a, _ in broken])}: {around}"
        found.append(Finding("text", SUSPICIOUS, what, shown, len(broken), "answers", do))
    return found or [Finding("text", FINE, "texts are whole", "", len(texts.answers), "answers")]


def ratings(texts: Texts) -> list[Finding]:
    """Pairs whose ratings, where columns hold some, say that the rejected answer is the better one."""
    rated = [(row.where, *told) for row in texts.rows if (told := _ratings(row)) is not None]
    wrong = [each for each in rated if each[1] < each[2]]
    if not wrong:
        what = "ratings agree with the order of chosen and rejected"
        return [Finding("ratings", FINE, what, "", len(rated), "rows")] if rated else []
    where, chosen, rejected = wrong[0]
    shown = f"{rows_of([each[0] for each in wrong])}; of the first {chosen:g} for chosen, {rejected:g} for rejected"
    do = "swap the two, or drop these rows; where a low figure is the better one, ignore this"
    what = "the rejected answer is rated above the chosen one"
    level = WRONG if len(wrong) < len(rated) else SUSPICIOUS
    return [Finding("ratings", level, what, shown, len(wrong), f"of {len(rated)} rows", do)]


def _ratings(row: Any) -> tuple[float, float] | None:
    """What a row's columns rate chosen and rejected, None where none does."""
    for name in RATINGS:
        pair = row.get(name.format("chosen")), row.get(name.format("rejected"))
        if all(type(x) in (int, float) for x in pair):
            return pair
    return None


def repeats(texts: Texts) -> list[Finding]:
    """Rows that stand in the file more than once."""
    counts = Counter(str([(key, row.get(key)) for key in ("prompt", "chosen", "rejected", "completion", "completions")])
                     for row in texts.rows)  # fmt: skip
    again = sum(counts.values()) - len(counts)
    if not texts.rows:
        return []
    level = SUSPICIOUS if again > REPEATED * len(texts.rows) and again > 1 else FINE
    what = "rows stand in the file more than once: they weigh as often" if again else "no row stands in the file twice"
    return [Finding("repeats", level, what, "", again, f"of {len(texts.rows)} rows", "drop them" if level != FINE else "")]


CHECKS: tuple[Callable[[Texts], Sequence[Finding]], ...] = (prompts_again, further_turns, texts_of_nothing, ratings, repeats)
