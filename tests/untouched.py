"""Families that a trace has to look at, and forces of a model that was never traced: one sequence at a time, by autograd."""

import torch

from tokdyn.testing import _perturbed as perturbed
from tokdyn.testing import random_chis

U, O = random_chis([(5, 3), (2, 4)], seed=1), random_chis([(4, 4), (1, 2)], seed=2)  # noqa: E741
FP32 = 1e-5  # two layers there and back, some 30 sums of up to 64 terms: √(30·64) eps = 5e-6 in either factor

WIDE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
SPARSE = dict(
    num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=8, q_lora_rank=16,
    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, index_topk=3, index_head_dim=16, index_n_heads=8,
    mlp_layer_types=["dense", "sparse"], layer_types=["indexed_attention"] * 2, indexer_types=["full"] * 2,
)  # fmt: skip
CYCLES = dict(hidden_size=32, num_attention_heads=4, intermediate_size=48, num_layers_per_stack=1, num_hidden_layers=8,
              head_dim=8, prefix_lm=False)  # fmt: skip
SHAPES = {
    "dsa": ("GlmMoeDsaConfig", "GlmMoeDsaForCausalLM", WIDE | SPARSE),  # asks for attentions by name
    "doge": ("DogeConfig", "DogeForCausalLM", WIDE | dict(num_key_value_heads=2, keep_window_size=4)),  # adds to its scores
    "git": ("GitConfig", "GitForCausalLM", WIDE | dict(vision_config=VISION)),  # asks for a class by the attention's name
    "bert as decoder": ("BertConfig", "BertLMHeadModel", WIDE | dict(is_decoder=True)),
    "bert": ("BertConfig", "BertLMHeadModel", WIDE),
    "xlnet": ("XLNetConfig", "XLNetLMHeadModel", dict(d_model=32, n_layer=2, n_head=4, d_inner=48)),
    "cpmant": ("CpmAntConfig", "CpmAntForCausalLM", dict(hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48,
                                                         num_hidden_layers=2, prompt_length=4)),
    "hrm": ("HrmTextConfig", "HrmTextForCausalLM", CYCLES),  # part of its cycles runs under no_grad
}  # fmt: skip


def build(name, **more):
    import transformers as tf

    config, model, shape = SHAPES[name]
    torch.manual_seed(0)
    special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return perturbed(getattr(tf, model)(getattr(tf, config)(vocab_size=61, **special, **(shape | more))).eval())


def log_probs(model, chi, padding=0):
    """log pi of the scored tokens by the model itself, behind so many places of padding."""
    ids = torch.nn.functional.pad(chi.ids, (padding, 0))[None]
    mask = {"attention_mask": (torch.arange(ids.shape[1]) >= padding).long()[None]} if padding else {}
    z = model(ids, use_cache=False, **mask).logits[0, padding:].log_softmax(-1)
    where = chi.scored.nonzero().squeeze(1)
    return z[where - 1, chi.ids[where]]


def gradients(model, chis):
    """∇ log pi of every scored token [N, P], each by a backward pass of its own."""
    own = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for chi in chis:
        for value in log_probs(model, chi, chi.padding):
            grads = torch.autograd.grad(value, own, retain_graph=True, allow_unused=True)
            filled = (torch.zeros_like(p) if g is None else g for p, g in zip(own, grads, strict=True))
            rows.append(torch.cat([g.flatten() for g in filled]))
    return torch.stack(rows).double()


def gram(model, update=U, observe=O):
    """F of SFT, whose force at the logits is that of log pi."""
    return gradients(model, observe) @ gradients(model, update).T
