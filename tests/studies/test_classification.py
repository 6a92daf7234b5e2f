"""Each study of classification and squeezing in its quick form: every claim meets its oracle, but for those named here."""

import pytest

from tokdyn import studies
from tokdyn.studies import gallery

# claims, by how they begin, that are measured and not asserted: few seeds do not decide them as many do, or theory does not
# say that they hold; docs/gallery.md has the numbers of the full form
OPEN = {
    "feature-adaptation": ["With growing energy h·h₀"],
    "ntk-stability": ["In fine-tuning the demo model"],
    "simko-tree": ["SimKO with α = 0.01"],
    "simplicity-bias": ["Examples of a good mapping help each other"],
    "zig-zag": ["With wrong labels, a student"],
}


@pytest.mark.parametrize(
    "name", ["digits", "feature-adaptation", "ntk-stability", "simko-tree", "simplicity-bias", "squeezing", "zig-zag"]
)
def test_claims_hold(name, tmp_path):
    told = gallery.run_study(name, tmp_path / name, quick=True)
    open_ = OPEN.get(name, [])
    missed = [claim["claim"] for claim in told["claims"] if not claim["holds"] and not claim["claim"].startswith(tuple(open_))]
    assert not missed, gallery.verdicts(told)
    assert all(any(claim["claim"].startswith(start) for claim in told["claims"]) for start in open_)
    assert told["title"] and told["figures"] and told["curves"]
    assert studies.load(name).run.__doc__
