"""td.check on TRL's DPOTrainer: references that are not the policy, and answers that a step is to raise and lowers."""

import pytest
import torch
from trainers import PAIRS, settings

import tokdyn as td

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def build(tokenizer_of_words, model_of_words, tmp_path):
    datasets.disable_progress_bars()

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(model_of_words, dtype=torch.float32)

    def make(rows=PAIRS, change=None, lora=None, **options):
        model, more = load(), {}
        if lora is not None:
            model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        if change == "other model":
            more["ref_model"] = load()
        data = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows]
        args = trl.DPOConfig(**settings(tmp_path / "out", max_steps=1, **options))
        made = trl.DPOTrainer(
            model=model, args=args, train_dataset=datasets.Dataset.from_list(data), processing_class=tokenizer_of_words, **more
        )
        with torch.no_grad():
            if change == "other model":
                made.ref_model.model.norm.weight.mul_(1.1)
            for name, p in made.model.named_parameters():
                if lora == "trained" and "lora_B.default" in name:
                    p.add_(0.05)
        return made

    return make


def suspicious(report, check):
    return [f for f in (*report.wrong, *report.suspicious) if f.check == check]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(change="other model"), "the reference is another model, and the policy differs"),
        (dict(lora="trained"), 'the reference is the adapter "ref", and the policy differs'),
        (dict(change=None), ""),
        (dict(lora="new"), ""),
        (dict(precompute_ref_log_probs=True), ""),
    ],
    ids=["other model", "adapter that is not its copy", "clean", "clean adapter", "clean, computed beforehand"],
)
def test_a_policy_that_does_not_begin_as_its_reference_is_found(build, options, words):
    report = td.check(build(**options))
    found = suspicious(report, "reference")
    assert (words in found[0].what and found[0].number > 0.01) if words else not found, str(report)
    if not words:
        (fine,) = [f for f in report if f.check == "reference"]
        assert fine.level == "fine" and fine.number < 1e-4


ROWS = {
    "chosen is lowered": [("what is the colour of the sky", " what of", " what what what what what what what")],
    "chosen is raised": [("what is the colour of the sky", " the sky is blue today", " i do not know")],
}


@pytest.mark.parametrize("case", ROWS)
def test_displacement_is_what_a_real_step_does(build, tokenizer_of_words, case):
    """The predicted change of log pi(chosen) is that of an SGD step up to its second order; a fall is named with its tokens."""
    lr = 1e-4  # the second order is 3e-3 of the first there, the last digits of log pi as much
    trainer = build(
        ROWS[case], optim="sgd", learning_rate=lr, per_device_train_batch_size=1, max_grad_norm=0, lr_scheduler_type="constant"
    )
    report = td.check(trainer)
    (finding,) = [f for f in report if f.check == "displacement"]
    question, chosen, _ = ROWS[case][0]
    probe = [td.encode(tokenizer_of_words, question, chosen)]
    monitor = td.attach(trainer, probe=probe, on_error="raise")
    trainer.train()
    actual = monitor.steps[0].actual
    assert finding.number == pytest.approx(float(actual.mean()), rel=0.02)
    assert (finding.level == "suspicious") == (case == "chosen is lowered") == (float(actual.mean()) < 0)
    if finding.level == "suspicious":
        assert "\u00ab" in finding.where and finding.where.count(";") == 4  # the five strongest pushes


@pytest.mark.parametrize(
    "row",
    [("what is two plus two", " four", " four"), ("what is the colour of the sky", " four blue", " four green")],
    ids=["chosen is rejected", "answers cut to the same"],
)
def test_pairs_that_teach_nothing_are_found(build, row):
    """Both answers alike in the data, and alike once max_length has cut them."""
    report = td.check(build([row] * 4, max_length=8))
    assert any(f.check == "pairs" and "same tokens" in f.what and f.number == 4 for f in report.wrong), str(report)


def test_a_gradient_that_is_not_finite_is_found(build):
    trainer = build()
    assert not suspicious(td.check(trainer), "gradients")
    with torch.no_grad():
        trainer.model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    report = td.check(trainer)
    assert any(f.check == "gradients" and "not finite" in f.what for f in report.wrong), str(report)


@pytest.mark.parametrize("factor", [1.0, 0.25, -1.0], ids=["clean", "divided by the group", "the wrong sign"])
def test_rollouts_of_a_wrong_scale_or_sign_are_found(tokenizer_of_words, model_of_words, tmp_path, factor):
    """What a step makes of answers with A > 0 is -lr <∇ log pi, ∇L> a token, by autograd on the same batch."""
    seen = []

    class Scaled(trl.GRPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(inputs)
            return factor * super().compute_loss(model, inputs, *args, **kwargs)

    lr = 1e-4
    args = trl.GRPOConfig(num_generations=4, max_completion_length=6, loss_type="grpo", optim="sgd", max_grad_norm=0,
                          **settings(tmp_path / "out", max_steps=1, learning_rate=lr))  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(model_of_words, dtype=torch.float32)
    trainer = Scaled(
        model=model, args=args, train_dataset=datasets.Dataset.from_list([{"prompt": p} for p, _, _ in PAIRS]),
        processing_class=tokenizer_of_words, reward_funcs=lambda completion_ids, **_: [1.0, 0.0] * (len(completion_ids) // 2),
    )  # fmt: skip
    report = td.check(trainer)
    found = {f.check: f for f in report if f.check in ("scale", "displacement")}
    level = {1.0: "fine"}.get(factor, "wrong")
    assert found["scale"].number == pytest.approx(factor, rel=1e-3) and (factor < 0 or found["scale"].level == level)
    assert ("divided by num_generations (4)" in found["scale"].what) == (factor == 0.25)
    batch, model = seen[0], trainer.model.eval()
    k = batch["completion_ids"].shape[1]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    z = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -k - 1 : -1]
    lp = z.log_softmax(-1).gather(-1, batch["completion_ids"][..., None]).squeeze(-1) * batch["completion_mask"]
    A, N = batch["advantages"], batch["completion_mask"].sum(1)
    raised = torch.autograd.grad(lp[A > 0].sum(), list(model.parameters()), retain_graph=True)
    lowered = torch.autograd.grad(-factor * (A * lp.sum(1) / N).mean(), list(model.parameters()))
    change = -lr * sum(float((a * b).sum()) for a, b in zip(raised, lowered, strict=True)) / int(N[A > 0].sum())
    assert found["displacement"].number == pytest.approx(change, rel=1e-3)
    assert found["displacement"].level == ("suspicious" if change < 0 else "fine") and (change < 0) == (factor < 0)
    if change < 0:
        assert "positive advantage" in found["displacement"].what and found["displacement"].where.count("\u00ab") == 5
