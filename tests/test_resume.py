"""A profile whose process is killed goes on with the tiles of its matrix that were written, to the same bytes."""

import os
import signal

import pytest
import torch

import tokdyn as td
from tokdyn.exact.sweep.tile import Tile
from tokdyn.exact.tangents import _TangentPass
from tokdyn.runs import tiles
from tokdyn.testing import random_chis, tiny

BYTES = "tokens.parquet", "forces.safetensors"
ENGINES = {"sweep": (Tile, "fill", 1 << 16), "tangents": (_TangentPass, "columns", 1)}


def profile(out, memory, **options):
    chosen, rejected = (chi.with_(role=role, group=0) for chi, role in zip(random_chis([(3, 5), (3, 4)], seed=2),
                                                                          ("chosen", "rejected"), strict=True))  # fmt: skip
    return td.profile(
        tiny("llama"), [chosen, rejected], random_chis([(2, 4), (1, 3)], seed=3), out=out, memory=memory, **options
    )


@pytest.fixture
def every_tile(monkeypatch):
    monkeypatch.setattr(tiles, "EVERY", 0.0)
    torch.set_num_threads(1)


def made(monkeypatch, engine, then=None):
    """Counts the tiles that an engine makes, and does something before each."""
    of, name, _ = ENGINES[engine]
    whole, count = getattr(of, name), []

    def counted(self, *args):
        count.append(1)
        if then is not None:
            then(len(count))
        return whole(self, *args)

    monkeypatch.setattr(of, name, counted)
    return count


def use(monkeypatch, engine):
    monkeypatch.setattr("tokdyn.exact.engines._sweeps", lambda *_: engine == "sweep")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_profile_goes_on_to_the_same_bytes(tmp_path, monkeypatch, every_tile, engine):
    """SIGKILL before one tile and another; each run goes on, the last makes what is missing alone."""
    use(monkeypatch, engine)
    memory = ENGINES[engine][2]
    count = made(monkeypatch, engine)
    profile(tmp_path / "whole", memory)
    total = len(count)
    assert total >= 4 and not (tmp_path / ".whole.tiles").exists()
    for n in (2, 2):
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            made(monkeypatch, engine, lambda k, n=n: os.kill(os.getpid(), signal.SIGKILL) if k == n else None)
            profile(tmp_path / "run", memory, resume=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert not (tmp_path / "run").exists() and (tmp_path / ".run.tiles" / "manifest-0.json").exists()
    count.clear()
    profile(tmp_path / "run", memory, resume=True)
    assert len(count) == total - 2 and sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]
    for name in BYTES:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_interrupted_profile_is_readable_and_goes_on(tmp_path, monkeypatch):
    """Ctrl-C: what is done is a partial run, and also kept for --resume, however short it took."""
    use(monkeypatch, "sweep")
    memory = ENGINES["sweep"][2]
    profile(tmp_path / "whole", memory)

    def stop(k):
        if k == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        made(patch, "sweep", stop)
        assert profile(tmp_path / "run", memory).about["status"] == "partial"
    with pytest.raises(FileExistsError):
        profile(tmp_path / "run", memory)
    with pytest.raises(ValueError, match=r"\.run\.tiles was begun with memory="):
        profile(tmp_path / "run", 2 * memory, resume=True)
    count = made(monkeypatch, "sweep")
    again = profile(tmp_path / "run", memory, resume=True)
    assert again.about["status"] == "complete" and 0 < len(count)
    assert torch.equal(again.matrix, td.load(tmp_path / "whole").matrix)
    with pytest.raises(FileExistsError, match="exists already"):
        profile(tmp_path / "run", memory, resume=True)


def test_tiles_that_were_left_are_removed_by_a_run_from_the_start(tmp_path, monkeypatch, every_tile):
    use(monkeypatch, "sweep")
    left = tiles.KeptTiles(tmp_path / "run", {"made of": "something else"}, resume=False)
    left.put("sweep 0 0", torch.arange(2), torch.arange(2), torch.zeros(1, 2, 2))
    assert left.folder.exists()
    run = profile(tmp_path / "run", 1 << 30)
    assert run.about["status"] == "complete" and not left.folder.exists()
