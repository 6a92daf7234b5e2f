"""Load a model and its tokenizer by name: the embedded demo model, a local folder, or a hub name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

DEMO = Path(__file__).parent / "demo"
DEMO_MODEL, DEMO_PAIRS = DEMO / "model", DEMO / "pairs.jsonl"


def load_model(name: str = "demo", device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A causal LM in evaluation mode and its tokenizer; "demo" is the model that ships with tokdyn.

    Raises:
        ValueError: the device is not available, or transformers cannot load a causal LM and a tokenizer of that name.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f'unknown device {device!r}: "cpu", "cuda", or "cuda:0"') from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device {device!r} was asked for but torch finds no CUDA device: use device="cpu"')
    source = str(DEMO_MODEL) if name == "demo" else name
    folder = Path(source)
    if not folder.is_dir() and (folder.is_absolute() or source.startswith((".", "~"))):
        raise ValueError(f"there is no model folder {source}")
    if folder.is_dir() and not list(folder.glob("*config.json")):
        raise ValueError(f"the folder {source} holds no model: it has no config.json")
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        what = "folder" if folder.is_dir() else "model"
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot load the {what} {name!r} as a causal language model with its tokenizer: {reason}") from error
    finally:
        if bar:
            logging.enable_progress_bar()
    return model.to(device).eval(), tokenizer
