"""Each language study in its quick form: the identities and robust claims that tests/claims.py asserts meet their oracles."""

import pyarrow.parquet as pq
import pytest
from claims import LANGUAGE, problems

from tokdyn.studies import gallery


@pytest.mark.parametrize("name", LANGUAGE)
def test_claims_hold(name, studies):
    told = gallery.run_study(name, studies / name, gallery.Settings(quick=True))
    assert not problems(told), "\n".join(problems(told))
    assert all(pq.read_metadata(studies / name / "curves" / f"{curve}.parquet").num_rows for curve in told["curves"])
    assert told["figures"] and told["title"]
