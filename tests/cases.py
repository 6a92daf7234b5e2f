"""Cases that Hypothesis makes up: how many of them, and how many there were."""

from hypothesis import HealthCheck, given, settings

made = [0]  # in this process; `--fuzz-count FILE` writes it


def tried(cases, strategy, check):
    """Check so many cases, drawn anew every time; a failing one is printed so that it can be repeated."""

    @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), database=None, print_blob=True)
    @given(strategy)
    def counted(case):
        made[0] += 1
        check(case)

    counted()
