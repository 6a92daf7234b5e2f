"""The checks of weights: the readout, what has no gradient, what the optimizer does not hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from ..model.unwrap import base_layer, local
from .finding import FINE, SUSPICIOUS, WRONG, Finding, rows_of
from .seen import Seen


def readout(seen: Seen) -> list[Finding]:
    """Whether the readout is tied as the model says, what adapts it, and how many rows it has."""
    lm: Any = seen.lm
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    config = lm.config.get_text_config() if hasattr(lm.config, "get_text_config") else lm.config
    meant, found = bool(getattr(config, "tie_word_embeddings", False)), list[Finding]()
    adapted, copied = hasattr(head, "lora_A") or hasattr(head, "lora_embedding_A"), hasattr(head, "modules_to_save")
    weights = [_weight(module) for module in (head, embedding)]
    tied = weights[0] is weights[1] or weights[0].data_ptr() == weights[1].data_ptr() != 0
    how = (
        "a copy of it is trained (modules_to_save)"
        if copied
        else "an adapter is on it alone"
        if adapted
        else "they are two tensors"
    )
    if meant and (not tied or adapted or copied):
        what = f"the model ties its readout to its embedding, and in this training {how}: the two part"
        do = "leave lm_head out of target_modules and modules_to_save (or ensure_weight_tying=True in PEFT's config)"
        level = WRONG if not tied and not copied and not adapted else SUSPICIOUS
        found.append(Finding("readout", level, what, type(head).__name__, do=do))
    V, known = int(weights[0].shape[0]), len(seen.tokenizer) if hasattr(seen.tokenizer, "__len__") else None
    if known is not None and known > V:
        do = "model.resize_token_embeddings(len(tokenizer))"
        found.append(
            Finding("readout", WRONG, f"the tokenizer has {known} tokens and the readout {V} rows", "", known - V, "rows", do)
        )
    if found:
        return found
    beyond = f", {V - known} rows beyond the tokenizer" if known is not None and V > known else ""
    about = f"{'tied to the embedding' if tied else 'a weight of its own'}{', adapted' if adapted or copied else ''}{beyond}"
    return [Finding("readout", FINE, f"the readout is {about}", "", V, "rows")]


def _weight(module: Any) -> torch.Tensor:
    """The weight that a module computes with: the copy that is trained, or the adapted layer's own."""
    if hasattr(module, "modules_to_save"):
        active = getattr(module, "active_adapters", None) or [getattr(module, "active_adapter", None)]
        saved = [module.modules_to_save[name] for name in active if name in module.modules_to_save]
        module = saved[0] if saved else module.original_module
    return base_layer(module).weight


