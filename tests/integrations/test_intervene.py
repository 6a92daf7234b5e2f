"""Interventions in real trainers: the loss that is asked for is the loss that is trained, the tokens spared are those named."""

import pytest
import torch
from trainers import PAIRS, settings

import tokdyn as td
from tokdyn.integrations.intervene import protect, reweight, sequences_of, train_with
from tokdyn.interventions import both_answers
from tokdyn.objectives import DPO, GRPO, IPO, LLDS, SFT, SimKO
from tokdyn.testing import relative_error

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

EPS = torch.finfo(torch.float32).eps

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture
def build(tokenizer_of_words, model_of_words, tmp_path):
    datasets.disable_progress_bars()

    def make(kind, lora=None, rows=None, **options):
        transformers.set_seed(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(model_of_words, dtype=torch.float32)
        shared = settings(tmp_path / "out", **options)
        rows = (
            rows
            or {
                "sft": [{"prompt": p, "completion": c} for p, c, _ in PAIRS],
                "dpo": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS],
                "grpo": [{"prompt": p} for p, _, _ in PAIRS],
            }[kind]
        )
        more = dict(
            model=model, processing_class=tokenizer_of_words, train_dataset=datasets.Dataset.from_list(rows), peft_config=lora
        )
        if kind == "sft":
            fused = trl.SFTConfig(**shared).loss_type == "chunked_nll"  # TRL up to 1.14: no token can be weighted there
            return trl.SFTTrainer(args=trl.SFTConfig(**shared | dict(loss_type="nll") if fused else shared), **more)
        if kind == "dpo":
            return trl.DPOTrainer(args=trl.DPOConfig(**shared), **more)

        def reward(completion_ids, **_):
            return [float(i % 4 < 2) for i in range(len(completion_ids))]  # every group has right and wrong ones

        config = trl.GRPOConfig(num_generations=4, max_completion_length=6, loss_type="grpo", scale_rewards="group", **shared)
        return trl.GRPOTrainer(args=config, reward_funcs=reward, **more)

    return make


@pytest.fixture
def probe(tokenizer_of_words):
    return [td.encode(tokenizer_of_words, PAIRS[0][0], PAIRS[0][1]), td.encode(tokenizer_of_words, PAIRS[2][0], PAIRS[2][2])]


def logged(trainer):
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


KINDS = ["sft", "dpo", "grpo"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_one_change_nothing_and_all_is_given_back(build, kind):
    plain = build(kind)
    plain.train()
    trainer = build(kind)
    undo = reweight(trainer, lambda model, chis: torch.ones(sum(len(chi) for chi in chis)))
    trainer.train()
    assert logged(trainer) == logged(plain) and torch.equal(weights_of(trainer), weights_of(plain))
    undo()
    assert "compute_loss" not in vars(trainer) and not trainer.model._forward_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_reach_the_tokens_they_are_for(build, kind):
    """With weights a function of the token, every token's c is the one without them times its own weight."""

    def weights(model, chis):
        return torch.cat([(chi.ids[chi.scored] % 5).float() / 4 for chi in chis])

    records = []
    for weigh in (None, weights):
        trainer = build(kind, max_steps=1)
        if weigh is not None:
            reweight(trainer, weigh)
        monitor = td.attach(trainer, on_error="raise")
        trainer.train()
        records.append(monitor.steps[0])
    plain, weighted = records
    ids = torch.tensor(plain.tokens["token_id"].to_pylist())
    assert torch.equal(ids, torch.tensor(weighted.tokens["token_id"].to_pylist())) and bool(plain.c.any())
    torch.testing.assert_close(weighted.c, plain.c * (ids % 5) / 4, rtol=1e3 * EPS, atol=0)
    assert weighted.residual < 1e-4  # what was captured explains the gradient that is trained


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_read_as_the_model_reads_them(build, tokenizer_of_words, kind):
    """Sequences of a batch, padding undone: prompts and answers of the data, answers scored, roles and advantages."""
    trainer, seen = build(kind, max_steps=1), []
    original = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        seen.append(sequences_of(trainer, inputs))
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    chis, grid, (rows, columns) = seen[0]
    assert len(rows) == len(columns) == sum(len(chi) for chi in chis) and len(chis) == (8 if kind == "dpo" else 4)
    texts = {
        tuple(tokenizer_of_words(p)["input_ids"]): (tokenizer_of_words(c)["input_ids"], tokenizer_of_words(r)["input_ids"])
        for p, c, r in PAIRS
    }
    for chi in chis:
        prompt, answer = tuple(chi.ids[~chi.scored].tolist()), chi.ids[chi.scored].tolist()
        assert prompt in texts and chi.ids.tolist() == [*prompt, *answer]
        if kind != "grpo":
            assert answer == [*texts[prompt][chi.role == "rejected"], tokenizer_of_words.eos_token_id]
    if kind == "dpo":
        assert [chi.role for chi in chis] == ["chosen"] * 4 + ["rejected"] * 4
        assert [chi.group for chi in chis] == [*range(4)] * 2
    if kind == "grpo":
        assert len({chi.group for chi in chis}) == 1 and sum(chi.advantage for chi in chis) == pytest.approx(0, abs=1e-5)


# ---------------------------------------------------------------- other losses


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("kind", "objective", "own"),
    [
        ("sft", SFT(), {}),
        ("dpo", DPO(beta=0.1), {}),
        ("dpo", IPO(by_length=True), {"loss_type": ["ipo"]}),
        ("grpo", GRPO(), {}),
    ],
    ids=["sft", "dpo", "ipo", "grpo"],
)
def test_a_trainers_own_loss_as_an_objective_trains_the_same(build, kind, objective, own, accumulate):
    """td.objectives' SFT, DPO, IPO and GRPO in TRL's trainers give TRL's losses and gradients."""
    if kind == "sft" and accumulate > 1:
        pytest.skip("TRL averages tokens over all accumulated batches, an objective over each")
    plain = build(kind, gradient_accumulation_steps=accumulate, **own)
    plain.train()
    trainer = build(kind, gradient_accumulation_steps=accumulate)
    train_with(trainer, objective)
    trainer.train()
    ours, theirs = (torch.tensor(logged(t)) for t in (trainer, plain))
    # losses and norms are sums of at most 100 terms in float32; two Adam steps divide by the gradient's own size
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e3 * EPS)
    assert bool((theirs[:, 1] > 0).all())


