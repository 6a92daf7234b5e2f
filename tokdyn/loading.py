"""Load a model and its tokenizer by name: the embedded demo model, a local folder, or a hub name; adapters too."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parent / "demo"
DEMO_MODEL, DEMO_PAIRS = DEMO / "model", DEMO / "pairs.jsonl"
ADAPTER = "adapter_config.json"  # what PEFT saves beside an adapter's weights


def load_model(
    name: str = "demo", device: str = "cpu", dtype: Any = None, adapter: str | None = None, *, allow_pickle: bool = False
) -> tuple[Any, Any]:
    """A causal LM in evaluation mode and its tokenizer.

    Args:
        name: "demo", the model that ships with tokdyn; a folder; or a hub name. A folder of PEFT's that holds an adapter
            stands for its base model with that adapter.
        device: "cpu", "cuda", "cuda:0", …
        dtype: of the weights; float32 when absent.
        adapter: a PEFT adapter for the model, a folder or a hub name. Its weights are trainable and the base is frozen, so
            that forces are those of a training of the adapter.
        allow_pickle: read weights that are there as .bin alone, a format that can run code. Safetensors cannot.

    Raises:
        ValueError: the device is not available, or transformers cannot load a causal LM and a tokenizer of that name, or PEFT
            the adapter.
    """
    check_device(device)
    tokenizer = load_tokenizer(name, adapter)
    return load_weights(name, device, dtype, adapter, allow_pickle=allow_pickle), tokenizer


def load_tokenizer(name: str, adapter: str | None = None) -> Any:
    """The tokenizer of a model as `load_model` names it; an adapter's own where its folder has one."""
    base, adapter = find_model(name, adapter)
    _require_hub(base)
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").exists()
    with _sentence(f"the tokenizer of {name!r}"):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(adapter if own else base)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a configuration alone
        raise ValueError(
            f"{name!r} has no tokenizer: its vocabulary is empty. Save one beside the weights, in Python by "
            f"tokenizer.save_pretrained({name!r})"
        )
    return tokenizer


def load_weights(
    name: str, device: str = "cpu", dtype: Any = None, adapter: str | None = None, *, allow_pickle: bool = False
) -> Any:
    """The model alone; arguments as in `load_model`."""
    base, adapter = find_model(name, adapter)
    what = "folder" if Path(base).is_dir() else "model"
    for place in (Path(base), *([Path(adapter)] if adapter is not None else [])):
        if not allow_pickle and any(place.glob("*.bin")) and not any(place.glob("*.safetensors")):
            raise ValueError(
                f"the folder {place} holds its weights as .bin alone, a format that can run code: convert them to safetensors, "
                "or say that you trust them, --allow-pickle (allow_pickle=True)"
            )
    with _sentence(f"the {what} {name!r} as a causal language model"):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        bar = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(
                base, dtype=dtype or torch.float32, use_safetensors=None if allow_pickle else True
            )
        finally:
            if bar:
                logging.enable_progress_bar()
    if adapter is not None:
        with _sentence(f"the adapter {adapter!r} onto {base!r}"):
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return model.to(device).eval()


def facts_of(name: str) -> dict[str, Any]:
    """What a model's configuration says without its weights: rows of its vocabulary, and the ids that end generation.

    Empty where there is no configuration to read.
    """
    from transformers import AutoConfig, GenerationConfig

    base, _ = find_model(name)
    found: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # a tokenizer alone has none
        config = AutoConfig.from_pretrained(base)
        found["vocabulary"] = int(config.get_text_config().vocab_size)
    with contextlib.suppress(Exception):
        ends = GenerationConfig.from_pretrained(base).eos_token_id
        found["eos"] = frozenset(ends if isinstance(ends, list) else [ends] if ends is not None else [])
    return found


