"""Tiny models of every kind of causal LM in the installed transformers: two layers of width 32, random weights.

A kind is built from its own configuration with every size shrunk (`SIZES`), and what it needs besides (`OTHERS`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

V = 61
LARGEST = 4_000_000  # parameters of what counts as tiny

# What a configuration calls its sizes, and how large they are here. Names that are not there are not set.
WIDTH, LAYERS, HEADS = 32, 2, 4
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "n_vocab", "vocab_size_per_layer_input"), V),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "model_dim", "lru_width", "embedding_size",
                     "attention_hidden_size", "cross_attention_hidden_size", "word_embed_proj_dim", "emb_dim"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
                     "num_decoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
        "num_decoder_attention_heads",
                     "encoder_attention_heads", "num_encoder_attention_heads", "linear_num_value_heads", "mamba_n_heads"),
                         HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "linear_num_key_heads", "swa_num_key_value_heads"),
        2),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "qk_nope_head_dim", "linear_key_head_dim",
        "linear_value_head_dim",
                     "d_head", "d_kv", "mamba_d_head", "mamba_head_dim", "swa_head_dim", "kv_channels",
                         "attention_head_dim"), 8),
    **dict.fromkeys(("intermediate_size", "d_ff", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size",
                     "dim_ff", "dff", "dense_intermediate_size", "intermediate_size_mlp", "block_ff_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
                     "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_top_k", "moe_topk", "experts_per_token",
        "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "num_shared_experts", "moe_num_shared_experts",
                     "first_k_dense_replace", "num_nextn_predict_layers"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim", "ssm_state_size", "state_size", "mamba_d_state",
        "d_state"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "mamba_d_conv", "conv_kernel", "d_conv", "mamba_dt_rank",
        "time_step_rank"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length",
        "context_length"), 64),
    **dict.fromkeys(("sliding_window", "attention_window_size", "local_window_size"), 4),
    "index_n_heads": 2, "index_topk": 4, "mamba_n_groups": 1, "n_groups": 1, "mamba_expand": 2,
        "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0, "max_window_layers": 1, "ple_dim": 8, "type_vocab_size": 2, "chunk_size": 16,
        "mamba_chunk_size": 16,
    "qk_head_dim": 12, "moe_layer_freq": 1, "conv_dim": WIDTH, "laurel_rank": 4, "altup_num_inputs": 2,
}  # fmt: skip
LOSES = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id")

# What a kind needs besides.
MLA = dict(num_key_value_heads=HEADS, head_dim=4)  # every head has keys of its own
MAMBA2 = dict(mamba_n_heads=8)  # heads times their width: twice the model's width
PADDED = dict(pad_token_id=2)  # its positions start behind the padding id, which no text of the sweep holds
ROPE = dict(rope_type="default", rope_theta=10_000.0)
WIDER = dict(attention_hidden_size=2 * WIDTH, attention_head_dim=16)  # attention on the lookup beside the hidden states
OTHERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear",
                     "longcat_flash", "minicpm3"), MLA),
    "deepseek_v2": MLA | dict(num_experts_per_tok=2),
    "bamba": MAMBA2, "granitemoehybrid": MAMBA2, "falcon_h1": MAMBA2 | dict(mamba_d_ssm=64), "mamba2": dict(num_heads=8),
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"), PADDED),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]), "nemotron": dict(num_key_value_heads=2, head_dim=8),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), dict(head_dim=8)),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), PADDED | dict(per_layer_config={})),
    "reformer": dict(axial_pos_embds_dim=[16, 16], axial_pos_shape=[8, 8], num_buckets=2),
    **dict.fromkeys(("youtu", "bailing_hybrid"), MLA | dict(n_group=1, topk_group=1)),
    "blt": dict(encoder_hash_byte_group_vocab=50),
    "cohere_compass_text": dict(rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE}),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=10_000.0),
                 ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2)),
    "dots1": dict(moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1,
                  topk_group=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "xlm": PADDED | dict(causal=True), "zaya": dict(num_experts_per_tok=1),
    "xmod": PADDED | dict(default_language="en_XX", languages=["en_XX"]),
    "qwen4_exp_text": dict(indexer_budget=4, indexer_compress_ratio=2, indexer_n_heads=2, indexer_kv_heads=1,
                           indexer_head_dim=8, ngram_vocab_size_base=100),
    "zamba": WIDER | dict(layers_block_type=["mamba", "hybrid", "hybrid"], num_hidden_layers=3),
    "zamba2": WIDER | dict(layers_block_type=["mamba", "hybrid", "hybrid"], num_hidden_layers=3),
    "dots3_note_text": MLA | dict(
        layer_types=["indexed_attention", "sliding_attention"], swa_num_attention_heads=HEADS, swa_num_key_value_heads=HEADS,
        swa_q_lora_rank=16, swa_kv_lora_rank=16, swa_head_dim=12, swa_qk_nope_head_dim=8, swa_v_head_dim=8),
    "roc_bert": dict(shape_vocab_size=V, pronunciation_vocab_size=V, shape_embed_dim=8, pronunciation_embed_dim=8),
}  # fmt: skip


# What is no model of text by itself, or does not run as one.
NOT_TINY = {
    "blt": "bytes in patches that a model of its own cuts; its parts take each other's full sizes",
    "dots3_note": "a model of pictures, sound and text with a size of its own in each part; its text is dots3_note_text",
    "gemma3n": "needs the package timm for its pictures; its text is gemma3n_text",
    "gemma4_assistant": "drafts for a larger model, whose hidden states it is given",
    "gemma4_unified_assistant": "drafts for a larger model, whose hidden states it is given",
    "prophetnet": "predicts several tokens at each place: its readout is given [B, n, T, d]",
    "musicgen": "a decoder of sound behind encoders of text and sound, ids [B · codebooks, T]",
    "musicgen_melody": "a decoder of sound behind encoders of text and sound, ids [B · codebooks, T]",
    "reformer": "asserts train mode wherever a gradient may be asked for, and its hashing draws at random there",
}


class CannotBuild(Exception):
    """A kind that has no tiny model, with the reason."""


def kinds() -> dict[str, str]:
    """The kinds of causal LM by their name in transformers, with the class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    return dict(sorted(names.items()))


