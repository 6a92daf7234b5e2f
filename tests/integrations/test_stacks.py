"""verl and OpenRLHF: stand-ins with the call protocol of their actors; their own code is in test_packages.py.

Each keeps of the original: names, arguments, shapes, the order of calls, in-place division of the logits, the roll of the
labels, and how the response's log-probs are cut out. docs/training.md says what was run of the packages themselves.
"""

from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from tokdyn.integrations import openrlhf, verl
from tokdyn.testing import random_chis, tiny

V, P, R, T = 61, 5, 6, 0.7
# a ratio's relative error is the error of log pi, of logits of size 6 made twice: 20 eps of that, as in
# tests/training/test_steps.py
RATIO = 20 * torch.finfo(torch.float32).eps * 6
PROBE = random_chis([(3, 4)], seed=3)


def batch(seed=0):
    """Left-padded prompts, right-padded responses, as rollout workers make them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (4, P + R), generator=generator)
    mask = torch.ones(4, P + R, dtype=torch.long)
    mask[::2, :2], mask[1::2, -2:] = 0, 0
    old = -4 + 0.3 * torch.randn(4, R, generator=generator)
    A = torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None] * mask[:, P:]
    return dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), responses=ids[:, P:],
                response_mask=mask[:, P:], old_log_probs=old, advantages=A)  # fmt: skip


def vanilla(old_log_prob, log_prob, advantages, response_mask, **_):
    ratio = (log_prob - old_log_prob).exp()
    value = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    return -(value * response_mask).sum() / response_mask.sum(), {}


class Config(dict):
    """Read both ways, as verl's is."""

    __getattr__ = dict.get


class DataParallelPPOActor:
    """verl's FSDP actor on one process."""

    def __init__(self, module, config, model):
        self.module, self.config, self.actor_module = module, config, model
        self.actor_optimizer, self.scaler = torch.optim.AdamW(model.parameters(), lr=1e-2), None

    def _forward_micro_batch(self, b, temperature):
        ids, mask = b["input_ids"], b["attention_mask"]
        if not self.config["use_remove_padding"]:
            logits = self.actor_module(
                input_ids=ids, attention_mask=mask, position_ids=b["position_ids"], use_cache=False
            ).logits
            logits.div_(temperature)
            logits = logits[:, -R - 1 : -1]
            log_pi = logits.log_softmax(-1)
            return log_pi.gather(-1, b["responses"][..., None]).squeeze(-1), -(log_pi.exp() * log_pi).sum(-1)
        kept = mask.flatten().nonzero().squeeze(1)
        row = ids.flatten()[kept][None]
        out = self.actor_module(
            input_ids=row, attention_mask=None, position_ids=b["position_ids"].flatten()[kept][None], use_cache=False
        )
        logits = out.logits.squeeze(0)
        logits.div_(temperature)
        log_pi = logits.log_softmax(-1)
        lp, H = log_pi.gather(-1, row.roll(-1, 1)[0][:, None]).squeeze(-1), -(log_pi.exp() * log_pi).sum(-1)
        return tuple(x.new_zeros(mask.numel()).index_copy(0, kept, x).reshape(mask.shape)[:, -R - 1 : -1] for x in (lp, H))

    def _optimizer_step(self):
        norm = torch.nn.utils.clip_grad_norm_(self.actor_module.parameters(), self.config["grad_clip"])
        self.actor_optimizer.step()
        return norm

    def update_policy(self, data):
        norms = []
        for b in data.batches:
            self.actor_optimizer.zero_grad()
            with torch.no_grad():
                self._forward_micro_batch(b, data.meta_info["temperature"])  # old log-probs
            lp, H = self._forward_micro_batch(b, data.meta_info["temperature"])
            loss, _ = self.module.get_policy_loss_fn("vanilla")(
                old_log_prob=b["old_log_probs"], log_prob=lp, advantages=b["advantages"], response_mask=b["response_mask"],
                loss_agg_mode="token-mean", config=self.config, rollout_is_weights=None,
            )  # fmt: skip
            if self.config["entropy_coeff"]:
                loss = loss - self.config["entropy_coeff"] * (H * b["response_mask"]).sum() / b["response_mask"].sum()
            loss.backward()
            norms.append(float(self._optimizer_step()))
        return norms


