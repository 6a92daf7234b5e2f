"""TRL's experimental trainers whose loss is one of log-probs: c against their own loss by autograd, training as before."""

import copy
import importlib

import pytest
import torch
from trainers import PAIRS, settings

import tokdyn as td

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

EPS = torch.finfo(torch.float32).eps

PREFERENCES = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]
ROWS = {
    "CPO": PREFERENCES,
    "ORPO": PREFERENCES,
    "KTO": [{"prompt": p, "completion": a, "label": i == 0} for p, *both in PAIRS for i, a in enumerate(both)],
    "TPO": [row | {"reference": c} for row, (_, c, _) in zip(PREFERENCES, PAIRS, strict=True)],
    **dict.fromkeys(("GMPO", "A2PO", "OnlineDPO"), [{"prompt": p} for p, _, _ in PAIRS]),
    # of prompts alone its loss is divided by the labels there were before it sampled: none
    "IWOPD": [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]} for p, c, _ in PAIRS],
}
FOLDERS = {"OnlineDPO": "online_dpo", "IWOPD": "iw_opd"}
OPTIONS = {
    "A2PO": dict(max_completion_length=6),
    "OnlineDPO": dict(max_new_tokens=6),  # its temperature is 0.9 by default, and not the loss's
    "IWOPD": dict(max_length=32, max_completion_length=6),
    "GMPO": dict(num_generations=4, max_completion_length=6),
    "CPO": dict(max_length=32),
    "ORPO": dict(max_length=32),
}


def reward(completions, completion_ids=None, **_):
    return [float(len(str(answer)) % 3) for answer in completion_ids or completions]


def right_or_wrong(completions, **_):
    """Neither all nor none of one text's samples."""
    return [float(n % 2) for n in range(len(completions))]


@pytest.fixture
def build(tokenizer_of_words, model_of_words, tmp_path):
    datasets.disable_progress_bars()

    def make(kind):
        try:
            module = importlib.import_module(f"trl.experimental.{FOLDERS.get(kind, kind.lower())}")
        except ImportError:
            pytest.skip(f"this TRL has no experimental {kind}")
        transformers.set_seed(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(model_of_words, dtype=torch.float32)
        args = getattr(module, f"{kind}Config")(**settings(tmp_path / "out", **OPTIONS.get(kind, {})))
        funcs = {"GMPO": reward, "OnlineDPO": reward, "A2PO": right_or_wrong}
        more = dict(reward_funcs=funcs[kind]) if kind in funcs else {}
        if kind == "IWOPD":  # the teacher is another model: equal ones give no advantage
            more["teacher_model"] = copy.deepcopy(model)
            for p in more["teacher_model"].parameters():
                p.data.add_(0.05 * torch.randn_like(p))
            tokenizer_of_words.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        # of a prompt that is padded on its right A2PO's loss reads the first answer token at a padding position
        tokenizer_of_words.padding_side = "left" if kind == "A2PO" else "right"
        return getattr(module, f"{kind}Trainer")(
            model=model,
            args=args,
            train_dataset=datasets.Dataset.from_list(ROWS[kind]),
            processing_class=tokenizer_of_words,
            **more,
        )

    return make


def watched_outputs(model):
    """c by autograd of each pass, row by row, 0 left out.

    It is -∂L/∂log pi(y) where the output has log-probs; at logits G = c (pi - e_y), so that c = -G_y / (1 - pi_y).
    """
    found = []

    def on_output(module, args, kwargs, out):
        log_probs, place = getattr(out, "log_probs", None), len(found)
        seen = out.logits if log_probs is None else log_probs
        if not torch.is_grad_enabled() or not seen.requires_grad:
            return
        found.append(None)
        if log_probs is not None:
            scored = out.label_mask.bool()  # what is no label has a log-prob of 0, and the loss may add it
            seen.register_hook(lambda G: found.__setitem__(place, -G[scored & (G != 0)].double()))
            return
        pi, ids = seen.detach().double().softmax(-1)[:, :-1], args[0] if args else kwargs["input_ids"]
        y = ids[:, -pi.shape[1] :, None]

        def on_grad(G):
            c = -(G[:, :-1].double().gather(-1, y) / (1 - pi.gather(-1, y))).squeeze(-1)
            found[place] = c[c != 0]

        seen.register_hook(on_grad)

    handle = model.register_forward_hook(on_output, with_kwargs=True)
    return found, handle


@pytest.mark.parametrize("kind", ROWS)
def test_an_experimental_trainer_is_captured_and_left_as_it_is(build, kind):
    plain = build(kind)
    found, handle = watched_outputs(plain.model)
    plain.train()
    handle.remove()
    trainer = build(kind)
    monitor = td.attach(trainer, on_error="raise", check=False)
    trainer.train()

    def logged(trainer):
        return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]

    assert logged(trainer) == logged(plain) and len(monitor.steps) == 2
    for p, q in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)
    c = torch.cat([step.c[step.c != 0] for step in monitor.steps]).double()
    expected = torch.cat([part for part in found if part is not None])
    assert c.shape == expected.shape and len(c) > 20
    # the norm of a row of V float32 numbers, and 1 - pi_y, which is no less than 0.1 here
    torch.testing.assert_close(c, expected, rtol=1e3 * EPS, atol=1e2 * EPS * float(expected.abs().max()))
    assert all(step.residual < 1e-4 for step in monitor.steps)