def load_optimizer(model: Any, checkpoint: str) -> Any:
    """The optimizer of a checkpoint that transformers.Trainer (or one of TRL's) saved, on a model's own parameters.

    Args:
        model: loaded from the same checkpoint, so that the same parameters are trainable.
        checkpoint: its folder, which holds optimizer.pt, or the file itself.

    Raises:
        ValueError: there is none, it cannot be read without running code, is no Adam's or AdamW's, or is of other parameters.
    """
    path = Path(checkpoint) / "optimizer.pt" if Path(checkpoint).is_dir() else Path(checkpoint)
    if not path.is_file():
        raise ValueError(f"{checkpoint} holds no optimizer.pt: give a checkpoint folder that transformers.Trainer saved")
    with _sentence(f"the optimizer {path}"):
        import torch

        state = torch.load(path, map_location="cpu", weights_only=True)
        groups = state["param_groups"]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if len(groups) == 2:  # Trainer puts what decays first
        decays = set(_decaying(model))
        trained = [each for each in trained if each[0] in decays] + [each for each in trained if each[0] not in decays]
    numbers = [n for group in groups for n in group["params"]]
    if len(numbers) != len(trained):
        raise ValueError(f"{path} is of {len(numbers)} parameters, the model has {len(trained)} that are trainable")
    for n, (name, p) in zip(numbers, trained, strict=True):
        kept = state["state"].get(n, {})
        if "exp_avg_sq" in kept and kept["exp_avg_sq"].shape != p.shape:
            shapes = f"{list(kept['exp_avg_sq'].shape)}, {name} is {list(p.shape)}"
            raise ValueError(f"{path} is of other parameters: its parameter {n} is {shapes}")
    if "betas" not in groups[0]:
        raise ValueError(f"{path} is no Adam's or AdamW's: its groups have no betas")
    of = iter(p for _, p in trained)
    made = torch.optim.AdamW([{"params": [next(of) for _ in group["params"]]} for group in groups])
    made.load_state_dict(state)
    return made


def _decaying(model: Any) -> list[str]:
    """The names of the parameters that transformers.Trainer has decay."""
    from transformers import Trainer

    return Trainer.get_decay_parameter_names(None, model)


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        ValueError: torch does not know it, or finds no CUDA device.
    """
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f'unknown device {device!r}: "cpu", "cuda", or "cuda:0"') from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device {device!r} was asked for but torch finds no CUDA device: use device="cpu"')


def find_model(name: str, adapter: str | None = None) -> tuple[str, str | None]:
    """Where a model and its adapter, or None, are loaded from; nothing is loaded.

    Raises:
        ValueError: a folder that is named is not there, or holds no model or adapter.
    """
    source = str(DEMO_MODEL) if name == "demo" else name
    folder = Path(source)
    if folder.is_file():
        raise ValueError(f"{source} is a file: a model is a folder with its config.json, weights and tokenizer")
    if not folder.is_dir() and (folder.is_absolute() or source.startswith((".", "~"))):
        raise ValueError(f"there is no model folder {source}")
    if adapter is not None:
        place = Path(adapter)
        if not place.is_dir() and (place.is_absolute() or adapter.startswith((".", "~"))):
            raise ValueError(f"there is no adapter folder {adapter}")
        if place.is_dir() and not (place / ADAPTER).exists():
            raise ValueError(f"the folder {adapter} holds no adapter: it has no {ADAPTER}")
    elif (folder / ADAPTER).exists() and not (folder / "config.json").exists():
        try:
            base = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (ValueError, AttributeError):
            raise ValueError(f"{folder / ADAPTER} is not the JSON that PEFT writes") from None
        if not base:
            raise ValueError(f"the adapter {source} does not name its base model: give --model BASE --adapter {source}")
        try:
            return find_model(str(base))[0], source
        except ValueError as error:
            raise ValueError(f"the base model of the adapter {source}: {error}. Give --model BASE --adapter {source}") from None
    if folder.is_dir() and not list(folder.glob("config.json")):
        raise ValueError(f"the folder {source} holds no model: it has no config.json")
    return source, adapter


def _require_hub(name: str) -> None:
    """Raise at once where a name is no folder, nothing of it is cached and the hub does not have it.

    huggingface_hub asks again for a minute, file by file, where there is no network.

    Raises:
        ValueError: what was asked for, and why it is not there.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if Path(name).is_dir() or constants.HF_HUB_OFFLINE:
        return
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=10)
    except GatedRepoError:
        return  # transformers says how to get access
    except (HFValidationError, RepositoryNotFoundError):
        raise ValueError(f"there is no model folder {name}, and the hub has no model of that name") from None
    except Exception as error:
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(
            f"there is no model folder {name}, and the hub cannot be asked for a model of that name ({why}): give a folder, or "
            "one that was loaded before"
        ) from None


@contextlib.contextmanager
def _sentence(what: str) -> Iterator[None]:
    """Turn what a library raises while it loads something into a ValueError of one sentence."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"cannot load {what}: the package {error.name} is not installed (pip install {error.name})") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"cannot load {what}: {reason}") from error
