"""The boundary between prompt and response, under every kind of tokenizer; batches, truncation and training metadata."""

import random
import re

import jaxtyping
import pytest
import torch
from tokenizers import Tokenizer, processors
from tokenizing import BYTE, ENGLISH, KINDS, SPECIALS, WORLD, tokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import tokdyn as td
from tokdyn.sequences import collate


def spelled(kind, ids):
    """The bytes that ordinary tokens stand for, read off the vocabulary."""
    pieces = [tokenizer(kind).convert_ids_to_tokens(i) for i in ids.tolist() if i >= len(SPECIALS)]
    if "byte" in kind:
        return bytes(BYTE[letter] for piece in pieces for letter in piece)
    if kind == "wordpiece":
        return "".join(piece.removeprefix("##") for piece in pieces).encode()
    return b"".join(
        bytes([int(piece[3:5], 16)]) if re.fullmatch("<0x..>", piece) else piece.replace("▁", " ").encode() for piece in pieces
    )


def canonical(kind, text):
    """What of a text a tokenizer keeps."""
    return "".join(text.split()) if kind == "wordpiece" else text


@pytest.mark.parametrize("kind", KINDS)
def test_the_scored_tokens_are_those_that_hold_a_character_of_the_response(kind):
    rng, straddling = random.Random(0), 0
    for text in ENGLISH + (WORLD if "byte" in kind or kind == "llama" else []):
        first_word = len(text.split()[0]) + 1 if " " in text else 4
        for cut in rng.sample(range(first_word, len(text)), min(14, len(text) - first_word)):
            prompt, response = text[:cut], text[cut:]
            if not canonical(kind, response):
                continue
            chi = td.encode(tokenizer(kind), prompt, response)
            before, after = spelled(kind, chi.ids[~chi.scored]), spelled(kind, chi.ids[chi.scored])
            first = spelled(kind, chi.ids[chi.scored][:1])
            whole = canonical(kind, text).encode()
            boundary = len((before + after).removesuffix(canonical(kind, response).encode()))
            assert (before + after).removeprefix(b" ") == whole  # " ": some tokenizers put one in front
            assert len(before) <= boundary < len(before) + len(first)
            straddling += len(before) < boundary
    assert straddling > 0  # merges over the boundary were met


@pytest.mark.parametrize("kind", ["byte", "byte trim", "llama"])
def test_a_token_that_starts_in_the_prompt_and_ends_in_the_response_is_scored(kind):
    for prompt, response in [("we saw th", "e cat"), ("we saw ", "the cat"), ("we saw", " the cat")]:
        chi = td.encode(tokenizer(kind), prompt, response)
        assert "".join(chi.tokens).strip() == "we saw the cat<eos>"
        assert [t for t, s in zip(chi.tokens, chi.scored, strict=True) if s][0] == " the"


@pytest.mark.parametrize("kind", ["byte trim", "byte prefix trim"])
def test_a_response_of_white_space_is_scored_although_its_offsets_are_trimmed(kind):
    own = tokenizer(kind)("cat  ", return_offsets_mapping=True, add_special_tokens=True).offset_mapping
    assert own[-1][0] == own[-1][1]  # what the tokenizer itself says of the last token: nothing there
    chi = td.encode(tokenizer(kind), "cat", "  ", eos=False)
    assert spelled(kind, chi.ids[chi.scored]) == b"  "


def test_a_tokenizer_without_offsets_serves_while_the_prompt_is_a_prefix():
    chi = td.encode(ByT5Tokenizer(), "héé<extra_id_0>", "é x")
    assert chi.ids[chi.scored].tolist() == [b + 3 for b in "é x".encode()] + [1]  # bytes are shifted by 3, </s> is 1


