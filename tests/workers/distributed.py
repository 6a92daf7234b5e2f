"""One rank of the distributed tests: RANK WORLD STORE OUT. Trains a tiny model plainly, under DDP and under FSDP2 on gloo."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import tokdyn as td
from tokdyn.testing import random_chis, tiny

RANK, WORLD, STORE, OUT = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
STEPS, LR = 3, 0.05
PROBE = random_chis([(3, 5), (2, 4)], seed=5)


def batches():
    """The same sequences however many ranks share them; the prompt of each is three tokens."""
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randint(0, 61, (4, 9), generator=generator) for _ in range(STEPS)]
    return [ids[RANK * 4 // WORLD : (RANK + 1) * 4 // WORLD] for ids in whole]


def sharded(model):
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def train(kind, probing="tokdyn", every=1):
    """Losses of every step, and the records."""
    model = tiny("llama", tied=False).train()
    wrapped = DistributedDataParallel(model) if kind == "ddp" else sharded(model) if kind == "fsdp2" else model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=LR)
    monitor = td.Monitor(wrapped, optimizer, probe=PROBE, every=every, on_error="raise") if probing == "tokdyn" else None
    if monitor is not None:
        monitor.start()
        monitor.step_begin()
    losses, figures = [], []
    for ids in batches():
        labels = ids.clone()
        labels[:, :3] = -100
        loss = wrapped(input_ids=ids, labels=labels).loss
        loss.backward()
        if probing == "naive":  # what tokdyn would do without giving the weights back
            with torch.no_grad():
                wrapped(input_ids=PROBE[0].ids[None])
        optimizer.step()
        if monitor is not None:
            monitor.step_end()
            figures.append(monitor.metrics())
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    records = []
    if monitor is not None:
        monitor.close()
        for step in monitor.steps:
            columns = {name: step.tokens[name].to_pylist() for name in ("token_id", "position", "c", "force", "entropy")}
            records.append(
                dict(columns, residual=step.residual, actual=step.actual, predicted=step.predicted, forces=step.forces,
                     readout=torch.tensor(step.observed["predicted_readout"].to_pylist(), dtype=torch.float64),
                     accounted=step.accounted, notes=step.notes, ranks=monitor.ranks)
            )  # fmt: skip
    whole = any(isinstance(m, FSDPModule) for m in wrapped.modules())
    return dict(losses=losses, records=records, figures=figures, dtensor=whole)


def main():
    torch.set_num_threads(1)
    if WORLD > 1:
        dist.init_process_group("gloo", init_method=f"file://{STORE}", rank=RANK, world_size=WORLD)
    if WORLD == 1:
        scored = torch.arange(9) >= 3
        update = [td.Chi(row, scored) for row in batches()[0]]
        forces = td.forces(tiny("llama", tied=False), update, PROBE, scope="readout", reduce="observe").vector
        found = {"plain": train("plain"), "readout forces": forces * LR / len(forces)}
    else:
        found = {
            "ddp": train("ddp"), "fsdp2": train("fsdp2"),
            "ddp without": train("ddp", probing="none"), "fsdp2 without": train("fsdp2", probing="none"),
            "fsdp2 naive": train("fsdp2", probing="naive"),
        }  # fmt: skip
    torch.save(found, OUT / f"{WORLD}-{RANK}.pt")
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


main()
