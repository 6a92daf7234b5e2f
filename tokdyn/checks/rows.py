"""The checks of rows against the same rows alone, and of the policy against its reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..model.readout import readout_of
from ..model.unwrap import unwrap
from ..training.forward import Forward
from ..training.isolation import Call, alone, body_inputs, first_leak, last_hidden, quiet
from .finding import FINE, SUSPICIOUS, WRONG, Finding
from .seen import Seen, bound_of

PACKED = "pack for layers that know where a row ends (position_ids that start again; seq_idx for recurrences), or do not pack"
MOST = 8  # rows that are run alone


def rows_alone(seen: Seen) -> list[Finding]:
    """Packed, padding-free and padded rows against the same rows alone: the largest difference of a scored log-prob."""
    if seen.sharded:
        raise ValueError("the weights are sharded: no pass of our own is made")
    worst, leak, compared, form = 0.0, "", 0, ""
    bound = bound_of(seen.forwards)
    for f in seen.forwards:
        call, layout = seen.call_of(f), f.layout
        if call is None or layout.ids is None or seen.readout is None or compared >= MOST:
            continue
        with quiet(seen.lm):
            together = last_hidden(seen.lm, body_inputs(call)).flatten(0, 1)
            for s in range(min(layout.sequences, MOST - compared)):
                own = f.sequence == s
                row = alone(layout, s)
                if not bool(own.any()) or len(row.places) < 2:
                    continue
                compared += 1
                by_itself = last_hidden(seen.lm, row.inputs)[0]
                at, y = f.position[own] - 1, f.targets[own]
                inside = at < len(row.places)
                at, y = at[inside], y[inside]
                packed, single = (_scored(seen, h, y, f.temperature) for h in (together[row.places[at]], by_itself[at]))
                difference = float((packed - single).abs().max()) if len(at) else 0.0
                if difference > worst:
                    worst, form = difference, _form(f)
                    if worst > bound and not leak:
                        found = first_leak(seen.lm, call, row, bound)
                        leak = "" if found is None else f"first in {found.name} ({found.kind})"
    if not compared:
        return []
    if worst <= bound:
        return [Finding("rows alone", FINE, f"{compared} rows compute the same in the batch and alone", "", worst, "nats")]
    what = f"rows in a {form} batch do not compute what they compute alone"
    do = PACKED if form == "packed" else "pad on the right, or pass position_ids and attention_mask"
    return [Finding("rows alone", WRONG, what, leak, worst, "nats", do)]


def _form(f: Forward) -> str:
    """How the rows of a pass lie in its batch."""
    layout = f.layout
    if layout.sequences > layout.real.shape[0]:
        return "packed"
    return "left-padded" if bool((~layout.real[:, 0]).any()) else "padded"


def _scored(seen: Seen, hidden: Tensor, y: Tensor, temperature: float) -> Tensor:
    assert seen.readout is not None
    z = seen.readout.logits(hidden.to(seen.readout.weight.dtype)).float() / temperature
    return z.log_softmax(1).gather(1, y[:, None]).squeeze(1)


# ---------------------------------------------------------------- the reference


def reference(seen: Seen) -> list[Finding]:
    """Which weights the reference is, and how far the policy is from it before the first step."""
    if seen.sharded:
        raise ValueError("the weights are sharded: no pass of our own is made")
    gaps, name = list[Tensor](), ""
    for f in seen.forwards:
        found = reference_of(seen, f)
        if found is None:
            continue
        name, ref, summed = found
        call = seen.call_of(f)
        if call is None or seen.readout is None:
            continue
        with quiet(seen.lm):
            own = _of_model(seen.lm, call, f)
        if summed:
            own = torch.zeros(f.layout.sequences, device=own.device).index_add_(0, f.sequence, own)
        gaps.append((own - ref.to(own)).float().cpu())
    if not gaps:
        return []
    gap = torch.cat(gaps)
    n = max((len(f) // max(f.layout.sequences, 1) for f in seen.forwards), default=1) if summed else 1
    bound, worst = bound_of(seen.forwards) * n**0.5, float(gap.abs().max())
    if not seen.first:
        return [Finding("reference", FINE, f"the reference is {name}", "", worst, "nats from it, after steps")]
    if worst <= bound:
        return [Finding("reference", FINE, f"the reference is {name}, and the policy begins as it", "", worst, "nats")]
    what = f"the reference is {name}, and the policy differs from it before the first step"
    do = ("load policy and reference from the same weights; where an adapter goes on training, keep a copy of it as the "
          "reference (TRL loads it as adapter \"ref\"), for without it the reference is the base model")  # fmt: skip
    return [Finding("reference", SUSPICIOUS, what, "", worst, "nats", do)]


def reference_of(seen: Seen, f: Forward) -> tuple[str, Tensor, bool] | None:
    """What the reference is, its log-probs, and whether they are sums over a sequence; None where the loss has none."""
    batch: Mapping[str, Any] = f.metadata.get("batch") or {}
    if isinstance(batch.get("ref_per_token_logps"), Tensor):
        return f"log-probs in the batch ({_whose(seen)})", f.of_rows(batch["ref_per_token_logps"]), False
    if isinstance(batch.get("ref_chosen_logps"), Tensor):
        return "log-probs computed beforehand", torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]), True
    if "roles" not in f.metadata or not hasattr(seen.trainer, "ref_model"):
        return None
    call, model = seen.call_of(f), seen.trainer.ref_model
    if call is None:
        return None
    if model is not None:
        lm = unwrap(model)[0]
        with quiet(lm):
            return _whose(seen), _of_model(lm, call, f), False
    if not seen.outer or not hasattr(seen.outer[0], "disable_adapter"):
        return None
    with _without_adapter(seen.outer[0]), quiet(seen.lm):
        return _whose(seen), _of_model(seen.lm, call, f), False


def _whose(seen: Seen) -> str:
    """The reference's weights in words."""
    if getattr(seen.trainer, "ref_model", None) is not None:
        return "another model"
    adapters = getattr(seen.outer[0], "peft_config", None) if seen.outer else None
    if adapters is not None:
        return 'the adapter "ref"' if "ref" in adapters else "this model with its adapter off"
    return "this model"


@contextlib.contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    """The reference inside a PEFT model: its adapter "ref" where there is one, else the base model."""
    if "ref" not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    active, trained = model.active_adapter, [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.set_adapter("ref")
        yield
    finally:
        model.set_adapter(active)
        for p, was in trained:
            p.requires_grad_(was)


def _of_model(lm: nn.Module, call: Call, f: Forward) -> Tensor:
    """Log-probs of a pass's scored tokens under a model, as the pass was called."""
    hidden = last_hidden(lm, body_inputs(call)).flatten(0, 1)
    readout = readout_of(lm, adapted=True)
    z = readout.logits(hidden[_places(f)].to(readout.weight.dtype)).float() / f.temperature
    return z.log_softmax(1).gather(1, f.targets[:, None]).squeeze(1)


def _places(f: Forward) -> Tensor:
    """The hidden states of a whole pass that score its tokens; f.rows counts those that the pass kept."""
    return f.batch * f.layout.real.shape[1] + f.column - 1
