"""Every kind of causal LM in the installed transformers, and every method of PEFT, against one gradient per token.

    python benchmarks/families.py [KIND...] [--json FILE] [--markdown FILE] [--minutes N] [--again]
    python benchmarks/families.py --peft ...

Each kind is built tiny: its own configuration with every size shrunk, two layers of width 32, random weights. A row of the
table is the error of the matrix and of both reductions against method="naive" (relative to the naive matrix, and to the sum of
magnitudes for reductions), the rules that parameters took part by, and the seconds. A run goes on where the last one stopped
(`--json` holds what is done) and ends after `--minutes`; kinds that cannot be built, or fail, are rows with their reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tokdyn as td
from tokdyn.testing import random_chis, relative_error

V, BOUND = 61, 1e-5  # float32: tests/exact/test_architectures.py
LARGEST = 4_000_000  # parameters of what counts as tiny
SECONDS = 45  # for one kind
UPDATE, OBSERVE = random_chis([(5, 3), (2, 4)], seed=1, vocabulary=V), random_chis([(4, 4), (1, 2)], seed=2, vocabulary=V)

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
PADDED = dict(pad_token_id=1)  # its positions start behind the padding id
OTHERS: dict[str, dict[str, Any]] = {
    "axk1": MLA, "deepseek_v3": MLA, "longcat_flash": MLA, "deepseek_v2": MLA | dict(num_experts_per_tok=2),
    "bamba": MAMBA2, "granitemoehybrid": MAMBA2, "falcon_h1": MAMBA2 | dict(mamba_d_ssm=64), "mamba2": dict(num_heads=8),
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
        "xmod"), PADDED),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]), "nemotron": dict(num_key_value_heads=2, head_dim=8),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), dict(head_dim=8)),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), dict(per_layer_config={})),
    "reformer": dict(axial_pos_embds_dim=[16, 16], axial_pos_shape=[8, 8], num_buckets=2),
    "roc_bert": dict(shape_vocab_size=V, pronunciation_vocab_size=V, shape_embed_dim=8, pronunciation_embed_dim=8),
}  # fmt: skip


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
        inner = getattr(config, name, None)
        if hasattr(inner, "to_dict"):
            found[name] = type(inner)(**shrunk(inner, "", without_ids)).to_dict() | {"model_type": inner.model_type}
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


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so many seconds."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def measured(model: nn.Module) -> dict[str, Any]:
    """A row: errors of the matrix and of both reductions against autograd, how many tensors went by which rule, seconds."""
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    start = time.perf_counter()
    naive = td.forces(model, UPDATE, OBSERVE, method="naive").matrix
    assert naive is not None
    row["seconds naive"] = round(time.perf_counter() - start, 2)
    if not bool(naive.isfinite().all()):
        raise ValueError("the naive matrix is not finite")
    again = td.forces(model, UPDATE, OBSERVE, method="naive").matrix
    assert again is not None
    row["repeats"] = relative_error(again, naive)
    start = time.perf_counter()
    try:
        fast = td.forces(model, UPDATE, OBSERVE)
        row["matrix"] = relative_error(fast.matrix, naive)
        row["rules"] = dict(Counter(rule for rule in fast.coverage.values() if rule != "frozen"))
    except Exception as error:
        row["matrix"] = reason(error)
    for reduce, axis in (("update", 1), ("observe", 0)):
        try:
            vector = td.forces(model, UPDATE, OBSERVE, reduce=reduce).vector
            row[reduce] = float((vector - naive.sum(axis)).norm() / naive.abs().sum(axis).norm())
        except Exception as error:
            row[reduce] = reason(error)
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def is_right(row: dict[str, Any]) -> bool:
    """Whether all three figures are there and below the bound."""
    return all(isinstance(row.get(name), float) and row[name] < BOUND for name in ("matrix", "update", "observe"))


def row_of(name: str, make: Any) -> dict[str, Any]:
    """The row of one kind or method; what is raised is part of it."""
    try:
        with at_most(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return measured(make(name))
    except CannotBuild as error:
        return {"not built": str(error)}
    except Exception as error:
        return {"failed": reason(error)}


def drawn(day: date, count: int = 12) -> list[str]:
    """So many kinds for a day: all of them come up as days go by."""
    every = list(kinds())
    start = day.toordinal() * count
    return [every[(start + i) % len(every)] for i in range(count)]


# ------------------------------------------------------------------------------------------------------------ PEFT


def methods() -> dict[str, Any]:
    """PEFT's methods by name, each a function that adapts a model."""
    import peft

    both, mlp = ["q_proj", "v_proj"], ["down_proj"]
    lora = dict(r=4, lora_alpha=8, target_modules="all-linear")
    plain = dict(target_modules=both + mlp)
    prompts = dict(num_virtual_tokens=3)
    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "LoRA": ("LoraConfig", lora), "rsLoRA": ("LoraConfig", lora | dict(use_rslora=True)),
        "DoRA": ("LoraConfig", lora | dict(use_dora=True)), "LoRA bias": ("LoraConfig", lora | dict(bias="all",
            lora_bias=True)),
        "LoRA on embeddings": ("LoraConfig", dict(r=4, target_modules=["embed_tokens", *both])),
        "LoRA modules_to_save": ("LoraConfig", dict(r=4, target_modules=both, modules_to_save=["down_proj"])),
        "LoRA token indices": ("LoraConfig", dict(r=4, target_modules=both, trainable_token_indices=[3, 5])),
        "PiSSA": ("LoraConfig", lora | dict(init_lora_weights="pissa")),
        "AdaLoRA": ("AdaLoraConfig", plain | dict(init_r=4, target_r=2, total_step=10)),
        "LoHa": ("LoHaConfig", plain | dict(r=4)), "LoKr": ("LoKrConfig", plain | dict(r=4)),
        "IA3": ("IA3Config", dict(target_modules=[*both, "down_proj"], feedforward_modules=["down_proj"])),
        "VeRA": ("VeraConfig", dict(target_modules=both, r=4)), "RandLoRA": ("RandLoraConfig", dict(target_modules=both, r=4)),
        "OFT": ("OFTConfig", plain | dict(oft_block_size=4)), "BOFT": ("BOFTConfig", plain | dict(boft_block_size=4)),
        "HRA": ("HRAConfig", plain | dict(r=4)), "FourierFT": ("FourierFTConfig", plain | dict(n_frequency=10)),
        "LN tuning": ("LNTuningConfig", dict(target_modules=["input_layernorm", "norm"])),
        "VB-LoRA": ("VBLoRAConfig", plain | dict(r=2, num_vectors=8, vector_length=8, topk=2)),
        "MiSS": ("MissConfig", plain | dict(r=4)), "ROAD": ("RoadConfig", plain | dict(group_size=8)),
        "C3A": ("C3AConfig", plain | dict(block_size=8)), "SHiRA": ("ShiraConfig", plain | dict(r=2)),
        "HiRA": ("HiraConfig", plain | dict(r=4)), "WaveFT": ("WaveFTConfig", plain | dict(n_frequency=10)),
        "DeLoRA": ("DeloraConfig", plain | dict(r=4)), "GraLoRA": ("GraloraConfig", plain | dict(r=4, gralora_k=2)),
        "OSF": ("OSFConfig", plain | dict(effective_rank=4)), "PSOFT": ("PsoftConfig", plain | dict(r=4)),
        "TinyLoRA": ("TinyLoraConfig", plain | dict(r=2)), "trainable tokens": ("TrainableTokensConfig",
            dict(token_indices=[3, 5], target_modules=["embed_tokens"])),
        "prompt tuning": ("PromptTuningConfig", prompts), "P-tuning": ("PromptEncoderConfig",
            prompts | dict(encoder_hidden_size=16)),
        "prefix tuning": ("PrefixTuningConfig", prompts), "adaption prompt": ("AdaptionPromptConfig", dict(adapter_len=3,
            adapter_layers=1)),
        "CPT": ("CPTConfig", dict(cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4])),
    }  # fmt: skip

    def adapt(name: str) -> nn.Module:
        kind, options = configs[name]
        if not hasattr(peft, kind):
            raise CannotBuild(f"peft {peft.__version__} has no {kind}")
        model = build("llama")
        try:
            return perturbed(peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **options)).eval())
        except Exception as error:
            raise CannotBuild(reason(error)) from error

    return dict.fromkeys(configs, adapt)


