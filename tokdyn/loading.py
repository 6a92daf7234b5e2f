"""A model and its tokenizer by name: the embedded one, a local folder, or a hub name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

DEMO = Path(__file__).parent / "demo"
DEMO_MODEL, DEMO_PAIRS = DEMO / "model", DEMO / "pairs.jsonl"


def load_model(name: str = "demo", device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Causal LM and tokenizer; "demo" is the model that ships with tokdyn.

    Raises:
        ValueError: the device is not there, or nothing that transformers can load lies under that name.
    """
    kind = device.split(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device {device!r} was asked for but torch finds no CUDA device: use device="cpu"')
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(DEMO_MODEL) if name == "demo" else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        what = "folder" if Path(name).is_dir() else "model"
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load the {what} {name!r} as a causal language model with its tokenizer: {reason}") from error
    return model.to(device).eval(), tokenizer