def test_a_change_of_the_post_processor_is_seen_by_the_next_encoding():
    core = Tokenizer.from_str(tokenizer("byte").backend_tokenizer.to_str())
    fast = PreTrainedTokenizerFast(tokenizer_object=core)
    assert len(td.encode(fast, "the cat", " sat").ids) == 3
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    assert td.encode(fast, "the cat", " sat").ids[0] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_token_texts_spell_the_sequence(kind):
    chi = td.encode(tokenizer(kind), "The cat sat", " on the mat, then.", eos=False)
    ordinary = "".join(t for t, i in zip(chi.tokens, chi.ids, strict=True) if i >= len(SPECIALS))
    assert canonical(kind, ordinary.strip()) == canonical(kind, "The cat sat on the mat, then.")
    assert " cat" in chi.tokens or "wordpiece" in kind or "unigram" in kind


# ---------------------------------------------------------------- special tokens


@pytest.mark.parametrize("kind", ["byte bos", "byte boseos"])
def test_bos_is_never_scored_and_eos_is_scored_once(kind):
    for prompt in ("", "the cat"):
        for response in (" sat", " sat<eos>") if kind == "byte bos" else (" sat",):
            chi = td.encode(tokenizer(kind), prompt, response)
            assert chi.ids[0] == 1 and not chi.scored[0]
            assert (chi.ids == 2).sum() == 1 and chi.ids[-1] == 2 and chi.scored[-1]


def test_special_tokens_before_the_prompt_are_not_scored_and_none_closes_an_empty_response():
    core = Tokenizer.from_str(tokenizer("byte").backend_tokenizer.to_str())
    specials = [("<unk>", 0), ("<bos>", 1), ("<eos>", 2)]
    core.post_processor = processors.TemplateProcessing(single="<bos> <unk> $A <eos>", special_tokens=specials)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    assert td.encode(fast, "the cat", " sat").scored.tolist() == [False, False, False, False, True, True]
    with pytest.raises(ValueError, match="no token is left to score"):
        td.encode(fast, "the cat", "")


def test_eos_can_be_left_out():
    with_, without = (td.encode(tokenizer("byte"), "the cat", " sat", eos=eos) for eos in (True, False))
    assert torch.equal(with_.ids[:-1], without.ids) and with_.ids[-1] == 2


def test_nothing_to_score_is_said():
    with pytest.raises(ValueError, match="the response is empty in the text given: no token is left to score .*'the cat'"):
        td.encode(tokenizer("byte"), "the cat", "", eos=False)


# ---------------------------------------------------------------- truncation


@pytest.mark.parametrize("truncate", ["end", "start"])
def test_truncation_keeps_one_end_and_says_what_it_cut(truncate):
    fast, prompt, response = tokenizer("byte"), "The cat sat on", " the mat, and the other cats sat there."
    full = td.encode(fast, prompt, response)
    n, x = len(full.ids), len(full.ids) - len(full)
    for keep in (x + 2, len(full) - 1):
        cut = n - keep
        part = slice(None, keep) if truncate == "end" else slice(cut, None)
        scored = full.scored[part].clone()
        scored[0] = False
        lost = len(full) - int(scored.sum())
        said = rf"max_length={keep} cut {cut} of {n} tokens at the {truncate} \({lost} of the {len(full)} scored ones\)"
        with pytest.warns(UserWarning, match=said):
            chi = td.encode(fast, prompt, response, max_length=keep, truncate=truncate)
        assert torch.equal(chi.ids, full.ids[part]) and torch.equal(chi.scored, scored)
        assert chi.truncated == cut and full.truncated == 0


@pytest.mark.parametrize("truncate, max_length", [("end", 2), ("start", 1)])
@pytest.mark.filterwarnings("ignore:max_length")
def test_truncation_that_leaves_nothing_to_score_is_refused(truncate, max_length):
    with pytest.raises(ValueError, match=f"empty after truncation to max_length={max_length}: no token is left"):
        td.encode(tokenizer("byte"), "The cat sat on", " the mat", max_length=max_length, truncate=truncate)