def update_with_verl(on, unpadded, entropy, **options):
    kind = type("DataParallelPPOActor", (DataParallelPPOActor,), {})
    module = SimpleNamespace(DataParallelPPOActor=kind, get_policy_loss_fn=lambda name: vanilla)
    config = Config(use_remove_padding=unpadded, entropy_coeff=entropy, grad_clip=1.0, clip_ratio=0.2, clip_ratio_high=0.28)
    options = dict(probe=PROBE, on_error="raise") | options
    monitors, undo = verl.instrument(module, **options) if on else ({}, None)
    actor = kind(module, config, tiny("llama"))
    norms = [
        actor.update_policy(SimpleNamespace(batches=[batch(2 * n), batch(2 * n + 1)], meta_info={"temperature": T}))
        for n in range(2)
    ]
    if on:
        monitors[actor].close()
        undo()
        assert kind.update_policy is DataParallelPPOActor.update_policy and module.get_policy_loss_fn("x") is vanilla
    return norms, list(actor.actor_module.parameters()), monitors.get(actor)


@pytest.mark.parametrize("unpadded", [False, True], ids=["padded", "unpadded"])
@pytest.mark.parametrize("entropy", [0.0, 0.05], ids=["", "entropy bonus"])
def test_verl_updates_are_captured_and_unchanged(unpadded, entropy):
    """Four optimizer steps in two updates; c is Aγ/N where the loss is not clipped, whichever way it was captured."""
    norms, weights, monitor = update_with_verl(True, unpadded, entropy)
    plain_norms, plain_weights, _ = update_with_verl(False, unpadded, entropy)
    assert norms == plain_norms and all(torch.equal(a, b) for a, b in zip(weights, plain_weights, strict=True))
    assert [step.step for step in monitor.steps] == [1, 2, 3, 4]
    for n, step in enumerate(monitor.steps):
        assert step.residual < 1e-5 and step.accounted == pytest.approx(1, abs=1e-3) and step.excluded == 1
        b, rows = batch(n), step.tokens.to_pylist()
        N = int(b["response_mask"].sum())
        tap = not unpadded and not entropy
        assert step.routes == (("tap",) if tap else ("least squares",) if entropy else ("logits",))
        if tap:
            assert len(rows) == N and step.metrics["clipped"] == sum(row["c"] == 0 for row in rows) / N
        prompts = [3, 5, 3, 5]  # positions count from the first real token
        for row in rows:
            s, t = row["sequence"], row["position"] - prompts[row["sequence"]]
            assert row["token_id"] == int(b["responses"][s, t])
            ratio = float(torch.tensor(row["log_prob"] - float(b["old_log_probs"][s, t])).exp())
            A = float(b["advantages"][s, t])
            clipped = ratio > 1.28 if A > 0 else ratio < 0.8
            assert row["c"] == pytest.approx(0 if clipped else A * ratio / N, rel=RATIO, abs=2e-3 if entropy else 0)
            assert row["advantage"] == A


class FSDPEngine:
    """verl's engine on one process, without FSDP: sequences in a row as nested tensors, or padded."""

    def __init__(self, model, padded):
        self.module, self.padded, self.scaler = model, padded, None
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.optimizer_config = SimpleNamespace(clip_grad=1.0)

    def forward_backward_batch(self, micro_batches, loss_function, forward_only=False):
        for micro_batch in micro_batches:
            with torch.set_grad_enabled(not forward_only):
                loss = self.forward_step(micro_batch, loss_function=loss_function, forward_only=forward_only)
            if not forward_only:
                loss.backward()

    def optimizer_step(self):
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.optimizer_config.clip_grad)
        self.optimizer.step()
        return norm.item()