def test_simko_trains_in_a_grpo_trainer_and_differs_from_grpo(build):
    found = {}
    for name, objective in (("grpo", GRPO()), ("simko", SimKO(quantile=0.5, alpha=0.5))):
        trainer = build("grpo")
        train_with(trainer, objective)
        trainer.train()
        found[name] = torch.tensor(logged(trainer))
    assert bool(found["simko"].isfinite().all())
    assert float((found["simko"][0, 1] - found["grpo"][0, 1]).abs()) > 1e-4  # another gradient


def test_llds_trains_on_the_trainers_old_and_reference_log_probs(build, model_of_words):
    """Two iterations on each of two rollouts, with KL: loss and c are the objective's on log-probs gathered beside the trainer.

    pi_old is the policy at the rollout, one step ago in every second step, and pi_ref the model that training started from.
    """
    T, objective = 0.7, LLDS(clip=0.1, beta=0.3, lam=12.0)
    trainer, batches = build("grpo", max_steps=4, num_iterations=2, beta=0.3, temperature=T, learning_rate=0.02), []
    start = transformers.AutoModelForCausalLM.from_pretrained(model_of_words, dtype=torch.float32)
    train_with(trainer, objective)
    ours = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        assert bool(inputs["prompt_mask"].all())  # one prompt a batch, so that no sequence begins with padding
        with torch.no_grad():
            logits = [m(ids).logits[:, inputs["prompt_ids"].shape[1] - 1 : -1] / T for m in (model, start)]
        chosen = [z.log_softmax(2).gather(2, inputs["completion_ids"][:, :, None]).squeeze(2) for z in logits]
        batches.append((ids, inputs["completion_mask"].bool(), inputs["advantages"], *chosen))
        return ours(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    monitor = td.attach(trainer, on_error="raise")
    trainer.train()

    def expected(n, swapped=False):
        ids, mask, A, now, reference = batches[n]
        old = batches[n - n % 2][3]
        old, reference = (reference, old) if swapped else (old, reference)
        scored = torch.cat([torch.zeros(len(ids), ids.shape[1] - mask.shape[1], dtype=torch.bool), mask], 1)
        real = scored | (torch.arange(ids.shape[1]) < ids.shape[1] - mask.shape[1])
        chis = [
            td.Chi(ids[b][real[b]], scored[b][real[b]], advantage=float(A[b]), old_log_probs=old[b][mask[b]],
                   reference_log_probs=reference[b][mask[b]])
            for b in range(len(ids))
        ]  # fmt: skip
        log_probs = now[mask]
        return [f(log_probs, chis) for f in (objective.loss, objective.g_terms, GRPO(clip=0.1, beta=0.3).loss)]

    losses, lost = [loss for loss, _ in logged(trainer)], []
    for n, step in enumerate(monitor.steps):
        loss, term, plain = expected(n)
        # log-probs of size 10, each off by an eps of that, in a sum over at most 24 tokens
        assert losses[n] == pytest.approx(float(loss), abs=100 * EPS * 10, rel=1e-5)
        if n % 2:  # at the rollout itself log-probs equal the old ones but for rounding, which decides on max(0, .)'s slope
            torch.testing.assert_close(step.c, term.c, rtol=1e-4, atol=100 * EPS)
            lost.append(float(loss) - float(plain))
    assert max(lost) > 0.01  # since one of the rollouts; the samples, which differ with the number of threads, decide which
    assert torch.equal(batches[2][0], batches[3][0]) and relative_error(batches[2][3], batches[2][4]) > 0.01
    assert abs(float(expected(3, swapped=True)[0]) - losses[3]) > 0.01


def test_extended_sft_trains_both_answers(build, tokenizer_of_words):
    """Every answer of every pair is a completion with c = 1/N, and the loss is the mean of -log pi over all their tokens."""
    pairs = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]
    trainer = build("sft", rows=both_answers(pairs), max_steps=1, per_device_train_batch_size=2 * len(pairs))
    monitor = td.attach(trainer, on_error="raise")
    trainer.train()
    step = monitor.steps[0]
    rows = {}
    for row in step.tokens.to_pylist():
        rows.setdefault(row["sequence"], []).append(row["token_id"])
    answers = [
        tokenizer_of_words(pair[name])["input_ids"] + [tokenizer_of_words.eos_token_id]
        for pair in pairs
        for name in ("chosen", "rejected")
    ]
    assert sorted(rows.values()) == sorted(answers)
    torch.testing.assert_close(step.c, torch.full_like(step.c, 1 / len(step.c)), rtol=1e3 * EPS, atol=0)
    assert logged(trainer)[0][0] == pytest.approx(-step.metrics["log_prob"], rel=1e-5)


