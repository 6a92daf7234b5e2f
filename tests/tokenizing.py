"""Tokenizers of every kind, trained on a few sentences."""

import functools

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

ENGLISH = [
    "The cat sat on the mat, and the other cats sat there with them.",
    "Whatever the weather, they gathered their things and went  further.",
    "def mother(other):\n    return other + 1\n\n\n    # then the end",
]
WORLD = ["Une naïve déjà-vu café — déjà payé.", "日本語のテキスト и русский текст", "smiles 🙂🙂 and flags 🇫🇷 end"]
SPECIALS = ["<unk>", "<bos>", "<eos>"]
BYTE = {letter: byte for byte, letter in bytes_to_unicode().items()}


@functools.cache
def tokenizer(kind):
    """A tokenizer trained on the sentences above; the kind's words say how it is built. No pad token anywhere."""
    if "byte" in kind:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="prefix" in kind)
        core.decoder = decoders.ByteLevel()
        core.post_processor = processors.ByteLevel(trim_offsets=True) if "trim" in kind else None
        trainer = trainers.BpeTrainer(
            vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=SPECIALS, show_progress=False
        )
    elif kind == "llama":  # characters, unknown ones as bytes
        core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        bytes_ = [f"<0x{b:02X}>" for b in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIALS + bytes_, show_progress=False)
    elif kind == "unigram":
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=90, unk_token="<unk>", special_tokens=SPECIALS, show_progress=False)
    else:  # white space belongs to no token
        core = Tokenizer(models.WordPiece(unk_token="<unk>"))
        core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIALS, show_progress=False)
    core.train_from_iterator(4 * (ENGLISH if kind == "llama" else ENGLISH + WORLD), trainer)
    if "bos" in kind:
        single = "<bos> $A <eos>" if "boseos" in kind else "<bos> $A"
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")


KINDS = ["byte", "byte trim", "byte prefix trim", "byte bos", "byte boseos", "llama", "unigram", "wordpiece"]
