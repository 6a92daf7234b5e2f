"""Every loss_type of TRL's DPO and GRPO that is named here, captured in its own trainer: c is that of the objective."""

import pytest
import torch
from trainers import PAIRS, settings

import tokdyn as td

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def dpo(tokenizer_of_words, model_of_words, tmp_path_factory):
    """Two accumulated batches of pairs, and a policy away from its reference."""
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS])
    args = trl.DPOConfig(**settings(tmp_path_factory.mktemp("dpo"), gradient_accumulation_steps=2, beta=0.3))
    trainer = trl.DPOTrainer(model=load(model_of_words), args=args, train_dataset=data, processing_class=tokenizer_of_words)
    with torch.no_grad():
        trainer.model.model.norm.weight.mul_(1.1)
    return trainer


def scale_of(trainer):
    """The finding about c, and the residual of the capture."""
    report = td.check(trainer)
    (scale,), (gradient,) = ([f for f in report if f.check == name] for name in ("scale", "gradient"))
    assert gradient.level == "fine", str(gradient)
    return scale


KINDS = {"sigmoid": 0.0, "ipo": 0.0, "exo_pair": 0.01, "nca_pair": 0.0, "robust": 0.2, "bco_pair": 0.0, "sppo_hard": 0.0,
         "aot": 0.1, "apo_zero": 0.0, "apo_down": 0.0, "discopop": 0.0, "sigmoid_norm": 0.0}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_c_of_a_preference_loss_is_that_of_its_objective(dpo, kind):
    dpo.loss_types, dpo.label_smoothing = [kind], KINDS[kind]
    found = scale_of(dpo)
    assert found.level == "fine" and kind in found.what and found.number == pytest.approx(1, abs=1e-3), str(found)


@pytest.mark.parametrize("kind", ["hinge", "aot_unpaired", "sft"])
def test_a_loss_without_an_objective_here_is_captured_and_nothing_is_said_of_its_scale(dpo, kind):
    dpo.loss_types, dpo.label_smoothing = [kind], 0.0
    report = td.check(dpo)
    assert not [f for f in report if f.check == "scale"] and [f.level for f in report if f.check == "gradient"] == ["fine"]


def test_two_losses_are_added_with_their_weights(dpo):
    dpo.loss_types, dpo.loss_weights, dpo.label_smoothing = ["sigmoid", "bco_pair"], [1.0, 0.5], 0.0
    assert scale_of(dpo).level == "fine"
    dpo.args.loss_weights = None
    dpo.loss_weights = [1.0]


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_c_of_a_policy_gradient_is_that_of_its_objective(tokenizer_of_words, model_of_words, tmp_path, kind):
    """With TRL's own weights of tokens, over two accumulated batches of responses of unequal length."""
    level = "sequence" if kind == "luspo" else "token"
    known = trl.GRPOConfig.__dataclass_fields__
    if kind in ("luspo", "vespo") and "vespo_k_pos" not in known:
        pytest.skip("this TRL has no such loss")
    args = trl.GRPOConfig(
        num_generations=4, max_completion_length=12, loss_type=kind, importance_sampling_level=level,
        **settings(tmp_path, gradient_accumulation_steps=2),
    )  # fmt: skip

    def reward(completion_ids, **_):
        return [sum(i % 3 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]

    data = datasets.Dataset.from_list([{"prompt": p} for p, _, _ in PAIRS])
    trainer = trl.GRPOTrainer(
        model=load(model_of_words), args=args, train_dataset=data, reward_funcs=reward, processing_class=tokenizer_of_words
    )
    found = scale_of(trainer)
    assert found.level == "fine" and kind in found.what and found.number == pytest.approx(1, abs=1e-3), str(found)
