"""td.check on steps of tiny trainers: each planted fault is found and named, the same step without it is silent."""

import random
import re

import numpy
import pytest
import torch
from chats import tokenizer_of

import tokdyn as td
from tokdyn.integrations.left_alone import left_as_it_was
from tokdyn.testing import tiny

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

EPS = torch.finfo(torch.float32).eps
IGNORED = -100


@pytest.fixture(scope="module")
def tokenizer():
    made = tokenizer_of("chatml")
    made.add_special_tokens({"pad_token": "<|pad|>"})
    return made


@pytest.fixture
def trainer(tokenizer, tmp_path):
    def make(kind=None, model=None, **options):
        shared = dict(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=1,
                      save_strategy="no", optim="sgd", learning_rate=0.01, bf16=False)  # fmt: skip
        model = tiny("llama", vocabulary=len(tokenizer)) if model is None else model
        args = transformers.TrainingArguments(**shared | options)
        return (kind or transformers.Trainer)(model=model, args=args, processing_class=tokenizer)

    return make


TALKS = [("Why is the sky blue?", "Air scatters blue light."), ("Is 7 prime?", "Yes, it is."), ("Two plus two?", "Four.")]


def talk(tokenizer, question, answer):
    """Ids of a conversation, and which of them are the answer's with its closing token."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    chi = td.encode(tokenizer, messages[:1], answer)
    closing = chi.ids.tolist().index(tokenizer.eos_token_id, int(chi.scored.int().argmax()))
    ids = chi.ids.tolist()[: closing + 1]
    return ids, chi.scored.tolist()[: closing + 1]


def batch(tokenizer, talks=TALKS, left=False, change=None):
    """Padded ids, mask and labels; `change(ids, scored)` makes other ones of a row."""
    rows = [talk(tokenizer, *each) for each in talks]
    rows = [change(list(ids), list(scored)) if change else (ids, scored) for ids, scored in rows]
    T = max(len(ids) for ids, _ in rows)

    def pad(x, value):
        return [value] * (T - len(x)) + x if left else x + [value] * (T - len(x))

    return dict(
        input_ids=torch.tensor([pad(ids, tokenizer.pad_token_id) for ids, _ in rows]),
        attention_mask=torch.tensor([pad([1] * len(ids), 0) for ids, _ in rows]),
        labels=torch.tensor([pad([i if s else IGNORED for i, s in zip(*row, strict=True)], IGNORED) for row in rows]),
    )


def told(report, check):
    """The finding of that check that is not fine; there is one, and of other checks none."""
    assert not report.skipped, report.skipped
    (finding,) = [f for f in (*report.wrong, *report.suspicious)]
    assert finding.check == check and finding.do, str(report)
    return finding


# ---------------------------------------------------------------- nothing is left behind


def test_a_clean_step_is_silent_and_leaves_no_trace(trainer, tokenizer):
    """Weights, buffers, .grad, optimizer, modes, random states, counters: the same objects with the same bits."""
    made = trainer(gradient_accumulation_steps=2)
    made.create_optimizer_and_scheduler(2)
    model = made.model.eval()
    model.model.layers[0].train()
    kept = next(model.parameters())
    kept.grad = torch.ones_like(kept)
    before = dict(
        weights=[p.clone() for p in model.parameters()], grads=[p.grad for p in model.parameters()],
        modes=[m.training for m in model.modules()], state=str(made.optimizer.state_dict()), held=dict(vars(made)),
        random=(numpy.random.get_state()[1].tolist(), torch.get_rng_state()), steps=vars(made.state).copy(),
    )  # fmt: skip
    report = td.check(made, batches=[batch(tokenizer), batch(tokenizer, TALKS[:1])])
    assert report.silent and not report.skipped, str(report)
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before["weights"], strict=True))
    assert all(p.grad is was for p, was in zip(model.parameters(), before["grads"], strict=True))
    assert torch.equal(kept.grad, torch.ones_like(kept)) and str(made.optimizer.state_dict()) == before["state"]
    assert [m.training for m in model.modules()] == before["modes"] and vars(made) == before["held"]
    assert numpy.random.get_state()[1].tolist() == before["random"][0] and vars(made.state) == before["steps"]
    assert torch.equal(torch.get_rng_state(), before["random"][1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_random_states_counters_and_metrics_are_put_back(trainer):
    """Python's own random state too, which the type checks of these tests draw from."""
    made, buffer = trainer(), torch.zeros(2)
    made.model.register_buffer("seen_so_far", buffer)
    made.logs, made.counted = {"train": {"loss": [1.0]}}, 3
    with left_as_it_was(made):
        states = random.getstate(), numpy.random.get_state()[1].copy(), torch.get_rng_state()
        random.random(), numpy.random.rand(), torch.rand(1)
        made.logs["train"]["loss"].append(2.0)
        made.logs["new"], made.counted, made.more = [1], 4, object()
        buffer += 1
        made.model.train()
    drawn = random.getstate(), numpy.random.get_state()[1], torch.get_rng_state()
    assert drawn[0] == states[0] and (drawn[1] == states[1]).all() and torch.equal(drawn[2], states[2])
    assert made.logs == {"train": {"loss": [1.0]}} and made.counted == 3 and not hasattr(made, "more")
    assert not buffer.any() and not made.model.training


