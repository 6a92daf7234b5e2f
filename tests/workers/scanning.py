"""One process of a job that scans; run by tests/scan/test_processes.py with what a launcher puts into the environment."""

import os
import sys
import time

import torch

import tokdyn as td
from tokdyn.objectives import DPO
from tokdyn.runs import job
from tokdyn.scan.scanner import Scanner
from tokdyn.testing import random_chis, tiny


def pairs(n):
    made = []
    for i in range(n):
        chosen, rejected = random_chis([(3, 2 + i % 4), (3, 3 + i % 3)], seed=i)
        made.append([chosen.with_(role="chosen", group=0), rejected.with_(role="rejected", group=0)])
    return made


GROUPS = {"chosen": random_chis([(3, 4), (1, 3)], seed=20), "other": random_chis([(1, 2)], seed=22)}


def main(out, hangs):
    torch.set_num_threads(1)
    job.PATIENCE, job.BEAT = 1.5, 0.1
    job.Queue.__init__.__defaults__ = (1.5,)
    tables = Scanner.tables

    def slow(self, places, first=0):
        if os.environ["RANK"] == hangs and first >= 4:  # it has drawn a block, and is killed over it
            print("hangs", flush=True)
            time.sleep(600)
        time.sleep(0.05)
        return tables(self, places, first)

    Scanner.tables = slow
    scan = td.scan(tiny("llama"), pairs(17), GROUPS, DPO(), out=out, block=2)
    print("complete" if scan.complete else "not complete", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
