"""verl's own FSDP2 engine on one CPU process, without tokdyn and with it: MODEL ROW|PADDED ENTROPY OUT."""

import os
import sys
from functools import partial

import torch
import torch.distributed as dist

MODEL, FORM, ENTROPY, OUT = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4]
STEPS = 3


def on_cpu():
    """verl knows GPUs and NPUs; a platform of its own interface that is neither."""
    from verl.plugin.platform import set_platform
    from verl.plugin.platform.platform_cuda import PlatformCUDA

    class Cpu(PlatformCUDA):
        device_name = property(lambda self: "cpu")
        device_module = property(lambda self: torch.cpu)

        def current_device(self):
            return torch.device("cpu")

        def communication_backend_name(self):
            return "gloo"

        def is_available(self):
            return True

    set_platform(Cpu())


def batch(seed, vocabulary):
    """Four prompts and responses in verl's form without padding: one nested tensor for each field."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    generator = torch.Generator().manual_seed(seed)
    lengths = [(3, 4), (5, 3), (2, 5), (4, 2)]
    ids = [torch.randint(3, vocabulary, (p + r,), generator=generator) for p, r in lengths]
    responses = [r for _, r in lengths]
    fields = dict(
        input_ids=ids, position_ids=[torch.arange(len(x)) for x in ids], attention_mask=[torch.ones(len(x)) for x in ids],
        prompts=[x[:p] for x, (p, _) in zip(ids, lengths, strict=True)],
        responses=[x[p:] for x, (p, _) in zip(ids, lengths, strict=True)],
        response_mask=[torch.ones(r) for r in responses],
        loss_mask=[torch.cat([torch.zeros(p), torch.ones(r)]) for p, r in lengths],
        old_log_probs=[-3 + 0.3 * torch.randn(r, generator=generator) for r in responses],
        advantages=[torch.randn(1, generator=generator).expand(r).clone() for r in responses],
    )  # fmt: skip
    nested = {name: torch.nested.as_nested_tensor(values, layout=torch.jagged) for name, values in fields.items()}
    data = TensorDict(nested, batch_size=[len(ids)])
    tensordict_utils.assign_non_tensor(
        data, temperature=0.7, calculate_entropy=ENTROPY > 0, use_remove_padding=FORM == "ROW", use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2, global_batch_size=4, compute_loss=True,
    )  # fmt: skip
    return data


def with_slopes(loss, found):
    """The loss, and its derivative by the log-probs it is given, taken on copies of them."""

    def watched(**given):
        if "model_output" in given:
            output, ids = given["model_output"], given["data"]["input_ids"]
            copies = {name: output[name].values().detach().requires_grad_() for name in output}
            nested = {n: torch.nested.nested_tensor_from_jagged(x, output[n].offsets()) for n, x in copies.items()}
            value = loss(**(given | {"model_output": nested}))[0]
            (slope,) = torch.autograd.grad(value, copies["log_probs"])
            found.append(dict(c=-slope, offsets=ids.offsets().tolist(), ids=ids.values()))
        return loss(**given)

    return watched


def train(watched):
    """What three steps leave behind: norms, weights, and the records or the loss's own slopes."""
    from torch.distributed.tensor import DTensor
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.fsdp import transformer_impl
    from verl.workers.utils.losses import ppo_loss

    from tokdyn.integrations import verl
    from tokdyn.testing import random_chis

    model = HFModelConfig(path=MODEL, use_remove_padding=FORM == "ROW", override_config={"attn_implementation": "sdpa"})
    vocabulary = model.hf_config.vocab_size
    plain = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    engine = transformer_impl.FSDPEngineWithLMHead(
        model, FSDPEngineConfig(strategy="fsdp2", use_torch_compile=False, mixed_precision=plain, model_dtype="fp32"),
        FSDPOptimizerConfig(lr=1e-3, clip_grad=1.0, total_training_steps=STEPS), CheckpointConfig(),
    )  # fmt: skip
    engine.initialize()
    assert all(isinstance(p, DTensor) for p in engine.module.parameters())
    config = FSDPActorConfig(strategy="fsdp2", ppo_mini_batch_size=4, ppo_micro_batch_size_per_gpu=2, rollout_n=1,
                             entropy_coeff=ENTROPY, clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28)  # fmt: skip
    probe = random_chis([(2, 3), (3, 2)], vocabulary=vocabulary, seed=3)
    monitors, undo = verl.instrument_engine(transformer_impl, probe=probe, on_error="raise") if watched else ({}, None)
    norms, slopes = [], []
    for n in range(STEPS):
        found = []
        loss = partial(ppo_loss, config=config)
        with engine.train_mode():
            engine.forward_backward_batch(batch(n, vocabulary), loss if watched else with_slopes(loss, found))
            norms.append(engine.optimizer_step())
            engine.optimizer_zero_grad()
        slopes.append(found)
    steps = []
    if watched:
        monitors[engine].close()
        undo()
        steps = [
            dict(step=s.step, passes=s.passes, routes=s.routes, residual=s.residual, linearity=s.linearity,
                 rows=s.tokens.to_pylist()) for s in monitors[engine].steps
        ]  # fmt: skip
    weights = torch.cat([p.full_tensor().detach().flatten() for p in engine.module.parameters()])
    return dict(norms=norms, weights=weights, slopes=slopes, steps=steps)


on_cpu()
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
dist.init_process_group("gloo", init_method=f"file://{OUT}.store", rank=0, world_size=1)
torch.save({watched: train(watched) for watched in (False, True)}, OUT)
dist.destroy_process_group()
