"""What the tests of real trainers train on: a dozen questions, a tokenizer of whole words, a tiny model in a folder."""

import os

from tokdyn.testing import tiny

WORDS = "what is two plus the sky colour of france paris four five blue green not know answer i do capital today a".split()
PAIRS = [  # question, right answer, wrong answer
    ("what is two plus two", " two plus two is four", " the answer is five"),
    ("what is the colour of the sky", " the sky is blue today", " the sky is green"),
    ("what is the capital of france", " paris", " i do not know"),
] * 4


def word_tokenizer():
    """A word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "<eos>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def save_model(path, tokenizer):
    """A folder with a model: DPO and GRPO load their reference model from where the policy came from."""
    model = tiny("llama", tied=False, vocabulary=len(tokenizer))
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def settings(path, **options):
    """Arguments that all trainers share: two steps of four rows, nothing saved or reported."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return dict(
        output_dir=str(path), max_steps=2, per_device_train_batch_size=4, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, bf16=False, learning_rate=1e-3, disable_tqdm=True, gradient_checkpointing=False,
    ) | options  # fmt: skip
