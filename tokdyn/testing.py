"""Tiny random models of every family and other things that tests, benchmarks and users' own checks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .sequences import Chi

V_TINY = 61


def tiny(family: str, *, tied: bool = True, seed: int = 0, vocabulary: int = V_TINY, **changes: Any) -> nn.Module:
    """A random causal LM of a family's shape: 2 layers of width 32, every 1-D parameter perturbed away from its default.

    Raises:
        ValueError: no such family (names those there are).
    """
    import transformers as tf

    wide = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    grouped = wide | dict(num_key_value_heads=2, head_dim=8)
    families: dict[str, tuple[str, dict[str, Any]]] = {
        "gpt2": ("GPT2", dict(n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=64)),
        "gpt_neox": ("GPTNeoX", wide | dict(rotary_pct=0.5)),
        "llama": ("Llama", grouped),
        "llama_bias": ("Llama", grouped | dict(attention_bias=True, mlp_bias=True)),
        "qwen2": ("Qwen2", wide | dict(num_key_value_heads=2)),
        "gemma2": ("Gemma2", grouped | dict(sliding_window=4, final_logit_softcapping=3.0, attn_logit_softcapping=5.0)),
    }
    if family not in families:
        raise ValueError(f"unknown family {family!r}: known are {', '.join(families)}")
    name, shape = families[family]
    shape = dict(max_position_embeddings=64) | shape if family != "gpt2" else shape
    special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config = getattr(tf, f"{name}Config")(vocab_size=vocabulary, tie_word_embeddings=tied, **special, **(shape | changes))
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # larger than at initialisation, so that forces are not all alike
            p.add_((0.1 if p.dim() == 1 else 0.15) * torch.randn_like(p))
    return model


def random_chis(lengths: list[tuple[int, int]], *, seed: int = 0, vocabulary: int = V_TINY, **metadata: Any) -> list[Chi]:
    """Sequences of random tokens; each length is (prompt, response)."""
    generator = torch.Generator().manual_seed(seed)
    chis = []
    for i, (x, y) in enumerate(lengths):
        ids = torch.randint(0, vocabulary, (x + y,), generator=generator)
        chis.append(Chi(ids, torch.arange(x + y) >= x, **({"group": i} | metadata)))
    return chis


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """‖value - truth‖ / ‖truth‖, in float64."""
    return float((value.double() - truth.double()).norm() / truth.double().norm())