def test_what_is_no_trainer_and_what_steps_by_itself_is_refused(trainer, tokenizer):
    with pytest.raises(ValueError, match="td.check needs a transformers.Trainer, got Linear"):
        td.check(torch.nn.Linear(2, 2))
    made = trainer()
    handle = next(made.model.parameters()).register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="steps inside the backward pass"):
        td.check(made, batches=[batch(tokenizer)])
    handle.remove()


# ---------------------------------------------------------------- tokens


def shifted(ids, scored):
    return ids, [False, False, *scored[:-2]]


def from_another_tokenisation(ids, scored):
    """A mask laid from a length that is two tokens too long."""
    first = scored.index(True)
    return ids, [s and t >= first + 2 for t, s in enumerate(scored)]


def with_the_question(ids, scored):
    return ids, [t > 0 for t in range(len(ids))]


def without_end(ids, scored):
    return ids, [*scored[:-1], False]


def cut(ids, scored):
    return ids[:-1], scored[:-1]


def nothing(ids, scored):
    return ids, [False] * len(ids)


@pytest.mark.parametrize(
    ("change", "check", "level", "words"),
    [
        (from_another_tokenisation, "roles", "wrong", "left out: the mask was made from another tokenisation.*«"),
        (with_the_question, "roles", "wrong", "other turns than the assistant's are scored.*user .*«"),
        (without_end, "EOS", "wrong", "is not scored.*«<.im_end.>»"),
        (cut, "EOS", "suspicious", "no answer of the batch ends"),
    ],
)
def test_wrongly_scored_tokens_are_found(trainer, tokenizer, change, check, level, words):
    finding = told(td.check(trainer(), batches=[batch(tokenizer, change=change)]), check)
    assert finding.level == level and re.search(words, f"{finding.what} {finding.where}", re.DOTALL), str(finding)


def test_a_batch_that_scores_nothing_is_said(trainer, tokenizer):
    report = td.check(trainer(), batches=[batch(tokenizer, change=nothing)])
    assert any(f.check == "roles" and f.number == 0 for f in report.wrong) or "nothing was captured" in str(report.skipped)


def test_scored_padding_is_found(trainer, tokenizer):
    made = batch(tokenizer)
    made["labels"] = torch.where(made["attention_mask"] == 0, made["input_ids"], made["labels"])
    finding = told(td.check(trainer(), batches=[made]), "padding")
    assert finding.number == int((made["attention_mask"] == 0).sum())


