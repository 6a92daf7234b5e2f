"""The language studies' oracles, each from one quick run: identities and what holds robustly, as each study says."""

import pyarrow.parquet as pq
import pytest

from tokdyn.studies import gallery

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
def test_oracles_hold(name, tmp_path):
    told = gallery.run_study(name.replace("_", "-"), tmp_path / name, quick=True)
    failed = [claim for i, claim in enumerate(told["claims"]) if i in ROBUST[name] and not claim["holds"]]
    assert not failed, "\n".join(f"{claim['claim']}: {claim['oracle']}; {claim['measured']}" for claim in failed)
    assert all(pq.read_metadata(tmp_path / name / "curves" / f"{curve}.parquet").num_rows for curve in told["curves"])
    assert told["figures"] and told["title"]
