"""Studies of a user's own model and texts: they run, claim what they always claim, and their identities hold there too."""

import json

import pytest
import tokenizing
from claims import LANGUAGE

from tokdyn.studies import gallery, texts
from tokdyn.testing import tiny

WORDS = "the cat sat on a mat while other cats gathered whatever things they there then saw and went further".split()
IDENTITIES = {
    "readout-vs-exact": 1, "shared-prefix": 3, "dpo-decay": 0, "sft-dynamics": 0, "entropy-collapse": 0, "where-it-lives": 1,
    "disentanglement-band": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with a tiny model and its tokenizer, and a file of pairs that begin alike."""
    folder = tmp_path_factory.mktemp("own")
    tokenizer = tokenizing.tokenizer("byte")
    tokenizer.eos_token = "<eos>"
    tiny("qwen2", vocabulary=len(tokenizer), max_position_embeddings=256).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    answers = [(WORDS[i : i + 5], [*WORDS[i : i + 2], WORDS[i - 3]]) for i in range(len(WORDS) - 5)]
    rows = [dict(prompt=f"Say {a[0]}.", chosen=" ".join(a), rejected=" ".join(b)) for a, b in answers]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("name", IDENTITIES)
def test_a_study_runs_on_a_model_and_texts_that_are_given(own, name, tmp_path):
    settings = gallery.Settings(True, 0, str(own / "model"), str(own / "pairs.jsonl"))
    told = gallery.run_study(name, tmp_path / name, settings)
    assert {claim["claim"] for claim in told["claims"]} == LANGUAGE[name].texts()
    identities = [claim for claim in told["claims"] if "identity" in claim["claim"]]
    assert len(identities) == IDENTITIES[name] and all(claim["verdict"] == "holds" for claim in identities)
    assert (told["model"], told["data"]) == (settings.model, settings.data)


def test_rows_are_drawn_by_the_seed_and_none_twice():
    rows = [{"prompt": str(i)} for i in range(30)]
    first, again, other = (texts.drawn(rows, 20, seed) for seed in (0, 0, 1))
    assert first == again != other and len({row["prompt"] for row in first}) == 20
    assert sorted(texts.drawn(rows, 99, 3), key=rows.index) == rows