# ------------------------------------------------------------------------------------------------------------ the table


def figure(value: Any) -> str:
    """A figure, in bold where it is wrong; what was raised as it is."""
    if isinstance(value, float):
        return f"{value:.1e}" if value < BOUND else f"**{value:.1e}**"
    return "" if value is None else f"**{value}**".replace("|", "\\|")


def rules_of(row: dict[str, Any]) -> str:
    """How many tensors went by which rule."""
    return ", ".join(f"{n} {rule}" for rule, n in sorted(row.get("rules", {}).items(), key=lambda x: -x[1])).replace("|", "\\|")


def table(rows: dict[str, dict[str, Any]], what: str) -> list[str]:
    """The rows as Markdown: those that ran, then those that did not."""
    ran = {name: row for name, row in rows.items() if "seconds naive" in row}
    lines = [
        f'| {what} | matrix | reduce="update" | reduce="observe" | tensors by rule | s, naive | s, all three |',
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in ran.items():
        figures = " | ".join(figure(row.get(x)) for x in ("matrix", "update", "observe"))
        noisy = f" (does not repeat itself: {row['repeats']:.0e})" if row.get("repeats", 0) > BOUND else ""
        lines.append(f"| {name}{noisy} | {figures} | {rules_of(row)} | {row['seconds naive']} | {row['seconds']} |")
    for title, key in (("Fails, also with one gradient per token:", "failed"), ("Not built tiny:", "not built")):
        some = {name: row[key] for name, row in rows.items() if key in row}
        if some:
            lines += ["", title, "", f"| {what} | reason |", "|---|---|"]
            lines += [f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in some.items()]
    return lines


def markdown(found: dict[str, Any]) -> str:
    """docs/families.md from what a run left."""
    families, adapters = found.get("kinds", {}), found.get("peft", {})
    right = sum(map(is_right, families.values()))
    ran = sum("seconds naive" in row for row in families.values())
    of = found["versions"]
    text = f"""# Families and adapters

Written by `make sweep` (benchmarks/families.py) from benchmarks/results/families.json; not by hand. transformers
{of["transformers"]}, PEFT {of["peft"]}, torch {of["torch"]}, float32 on a CPU.

Each row is a random model of two layers and width 32: the error of `td.forces` against `method="naive"`, one autograd gradient
per token, relative to the norm of the matrix, of a reduction relative to the sums of magnitudes. **Bold is wrong**, or what was
raised. The bound is {BOUND:.0e}, as in tests/exact/test_architectures.py. "One direction per token" is exact, and slower.

What is known of the bold ones: models that are not causal (CPM-Ant, XLNet), or whose backward pass is not the derivative of
their forward pass (HRM runs cycles without gradients), are refused by name. Where a text holds the padding id of a tied
embedding (RoBERTa and its relatives) a reduction's tangent pass moves that row, as a real step does; autograd gives a padding
row no gradient as a lookup, so that the matrix leaves it out. RandLoRA and trainable tokens miss the bound by rounding (1e-13
in float64), SHiRA by finite differences. Not seen by any row: GLM-MoE-DSA with ties among the scores that
its indexer takes the largest of, 0.70 off in a batch and without a word. Rows were measured one after the other while the code
changed: run `make sweep` for those of one tree.

{len(families)} kinds of {len(kinds())} were tried: {ran} ran, {right} of them with all three figures right;
{len(families) - ran} did not run.

## Kinds of causal LM
"""
    lines = [text, *table(families, "kind"), "", "## Methods of PEFT", ""]
    lines += ["On a Llama, away from the adapter's start.", "", *table(adapters, "method"), ""]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """What the figures are of."""
    import peft
    import transformers

    return {
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "torch": str(torch.__version__).partition("+")[0],
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="families.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/families.json"))
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--peft", action="store_true", help="PEFT's methods instead of kinds")
    parser.add_argument("--again", action="store_true", help="also what is in the file already, and was right")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    found = json.loads(options.json.read_text()) if options.json.exists() else {}
    found["versions"] = versions()
    rows = found.setdefault("peft" if options.peft else "kinds", {})
    make = methods() if options.peft else dict.fromkeys(kinds(), build)
    end = time.monotonic() + 60 * options.minutes
    for name in options.names or make:
        if time.monotonic() > end:
            print("out of time: run it again to go on")
            break
        if name in rows and not options.again and not options.names:
            continue
        rows[name] = row_of(name, make[name])
        print(name, rows[name], flush=True)
        found["peft" if options.peft else "kinds"] = {key: rows[key] for key in make if key in rows}
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(found))


if __name__ == "__main__":
    main()
