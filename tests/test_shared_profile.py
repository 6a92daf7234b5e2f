"""Several processes at one profile: its run is that of one process, bit for bit, also when one of them dies."""

from pathlib import Path

import pytest
from launched import launched

BYTES = "tokens.parquet", "forces.safetensors"
WORKER = Path(__file__).resolve().parent / "workers" / "profiling.py"


def together(out, ranks, dies="none"):
    """The exit status and the words of each process of a job."""
    processes = launched(WORKER, out, dies, ranks=ranks)
    said = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, out.split(), error) for process, (out, error) in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    ((code, (made, written), error),) = together(out, 1)
    assert code == 0 and written == "True" and int(made) >= 4, error
    return out, int(made)


@pytest.mark.parametrize("dies", ["none", "1"])
def test_a_job_makes_the_run_of_one_process(tmp_path, whole, dies):
    """Every tile is made once, unless its process dies over it; the first process alone writes the run."""
    one, tiles = whole
    out = tmp_path / "run"
    first, second = together(out, 2, dies)
    assert first[0] == 0 and first[1][1] == "True", first[2]
    if dies == "none":
        assert second[0] == 0 and second[1][1] == "False", second[2]
        shares = int(first[1][0]), int(second[1][0])
        assert sum(shares) == tiles and min(shares) > 0
    else:
        assert second[0] == 9 and second[1] == ["dies"], second[2]
        assert int(first[1][0]) == tiles - 1  # all but the one that the other had written
    for name in BYTES:
        assert (out / name).read_bytes() == (one / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # no tiles are left