def test_precomputed_references_serve(build):
    found = []
    for precompute in (False, True):
        trainer = build("dpo", precompute_ref_log_probs=precompute, learning_rate=3e-3)
        train_with(trainer, IPO())
        trainer.train()
        found.append(torch.tensor(logged(trainer)))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e3 * EPS)


# ---------------------------------------------------------------- protection


CHECKPOINTED = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize("form", ["full", "checkpointed", "LoRA", "LoRA checkpointed", "accumulated"])
@pytest.mark.parametrize("kind", KINDS)
def test_protection_spares_the_tokens_whose_force_is_worst(build, probe, kind, form):
    """Recorded with and without: c is 0 on the worst tokens by td.Monitor's own forces, and as it was on the others."""
    options = CHECKPOINTED if "checkpointed" in form else dict(gradient_accumulation_steps=2) if form == "accumulated" else {}
    records = []
    for guard in (False, True):
        if "LoRA" in form:
            import peft

            lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
            options = options | dict(lora=lora)
        trainer = build(kind, max_steps=1, optim="sgd", max_grad_norm=0.0, **options)
        if guard:
            protect(trainer, probe, share=0.25)
        monitor = td.attach(trainer, probe={"protected": probe}, on_error="raise")
        trainer.train()
        records.append(monitor.steps[0])
    plain, guarded = records
    F, batch = plain.forces, torch.tensor(plain.tokens["micro_batch"].to_pylist())
    spared = torch.zeros(len(F), dtype=torch.bool)
    for b in batch.unique():
        own = (batch == b).nonzero().squeeze(1)
        worst = own[F[own].argsort()[: int(0.25 * len(own))]]
        spared[worst[F[worst] < 0]] = True
    assert len(batch.unique()) == (2 if form == "accumulated" else 1)
    assert bool(spared.any()) and torch.equal(guarded.c == 0, spared | (plain.c == 0))
    torch.testing.assert_close(guarded.c[~spared], plain.c[~spared], rtol=1e3 * EPS, atol=0)
    # the theorem, as it came out: predicted by the forces, and measured on the probe after the step
    assert float(guarded.predicted.sum()) > float(plain.predicted.sum())
    gain = float((guarded.predicted - plain.predicted).sum())
    assert gain == pytest.approx(float(-F[spared].sum()), rel=1e-3)
    assert float(guarded.actual.sum()) > float(plain.actual.sum())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_protection_is_by_the_step_that_the_optimizer_is_about_to_take(build, probe, kind, accumulate, monkeypatch):
    """The last batch of AdamW's second step loses the tokens that td.Monitor, which reads the state AFTER a step, finds worst.

    v' then holds the first step, the batches accumulated before, and gradients that clipping made smaller.
    """
    from tokdyn.integrations import intervene

    spare, calls = intervene.interventions.spare, []

    def last_alone(f, **options):
        calls.append(len(f))  # once when protect() checks its options, then batch by batch
        return spare(f, **options) if len(calls) == 1 + 2 * accumulate else torch.ones_like(f)

    records = []
    for guard in (False, True):
        trainer = build(
            kind,
            max_steps=2,
            per_device_train_batch_size=4 if kind == "grpo" else 4 // accumulate,
            optim="adamw_torch",
            max_grad_norm=0.1,
            gradient_accumulation_steps=accumulate,
            learning_rate=1e-4,
        )
        if guard:
            monkeypatch.setattr(intervene.interventions, "spare", last_alone)
            protect(trainer, probe, share=0.25)
        monitor = td.attach(trainer, probe={"protected": probe}, on_error="raise")
        trainer.train()
        records.append(monitor.steps[1])
    plain, guarded = records
    assert len(calls) == 1 + 2 * accumulate
    own = (torch.tensor(plain.tokens["micro_batch"].to_pylist()) == accumulate - 1).nonzero().squeeze(1)
    worst = own[plain.forces[own].argsort()[: int(0.25 * len(own))]]
    spared = torch.zeros(len(plain.forces), dtype=torch.bool)
    spared[worst[plain.forces[worst] < 0]] = True
    assert bool(spared.any()) and torch.equal(guarded.c == 0, spared | (plain.c == 0))
    torch.testing.assert_close(guarded.c[~spared], plain.c[~spared], rtol=1e-4, atol=0)  # c is captured anew in either run


