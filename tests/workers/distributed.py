"""One rank of the distributed tests: RANK WORLD STORE OUT PORT. A tiny model under DDP, FSDP2 and Trainer, on gloo."""

import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import MethodType, SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import ModelOutput

import tokdyn as td
from tokdyn.integrations.trainer import _require_shards
from tokdyn.testing import random_chis, tiny

RANK, WORLD, STORE, OUT, PORT = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5]
STEPS, LR = 3, 0.05
PROBE = random_chis([(3, 5), (2, 4)], seed=5)


def batches():
    """The same sequences however many ranks share them; the prompt of each is three tokens."""
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randint(0, 61, (4, 9), generator=generator) for _ in range(STEPS)]
    return [ids[RANK * 4 // WORLD : (RANK + 1) * 4 // WORLD] for ids in whole]


def sharded(model, head=False):
    """FSDP2, a group for each layer; with one for the readout as well, it is sharded again before the backward pass."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if head:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def train(kind, probing="tokdyn", accumulate=1):
    """Losses of every step, and the records; each step's sequences in so many micro-batches."""
    model = tiny("llama", tied=False).train()
    wrapped = DistributedDataParallel(model) if kind == "ddp" else sharded(model) if kind == "fsdp2" else model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=LR)
    monitor = td.Monitor(wrapped, optimizer, probe=PROBE, on_error="raise") if probing == "tokdyn" else None
    if monitor is not None:
        monitor.start()
        monitor.step_begin()
    losses, figures = [], []
    for ids in batches():
        labels = ids.clone()
        labels[:, :3] = -100
        total = 0.0
        for x, y in zip(ids.chunk(accumulate), labels.chunk(accumulate), strict=True):
            loss = wrapped(input_ids=x, labels=y).loss / accumulate
            loss.backward()
            total += float(loss.detach())
        if probing == "naive":  # what tokdyn would do without giving the weights back
            with torch.no_grad():
                wrapped(input_ids=PROBE[0].ids[None])
        optimizer.step()
        if monitor is not None:
            monitor.step_end()
            figures.append(monitor.metrics())
        optimizer.zero_grad()
        losses.append(total)
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


@dataclass
class Fused(ModelOutput):
    """What TRL's fused head returns."""

    log_probs: torch.Tensor = None
    entropy: torch.Tensor = None


def fused(self, input_ids, labels, **_):
    """A forward pass that never calls the readout's module: its weight is gathered, and sharded when gradients come."""
    h, W = self.model(input_ids, use_cache=False).last_hidden_state[:, :-1], self.lm_head.weight
    log_pi = (h @ (W.full_tensor() if isinstance(W, DTensor) else W).T).log_softmax(-1)
    mask = labels[:, 1:] != -100
    lp = log_pi.gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)
    return Fused(log_probs=lp * mask, entropy=-(log_pi.exp() * log_pi).sum(-1) * mask)


