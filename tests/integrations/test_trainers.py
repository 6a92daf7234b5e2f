"""td.attach on real trainers: transformers.Trainer and TRL's SFT, DPO and GRPO train bit for bit as without it."""

import copy

import pytest
import torch
from packaging.version import Version
from trainers import PAIRS, settings

import tokdyn as td
from tokdyn import steps as records
from tokdyn.objectives import DPO, GRPO
from tokdyn.sequences import Chi
from tokdyn.training import capture as capturing

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def build(tokenizer_of_words, model_of_words, tmp_path):
    datasets.disable_progress_bars()

    def make(kind, *, lora=False, rows=PAIRS, **options):
        transformers.set_seed(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(model_of_words, dtype=torch.float32)
        shared = settings(tmp_path / "out", **options)
        peft = None
        if lora:
            from peft import LoraConfig, get_peft_model

            peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        if kind == "trainer":
            texts = [tokenizer_of_words(p + c, padding="max_length", max_length=14)["input_ids"] for p, c, _ in rows]
            data = datasets.Dataset.from_list([{"input_ids": x, "labels": [-100] * 3 + x[3:]} for x in texts])
            return transformers.Trainer(
                model=model if peft is None else get_peft_model(model, peft),
                args=transformers.TrainingArguments(**shared),
                train_dataset=data,
                data_collator=lambda rows: {k: torch.tensor([row[k] for row in rows]) for k in rows[0]},
            )
        more = dict(model=model, processing_class=tokenizer_of_words, peft_config=peft)
        if kind == "sft":
            data = [{"prompt": p, "completion": c} for p, c, _ in rows]
            return trl.SFTTrainer(args=trl.SFTConfig(**shared), train_dataset=datasets.Dataset.from_list(data), **more)
        if kind == "dpo":
            data = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows]
            return trl.DPOTrainer(args=trl.DPOConfig(**shared), train_dataset=datasets.Dataset.from_list(data), **more)
        known = trl.GRPOConfig.__dataclass_fields__
        if missing := [name for name in options if name not in known]:
            pytest.skip(f"this TRL's GRPO has no {missing}")

        def reward(completion_ids, **_):
            return [sum(i % 3 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]

        config = trl.GRPOConfig(num_generations=4, max_completion_length=6, **shared)
        data = datasets.Dataset.from_list([{"prompt": p} for p, _, _ in rows])
        return trl.GRPOTrainer(args=config, train_dataset=data, reward_funcs=reward, **more)

    return make


@pytest.fixture
def probe(tokenizer_of_words):
    question, good, bad = PAIRS[0]
    return {
        "chosen": [td.encode(tokenizer_of_words, question, good)],
        "rejected": [td.encode(tokenizer_of_words, question, bad)],
    }


def logged(trainer):
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


WAYS = {
    "trainer": ("trainer", {}),
    "trainer, LoRA, accumulation": ("trainer", dict(lora=True, gradient_accumulation_steps=2)),
    "trainer, checkpointing, bf16": ("trainer", dict(gradient_checkpointing=True, bf16=True)),
    "trainer, label smoothing": ("trainer", dict(label_smoothing_factor=0.1)),
    "trainer, torch.compile": ("trainer", dict(torch_compile=True, torch_compile_backend="aot_eager")),
    "sft": ("sft", {}),
    "sft, LoRA, accumulation, checkpointing": (
        "sft",
        dict(lora=True, gradient_accumulation_steps=2, gradient_checkpointing=True),
    ),
    "sft, bf16": ("sft", dict(bf16=True)),
    "sft, packing": ("sft", dict(packing=True, max_length=32)),
    "sft, padding-free": ("sft", dict(padding_free=True, max_length=None)),
    "sft, torch.compile": ("sft", dict(torch_compile=True, torch_compile_backend="aot_eager")),
    "dpo": ("dpo", {}),
    "dpo, LoRA, accumulation": ("dpo", dict(lora=True, gradient_accumulation_steps=2)),
    "dpo, bf16": ("dpo", dict(bf16=True)),
    "dpo, torch.compile": ("dpo", dict(torch_compile=True, torch_compile_backend="aot_eager")),
    "dpo, checkpointing, precomputed reference": ("dpo", dict(gradient_checkpointing=True, precompute_ref_log_probs=True)),
    "grpo": ("grpo", {}),
    "grpo, LoRA, accumulation": ("grpo", dict(lora=True, gradient_accumulation_steps=2)),
    "grpo, entropy bonus, KL, temperature, iterations, checkpointing": (
        "grpo",
        dict(beta=0.04, entropy_coef=0.05, temperature=0.7, num_iterations=2, gradient_checkpointing=True),
    ),
    "grpo, KL, temperature": ("grpo", dict(beta=0.04, temperature=0.7)),
    "grpo, bf16, checkpointing": ("grpo", dict(bf16=True, gradient_checkpointing=True)),
    "grpo, torch.compile": ("grpo", dict(torch_compile=True, torch_compile_backend="aot_eager")),
    "grpo, ratios of sequences, iterations": (
        "grpo",
        dict(importance_sampling_level="sequence", loss_type="grpo", num_iterations=2),
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
def test_training_is_bit_identical_and_every_step_is_captured(build, probe, way):
    kind, options = WAYS[way]
    without = build(kind, **options)
    without.train()
    trainer = build(kind, **options)
    report = td.check(trainer)  # which leaves no trace in what follows
    inside = kind == "trainer" or kind == "sft" and Version(trl.__version__) < Version("1.15")  # where the loss is made
    hidden = "torch.compile" in way and inside
    seen = watched(trainer, compiled="torch.compile" in way)
    monitor = td.attach(trainer, probe=probe, on_error="warn" if hidden else "raise")
    trainer.train()
    seen["hook"].remove()
    assert logged(trainer) == logged(without)
    mine, plain = dict(trainer.model.named_parameters()), dict(without.model.named_parameters())
    assert all(torch.equal(p, plain[name]) for name, p in mine.items())
    assert (torch._dynamo.utils.counters["frames"]["ok"] > 0) == ("torch.compile" in way)
    if hidden:
        assert "the loss is computed inside the compiled model" in monitor.problems[0][1] and not monitor.steps
        assert "the loss is computed inside the compiled model" in monitor.report.skipped["capture"]
        return
    assert [step.step for step in monitor.steps] == [1, 2]
    for told in (report, monitor.report):  # before the training, and in its first step
        assert {f.check for f in (*told.wrong, *told.suspicious)} == truly(kind, monitor.steps[0], trainer), str(told)
        assert set(told.skipped) <= ({"rows alone", "reference", "displacement"} if "compile" in way else set()), told.skipped
    for names, on in features(trainer, monitor.steps, **seen).items():
        assert on == any(name in way for name in names), names
    for step in monitor.steps:
        half = "bf16" in way
        assert step.residual < (4 * torch.finfo(torch.bfloat16).eps if half else 2e-5)
        # every token of the loss was captured: their forces add up to what the optimizer's gradient does
        F, total = step.forces.double(), float(step.forces.double().sum())
        own = total / step.accounted
        # in bfloat16 each token's part is off by √(30 products) roundings, about one eps of it, apart from the others'
        bound = 8 * torch.finfo(torch.bfloat16).eps * float(F.norm()) if half else 2e-3 * abs(own)
        assert abs(total - own) < bound < float(F.abs().max()) / 2  # so that a single token could not be missing
        assert 0.7 < step.linearity < 1.3
    assert hooks(trainer.model) == hooks(without.model)  # gradient checkpointing leaves one of its own


def truly(kind, step, trainer):
    """What is wrong with the trainings of these tests: the plain Trainer's rows score their padding, rollouts are cut."""
    if kind == "trainer":
        return {"EOS", "padding"}
    ends = trainer.processing_class.eos_token_id in step.tokens["token_id"].to_pylist()
    return set() if ends else {"EOS"}


def watched(trainer, compiled):
    """What a training really does, seen without tokdyn: its batches, and dtype and recomputation at a layer's calls."""
    batches, calls, original = [], [], trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        batches.append(inputs)
        return original(model, inputs, *args, **kwargs)

    def look(module, args, output):
        calls.append((output.dtype, torch._C._current_graph_task_id() != -1))  # -1 outside a backward pass

    trainer.compute_loss = compute_loss
    layer = next(m for name, m in trainer.model.named_modules() if name.endswith("mlp.up_proj"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return dict(batches=batches, calls=calls, hook=(torch.nn.Module() if compiled else layer).register_forward_hook(look))


def features(trainer, steps, batches, calls, hook):
    """Whether what the words in a way's name stand for was at work."""
    first, last = (step.tokens for step in steps)
    positions, rows = batches[-1].get("position_ids"), len(next(iter(batches[-1].values())))
    beside_c = any(any(step.tokens[name].to_pylist()) for step in steps for name in "vu")
    return {
        ("LoRA",): any("lora_" in name for name, p in trainer.model.named_parameters() if p.requires_grad),
        ("accumulation",): steps[0].passes == 2,
        ("checkpointing",): any(again for _, again in calls),
        ("bf16",): any(dtype is torch.bfloat16 for dtype, _ in calls),
        ("packing", "padding-free"): positions is not None
        and bool((positions[:, 1:] == 0).any())
        and len(set(last["sequence"].to_pylist())) > rows,
        ("label smoothing", "entropy bonus"): beside_c,
        ("precomputed reference",): "ref_chosen_logps" in batches[-1],
        ("KL",): batches[-1].get("ref_per_token_logps") is not None,
        ("iterations",): first["token_id"].equals(last["token_id"]),
    }


def hooks(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_c_of_sft_is_one_over_the_tokens_of_the_step(build):
    """Also over accumulated micro-batches of unequal length, and per rank count."""
    trainer = build("sft", gradient_accumulation_steps=2, per_device_train_batch_size=2)
    monitor = td.attach(trainer, on_error="raise")
    trainer.train()
    for step in monitor.steps:
        # a handful of quotients and products on the way of the loss's scale, each rounded once
        torch.testing.assert_close(step.c, torch.full_like(step.c, 1 / len(step.c)), rtol=50 * EPS, atol=0)
        assert set(step.tokens["micro_batch"].to_pylist()) == {0, 1} and step.passes == 2


def sequences(step, reference=None, old=None):
    """The step's sequences as an objective wants them, with its log-probs; reference and old log-probs by sequence."""
    rows = step.tokens.to_pylist()
    chis = []
    for s in sorted({row["sequence"] for row in rows}):
        own = [row for row in rows if row["sequence"] == s]
        ids = torch.tensor([0] + [row["token_id"] for row in own])
        more = {name: torch.tensor([row["log_prob"] for row in of[s]]) for name, of in
                (("reference_log_probs", reference), ("old_log_probs", old)) if of is not None}  # fmt: skip
        advantage = own[0]["advantage"]
        chis.append(
            Chi(ids, torch.arange(len(ids)) > 0, role=own[0]["role"], advantage=None if advantage != advantage else advantage,
                group=own[0]["group"] if own[0]["role"] != "response" else 0, **more)
        )  # fmt: skip
    return torch.tensor([row["log_prob"] for row in rows]), chis


def by_sequence(step):
    rows = step.tokens.to_pylist()
    return {s: [row for row in rows if row["sequence"] == s] for s in {row["sequence"] for row in rows}}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_an_attached_probe_of_the_entropy_names_the_token_that_lowered_it(build, probe):
    """Each token's force on Σ H of the probe is -lr <∇Σ H, ∇(its part of the loss)>: one autograd gradient a token."""
    lr = 0.5
    options = dict(max_steps=1, per_device_train_batch_size=3, optim="sgd", learning_rate=lr, max_grad_norm=0.0)
    trainer = build("trainer", rows=PAIRS[:3], lr_scheduler_type="constant", **options)
    model = copy.deepcopy(trainer.model).double()
    watched = dict(probe=probe, blame="chosen", observable="entropy", on_error="raise", check=False)
    monitor = td.attach(trainer, **watched)
    trainer.train()
    (step,) = monitor.steps

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)])

    def log_pi(ids):
        return model(ids[None]).logits[0].log_softmax(-1)

    (chi,) = probe["chosen"]
    at = log_pi(chi.ids)[chi.scored.nonzero().flatten() - 1]
    H = gradient(-(at.exp() * at).sum())
    texts = {tuple(row["input_ids"][3:]): torch.tensor(row["input_ids"]) for row in trainer.train_dataset}
    naive = []
    for rows in by_sequence(step).values():
        ids = texts[tuple(row["token_id"] for row in rows)]
        losses = -log_pi(ids)[:-1].gather(1, ids[1:, None]).squeeze(1)[2:] / step.tokens.num_rows
        naive += [-lr * float(H @ gradient(loss)) for loss in losses]
    naive = torch.tensor(naive, dtype=torch.float64)
    before, after = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, trainer.model))
    # the step is read off weights that are rounded to their last digit: as many eps as they are larger than it
    rounding = EPS * float(before.norm() / (after - before).norm())
    assert float((step.forces - naive).norm()) < (100 * EPS + rounding) * float(naive.norm())
    assert float(naive.min()) < 0 and int(step.forces.argmin()) == int(naive.argmin())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_c_of_dpo_is_that_of_the_objective(build):
    """At step 0, where the policy is its reference, and after a step, where it is not."""
    trainer = build("dpo", rows=PAIRS[:1] * 4, per_device_train_batch_size=1, beta=0.3, learning_rate=0.01)
    monitor = td.attach(trainer, on_error="raise")
    trainer.train()
    first, second = monitor.steps
    for step, reference in ((first, None), (second, by_sequence(first))):
        log_probs, chis = sequences(step, reference)
        c = DPO(beta=0.3).g_terms(log_probs, chis).c
        torch.testing.assert_close(step.c, c, rtol=0, atol=20 * EPS * 10)  # log-ratios of sums of log-probs of size 10
    assert float((second.c.abs() - 0.15).abs().max()) > 1e-3  # no longer β/2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_c_of_grpo_is_that_of_the_objective(build):
    """Two iterations on the same rollouts: ratios, the clip and the KL term all act in the second."""
    options = dict(beta=0.04, num_iterations=2, loss_type="grpo", learning_rate=0.1, epsilon=0.1, epsilon_high=0.1)
    if "use_bias_correction_kl" in trl.GRPOConfig.__dataclass_fields__:
        options["use_bias_correction_kl"] = False
    trainer = build("grpo", rows=PAIRS[:1] * 4, **options)
    monitor = td.attach(trainer, on_error="raise")
    trainer.train()
    first, second = monitor.steps
    assert first.tokens["token_id"].equals(second.tokens["token_id"])
    for step, before in ((first, None), (second, by_sequence(first))):
        log_probs, chis = sequences(step, before, before)
        c = GRPO(clip=0.1, beta=0.04).g_terms(log_probs, chis).c
        torch.testing.assert_close(step.c, c, rtol=0, atol=100 * EPS)
    assert second.metrics["clipped"] > 0 and first.metrics["clipped"] == 0
    assert first.excluded > 0  # generation, and the reference model


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_clipped_share_is_the_trainers_own(build, level):
    """TRL logs the share of clipped tokens; ours is counted from the captured log-probs, in both iterations."""
    epsilon = 0.1 if level == "token" else 0.02
    trainer = build(
        "grpo", num_iterations=2, learning_rate=0.1, epsilon=epsilon, epsilon_high=epsilon, loss_type="grpo",
        importance_sampling_level=level,
    )  # fmt: skip
    monitor = td.attach(trainer, on_error="raise")
    trainer.train()
    theirs = [entry["clip_ratio/region_mean"] for entry in trainer.state.log_history if "loss" in entry]
    ours = [step.metrics["clipped"] for step in monitor.steps]
    assert ours == pytest.approx(theirs, rel=1e-5) and ours[0] == 0 < ours[1] < 1
    if level == "token":  # a clipped token has no force; unclipped ones with an advantage have
        last = monitor.steps[1].tokens
        clipped, A = (torch.tensor(last[name].to_pylist()) for name in ("clipped", "advantage"))
        assert torch.equal((monitor.steps[1].c == 0), (clipped == 1) | (A == 0))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_losses_that_do_not_clip_have_no_clipped_share(build):
    trainer = build("grpo", loss_type="cispo", epsilon_high=0.1)
    monitor = td.attach(trainer, on_error="raise")
    trainer.train()
    assert all("clipped" not in step.metrics and step.residual < 1e-5 for step in monitor.steps)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_an_entropy_bonus_is_captured_as_v(build):
    trainer = build("grpo", entropy_coef=0.05)
    monitor = td.attach(trainer, on_error="raise")
    trainer.train()
    for step in monitor.steps:
        v = torch.tensor(step.tokens["v"].to_pylist())
        # where logits are all there is (TRL up to 1.14), c, v and u are fitted: three directions that are much alike
        band = 50 * EPS if step.routes == ("log_probs",) else 0.01
        torch.testing.assert_close(v, torch.full_like(v, -0.05 / len(v)), rtol=band, atol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_figures_reach_reporters_and_the_folder(build, probe, tmp_path):
    """A reporter that was there before sees them, at logging steps only, merged over the steps since; so does log_history."""
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = build("dpo", logging_steps=2, max_steps=4)
    trainer.add_callback(Reporter())
    monitor = td.attach(trainer, probe=probe, probe_every=2, out=tmp_path / "run", on_error="raise")
    trainer.train()
    ours = [
        {k.removeprefix("tokdyn/"): v for k, v in logs.items() if k.startswith("tokdyn/")} for logs in seen if "loss" in logs
    ]
    assert len(ours) == 2
    merged = sum(step.metrics["c_up"] for step in monitor.steps[:2]) / 2
    assert ours[0]["c_up"] == pytest.approx(merged) and {"chosen/actual", "rejected/log_prob", "probe/linearity"} <= set(
        ours[0]
    )
    assert {"shared_prefix", "residual", "force_up_share"} <= set(ours[0])
    assert all("tokdyn/c_up" in entry for entry in trainer.state.log_history if "loss" in entry)
    about, tables = records.read(tmp_path / "run")
    assert about["status"] == "complete" and tables["steps"].num_rows == 4
    assert sorted(set(tables["probe"]["step"].to_pylist())) == [1, 2, 4]
    assert set(tables["tokens"]["role"].to_pylist()) == {"chosen", "rejected"} and "token" in tables["tokens"].column_names


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_figures_reach_tensorboard(build, probe, tmp_path, monkeypatch):
    """What its event file holds is what the monitor found: the callback sits before the reporter."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = build("dpo", report_to="tensorboard")
    monitor = td.attach(trainer, probe=probe, on_error="raise")
    trainer.train()
    (file,) = (tmp_path / "tb").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    for name in ("c_up", "force_up_share", "squeezing", "shared_prefix", "entropy"):
        (tag,) = [tag for tag in events.Tags()["scalars"] if tag.endswith(f"tokdyn/{name}")]
        assert [e.value for e in events.Scalars(tag)] == pytest.approx([step.metrics[name] for step in monitor.steps])
    assert any(tag.endswith("tokdyn/chosen/actual") for tag in events.Tags()["scalars"])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_trainer_is_itself_again_afterwards(build):
    """Methods, callbacks and hooks, when training ends and when it raises."""
    for fails in (False, True):
        trainer = build("trainer")
        if fails:
            trainer.compute_loss_func = lambda *a, **k: (_ for _ in ()).throw(KeyError("user's own"))
        own, callbacks = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
        td.attach(trainer, on_error="raise")
        with pytest.raises(ValueError, match="attached already"):
            td.attach(trainer)
        if fails:
            with pytest.raises(KeyError):
                trainer.train()
        else:
            trainer.train()
        assert {"train", "compute_loss", "_clip_grad_norm"}.isdisjoint(vars(trainer)) and set(own) <= set(vars(trainer))
        assert trainer.callback_handler.callbacks == callbacks
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())
        assert not [c for c in capturing._active if c.lm is trainer.model]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_training_goes_on_where_tokdyn_cannot_start(build, probe, tmp_path):
    """The folder is taken once it is too late to refuse: the same training, one warning, the folder as it was."""
    without, trainer = build("trainer"), build("trainer")
    without.train()
    monitor = td.attach(trainer, probe=probe, out=tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "taken").touch()
    with pytest.warns(UserWarning, match="tokdyn is not attached: .* exists already"):
        trainer.train()
    assert logged(trainer) == logged(without)
    assert len(monitor.problems) == 1 and not monitor.steps
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["taken"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_taken_folder_is_refused_before_training_and_overwritten_if_asked(build, probe, tmp_path):
    """A run that is started again: refused, the trainer as it was; with overwrite=True the new records alone are there."""
    first = build("trainer")
    td.attach(first, out=tmp_path / "run", on_error="raise")
    first.train()
    (tmp_path / "run" / "report.html").touch()
    again = build("trainer")
    callbacks = list(again.callback_handler.callbacks)
    with pytest.raises(FileExistsError, match="exists already: .*overwrite=True"):
        td.attach(again, out=tmp_path / "run")
    assert again.callback_handler.callbacks == callbacks and "train" not in vars(again)
    monitor = td.attach(again, out=tmp_path / "run", every=2, overwrite=True, on_error="raise")
    again.train()
    _, tables = td.steps.read(tmp_path / "run")
    assert sorted(tables["steps"]["step"].to_pylist()) == [step.step for step in monitor.steps]
    assert not (tmp_path / "run" / "report.html").exists()
    (tmp_path / "run" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="is not overwritten, it holds thesis.txt"):
        td.attach(again, out=tmp_path / "run", overwrite=True)


def test_anything_but_a_trainer_is_refused():
    with pytest.raises(ValueError, match="needs a transformers.Trainer, got Linear"):
        td.attach(torch.nn.Linear(2, 2))
