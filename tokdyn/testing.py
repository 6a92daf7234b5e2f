"""Tiny random models of every family, random sequences and an error measure, for tests, benchmarks and users' own checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .sequences import Chi

V_TINY = 61


def _families() -> dict[str, tuple[str, dict[str, Any]]]:
    """Class and configuration of every family; its special features are enabled and have an effect within eight tokens."""
    wide = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
    grouped = wide | dict(num_key_value_heads=2, head_dim=8)
    paired = wide | dict(num_key_value_heads=2)
    falcon = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=48, max_position_embeddings=64)
    experts = dict(num_experts_per_tok=2, sliding_window=None)
    granite = dict(embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.2)
    return {
        "gpt2": ("GPT2", dict(n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=64)),
        "gpt_neox": ("GPTNeoX", wide | dict(rotary_pct=0.5)),
        "opt": ("OPT", {k: v for k, v in wide.items() if k != "intermediate_size"} | dict(ffn_dim=48, word_embed_proj_dim=24)),
        "llama": ("Llama", grouped),
        "llama_bias": ("Llama", grouped | dict(attention_bias=True, mlp_bias=True)),
        "mistral": ("Mistral", grouped | dict(sliding_window=4)),
        "qwen2": ("Qwen2", paired),
        "qwen3": ("Qwen3", grouped),
        "gemma2": ("Gemma2", grouped | dict(sliding_window=4, final_logit_softcapping=3.0, attn_logit_softcapping=5.0)),
        "gemma3": ("Gemma3Text", grouped | dict(sliding_window=4, final_logit_softcapping=3.0, query_pre_attn_scalar=8,
                                                layer_types=["sliding_attention", "full_attention"])),
        "phi3": ("Phi3", paired | dict(sliding_window=4)),
        "cohere": ("Cohere", paired | dict(use_qk_norm=True, logit_scale=0.25)),
        "granite": ("Granite", paired | granite),
        "olmo2": ("Olmo2", paired),
        "falcon": ("Falcon", falcon),
        "falcon_new": ("Falcon", falcon | dict(new_decoder_architecture=True, num_kv_heads=2)),
        "falcon_alibi": ("Falcon", falcon | dict(alibi=True, multi_query=False, parallel_attn=False, bias=True)),
        "bloom": ("Bloom", dict(hidden_size=32, n_layer=2, n_head=4)),
        "stablelm": ("StableLm", paired | dict(use_qkv_bias=True, qk_layernorm=True, use_parallel_residual=True)),
        "qwen2_moe": ("Qwen2Moe", paired | experts | dict(num_experts=5, moe_intermediate_size=16,
                                                          shared_expert_intermediate_size=24)),
        "mixtral": ("Mixtral", paired | experts | dict(num_local_experts=4)),
        "mamba": ("Mamba", dict(hidden_size=32, num_hidden_layers=2, state_size=4, conv_kernel=3, time_step_rank=3)),
    }  # fmt: skip


FAMILIES = tuple(_families())


def tiny(family: str, *, tied: bool | None = True, seed: int = 0, vocabulary: int = V_TINY, **changes: Any) -> nn.Module:
    """A random causal LM of a family's shape: 2 layers of width 32, every parameter perturbed away from its default.

    Args:
        family: one of FAMILIES.
        tied: whether lookup and readout share their weight; None takes the family's default.
        seed: of the random weights.
        vocabulary: number of tokens.
        changes: further fields of the family's configuration.

    Raises:
        ValueError: no such family; the message lists the families.
    """
    import transformers as tf

    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: known are {', '.join(FAMILIES)}")
    name, shape = _families()[family]
    special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    tie = {} if tied is None else dict(tie_word_embeddings=tied)
    config = getattr(tf, f"{name}Config")(vocab_size=vocabulary, **(special | tie | shape | changes))
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    return _perturbed(model)


def tiny_lora(family: str, *, seed: int = 0, r: int = 4, **options: Any) -> nn.Module:
    """`tiny` with LoRA adapters on every projection of attention and MLP that PEFT can adapt, B away from zero.

    Raises:
        ImportError: peft is not installed.
    """
    import peft

    targets: Any = (
        ["in_proj", "x_proj"] if family == "mamba" else "all-linear"
    )  # its other weights are used without calling their module
    model = peft.get_peft_model(
        tiny(family, seed=seed, **options),
        peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, task_type="CAUSAL_LM"),
    )
    return _perturbed(model.eval(), only_trainable=True)


def _perturbed(model: nn.Module, only_trainable: bool = False) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():  # larger than at initialisation, so that forces are not all alike
            if p.requires_grad or not only_trainable:
                p.add_((0.1 if p.dim() == 1 else 0.15) * torch.randn_like(p))
    return model


class float64(TorchFunctionMode):  # noqa: N801
    """Turn casts to float32 into casts to float64: inside `with float64():` a `model.double()` computes in float64 throughout.

    transformers casts to float32 inside norms, softmax, rotary angles, routers and state-space scans whatever the model's
    precision; with those casts a float64 model is right to about 1e-6 only.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        single, double = torch.float32, torch.float64
        if any(x is single for x in args):
            args = tuple(double if x is single else x for x in args)
        return func(*args, **{name: double if x is single else x for name, x in (kwargs or {}).items()})


def random_chis(lengths: list[tuple[int, int]], *, seed: int = 0, vocabulary: int = V_TINY, **metadata: Any) -> list[Chi]:
    """Sequences of random tokens; `lengths` holds (prompt, response) of each in tokens, `metadata` further fields of Chi."""
    generator = torch.Generator().manual_seed(seed)
    chis = []
    for i, (x, y) in enumerate(lengths):
        ids = torch.randint(0, vocabulary, (x + y,), generator=generator)
        chis.append(Chi(ids, torch.arange(x + y) >= x, **({"group": i} | metadata)))
    return chis


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """‖value - truth‖ / ‖truth‖, in float64."""
    return float((value.double() - truth.double()).norm() / truth.double().norm())
