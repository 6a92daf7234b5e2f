"""Fine-tuning objectives, each written as its paper's plain loss on the log-probabilities of the given tokens.

Every loss here reads log pi(y_l) of the scored tokens, a vector [L]. Its gradient at the logits is then

    G_l = c_l (pi_l - e_{y_l}),   c_l = -dL/d log pi(y_l),

and autograd on that small vector gives c; the closed forms (docs/theory.md, Objectives) are the tests' oracle. c > 0 pulls
the token up, c < 0 pushes it down. Three generalisations cover the rest: several target tokens per position (c [L, K]), an
entropy term v_l = dL/dH_l, and a uniform target u_l = -dL/d(mean over the vocabulary of log pi_l).

The loss is a SUM over sequences, pairs or prompts (a group), normalised inside each as its paper does (DAPO and what is made
of it are means over all of them); scale eta to turn the sum into a mean. pi_ref and pi_old are fields of the Chi; if absent
they are the policy itself, as at step 0.

    parts.py                what losses are made of       supervised.py       SFT
    against_reference.py    DPO and its kin               reference_free.py   SimPO, ORPO, SLiC; KTO's single answers
    policy.py               PPO, GRPO, other weights      policy_variants.py  gates, masks, redistributed gradients
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .._arguments import objective_name
from ..objective import Objective as Objective
from ..objective import Scores as Scores
from .against_reference import (
    AOT,
    BCO,
    CDPO,
    DPO,
    DPOP,
    EXO,
    IPO,
    NCA,
    SPIN,
    SPPO,
    APODown,
    APOZero,
    DiscoPOP,
    DPONorm,
    RobustDPO,
)
from .policy import DAPO, GRPO, GSPO, PPO, REINFORCE, DrGRPO
from .policy_variants import BNPO, CISPO, GMPO, LLDS, LUSPO, SAPO, VESPO, ClipCov, KLCov, SimKO
from .reference_free import KTO, ORPO, SimPO, SLiC
from .supervised import SFT

__all__ = ["SFT", "DPO", "CDPO", "IPO", "SLiC", "SPPO", "SPIN", "SimPO", "ORPO", "KTO", "DPOP", "EXO", "NCA", "RobustDPO",
           "BCO", "AOT", "APOZero", "APODown", "DiscoPOP", "DPONorm", "PPO", "GRPO", "DrGRPO", "DAPO", "GSPO", "REINFORCE",
           "SimKO", "LLDS", "BNPO", "CISPO", "SAPO", "LUSPO", "VESPO", "GMPO", "ClipCov", "KLCov"]  # fmt: skip


def by_name(name: str, **constants: Any) -> Objective:
    """The objective of that name, in any case, with its constants.

    Raises:
        ValueError: no such objective (names the nearest), or it has no such constant (names those it has).
    """
    cls: Callable[..., Objective] = globals()[objective_name(name, __all__)]
    allowed = [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]
    for constant in constants:
        if constant not in allowed:
            raise ValueError(f"{cls.__name__} has no constant {constant!r}: it has {', '.join(allowed) or 'none'}")
    whole = {f.name for f in fields(cls) if isinstance(f.default, int) and not isinstance(f.default, bool)}  # type: ignore[arg-type]
    for constant, value in constants.items():
        if value is not None and (not math.isfinite(value) or (constant in whole and value != int(value))):
            raise ValueError(
                f"{cls.__name__}: {constant} must be a finite {'whole ' if constant in whole else ''}number, got {value}"
            )
    return cls(**{name: int(value) if name in whole else value for name, value in constants.items()})