class FSDPEngineWithLMHead(FSDPEngine):
    def forward_step(self, micro_batch, loss_function, forward_only):
        ids, positions = micro_batch["input_ids"], micro_batch["position_ids"]
        row = ids.values()
        if self.padded:
            lengths = ids.offsets().diff()
            mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
            given = dict(input_ids=torch.nested.to_padded_tensor(ids, 0), attention_mask=mask)
            logits = self.module(**given, use_cache=False).logits[mask.bool()]
        else:
            given = dict(input_ids=row[None], attention_mask=None, position_ids=positions.values()[None])
            logits = self.module(**given, use_cache=False).logits.squeeze(0)
        log_pi = (logits / micro_batch["temperature"]).log_softmax(-1)
        H = -(log_pi.exp() * log_pi).sum(-1)
        lp = log_pi.gather(-1, row.roll(-1)[:, None]).squeeze(-1)
        output = dict(log_probs=torch.nested.nested_tensor_from_jagged(lp, ids.offsets()))
        if micro_batch["calculate_entropy"]:
            output["entropy"] = torch.nested.nested_tensor_from_jagged(H, ids.offsets())
        return lp.sum() if loss_function is None else loss_function(model_output=output, data=micro_batch, dp_group=None)


def ppo_loss(config, model_output, data, dp_group=None):
    """verl's: the response's log-probs are cut out of the row and padded on the right."""

    def cut(nested):
        parts = [x[-1 - len(r) : -1] for x, r in zip(nested.unbind(), data["response_mask"].unbind(), strict=True)]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    mask, old, A = (
        torch.nn.utils.rnn.pad_sequence(list(data[name].unbind()), batch_first=True)
        for name in ("response_mask", "old_log_probs", "advantages")
    )
    loss, _ = vanilla(old, cut(model_output["log_probs"]), A, mask)
    if "entropy" in model_output:
        loss = loss - config["entropy_coeff"] * (cut(model_output["entropy"]) * mask).sum() / mask.sum()
    return loss


def engine_batch(seed, entropy):
    """The sequences of `batch` without padding, as nested tensors; the middle of each response is a tool's."""
    b = batch(seed)
    real = b["attention_mask"].bool()
    b["response_mask"] = b["response_mask"] * (torch.arange(R) != 2)

    def nested(x, of):
        return torch.nested.as_nested_tensor([row[keep] for row, keep in zip(x, of, strict=True)], layout=torch.jagged)

    found = {name: nested(b[name], real) for name in ("input_ids", "position_ids")}
    found |= {name: nested(b[name].float(), real[:, P:]) for name in ("response_mask", "advantages", "old_log_probs")}
    return b, dict(found, temperature=T, calculate_entropy=bool(entropy))


def update_with_engine(on, padded, entropy, **options):
    base = type("FSDPEngine", (FSDPEngine,), {})
    kind = type("FSDPEngineWithLMHead", (FSDPEngineWithLMHead, base), {})
    module = SimpleNamespace(FSDPEngine=base, FSDPEngineWithLMHead=kind)
    base.optimizer_step, kind.forward_step = FSDPEngine.optimizer_step, FSDPEngineWithLMHead.forward_step
    options = dict(probe=PROBE, on_error="raise") | options
    monitors, undo = verl.instrument_engine(module, **options) if on else ({}, None)
    engine = kind(tiny("llama"), padded)
    config = Config(entropy_coeff=entropy, clip_ratio=0.2, clip_ratio_high=0.28, policy_loss={})
    norms = []
    for n in range(2):
        batches = [engine_batch(10 * n + k, entropy)[1] for k in range(2)]
        engine.forward_backward_batch(batches, None, forward_only=True)  # old log-probs
        engine.forward_backward_batch(batches, partial(ppo_loss, config=config))
        norms.append(engine.optimizer_step())
        engine.optimizer.zero_grad()
    if on:
        monitors[engine].close()
        undo()
        assert kind.forward_step is FSDPEngineWithLMHead.forward_step and base.optimizer_step is FSDPEngine.optimizer_step
    return norms, list(engine.module.parameters()), monitors.get(engine)