def lopsided():
    """FSDP2 with a readout that is sharded by itself, and losses for which only rank 0 needs its weights once more.

    A gather on one rank alone would wait for ever.
    """
    found = {}
    for name in ("smoothing", "entropy"):
        model = tiny("llama", tied=False).train()
        if name == "entropy":
            model.forward = MethodType(fused, model)
        model = sharded(model, head=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        steps = []
        with td.Monitor(model, optimizer, on_error="raise") as monitor:
            for ids in batches()[:2]:
                if name == "smoothing":
                    z = model(input_ids=ids).logits[:, 2:-1]
                    loss = cross_entropy(z.flatten(0, 1), ids[:, 3:].flatten(), label_smoothing=0.1 * (RANK == 0))
                else:
                    out = model(input_ids=ids, labels=torch.where(torch.arange(9) < 3, -100, ids))
                    loss = -(out.log_probs.sum() + 0.1 * (RANK == 0) * out.entropy.sum()) / (len(ids) * 6)
                loss.backward()
                optimizer.step()
                step = monitor.step_end()
                optimizer.zero_grad()
                steps.append(dict(residual=step.residual, c=step.c, force=step.metrics["force"], routes=step.routes))
        found[name] = steps
    return found


def trainer():
    """transformers.Trainer with td.attach: c, figures and whether training is as it is without; what is said of fsdp."""
    import transformers

    if WORLD > 1:
        os.environ |= dict(
            RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=PORT
        )
    rows = []
    for ids in torch.randint(0, 61, (8, 9), generator=torch.Generator().manual_seed(3)):
        rows.append(dict(input_ids=ids, labels=torch.where(torch.arange(9) < 3, -100, ids)))
    found = {}
    for name in ("with", "without", *["fsdp"] * (WORLD > 1)):
        transformers.set_seed(0)
        args = transformers.TrainingArguments(
            output_dir=str(OUT / f"trainer-{name}"), max_steps=2, per_device_train_batch_size=4 // WORLD, logging_steps=1,
            gradient_accumulation_steps=2, save_strategy="no", report_to="none", use_cpu=True, learning_rate=1e-3,
            disable_tqdm=True, ddp_backend="gloo" if WORLD > 1 else None, fsdp=True if name == "fsdp" else None,
        )  # fmt: skip
        run = transformers.Trainer(
            model=tiny("llama", tied=False), args=args, train_dataset=rows,
            data_collator=lambda rows: {k: torch.stack([row[k] for row in rows]) for k in rows[0]},
        )  # fmt: skip
        options = {"with": dict(probe=PROBE, out=OUT / f"folder-{WORLD}", on_error="raise"), "fsdp": {}}
        monitor = td.attach(run, **options[name]) if name in options else None
        run.train()
        logs = [log for log in run.state.log_history if "loss" in log]
        found[name] = [(log["loss"], log["grad_norm"]) for log in logs]
        if name == "fsdp":
            found["of fsdp"] = monitor.problems
            _require_shards(SimpleNamespace(args=run.args, model_wrapped=sharded(tiny("llama"))))  # has nothing to say
        if name == "with":
            assert isinstance(run.model_wrapped, DistributedDataParallel) == (WORLD > 1)
            steps = monitor.steps
            found |= dict(
                figures=[{k: v for k, v in log.items() if k.startswith("tokdyn/")} for log in logs], c=[s.c for s in steps],
                token_id=[s.tokens["token_id"].to_pylist() for s in steps], actual=[s.actual for s in steps],
                predicted=[s.predicted for s in steps], accounted=[s.accounted for s in steps],
                passes=[s.passes for s in steps],
            )  # fmt: skip
    return found


def checks():
    """td.check and the checks of td.attach where the loss is as it should be, and where it is divided by the ranks twice.

    The report of each rank: (check, text) of what is wrong or suspicious, what fine ones say, and what could not be checked.
    """
    import transformers

    rows = []
    for n, ids in enumerate(torch.randint(0, 61, (12, 9), generator=torch.Generator().manual_seed(3))):
        rows.append(dict(input_ids=ids, labels=torch.where(torch.arange(9) < 2 + n % 5, -100, ids)))

    class Twice(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) / self.accelerator.num_processes

    def told(report):
        bad = [(f.check, f.what) for f in (*report.wrong, *report.suspicious)]
        return dict(bad=bad, fine={f.check: f.what for f in report.findings if f.level == "fine"}, skipped=report.skipped)

    found = {}
    for kind, name, average in (
        (transformers.Trainer, "clean", True),
        (transformers.Trainer, "by rank", False),
        (Twice, "twice", True),
    ):
        transformers.set_seed(0)
        args = transformers.TrainingArguments(
            output_dir=str(OUT / name), max_steps=1, per_device_train_batch_size=3, save_strategy="no", use_cpu=True,
            report_to="none", disable_tqdm=True, ddp_backend="gloo", average_tokens_across_devices=average,
        )  # fmt: skip
        run = kind(
            model=tiny("llama", tied=False), args=args, train_dataset=rows,
            data_collator=lambda rows: {k: torch.stack([row[k] for row in rows]) for k in rows[0]},
        )  # fmt: skip
        found[name] = told(td.check(run))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            monitor = td.attach(run, on_error="raise")
            run.train()
        found[f"{name}, attached"] = None if monitor.report is None else told(monitor.report)
    return found


def main():
    torch.set_num_threads(1)
    if WORLD > 1:
        dist.init_process_group("gloo", init_method=f"file://{STORE}", rank=RANK, world_size=WORLD)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if WORLD == 1:
        scored = torch.arange(9) >= 3
        update = [td.Chi(row, scored) for row in batches()[0]]
        forces = td.forces(tiny("llama", tied=False), update, PROBE, scope="readout", reduce="observe").vector
        found = {
            "plain": train("plain"),
            "plain, accumulated": train("plain", accumulate=2),
            "readout forces": forces * LR / len(forces),
        }
    else:
        found = {
            "ddp": train("ddp"), "fsdp2": train("fsdp2"),
            "ddp without": train("ddp", probing="none"), "fsdp2 without": train("fsdp2", probing="none"),
            "fsdp2 naive": train("fsdp2", probing="naive"),
            "ddp, accumulated": train("ddp", accumulate=2), "fsdp2, accumulated": train("fsdp2", accumulate=2),
            "lopsided": lopsided(),
        }  # fmt: skip
    found["trainer"] = trainer()
    if WORLD > 1:
        found["checks"] = checks()
    torch.save(found, OUT / f"{WORLD}-{RANK}.pt")
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


main()