def test_truncation_options_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        td.encode(tokenizer("byte"), "The cat", " sat", max_length=0)
    with pytest.raises(ValueError, match='truncate must be "end" or "start", got \'left\''):
        td.encode(tokenizer("byte"), "The cat", " sat", truncate="left")


# ---------------------------------------------------------------- pairs and groups


def test_a_preference_pair_has_roles_one_group_and_one_prompt():
    chosen, rejected = td.preference(tokenizer("byte"), "The cat", " sat on the mat", " went", group=3)
    assert (chosen.role, rejected.role, chosen.group, rejected.group) == ("chosen", "rejected", 3, 3)
    assert torch.equal(chosen.ids[~chosen.scored], rejected.ids[~rejected.scored])


@pytest.mark.parametrize(
    "rewards, options, advantages",
    [
        ([1.0, 0.0, 0.0, 0.0], {}, [1.5, -0.5, -0.5, -0.5]),
        ([1.0, 0.0, 0.0, 1.0], {}, [0.8660254, -0.8660254, -0.8660254, 0.8660254]),
        ([1.0, 0.0, 0.0, 0.0], {"std": "population"}, [1.7320508, -0.5773503, -0.5773503, -0.5773503]),
        ([1.0, 0.0, 0.0, 1.0], {"std": "population"}, [1, -1, -1, 1]),
        ([1.0, 0.0, 0.0, 0.0], {"scale": False}, [0.75, -0.25, -0.25, -0.25]),
        ([0.1, 0.1, 0.1], {}, [0, 0, 0]),  # their mean is not 0.1 in floats
        ([5.0], {}, [0]),
    ],
)
def test_advantages_are_centred_and_divided_by_the_spread(rewards, options, advantages):
    chis = td.rollouts(tokenizer("byte"), "The cat", [" sat"] * len(rewards), rewards, group=4, **options)
    assert [chi.advantage for chi in chis] == pytest.approx(advantages, abs=5e-8)  # as docs/theory.md, Advantages, prints them
    assert {(chi.role, chi.group) for chi in chis} == {("response", 4)}


@pytest.mark.parametrize("rewards", [[1.0, 0.0, 0.0, 0.0], [0.3, 2.0, -1.0], [1.0, 1.0]])
def test_advantages_are_trls(rewards):
    """TRL divides by its own spread + 1e-4: with that taken out, its advantages are ours."""
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    r = torch.tensor(rewards, dtype=torch.float64)
    theirs = (r - r.mean()) / (nanstd(r) + 1e-4)
    ours = [chi.advantage for chi in td.rollouts(tokenizer("byte"), "The cat", [" sat"] * len(r), rewards)]
    # the factor n/(n - 1) of theirs is a float32
    assert ours == pytest.approx((theirs * (1 + 1e-4 / nanstd(r).clamp_min(1e-9))).tolist(), rel=torch.finfo(torch.float32).eps)


def test_a_reward_for_each_completion_is_required():
    with pytest.raises(ValueError, match="got 2 completions and 1 rewards"):
        td.rollouts(tokenizer("byte"), "The cat", [" sat", " went"], [1.0])
    with pytest.raises(ValueError, match='std must be "sample" or "population", got \'none\''):
        td.rollouts(tokenizer("byte"), "The cat", [" sat", " went"], [1.0, 0.0], std="none")