def test_a_batch_that_loses_its_labels_on_the_way_is_still_whole(build, probe):
    """transformers.Trainer takes them out where it has a loss function of its own, and the batch is read twice."""
    records = []
    for guard in (None, 0.0, 0.5):
        trainer = build("sft", max_steps=1, optim="sgd", max_grad_norm=0.0)
        trainer.compute_loss_func = lambda out, labels, **_: (
            -torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        )
        if guard is not None:
            protect(trainer, probe, share=guard)
        monitor = td.attach(trainer, probe={"protected": probe}, on_error="raise")
        trainer.train()
        records.append((logged(trainer), monitor.steps[0]))
    (plain, step), (same, _), (_, guarded) = records
    assert same == plain
    spared = torch.zeros(len(step.forces), dtype=torch.bool)
    spared[step.forces.argsort()[: len(step.forces) // 2]] = True
    spared &= step.forces < 0
    assert bool(spared.any())  # the record has those that get a gradient: nobody told it the labels
    torch.testing.assert_close(guarded.forces, step.forces[~spared], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_protection_of_nothing_changes_no_bit(build, probe, kind):
    """The rehearsal leaves no trace in gradients, random numbers or the trainer's own figures of loss."""
    plain = build(kind)
    plain.train()
    trainer = build(kind)
    protect(trainer, {"a": probe}, share=0.0)
    trainer.train()
    assert logged(trainer) == logged(plain) and torch.equal(weights_of(trainer), weights_of(plain))


def test_nthr_in_a_grpo_trainer(build):
    """Wrong rollouts lose c where NTHR says so, and the right ones' tokens keep it all."""
    chosen, records = [], []
    for spare in (False, True):
        trainer = build("grpo", max_steps=1)
        if spare:

            def weights(model, chis):
                chosen.append(td.interventions.nthr(model, chis, beta=0.1, scale=0.0))
                return chosen[-1]

            reweight(trainer, weights)
        monitor = td.attach(trainer, on_error="raise")
        trainer.train()
        records.append(monitor.steps[0])
    plain, spared = records
    A = torch.tensor(plain.tokens["advantage"].to_pylist())
    assert bool((A > 0).any() and (A < 0).any()) and bool((chosen[0] == 0).any())
    assert torch.equal(chosen[0][A > 0], torch.ones(int((A > 0).sum())))
    torch.testing.assert_close(spared.c, plain.c * chosen[0], rtol=1e3 * EPS, atol=0)
    assert relative_error(spared.c, plain.c) > 0.01


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("call", "tokenizer_of_words"),
    [
        (lambda: reweight(object(), lambda m, c: None), "needs a transformers.Trainer, got object without train"),
        (lambda: protect(object(), []), "the probe is empty"),
        (lambda: protect(object(), [td.Chi(torch.arange(3), torch.arange(3) > 0)], share=3.0), r"share must lie in \[0, 1\]"),
        (lambda: sequences_of(object(), {"pixels": 1}), "which tokens of this batch are scored is unknown: it has pixels"),
    ],
)  # fmt: skip
def test_mistakes_say_what_to_do(call, tokenizer_of_words):
    with pytest.raises(ValueError, match=tokenizer_of_words):
        call()


def test_weights_of_another_length_stop_the_training(build):
    trainer = build("sft")
    reweight(trainer, lambda model, chis: torch.ones(3))
    with pytest.raises(ValueError, match=r"must return \[L\]=\(\d+,\), one for each scored token, got \[3\]"):
        trainer.train()