def test_two_beginnings_are_found(trainer, tokenizer):
    made = tokenizer_of("llama 3")
    trained = trainer(model=tiny("llama", vocabulary=len(made)))
    trained.processing_class = made
    row = made.apply_chat_template(
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}], tokenize=False
    )
    ids = made(row, add_special_tokens=False).input_ids
    labels = [IGNORED] * (len(ids) - 3) + ids[-3:]
    twice = dict(input_ids=torch.tensor([[made.bos_token_id, *ids]]), labels=torch.tensor([[IGNORED, *labels]]))
    assert "BOS" in {f.check for f in td.check(trained, batches=[twice]).wrong}
    once = dict(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
    assert "BOS" not in {f.check for f in td.check(trained, batches=[once]).wrong}


# ---------------------------------------------------------------- the scale of c


def scaled(by):
    """A Trainer of a library whose loss comes out `by` times as large."""

    class Scaled(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return by(self) * super().compute_loss(model, inputs, *args, **kwargs)

    return Scaled


class BatchMeans(transformers.Trainer):
    """Each accumulated batch averaged by itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs) / self.current_gradient_accumulation_steps


class AnswerMeans(transformers.Trainer):
    """Each answer averaged by itself, then over answers."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        z, y = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits, inputs["labels"][:, 1:]
        lp = z[:, :-1].log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1) * (y != IGNORED)
        return -(lp.sum(1) / (y != IGNORED).sum(1)).mean()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (scaled(lambda self: 1 / self.args.gradient_accumulation_steps), "0.5 times.*divided by the accumulated batches"),
        (scaled(lambda self: 3.0), "3 times.*multiplied by the sequences of a batch"),
        (BatchMeans, "each accumulated batch is averaged by itself.*as 1/length"),
        (AnswerMeans, "weigh by the length of their answer"),
    ],
    ids=["divided by the accumulation twice", "a sum over answers", "means of batches", "means of answers"],
)
def test_a_wrong_scale_is_found_with_its_factor(trainer, tokenizer, kind, words):
    made = [batch(tokenizer), batch(tokenizer, [*TALKS[1:], TALKS[1]])]
    finding = told(td.check(trainer(kind, gradient_accumulation_steps=2), batches=made), "scale")
    assert re.search(words, finding.what), str(finding)


def test_a_loss_of_ones_own_that_no_factor_explains_is_left_alone(trainer, tokenizer):
    class Own(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            z, y = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits, inputs["labels"][:, 1:]
            lp = z[:, :-1].log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)
            return -(lp * torch.linspace(0.1, 2, y.shape[1]) * (y != IGNORED)).sum()

    assert td.check(trainer(Own), batches=[batch(tokenizer)]).silent


# ---------------------------------------------------------------- log-probs


class Tapped(transformers.Trainer):
    """A loss of log-probs that it makes itself, on rollouts where the batch says so."""

    temperature, made_at, normalised = 1.0, 1.0, True

    def compute_loss(self, model, inputs, *args, **kwargs):
        y = inputs["labels"][:, 1:]
        z = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1] / self.made_at
        lp = (z.log_softmax(-1) if self.normalised else z).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)
        lp = td.tap(lp, y, temperature=self.temperature)
        old = inputs.get("old_per_token_logps")
        mask = (y != IGNORED).float()
        if old is None:
            return -(lp * mask).sum()
        ratio = (lp - old[:, 1:]).exp()
        return -(ratio * inputs["advantages"][:, None] * mask).sum()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(made_at=0.7), "they are those at temperature 0.7, and 1 is what the trainer names"),
        (dict(normalised=False), "above 0 nats|not those of the model's logits"),
    ],
)
def test_log_probs_that_are_not_the_models_are_found(trainer, tokenizer, changes, words):
    clean, planted = trainer(Tapped), trainer(Tapped)
    assert "log-probs" not in {f.check for f in td.check(clean, batches=[batch(tokenizer)]).wrong}
    for name, value in changes.items():
        setattr(planted, name, value)
    report = td.check(planted, batches=[batch(tokenizer)])
    (finding,) = [f for f in report.wrong if f.check == "log-probs"]
    assert re.search(words, finding.what), str(finding)


def rollout(tokenizer, model, old):
    """A batch of rollouts whose old log-probs are `old` of the logits, [B, T]."""
    made = batch(tokenizer)
    made["advantages"] = torch.tensor([1.0, -1.0, 0.5])
    with torch.no_grad():
        z = model(input_ids=made["input_ids"], attention_mask=made["attention_mask"]).logits[:, :-1]
    y = made["input_ids"][:, 1:]
    lp = old(z).gather(-1, y[..., None]).squeeze(-1)
    made["old_per_token_logps"] = torch.nn.functional.pad(lp, (1, 0))
    return made


def nucleus(p):
    def old(z):
        pi, order = z.softmax(-1).sort(-1, descending=True)
        kept = pi.cumsum(-1) - pi < p
        return z.log_softmax(-1) - (pi * kept).sum(-1, keepdim=True).log()

    return old


