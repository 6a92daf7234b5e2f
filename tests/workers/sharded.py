"""One of two ranks with a model under FSDP2, RANK STORE OUT: reductions, verify, the readout's matrix, and what is refused."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import tokdyn as td
from tokdyn.objectives import DPO, SFT
from tokdyn.testing import random_chis, tiny

LR = 1e-3
PAIR = [chi.with_(role=role, group=0) for chi, role in zip(random_chis([(3, 5), (3, 4)], seed=2), ("chosen", "rejected"),
                                                           strict=True)]  # fmt: skip
WATCHED = random_chis([(2, 4), (1, 3)], seed=3)
KINDS = "llama", "llama, tied"


def model(kind):
    family, _, tied = kind.partition(", ")
    return tiny(family, tied=bool(tied))


def answers(lm):
    """What is asked of a model, whole or spread over ranks."""
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=LR)
    found = {
        "update": td.forces(lm, PAIR, WATCHED, DPO(), reduce="update").vector,
        "observe": td.forces(lm, PAIR, WATCHED, DPO(), reduce="observe").vector,
        "entropy": td.forces(lm, PAIR, WATCHED, SFT(), reduce="observe", observable="entropy").vector,
        "optimizer": td.forces(lm, PAIR, WATCHED, DPO(), reduce="update", optimizer=optimizer).vector,
        "readout": td.forces(lm, PAIR, WATCHED, DPO(), scope="readout").matrix,
        "some": td.forces(lm, PAIR, WATCHED, DPO(), reduce="update", scope="mlp").vector,
    }
    checked = td.verify(lm, PAIR, WATCHED, DPO())
    return found | {"predicted": checked.predicted, "actual": checked.actual}, checked.order


def refusals(lm):
    """What a sharded model is not asked."""
    said = {}
    for name, ask in {
        "matrix": lambda: td.forces(lm, PAIR, WATCHED, DPO()),
        "naive": lambda: td.forces(lm, PAIR, WATCHED, DPO(), method="naive"),
        "groups": lambda: td.forces(lm, PAIR, WATCHED, DPO(), groups="sequence"),
        "both": lambda: td.forces(lm, PAIR, WATCHED, DPO(), reduce="both"),
        "by": lambda: td.forces(lm, PAIR, WATCHED, DPO(), reduce="update", by="layer"),
        "scan": lambda: td.scan(lm, [PAIR], WATCHED, out=sys.argv[3] + "/scan"),
    }.items():
        try:
            ask()
            said[name] = "done"
        except ValueError as error:
            said[name] = str(error)
    return said


def losses(lm, ask):
    """Three steps of a training; tokdyn asks between backward and step."""
    lm.train()
    opt = torch.optim.SGD(lm.parameters(), lr=0.05)
    found = []
    for n in range(3):
        ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(n))
        loss = lm(input_ids=ids, labels=ids).loss
        loss.backward()
        if ask:
            td.forces(lm, PAIR, WATCHED, DPO(), reduce="update")
            td.verify(lm, PAIR, WATCHED, DPO())
        opt.step()
        opt.zero_grad()
        found.append(float(loss.detach()))
    return found


def sharded(kind):
    lm, mesh = model(kind), init_device_mesh("cpu", (2,))
    for layer in lm.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(lm, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in lm.parameters())
    return lm


def main(rank, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    found = {}
    for kind in KINDS:
        lm = sharded(kind)
        for p in lm.parameters():
            p.grad = torch.ones_like(p)
        found[kind] = answers(lm)
        assert all(isinstance(p, DTensor) and bool((p.grad == 1).full_tensor().all()) for p in lm.parameters())
    found["refusals"] = refusals(sharded("llama"))
    found["losses"] = losses(sharded("llama"), True), losses(sharded("llama"), False)
    torch.save(found, f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
