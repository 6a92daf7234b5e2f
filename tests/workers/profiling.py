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
    torch.set_num_threads(1)
    job.PATIENCE, job.BEAT = 2.0, 0.1
    job.Queue.__init__.__defaults__ = (2.0,)
    put, made = tiles.KeptTiles.put, []

    def slow(self, name, *tile):
        if os.environ.get("RANK") == dies and made:  # it has taken a second tile, and is gone over it
            print("dies", flush=True)
            os._exit(9)
        made.append(name)
        time.sleep(0.2)
        put(self, name, *tile)

    tiles.KeptTiles.put = slow
    with job.shared() as team:
        run = td.profile(tiny("llama", tied=False), *sides(), DPO(), out=out, memory=MEMORY, job=team)
    print(len(made), run.path is not None, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