@pytest.mark.parametrize("padded", [False, True], ids=["in a row", "padded"])
@pytest.mark.parametrize("entropy", [0.0, 0.05], ids=["", "entropy bonus"])
def test_verl_engines_are_captured_and_unchanged(padded, entropy):
    """Two steps of two micro-batches each; c is Aγ/N, v the entropy bonus's, clipped and masked tokens are told apart."""
    norms, weights, monitor = update_with_engine(True, padded, entropy)
    plain_norms, plain_weights, _ = update_with_engine(False, padded, entropy)
    assert norms == plain_norms and all(torch.equal(a, b) for a, b in zip(weights, plain_weights, strict=True))
    assert [(step.step, step.passes) for step in monitor.steps] == [(1, 2), (2, 2)]
    for n, step in enumerate(monitor.steps):
        assert step.residual < 1e-5 and step.accounted == pytest.approx(1, abs=1e-3)
        assert step.routes == (("least squares" if entropy else "logits",) if padded else ("tap",))
        rows = step.tokens.to_pylist()
        for k in range(2):
            b, _ = engine_batch(10 * n + k, entropy)
            N, own = int(b["response_mask"].sum()), [row for row in rows if row["micro_batch"] == k]
            if not padded:
                assert len(own) == N
            for row in own:
                s = row["sequence"] - 4 * k
                t = row["position"] - (3, 5, 3, 5)[s]
                assert row["token_id"] == int(b["responses"][s, t]) and b["response_mask"][s, t]
                if not padded:
                    A = float(b["advantages"][s, t])
                    ratio = float(torch.tensor(row["log_prob"] - float(b["old_log_probs"][s, t])).exp())
                    assert row["advantage"] == A and bool(row["clipped"]) == (ratio > 1.28 if A > 0 else ratio < 0.8)
                    assert row["c"] == pytest.approx(0 if row["clipped"] else A * ratio / N, rel=RATIO)
                    assert row["v"] == pytest.approx(-entropy / N, rel=1e-5)


@pytest.mark.parametrize("update", [update_with_verl, update_with_engine])
def test_verl_trains_on_where_tokdyn_cannot_start(update, tmp_path):
    """A job that is started again finds its folder taken: the same training, one warning, nothing recorded."""
    (tmp_path / "taken").touch()
    with pytest.warns(UserWarning, match="tokdyn is not attached: .* exists already") as caught:
        norms, weights, monitor = update(True, False, 0.0, out=tmp_path, on_error="warn")
    plain_norms, plain_weights, _ = update(False, False, 0.0)
    assert norms == plain_norms and all(torch.equal(a, b) for a, b in zip(weights, plain_weights, strict=True))
    assert len(monitor.problems) == len(caught) == 1 and not monitor.steps
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


class Actor(torch.nn.Module):
    """OpenRLHF's wrapper of a causal LM."""

    def __init__(self, model, temperature):
        super().__init__()
        self.model, self.temperature, self.packing_samples = model, temperature, False

    def forward(self, sequences, action_mask, attention_mask):
        rolled = torch.roll(sequences, shifts=-1, dims=1)
        positions = attention_mask.long().cumsum(-1) - 1
        positions.masked_fill_(attention_mask == 0, 1)
        logits = self.model(sequences, attention_mask=attention_mask, position_ids=positions)["logits"].to(torch.float32)
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        lp = logits.gather(-1, rolled[..., None]).squeeze(-1) - logits.logsumexp(-1)
        return lp[:, :-1][:, -action_mask.shape[1] :] * action_mask.float()