def test_a_first_token_without_one_before_it_is_named():
    """Without BOS an empty prompt leaves the response's first token unscored, as a trainer's shift does; and it is said."""
    text = "The other cats sat there"
    with pytest.warns(UserWarning, match="the response's first token, 'The', is not scored.*tokenizer.bos_token"):
        bare = td.encode(tokenizer("byte"), "", text)
    assert bare.scored.tolist() == [False] + [True] * (len(bare.ids) - 1)
    whole = td.encode(tokenizer("byte"), tokenizer("byte").bos_token, text)  # what the warning says to do
    assert torch.equal(whole.ids[1:], bare.ids) and len(whole) == len(bare) + 1
    assert len(td.encode(tokenizer("byte bos"), "", text)) == len(whole)
    (id_,) = tokenizer("byte")("The", add_special_tokens=False).input_ids
    assert bare.ids[0] == id_
    with pytest.raises(ValueError, match="the response's first token, 'The', is all there is to score, and cannot be"):
        td.encode(tokenizer("byte"), "", "The", eos=False)


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_taken_off(side):
    texts = [("The cat", " sat on the mat."), ("We", " went"), ("", "The other cats sat there")]
    chis = [td.encode(tokenizer("byte bos"), *text) for text in texts]
    T = max(len(chi.ids) for chi in chis)

    def pad(row, value):
        fill = torch.full((T - len(row),), value)
        return torch.cat([fill, row] if side == "left" else [row, fill])

    ids = torch.stack([pad(chi.ids, 2) for chi in chis])  # padded with eos, as is usual where there is no pad token
    mask = torch.stack([pad(torch.ones_like(chi.ids), 0) for chi in chis])
    labels = torch.stack([pad(torch.where(chi.scored, chi.ids, -100), -100) for chi in chis])
    for i, (chi, found) in enumerate(zip(chis, td.from_batch(ids, mask, labels, tokenizer("byte bos")), strict=True)):
        assert torch.equal(found.ids, chi.ids) and torch.equal(found.scored, chi.scored)
        assert found.tokens == chi.tokens and found.group == i


def test_a_batch_without_mask_and_labels_is_scored_from_its_second_token():
    (chi,) = td.from_batch(torch.tensor([[5, 6, 7]]))
    assert chi.ids.tolist() == [5, 6, 7] and chi.scored.tolist() == [False, True, True]


def test_labels_that_score_nothing_are_said():
    with pytest.raises(ValueError, match="every label is -100: no token is scored"):
        td.from_batch(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, -100, -100]]))  # nothing precedes the first


def test_collate_by_hand():
    a = td.Chi(torch.tensor([5, 6, 7]), torch.tensor([False, False, True]))
    b = td.Chi(torch.tensor([1, 2, 3, 4]), torch.tensor([False, True, False, True]))
    batch = collate([a, b], first=3)
    assert batch.ids.tolist() == [[5, 6, 7, 0], [1, 2, 3, 4]]
    assert batch.targets.tolist() == [7, 2, 4]
    assert batch.sequence.tolist() == [3, 4, 4]
    assert batch.position.tolist() == [2, 1, 3]
    assert batch.rows.tolist() == [1, 4, 6]


def test_a_model_that_knows_the_next_token_is_right_at_every_row_of_a_batch():
    chis = [td.encode(tokenizer("byte"), text[:9], text[9:]) for text in ENGLISH]
    batch = collate(chis)
    logits = torch.nn.functional.one_hot(batch.ids.roll(-1, dims=1), 420)  # [B, T, V]: position t predicts t + 1
    assert torch.equal(logits.flatten(0, 1)[batch.rows].argmax(1), batch.targets)


# ---------------------------------------------------------------- mistakes


IDS, SCORED = torch.tensor([1, 2, 3]), torch.tensor([False, True, True])


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(ids=IDS.int()), r"ids must be int64 of shape \[T\], got torch.int32"),
        (dict(scored=SCORED.long()), r"scored must be bool of shape \[T\]=\(3,\), got torch.int64"),
        (dict(scored=SCORED[1:]), r"scored must be bool of shape \[T\]=\(3,\), got torch.bool \[2\]"),
        (dict(scored=~SCORED), r"scored\[0\] must be False"),
        (dict(reference_log_probs=torch.zeros(3)), r"reference_log_probs must have shape \[n\]=\(2,\)"),
        (dict(old_log_probs=torch.zeros(1)), r"old_log_probs must have shape \[n\]=\(2,\)"),
    ],
)
def test_a_chi_that_does_not_fit_together_is_refused(changes, said, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what users meet, who run without type checks
    with pytest.raises(ValueError, match=said):
        td.Chi(IDS, SCORED).with_(**changes)