def gradients(seen: Seen) -> list[Finding]:
    """Trained parameters without gradient or that the optimizer does not hold, and frozen ones among trained ones."""
    if not seen.forwards:
        return []
    named = dict(seen.lm.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    found = list[Finding]()
    broken = [n for n, g in seen.gradients.items() if not bool(torch.isfinite(local(g)).all())]
    if broken:
        do = "look for overflow in half precision, or a division by no tokens"
        found.append(Finding("gradients", WRONG, "gradients are not finite", rows_of(broken), len(broken), "tensors", do))
    still = [n for n in trained if n not in seen.gradients or not bool(local(seen.gradients[n]).any())]
    still = [n for n in still if not _waits(n, named, seen) and "expert" not in n]
    if not seen.pushed:
        found.append(_no_push(seen))
    elif still:
        what = "parameters are trained and have no gradient in this batch"
        do = "see whether the forward pass uses them (sinks, routers, a head that the loss goes past), or freeze them"
        found.append(Finding("gradients", SUSPICIOUS, what, rows_of(still, 5), len(still), f"of {len(trained)} tensors", do))
    if seen.optimizer is not None:
        held = {id(p) for group in seen.optimizer.param_groups for p in group["params"]}
        lost = [n for n, p in trained.items() if id(p) not in held]
        if lost:
            do = "make the optimizer from the parameters that are trained, after adapters and embeddings were added"
            what = "parameters are trained that the optimizer does not hold: they never move"
            found.append(Finding("gradients", WRONG, what, rows_of(lost, 5), len(lost), f"of {len(trained)} tensors", do))
    odd = _frozen_among_trained(trained, [n for n, p in named.items() if not p.requires_grad])
    if odd:
        do = "set requires_grad, or ignore this where it is meant"
        what = "parameters are frozen while others of their kind, in other layers, are trained"
        found.append(Finding("gradients", SUSPICIOUS, what, rows_of(odd, 5), len(odd), "tensors", do))
    if found:
        return found
    moved = sum(p.numel() for n, p in trained.items() if n in seen.gradients)
    share = moved / max(sum(p.numel() for p in named.values()), 1)
    return [
        Finding("gradients", FINE, f"all {len(trained)} trained tensors have a gradient", "", 100 * share, "% of all weights")
    ]


def _no_push(seen: Seen) -> Finding:
    """That c is 0 at every token, and whether advantages are the reason."""
    told = [A for f in seen.forwards if (A := f.metadata.get("advantages")) is not None]
    equal = bool(told) and not any(bool(A.any()) for A in told)
    what = "c is 0 at every scored token: the step teaches nothing"
    why = " (all advantages are 0: within each group the rewards are equal)" if equal else ""
    do = (
        "look at what the reward functions return, also for answers that were cut"
        if equal
        else "look at what the loss multiplies log-probs with: beta, weights, a mask"
    )
    return Finding("gradients", SUSPICIOUS, what + why, "", sum(map(len, seen.forwards)), "tokens", do)


def rounding(seen: Seen) -> list[Finding]:
    """The share of trained weights that are half precision, and so large that a step of Adam's is rounded away.

    Adam moves a weight by about the learning rate. bfloat16 holds 8 bits: w + lr is w where lr < 2^-9 |w|, about.
    """
    trained = [p for p in seen.lm.parameters() if p.requires_grad and p.is_floating_point()]
    rates = _rates(seen)
    half = [p for p in trained if p.element_size() < 4 and rates.get(id(p))]
    if not half:
        return []
    still = 0
    for p in half:
        w, lr = local(p.detach()), rates[id(p)]
        up, down = ((w.float() + step).to(w.dtype) for step in (lr, -lr))
        still += int(((up == w) & (down == w)).sum())
    total = sum(local(p).numel() for p in trained)
    share, lr, dtype = 100 * still / total, max(rates[id(p)] for p in half), str(half[0].dtype).removeprefix("torch.")
    if 2 * still < total:
        return [Finding("rounding", FINE, f"steps of {lr:g} move most {dtype} weights", "", share, "% are too large for it")]
    what = f"the trained weights are {dtype}, and a step of Adam's, {lr:g}, is rounded away at most of them"
    do = "keep the weights in float32 (load them so, and train with bf16=True), a larger learning rate, or stochastic rounding"
    return [Finding("rounding", SUSPICIOUS, what, "", share, "% do not move", do)]


def _rates(seen: Seen) -> dict[int, float]:
    """The highest learning rate of each parameter under Adam, by id; empty where another optimizer steps."""
    optimizer: Any = seen.optimizer
    if optimizer is None:  # not made yet: what the options say
        name, lr = str(getattr(seen.option("optim"), "value", seen.option("optim"))), seen.option("learning_rate")
        return {id(p): float(lr) for p in seen.lm.parameters()} if name.startswith("adam") and lr else {}
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return {}
    return {id(p): float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups for p in g["params"]}


def _waits(name: str, named: dict[str, torch.nn.Parameter], seen: Seen) -> bool:
    """Whether a parameter has no gradient because the other factor of its adapter is still 0, as LoRA begins."""
    for first, second in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"), ("hada_w1_a", "hada_w2_a"),
                          ("lokr_w1", "lokr_w2"), ("vera_lambda_d", "vera_lambda_b")):  # fmt: skip
        for one, other in ((first, second), (second, first)):
            partner = named.get(name.replace(one, other)) if one in name else None
            if partner is not None and not bool(local(partner).any()):
                return True
    return False


def _frozen_among_trained(trained: Sequence[str] | dict[str, Any], frozen: Sequence[str]) -> list[str]:
    """Frozen parameters whose kind, their name without numbers, is trained elsewhere."""
    kinds = {re.sub(r"\d+", "#", name) for name in trained}
    return [name for name in frozen if re.sub(r"\d+", "#", name) in kinds and re.search(r"\d", name)]