class PolicyTrainer:
    """OpenRLHF's policy trainer without DeepSpeed."""

    def __init__(self, temperature):
        self.actor = Actor(tiny("llama"), temperature)
        self.actor_optim = torch.optim.AdamW(self.actor.parameters(), lr=1e-2)
        self.args = SimpleNamespace(actor=SimpleNamespace(eps_clip_low_high=(0.2, 0.28), entropy_coef=None, max_norm=0.1))
        self.strategy = SimpleNamespace(optimizer_step=self._step, get_grad_norm=lambda actor: self.norm)

    def _step(self, optimizer, model, scheduler, name=""):
        self.norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.actor.max_norm).item()
        assert self.norm > 2 * self.args.actor.max_norm
        optimizer.step()
        optimizer.zero_grad()

    def actor_loss_fn(self, log_probs, old, advantages, action_mask=None):
        return vanilla(old, log_probs, advantages, action_mask)

    def training_step(self, e, kl_ctl=0.0):
        lp = self.actor(e.sequences, e.action_mask, attention_mask=e.attention_mask)
        loss, _ = self.actor_loss_fn(lp, e.action_log_probs, e.advantages, action_mask=e.action_mask)
        loss.backward()
        self.strategy.optimizer_step(self.actor_optim, self.actor, None, name="actor")
        return loss.item()


@pytest.mark.parametrize("temperature", [1.0, T])
def test_openrlhf_steps_are_captured_and_unchanged(temperature):
    found = []
    for on in (False, True):
        trainer = PolicyTrainer(temperature)
        monitor = openrlhf.attach(trainer, probe=PROBE, on_error="raise") if on else None
        losses = []
        for n in range(2):
            b = batch(n)
            losses.append(
                trainer.training_step(
                    SimpleNamespace(
                        sequences=b["input_ids"],
                        attention_mask=b["attention_mask"],
                        advantages=b["advantages"],
                        action_mask=b["response_mask"],
                        action_log_probs=b["old_log_probs"],
                    )  # fmt: skip
                )
            )
        if monitor is not None:
            monitor.close()
            assert {"training_step", "actor_loss_fn"}.isdisjoint(vars(trainer))
            assert [step.routes for step in monitor.steps] == [("tap",)] * 2
            for n, step in enumerate(monitor.steps):
                assert step.residual < 1e-5 and step.accounted == pytest.approx(1, abs=1e-3)
                assert len(step.c) == int(batch(n)["response_mask"].sum())
                clipped = torch.tensor(step.tokens["clipped"].to_pylist()).bool()
                assert torch.equal(clipped, step.c == 0) and 0 < int(clipped.sum()) < len(clipped)
        found.append((losses, [p.detach() for p in trainer.actor.parameters()]))
    assert found[0][0] == found[1][0] and all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_openrlhf_trains_on_where_tokdyn_cannot_start(tmp_path):
    (tmp_path / "taken").touch()
    trainer = PolicyTrainer(1.0)
    with pytest.warns(UserWarning, match="tokdyn is not attached: .* exists already"):
        monitor = openrlhf.attach(trainer, out=tmp_path)
    b = batch()
    trainer.training_step(SimpleNamespace(
        sequences=b["input_ids"], attention_mask=b["attention_mask"], advantages=b["advantages"],
        action_mask=b["response_mask"], action_log_probs=b["old_log_probs"],
    ))  # fmt: skip
    assert len(monitor.problems) == 1 and not monitor.steps


def test_options_of_verl_are_looked_at_before_training():
    with pytest.raises(ValueError, match="every must be at least 1"):
        verl.instrument(SimpleNamespace(), every=0)
    with pytest.raises(ValueError, match="every must be at least 1"):
        verl.instrument_engine(SimpleNamespace(), every=0)


def test_anything_else_is_refused():
    with pytest.raises(ValueError, match="no OpenRLHF policy trainer"):
        openrlhf.attach(SimpleNamespace(actor=None))
    if find_spec("verl") is None:
        with pytest.raises(ModuleNotFoundError, match="verl"):
            verl.install()