def shrunk(config: Any, kind: str, without_ids: bool = True) -> dict[str, Any]:
    """The sizes of a configuration as keyword arguments,
    those of configurations inside it included; special ids none or small."""
    found: dict[str, Any] = {}
    values = config.to_dict()
    aliases = getattr(type(config), "attribute_map", {})
    for name, value in values.items():
        inner = vars(config).get(name)
        if hasattr(inner, "to_dict"):
            found[name] = type(inner)(**shrunk(inner, inner.model_type, without_ids)).to_dict() | {
                "model_type": inner.model_type
            }
        elif name in LOSES:
            found[name] = None if without_ids else LOSES.index(name)
        elif name in SIZES and value is not None and name not in aliases:
            found[name] = SIZES[name]
        elif name in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types") and isinstance(
            value, (list, tuple)
        ):
            each = list(dict.fromkeys(value))  # every type once, the last one twice
            found[name] = (each + each)[: max(LAYERS, len(each))]
    types = [name for name in found if name in ("layer_types", "layers_block_type")]
    for name in types:
        found |= {key: len(found[name]) for key in found if SIZES.get(key) == LAYERS and key.endswith("hidden_layers")}
        if "mlp_layer_types" in found:
            each = found["mlp_layer_types"]
            found["mlp_layer_types"] = (each * len(found[name]))[: len(found[name])]
    return found | OTHERS.get(kind, {})


def build(kind: str) -> nn.Module:
    """A tiny model of a kind, every parameter moved away from its default.

    Raises:
        CannotBuild: with what stands in the way.
    """
    import transformers as tf

    if kind in NOT_TINY:
        raise CannotBuild(NOT_TINY[kind])
    try:
        config = tf.AutoConfig.for_model(kind)
        try:
            config = type(config)(**shrunk(config, kind))
        except Exception:  # some insist on special ids
            config = type(config)(**shrunk(config, kind, without_ids=False))
        if getattr(config, "is_decoder", None) is False:
            config.is_decoder = True
        with torch.device("meta"):
            large = tf.AutoModelForCausalLM.from_config(config)
        size = sum(p.numel() for p in large.parameters())
        if size > LARGEST:
            biggest = max(large.named_parameters(), key=lambda x: x[1].numel())
            raise CannotBuild(f"{size:,} parameters; {biggest[0]} is {list(biggest[1].shape)}")
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config).eval()
        return perturbed(model)
    except CannotBuild:
        raise
    except Exception as error:  # whatever a configuration or a class of somebody else raises is the reason
        raise CannotBuild(reason(error)) from error


def perturbed(model: nn.Module) -> nn.Module:
    """The model with noise on every trainable parameter, larger than at initialisation, so that forces are not all alike."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.is_floating_point():
                p.add_((0.1 if p.dim() == 1 else 0.15) * torch.randn_like(p))
    return model


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]
