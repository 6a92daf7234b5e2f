"""The language studies' oracles, each from one quick run: identities and what holds robustly, as each study says."""

from importlib import import_module

import pytest

pytest.importorskip("matplotlib")

# study -> numbers of the claims that CI asserts; the others are measured and reported as they come
ROBUST = {
    "ches_filter": (0,),
    "dpo_decay": (0, 1),
    "extended_sft": (0,),
    "grpo_forces": (0, 2, 3),
    "hallucination": (0, 1, 2),
    "longer_sft_worse_dpo": (0, 1),
    "readout_vs_exact": (0, 1),
    "sft_dynamics": (0, 1, 4),
    "shared_prefix": (0, 1, 2, 4),
    "simko": (0, 1),
}


@pytest.mark.parametrize("name", ROBUST)
def test_oracles_hold(name):
    result = import_module(f"tokdyn.studies.{name}").run(quick=True)
    failed = [claim for i, claim in enumerate(result.claims) if i in ROBUST[name] and not claim.holds]
    assert not failed, "\n".join(f"{claim.claim}: {claim.oracle}; {claim.measured}" for claim in failed)
    assert result.curves and all(table.num_rows for table in result.curves.values())
    assert result.figures and result.title