SAMPLERS = {
    "temperature": (lambda z: (z / 0.8).log_softmax(-1), "the sampler's temperature is 0.8"),
    "top-p": (nucleus(0.9), "renormalised over what top-p 0.9 keeps"),
    "top-k": (lambda z: z.log_softmax(-1) - z.softmax(-1).topk(20).values.sum(-1, keepdim=True).log(), "top-k 20 keeps"),
    "noise": (lambda z: z.log_softmax(-1) + 0.05 * torch.randn(z.shape, generator=torch.manual_seed(0)), "two sides"),
    "other weights": (lambda z: z.roll(1, -1).log_softmax(-1), "other weights|two sides|one-sided"),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_old_log_probs_that_are_not_the_new_ones_are_explained(trainer, tokenizer, sampler):
    old, words = SAMPLERS[sampler]
    made = trainer(Tapped)
    model = made.model.eval()
    clean = td.check(made, batches=[rollout(tokenizer, model, lambda z: z.log_softmax(-1))])
    assert "old log-probs" not in {f.check for f in (*clean.wrong, *clean.suspicious)}, str(clean)
    report = td.check(made, batches=[rollout(tokenizer, model, old)])
    (finding,) = [f for f in (*report.wrong, *report.suspicious) if f.check == "old log-probs"]
    assert re.search(words, finding.what), str(finding)
    assert (finding.level == "wrong") == (sampler in ("temperature", "top-p", "top-k"))


# ---------------------------------------------------------------- rows alone


def packed(tokenizer):
    rows = [talk(tokenizer, *each) for each in TALKS]
    return dict(
        input_ids=torch.tensor([sum((ids for ids, _ in rows), [])]),
        position_ids=torch.tensor([sum((list(range(len(ids))) for ids, _ in rows), [])]),
        labels=torch.tensor([sum(([i if s else IGNORED for i, s in zip(*row, strict=True)] for row in rows), [])]),
    )


def test_packed_rows_that_attention_keeps_apart_are_silent(trainer, tokenizer):
    assert td.check(trainer(), batches=[packed(tokenizer)]).silent


def test_packed_rows_that_leak_through_attention_are_found(trainer, tokenizer):
    model = tiny("llama", vocabulary=len(tokenizer))
    model.set_attn_implementation("eager")

    def forget(module, args, kwargs):
        T = args[0].shape[1] if args else kwargs["hidden_states"].shape[1]
        return args, kwargs | dict(attention_mask=torch.full((T, T), -1e30).triu(1)[None, None])

    model.model.layers[1].self_attn.register_forward_pre_hook(forget, with_kwargs=True)
    finding = told(td.check(trainer(model=model), batches=[packed(tokenizer)]), "rows alone")
    assert "packed" in finding.what and finding.where == "first in model.layers.1.self_attn (attention)"


def test_packed_rows_that_leak_through_a_recurrence_are_found(trainer, tokenizer):
    """Mamba reads no position_ids."""
    finding = told(td.check(trainer(model=tiny("mamba", vocabulary=len(tokenizer))), batches=[packed(tokenizer)]), "rows alone")
    assert "packed" in finding.what and finding.where == "first in backbone.layers.0.mixer (recurrence)"


class Mixer(torch.nn.Module):
    """A causal convolution over the tokens."""

    def __init__(self, d):
        super().__init__()
        self.taps = torch.nn.Conv1d(d, d, 3, padding=2, groups=d)

    def forward(self, x):
        return self.taps(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


def test_packed_rows_that_leak_through_a_convolution_are_found(trainer, tokenizer):
    model = tiny("llama", vocabulary=len(tokenizer))
    model.model.layers[0].mlp = Mixer(32)  # whose outputs the next layer spreads
    finding = told(td.check(trainer(model=model), batches=[packed(tokenizer)]), "rows alone")
    assert finding.where == "first in model.layers.0.mlp.taps (convolution)"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_left_padding_is_silent_under_rotary_and_found_under_learned_positions(trainer, tokenizer, family):
    report = td.check(trainer(model=tiny(family, vocabulary=len(tokenizer))), batches=[batch(tokenizer, left=True)])
    if family == "llama":
        assert report.silent, str(report)
    else:
        assert "left-padded" in told(report, "rows alone").what


# ---------------------------------------------------------------- weights


def test_parameters_that_never_move_are_found(trainer, tokenizer):
    """Not held by the optimizer; without gradient; frozen among others of their kind."""
    made = trainer()
    made.create_optimizer_and_scheduler(1)
    made.model.unused = torch.nn.Parameter(torch.ones(3))
    report = td.check(made, batches=[batch(tokenizer)])
    found = {f.what.split(":")[0]: f.where for f in (*report.wrong, *report.suspicious)}
    assert found == {
        "parameters are trained and have no gradient in this batch": "unused",
        "parameters are trained that the optimizer does not hold": "unused",
    }
    frozen = trainer()
    frozen.model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    assert told(td.check(frozen, batches=[batch(tokenizer)]), "gradients").where == "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("advantage", [0.0, 1.0])
def test_a_step_that_teaches_nothing_is_found(trainer, tokenizer, advantage):
    """By equal rewards, or since the loss multiplies everything with 0."""

    class Nothing(Tapped):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (1.0 - advantage)

    made = trainer(Nothing)
    rows = rollout(tokenizer, made.model.eval(), lambda z: z.log_softmax(-1))
    rows["advantages"] = rows["advantages"] * advantage
    finding = told(td.check(made, batches=[rows]), "gradients")
    assert "c is 0 at every scored token" in finding.what and ("rewards are equal" in finding.what) == (advantage == 0)


@pytest.mark.parametrize("made_already", [False, True])
def test_steps_that_half_precision_rounds_away_are_found(trainer, tokenizer, made_already):
    """What moves after a real step of AdamW is what the check says moves."""

    def bfloat16(lr, warmup=0):
        made = trainer(
            model=tiny("llama", vocabulary=len(tokenizer)).bfloat16(), optim="adamw_torch", learning_rate=lr, weight_decay=0.0,
            warmup_steps=warmup,
        )  # fmt: skip
        if made_already:
            made.create_optimizer_and_scheduler(10)
        return made

    made = bfloat16(1e-6, warmup=5)  # whose first rate is 0
    finding = told(td.check(made, batches=[batch(tokenizer)]), "rounding")
    assert finding.level == "suspicious" and "bfloat16" in finding.what and "1e-06" in finding.what
    assert td.check(bfloat16(1e-2), batches=[batch(tokenizer)]).silent
    model = made.model
    before = [p.detach().clone() for p in model.parameters()]
    stepping = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    model(**batch(tokenizer)).loss.backward()
    stepping.step()
    has = [p.grad != 0 for p in model.parameters()]  # a weight without gradient stands still for another reason
    still = sum(int(((p == was) & g).sum()) for p, was, g in zip(model.parameters(), before, has, strict=True))
    assert abs(100 * still / sum(int(g.sum()) for g in has) - finding.number) < 5


def adapted(tokenizer, **options):
    import peft

    model = tiny("llama", tied=True, vocabulary=len(tokenizer))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", *options.pop("more", [])], task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config)


def test_an_adapter_that_unties_the_readout_is_found(trainer, tokenizer):
    pytest.importorskip("peft")
    assert td.check(trainer(model=adapted(tokenizer)), batches=[batch(tokenizer)]).silent
    for options in (dict(modules_to_save=["lm_head"]), dict(more=["lm_head"])):
        report = td.check(trainer(model=adapted(tokenizer, **options)), batches=[batch(tokenizer)])
        (finding,) = [f for f in (*report.wrong, *report.suspicious) if f.check == "readout"]
        assert "ties its readout to its embedding" in finding.what, str(report)


def test_a_tokenizer_beyond_the_readout_is_found(trainer, tokenizer):
    made = trainer()
    made.processing_class = tokenizer_of("chatml")
    made.processing_class.add_tokens([f"new{n}" for n in range(500)])
    finding = told(td.check(made, batches=[batch(tokenizer)]), "readout")
    assert "tokens and the readout" in finding.what


def test_a_readout_that_should_be_tied_and_is_not_is_found(trainer, tokenizer):
    model = tiny("llama", tied=True, vocabulary=len(tokenizer))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    report = td.check(trainer(model=model), batches=[batch(tokenizer)])
    (finding,) = [f for f in report.wrong if f.check == "readout"]
    assert "they are two tensors" in finding.what


def test_a_temperature_that_the_loss_does_not_divide_by_is_found(trainer, tokenizer):
    made = trainer()
    made.temperature = 0.5
    report = td.check(made, batches=[batch(tokenizer)])
    (finding,) = [f for f in report.wrong if f.check == "gradient"]
    assert "c explains the gradient at the hidden states only to" in finding.what and finding.number > EPS**0.5, str(report)
