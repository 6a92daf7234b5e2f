"""OpenRLHF's own actor, policy loss and training step on a CPU, without tokdyn and with it: MODEL ENTROPY OUT.

vLLM, DeepSpeed and flash-attention need a GPU: modules that answer to everything stand where they are imported, and a plain
optimizer where DeepSpeed's strategy is.
"""

import importlib.abc
import importlib.machinery
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import peft  # noqa: F401 - what looks for the absent packages does so before they seem to be there
import torch
import torch.distributed as dist
import transformers  # noqa: F401

MODEL, ENTROPY, OUT = sys.argv[1], float(sys.argv[2]), sys.argv[3]
STEPS, TEMPERATURE, LIMIT = 3, 0.7, 0.1


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that are imported and never called here."""

    names = frozenset({"vllm", "deepspeed", "flash_attn", "pylatexenc", "aiohttp", "torchdata"})

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in self.names and not name.startswith("flash_attn.ops"):  # a kernel it can do without
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__name__, module.__spec__, module.__path__ = spec.name, spec, []
        return module

    def exec_module(self, module):
        pass


class Strategy:
    """A plain optimizer in DeepSpeed's place."""

    ring_attn_group = None

    def __init__(self):
        train = SimpleNamespace(max_epochs=1, dynamic_batch_enable=False, colocate_all=False, async_enable=False)
        actor = SimpleNamespace(eps_clip_low_high=(0.2, 0.28), dual_clip=None, loss_agg_mode="token-mean", aux_loss_coef=0.0,
                                policy_loss_type="ppo", entropy_coef=ENTROPY or None, max_norm=LIMIT)  # fmt: skip
        kl = SimpleNamespace(use_loss=False, init_coef=0.0)
        advantage = SimpleNamespace(is_correction_level="off", is_correction_mode="mask", is_correction_gating="ratio",
                                    is_correction_threshold=(0.5, 5.0))  # fmt: skip
        algo, ds, vllm = dict(kl=kl, advantage=advantage), dict(packing_samples=False), dict(sync_backend="gloo")
        algo, ds, vllm = (SimpleNamespace(**part) for part in (algo, ds, vllm))
        self.args = SimpleNamespace(train=train, actor=actor, algo=algo, ds=ds, vllm=vllm)
        self.norm = 0.0

    def backward(self, loss, model, optimizer):
        loss.backward()

    def optimizer_step(self, optimizer, model, scheduler, name="model"):
        self.norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT))
        optimizer.step()
        optimizer.zero_grad()

    def get_grad_norm(self, model):
        return self.norm


def experience(seed, vocabulary):
    """Two prompts of three tokens with responses of five and four."""
    from openrlhf.trainer.ppo_utils.experience import Experience

    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 7] = 0
    action = mask[:, 3:].bool()
    A = torch.randn(2, 1, generator=generator).expand(2, 5) * action
    old = (-3 + 0.3 * torch.randn(2, 5, generator=generator)) * action
    return Experience(sequences=torch.randint(3, vocabulary, (2, 8), generator=generator), attention_mask=mask,
                      action_mask=action, action_log_probs=old, base_action_log_probs=old, advantages=A, info={})  # fmt: skip


def train(watched):
    """What three steps leave behind: norms, weights, and the records or the loss's own slopes."""
    from openrlhf.models import Actor
    from openrlhf.trainer.ray import ppo_actor

    from tokdyn.integrations import openrlhf
    from tokdyn.testing import random_chis

    actor = Actor(MODEL, attn_implementation="sdpa", temperature=TEMPERATURE).float()
    optimizer = torch.optim.AdamW(actor.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    ppo_actor.torch_dist_barrier_and_cuda_sync, ppo_actor.NaiveReplayBuffer = dist.barrier, MagicMock()  # both ask for CUDA
    trainer = ppo_actor.ActorPPOTrainer(Strategy(), actor, None, optimizer, scheduler, micro_train_batch_size=2)
    vocabulary, slopes = actor.model.config.vocab_size, []
    monitor = None
    if watched:
        probe = random_chis([(2, 3), (3, 2)], vocabulary=vocabulary, seed=3)
        monitor = openrlhf.attach(trainer, probe=probe, on_error="raise")
    else:
        loss = trainer.actor_loss_fn

        def noted(log_probs, *args, **kwargs):
            copy = log_probs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(loss(copy, *args, **kwargs)[0], copy)
            slopes.append(-slope)
            return loss(log_probs, *args, **kwargs)

        trainer.actor_loss_fn = noted
    norms, ids = [], []
    for n in range(STEPS):
        batch = experience(n, vocabulary)
        ids.append(batch.sequences)
        trainer.training_step(batch, 0.0, n)
        norms.append(trainer.strategy.norm)
    steps = []
    if monitor is not None:
        monitor.close()
        steps = [
            dict(step=s.step, routes=s.routes, residual=s.residual, linearity=s.linearity, accounted=s.accounted,
                 rows=s.tokens.to_pylist()) for s in monitor.steps
        ]  # fmt: skip
    weights = torch.cat([p.detach().flatten() for p in actor.parameters()])
    return dict(norms=norms, weights=weights, slopes=slopes, ids=ids, steps=steps)


sys.meta_path.insert(0, Absent())
dist.init_process_group("gloo", init_method=f"file://{OUT}.store", rank=0, world_size=1)
torch.save({watched: train(watched) for watched in (False, True)}, OUT)
dist.destroy_process_group()
