"""One process of a job that profiles; run by tests/test_shared_profile.py with what a launcher puts into the environment."""

import os
import sys
import time

import torch

import tokdyn as td
from tokdyn.objectives import DPO
from tokdyn.runs import job, tiles
from tokdyn.testing import random_chis, tiny

MEMORY = 1 << 16  # of several tiles


def sides():
    pair = [chi.with_(role=role, group=0) for chi, role in zip(random_chis([(3, 6), (3, 7)], seed=1), ("chosen", "rejected"),
                                                               strict=True)]  # fmt: skip
    return pair, [*pair, *random_chis([(2, 8), (4, 5)], seed=2)]


def main(out, dies):
    """Each process has a tile in hand before any of the first two is kept, so that all have a share however late one starts."""
    torch.set_num_threads(1)
    job.BEAT, patience = 0.1, 30.0 if dies == "none" else 10.0
    job.Queue.__init__.__defaults__ = (patience,)
    put, made = tiles.KeptTiles.put, []

    def together(self, name, *tile):
        if self.job is not None and len(made) < 2:
            key = f"test/{len(made)}"
            self.job._add(key, 1)
            while self.job._count(key) < self.job.ranks:
                time.sleep(0.02)
        if os.environ.get("RANK") == dies and made:  # it has taken a second tile, and is gone over it
            print("dies", flush=True)
            os._exit(9)
        made.append(name)
        put(self, name, *tile)

    tiles.KeptTiles.put = together
    with job.shared() as team:
        run = td.profile(tiny("llama", tied=False), *sides(), DPO(), out=out, memory=MEMORY, job=team)
    print(len(made), run.path is not None, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
