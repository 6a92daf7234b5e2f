"""The checks of data: boundary, ends, answers, roles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ..turns import Turns
from .finding import FINE, SUSPICIOUS, WRONG, Finding, around, excerpt, rows_of
from .texts import Answer, Texts

BOUNDARIES = (  # prompt text lost, a token with letters shared, a token of white space shared
    (
        WRONG,
        "the prompt with its generation prompt does not begin prompt + answer: a mask of its length is laid over other tokens",
        "take the mask from character offsets (td.encode), or use a template that repeats its generation prompt",
    ),
    (
        WRONG,
        "prompt and answer share a token: a mask of the prompt's length leaves some of the answer out, or scores the prompt",
        "take the mask from character offsets (td.encode), or move white space from the prompt's end to the answer's start",
    ),
    (SUSPICIOUS, "white space at the boundary is merged into one token with its neighbour", "end prompts without white space"),
)


def rows_that_cannot_be_read(texts: Texts) -> list[Finding]:
    """Rows of no known form, and rows that template or tokenizer refuse."""
    found = []
    for places, do in ((texts.bad, "mend or drop them: a trainer stops at them, or leaves them out without a word"),
                       (texts.failed, "mend the row, or the template")):  # fmt: skip
        if places:
            what = f"{len(places)} row{'s' * (len(places) > 1)} cannot be used: {places[0]}"
            found.append(Finding("rows", WRONG, what, rows_of(places[1:]), len(places), "rows", do))
    if not found:
        n = len(texts.answers)
        found.append(Finding("rows", FINE, f"all {len(texts.rows)} rows were read and encoded", "", n, "answers"))
    return found


def boundary(texts: Texts) -> list[Finding]:
    """Whether the prompt is a prefix of prompt + answer, in text and in tokens."""
    lost, moved, merged = list[Answer](), list[Answer](), list[Answer]()
    for answer in texts.answers:
        first = max(len(answer.head), 1 if not answer.opened else 0)  # nothing precedes a first token that could score it
        if answer.ids[: len(answer.head)] == answer.head and answer.scored.index(True) == first:
            continue
        start, counted = answer.scored.index(True), len(answer.head)
        between = "".join(texts.tokens(answer.ids[min(start, counted) : max(start, counted)]))
        if not answer.whole.startswith(answer.opened):
            lost.append(answer)
        elif start != counted and between.strip():
            moved.append(answer)
        else:
            merged.append(answer)
    found = []
    for answers_, (level, what, do) in zip((lost, moved, merged), BOUNDARIES, strict=True):
        found += _boundary(texts, answers_, level, what, do)
    if not found and texts.answers:
        found = [Finding("boundary", FINE, "every prompt is a prefix of prompt + answer in text and in tokens")]
    return found


def _boundary(texts: Texts, answers: Sequence[Answer], level: str, what: str, do: str) -> list[Finding]:
    if not answers:
        return []
    first = answers[0]
    at = next((i for i, (a, b) in enumerate(zip(first.head, first.ids, strict=False)) if a != b), len(first.head))
    alone, together = (texts.tokens(ids[max(at - 2, 0) : at + 3]) for ids in (first.head, first.ids))
    where = f"{rows_of([answer.where for answer in answers])}; the prompt alone {alone}, with the answer {together}"
    return [Finding("boundary", level, what, where, len(answers), f"of {len(texts.answers)} answers", do)]


def beginning(texts: Texts) -> list[Finding]:
    """Whether a sequence begins with two beginning-of-sequence tokens."""
    bos = getattr(texts.tokenizer, "bos_token_id", None)
    if bos is None:
        return []
    twice = [answer for answer in texts.answers if answer.ids[:2] == [bos, bos]]
    if not twice:
        return [Finding("BOS", FINE, f"no sequence begins with {texts.tokenizer.bos_token} twice")]
    what = f"sequences begin with {texts.tokenizer.bos_token} twice"
    do = "give a chat as messages, not as the text that its template makes; or take the token out of the text"
    return [Finding("BOS", WRONG, what, rows_of([a.where for a in twice]), len(twice), "answers", do)]


def ending(texts: Texts) -> list[Finding]:
    """Whether answers end with a token that ends generation, and whether padding is told from it."""
    tokenizer, found = texts.tokenizer, list[Finding]()
    if getattr(tokenizer, "eos_token_id", None) is None:
        do = "set tokenizer.eos_token: a model that never sees one never stops"
        return [
            Finding("EOS", SUSPICIOUS, "the tokenizer has no end-of-sequence token, so that no answer ends with one", do=do)
        ]
    specials = set(tokenizer.all_special_ids) | texts.ends
    open_, other = list[Answer](), list[tuple[Answer, int]]()
    for answer in texts.answers:
        tail = _behind(texts, answer)
        closing = [token for token in tail if token in specials]
        if answer.chat and not closing:
            open_.append(answer)
        elif answer.chat and not set(closing) & texts.ends:
            other.append((answer, closing[0]))
    if open_:
        what = "the template writes no special token behind the answer: it never learns to stop"
        do = "let the template close an assistant's turn with the end-of-sequence token"
        found.append(Finding("EOS", SUSPICIOUS, what, rows_of([a.where for a in open_]), len(open_), "answers", do))
    if other:
        token = texts.tokens([other[0][1]])[0]
        what = f"answers end with {token!r}, which is not the end of generation ({tokenizer.eos_token!r})"
        do = f"train with eos_token={token!r}, or put its id into generation_config.eos_token_id"
        found.append(Finding("EOS", SUSPICIOUS, what, rows_of([a.where for a, _ in other]), len(other), "answers", do))
    if not found and texts.answers:
        found.append(Finding("EOS", FINE, "answers end with a token that ends generation"))
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        what = f"padding and end of sequence are one token, {tokenizer.eos_token!r}: a collator that masks padding by its id "
        found.append(Finding("pad", FINE, what + "masks the end of answers as well"))
    return found


def _behind(texts: Texts, answer: Answer) -> list[int]:
    """The tokens behind the last character of the answer."""
    end = answer.whole.rfind(answer.answer.strip()[-20:]) + len(answer.answer.strip()[-20:])
    tokens, place, behind = texts.tokens(answer.ids), 0, list[int]()
    for token, text in zip(answer.ids, tokens, strict=True):
        place += len(text)
        if place > end:
            behind.append(token)
    return behind


def length(texts: Texts) -> list[Finding]:
    """Answers that the training cuts, or that the model has no positions for."""
    limit = texts.max_length or getattr(texts.tokenizer, "model_max_length", None)
    if not limit or limit > 1 << 24:
        return []
    long = [answer for answer in texts.answers if len(answer.ids) > limit]
    gone = [answer for answer in long if answer.scored.index(True) >= limit]
    if not long:
        most = max((len(answer.ids) for answer in texts.answers), default=0)
        return [Finding("length", FINE, f"the longest sequence fits {limit} tokens", "", most, "tokens")]
    level = WRONG if gone else SUSPICIOUS
    what = f"answers are cut at {limit} tokens" + (f", {len(gone)} of them to nothing" if gone else "")
    do = "raise max_length, or drop these rows: a cut answer has no end, and its model does not stop"
    return [Finding("length", level, what, rows_of([a.where for a in gone or long]), len(long), "answers", do)]


def answers(texts: Texts) -> list[Finding]:
    """Chosen equal to rejected, and the same row twice with the answers swapped."""
    pairs = [row for row in texts.rows if row.get("chosen") is not None and row.get("rejected") is not None]
    if not pairs:
        return []
    same = [row.where for row in pairs if row["chosen"] == row["rejected"]]
    known = {(str(row["prompt"]), str(row["chosen"]), str(row["rejected"])) for row in pairs}
    swapped = [row.where for row in pairs if (str(row["prompt"]), str(row["rejected"]), str(row["chosen"])) in known]
    swapped = [place for place in swapped if place not in same]
    found = []
    for places, what, do in (
        (same, "chosen and rejected are the same text: their pushes cancel, and the loss stays at log 2", "drop these rows"),
        (swapped, "the same two answers stand in both orders", "keep one order of each"),
    ):
        if places:
            found.append(Finding("pairs", WRONG, what, rows_of(places), len(places), "rows", do))
    return found or [Finding("pairs", FINE, "chosen and rejected differ in every row", "", len(pairs), "rows")]


def vocabulary(texts: Texts) -> list[Finding]:
    """Tokens that the model has no row for, and answers with unknown tokens."""
    found, tokenizer = list[Finding](), texts.tokenizer
    unknown = getattr(tokenizer, "unk_token_id", None)
    lost = [a for a in texts.answers if unknown is not None and unknown in a.ids and tokenizer.unk_token not in a.whole]
    if lost:
        do = "use the tokenizer of the model, or add the missing tokens: what is unknown is all one token to the model"
        what = f"texts hold characters that the tokenizer does not know ({tokenizer.unk_token})"
        shown = f"{rows_of([a.where for a in lost])}: {excerpt(lost[0].whole)}"
        found.append(Finding("vocabulary", SUSPICIOUS, what, shown, len(lost), "answers", do))
    if texts.vocabulary is not None:
        beyond = [a for a in texts.answers if max(a.ids) >= texts.vocabulary]
        if beyond:
            do = "resize the embeddings to the tokenizer: model.resize_token_embeddings(len(tokenizer))"
            what = f"tokens lie beyond the model's {texts.vocabulary} rows"
            found.append(Finding("vocabulary", WRONG, what, rows_of([a.where for a in beyond]), len(beyond), "answers", do))
    return found or [Finding("vocabulary", FINE, "every token is known to tokenizer and model")]


def scored_roles(texts: Texts) -> list[Finding]:
    """The share of tokens that are scored, by the role in whose turn they stand."""
    turns, counts, every = Turns.of(texts.tokenizer), Counter[str](), Counter[str]()
    wrongly, open_ = list[str](), list[str]()
    for answer in texts.answers:
        tokens = texts.tokens(answer.ids)
        roles = turns.roles(tokens) if turns is not None and answer.chat else None
        roles = roles or ["assistant" if scored else "user" for scored in answer.scored]
        scored = [t for t, on in enumerate(answer.scored) if on]
        every.update(roles)
        counts.update(roles[t] for t in scored)
        wrongly += [around(answer.where, tokens, t) for t in scored if roles[t] in ("user", "system", "tool")]
        if not answer.chat and not str(answer.row["prompt"]).strip():
            open_.append(answer.where)
    if not texts.answers:
        return []
    shares, found = ", ".join(f"{role} {counts[role]}/{n}" for role, n in every.items()), list[Finding]()
    if open_:
        what = f"rows have no prompt: all of their text is scored, a question that stands in it too ({shares})"
        do = "put what is given into the column prompt; or ignore this where whole texts are to be learned"
        found.append(Finding("roles", SUSPICIOUS, what, rows_of(open_), len(open_), "answers", do))
    if wrongly:
        what = f"tokens of other turns than the assistant's are scored ({shares})"
        do = "let the template write nothing behind the answer's turn, or score the assistant's turn alone"
        found.append(Finding("roles", WRONG, what, wrongly[0], len(wrongly), "tokens", do))
    share = sum(counts.values()) / sum(every.values())
    return found or [Finding("roles", FINE, f"the answer alone is scored ({shares})", "", share, "of the tokens")]


CHECKS: tuple[Callable[[Texts], Sequence[Finding]], ...] = (
    rows_that_cannot_be_read, boundary, beginning, ending, length, answers, vocabulary, scored_roles,
)  # fmt: skip
