"""Each study of classification and squeezing in its quick form: every claim that tests/claims.py asserts meets its oracle."""

import pytest
from claims import CLASSIFICATION, problems

from tokdyn.studies import gallery


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_claims_hold(name, studies):
    told = gallery.run_study(name, studies / name, gallery.Settings(quick=True))
    assert not problems(told), "\n".join(problems(told))
    assert told["title"] and told["figures"] and told["curves"]
