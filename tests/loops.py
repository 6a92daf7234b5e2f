"""Plain training loops of tiny models, with a monitor or without: what the tests of records and of predictions share."""

import contextlib

import torch
from torch.nn.functional import logsigmoid

import tokdyn as td
from tokdyn.testing import random_chis, tiny, tiny_lora
from tokdyn.training import capture

V, PROMPT = 61, 4
EPS = torch.finfo(torch.float32).eps


def data(B=4, T=9, seed=0):
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


def labelled(ids):
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return labels


def sft(model, ids):
    return model(input_ids=ids, labels=labelled(ids)).loss


def answers(model, ids):
    """log pi and H of the response tokens, [B, n]."""
    log_pi = model(input_ids=ids).logits.log_softmax(-1)[:, PROMPT - 1 : -1]
    H = -(log_pi.exp() * log_pi).sum(-1)
    return log_pi.gather(-1, ids[:, PROMPT:, None]).squeeze(-1), H


def dpo(model, ids):
    plus, minus = answers(model, ids)[0].sum(1).chunk(2)
    return -logsigmoid(0.1 * (plus - minus)).mean()


def grpo(model, ids):
    lp, H = answers(model, ids)
    td.tap(lp, ids[:, PROMPT:], entropy=H)
    A = torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None]
    ratio = (lp - lp.detach()).exp()
    return -(torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A) + 0.01 * H).mean()


PROBE = {"near": random_chis([(3, 5), (2, 4)], seed=5), "far": random_chis([(3, 3)], seed=6)}


def train(loss_of, *, family="llama", lora=False, monitor=True, steps=3, accumulate=1, optimizer=None, max_norm=1.0, **options):
    """Loss and gradient norm of every step, the parameters at the end, and the monitor."""
    model = (tiny_lora if lora else tiny)(family).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    opt = optimizer(parameters) if optimizer else torch.optim.AdamW(parameters, lr=1e-3)
    torch.manual_seed(7)
    watch = td.Monitor(model, opt, on_error="raise", **({"probe": PROBE} | options)) if monitor else None
    figures = []
    if watch is not None:
        watch.start()
        watch.step_begin()
    for n in range(steps):
        for k in range(accumulate):
            loss = loss_of(model, data(seed=10 * n + k)) / accumulate
            loss.backward()
            if watch is not None and k + 1 < accumulate:
                assert watch.step_end() is None
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        opt.step()
        figures.append((loss.item(), norm.item()))
        if watch is not None:
            watch.step_end(clip=min(1.0, max_norm / (norm.item() + 1e-6)))
        opt.zero_grad()
    if watch is not None:
        watch.close()
    return figures, parameters, watch


def one_record(model, loss_of, ids, **about):
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    with td.Monitor(model, opt, on_error="raise") as monitor:
        with monitor.micro_batch(**about):
            loss_of(model, ids).backward()
        opt.step()
        return monitor.step_end()


def recorded(path, first, last, **options):
    """Steps of a training from a checkpoint that this reproduces, recorded by a monitor that is never closed: killed."""
    model = tiny("llama").train()
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = td.Monitor(model, opt, probe=PROBE, out=path, on_error="raise", **options)
    monitor.start()
    for n in range(1, last + 1):
        with contextlib.nullcontext() if n >= first else capture.unwatched():
            monitor.step_begin(n)
            sft(model, data(seed=n)).backward()
            opt.step()
            if n >= first:
                monitor.step_end()
            opt.zero_grad()
    return monitor
