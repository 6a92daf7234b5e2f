"""Monitor: figures are what they say, and training is unmoved."""

import importlib
import json
import subprocess
import sys
import warnings

import pytest
import torch
from loops import EPS, PROBE, V, data, dpo, grpo, labelled, one_record, sft, train

import tokdyn as td
from tokdyn import steps as records
from tokdyn.sequences import Chi
from tokdyn.testing import random_chis, tiny

# ---------------------------------------------------------------- training is untouched


@pytest.mark.parametrize(
    "loss_of, options",
    [(sft, {}), (dpo, dict(lora=True)), (grpo, dict(accumulate=2)), (sft, dict(family="gpt2"))],
    ids=["sft", "dpo with LoRA", "grpo with entropy bonus and accumulation", "sft with dropout"],
)
def test_losses_norms_and_weights_are_bit_identical(loss_of, options):
    with_it, without = train(loss_of, **options), train(loss_of, monitor=False, **options)
    assert with_it[0] == without[0]
    assert all(torch.equal(a, b) for a, b in zip(with_it[1], without[1], strict=True))
    assert len(with_it[2].steps) == 3 and all(step.actual is not None for step in with_it[2].steps)


def test_whatever_fails_is_a_warning_that_names_it_and_training_goes_on():
    """A probe that cannot run, and a capture that breaks: same losses, one warning each, hooks gone."""
    plain = train(sft, monitor=False)[0]
    model = tiny("llama").train()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = td.Monitor(model, opt, probe=[random_chis([(3, 4)], vocabulary=V + 900, seed=2)[0]])
    torch.manual_seed(7)
    losses = []
    with monitor, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(3):
            if n == 1:
                monitor._capture.temperature = None  # the capture itself breaks
            loss = sft(model, data(seed=10 * n))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            monitor.step_end()
            opt.zero_grad()
            losses.append((loss.item(), norm.item()))
    assert losses == plain
    told = [str(w.message) for w in caught if "tokdyn" in str(w.message)]
    assert "the probe could not be read after the step" in told[0] and "vocabulary" in told[0] and "capture failed" in told[1]
    assert len(told) == 2 and len(monitor.problems) > 2
    assert len(monitor.steps) == 1 and "capture failed" in monitor.problems[-1][1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks


def test_nothing_captured_is_an_error_never_an_empty_plot():
    model, other = tiny("llama"), tiny("llama")
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with td.Monitor(model, opt, on_error="raise") as monitor:
        sft(other, data()).backward()
        opt.step()
        with pytest.raises(ValueError, match="step 1: nothing was captured: no forward pass of LlamaForCausalLM was seen"):
            monitor.step_end()
    assert not monitor.steps


def test_an_exception_in_the_loop_takes_everything_off(tmp_path):
    model = tiny("llama")
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyError), td.Monitor(model, opt, probe=PROBE, out=tmp_path / "run"):
        sft(model, data()).backward()
        raise KeyError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not opt._optimizer_step_pre_hooks
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "interrupted"


# ---------------------------------------------------------------- records on disk, options


def test_a_folder_says_when_it_was_last_written(tmp_path):
    """Every flush moves the time on, so that a training that writes no more can be told from one that runs."""
    step_folder = importlib.import_module("tokdyn.training.step_folder")
    _, _, monitor = train(sft, steps=1)
    folder, seen = step_folder.Folder(tmp_path / "run", 0, {}), []
    for hour in (1, 2):
        about = folder.about | {"written": f"2000-01-01T0{hour}:00:00+00:00"}  # as of a run of long ago
        (tmp_path / "run" / "run.json").write_text(json.dumps(about))
        assert step_folder.unwritten_for(records.read(tmp_path / "run")[0]) > 20 * 365 * 24 * 3600
        folder.add(monitor.steps[0])
        folder.flush()
        seen.append(step_folder.unwritten_for(records.read(tmp_path / "run")[0]))
    assert all(-1 <= seconds < 3600 for seconds in seen)  # whole seconds are written
    assert records.read(tmp_path / "run")[0]["status"] == "running"
    assert step_folder.unwritten_for({"status": "running"}) is None


def test_the_folder_holds_what_the_records_hold(tmp_path):
    _, _, monitor = train(sft, out=tmp_path / "run", every=2, steps=5)
    about, tables = records.read(tmp_path / "run")
    assert [step.step for step in monitor.steps] == [1, 2, 4]
    assert about["status"] == "complete" and about["kind"] == "training" and about["problems"] == []
    assert about["probe"] == {"near": 2, "far": 1} and about["settings"]["every"] == 2
    assert tables["tokens"]["step"].to_pylist() == [1] * 20 + [2] * 20 + [4] * 20
    assert tables["steps"]["entropy"].to_pylist() == [step.metrics["entropy"] for step in monitor.steps]
    assert tables["probe"].num_rows == 3 * 12 and set(tables["probe"]["probe"].to_pylist()) == {"near", "far"}
    assert tables["probe"]["actual"].to_pylist()[:12] == monitor.steps[0].actual.tolist()
    last = monitor.steps[-1]  # its table was written and is read back
    assert last.tokens["c"].to_pylist() == last.c.tolist() and last.sequences().num_rows == 4
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]
    with pytest.raises(FileExistsError, match="exists already"):
        train(sft, out=tmp_path / "run", steps=1)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        records.read(tmp_path)
    (tmp_path / "run/run.json").write_text(json.dumps({"format": 1, "kind": "profile"}))
    with pytest.raises(ValueError, match="holds profile"):
        records.read(tmp_path / "run")


def test_token_tables_are_let_go_where_no_folder_holds_them(monkeypatch, tmp_path):
    from tokdyn import monitor

    monkeypatch.setattr(monitor, "KEPT", 2)
    _, _, watch = train(sft, steps=4)
    assert [len(step.c) for step in watch.steps] == [20] * 4 and watch.steps[2].tokens.num_rows == 20
    with pytest.raises(ValueError, match="step 2 was let go to spare memory: give the monitor out="):
        watch.steps[1].tokens  # noqa: B018
    _, _, watch = train(sft, steps=4, out=tmp_path / "run")
    assert [step.tokens.num_rows for step in watch.steps] == [20] * 4


def test_a_loss_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match="the gradient at the hidden states is not finite"):
        one_record(tiny("llama"), lambda m, ids: sft(m, ids) * float("inf"), data())


def test_a_router_loss_is_noted():
    model = tiny("qwen2_moe", output_router_logits=True, router_aux_loss_coef=0.1).train()
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    with td.Monitor(model, opt, on_error="raise") as monitor:
        sft(model, data()).backward()
        opt.step()
        step = monitor.step_end()
    assert step.residual < 1e-5 and "a loss of the router goes past the logits" in step.notes[0]


def test_fitted_terms_are_noted():
    def smoothed(m, ids):
        z = m(ids).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(z, labelled(ids)[:, 1:].flatten(), label_smoothing=0.1)

    step = one_record(tiny("llama"), smoothed, data())
    assert step.residual < 1e-5 and "entropy and label smoothing terms (v, u) were fitted to it" in step.notes[0]


def test_a_grad_scaler_sits_inside_c_and_changes_after_the_step():
    """c is that of the loss, not of the scaled one, also when the scale grows after every step; a skipped step is named."""
    model = tiny("llama")
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    with td.Monitor(model, opt, scaler=scaler, probe=PROBE, on_error="raise") as monitor:
        for n in range(3):
            loss = sft(model, data(seed=n)) * (float("inf") if n == 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            if n == 2:
                with pytest.raises(ValueError, match="is not finite"):
                    monitor.step_end(force=True)
                break
            step = monitor.step_end()
            opt.zero_grad()
            torch.testing.assert_close(step.c, torch.full((20,), 1 / 20), rtol=100 * EPS, atol=0)
            assert step.accounted == pytest.approx(1, abs=1e-3)


def test_every_term_of_a_loss_is_that_of_the_loss_and_not_of_the_scaled_one():
    """Label smoothing ε over N tokens is c = (1-ε)/N and u = ε/N, whatever the scaler multiplies the loss by."""
    model, ids = tiny("llama"), data()
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with td.Monitor(model, opt, scaler=scaler, on_error="raise") as monitor:
        for _ in range(2):  # the pass in which c alone is found wanting, and one after it
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labelled(ids)[:, 1:].flatten(), label_smoothing=0.1)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            step = monitor.step_end()
            opt.zero_grad()
            found = {name: torch.tensor(step.tokens[name].to_pylist()) for name in ("c", "v", "u")}
            for name, share in (("c", 0.9), ("v", 0.0), ("u", 0.1)):
                torch.testing.assert_close(found[name], torch.full((20,), share / 20), rtol=1e4 * EPS, atol=1e4 * EPS / 20)


def test_a_step_that_the_scaler_skips_is_noted():
    model = tiny("llama")
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with td.Monitor(model, opt, scaler=scaler, probe=PROBE, on_error="raise") as monitor:
        scaler.scale(sft(model, data())).backward()
        next(model.parameters()).grad.fill_(float("inf"))  # what overflow in half precision leaves
        scaler.step(opt)
        scaler.update()
        step = monitor.step_end(force=True)
    assert step.notes == ["the optimizer skipped this step: its gradients overflowed in half precision"]
    assert step.actual is None
    torch.testing.assert_close(step.c, torch.full((20,), 1 / 20), rtol=100 * EPS, atol=0)


def test_token_texts():
    from tokdyn.loading import load_model

    model, tokenizer = load_model("demo")
    chi = td.encode(tokenizer, "Human: Hello\n\nAssistant:", " Good morning")
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    with td.Monitor(model, opt, tokenizer=tokenizer, on_error="raise") as monitor:
        model(chi.ids[None], labels=torch.where(chi.scored, chi.ids, -100)[None]).loss.backward()
        opt.step()
        step = monitor.step_end()
    assert "".join(step.tokens["token"].to_pylist()) == "".join(t for t, s in zip(chi.tokens, chi.scored, strict=True) if s)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(every=0), "every must be at least 1"),
        (dict(every=2, probe_every=3), "a multiple of it"),
        (dict(on_error="ignore"), "on_error must be"),
        (dict(probe={}), "the probe is empty"),
        (dict(probe=PROBE, blame="nobody"), "blame must name a group of the probe, near, far"),
        (dict(probe=[Chi(torch.arange(3), torch.zeros(3, dtype=torch.bool))]), "no scored token"),
    ],
)
def test_options_that_do_not_fit(options, message):
    model = tiny("llama")
    with pytest.raises(ValueError, match=message):
        td.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_a_probe_needs_the_optimizer_and_a_whole_model():
    model = tiny("llama")
    with pytest.raises(ValueError, match="a probe needs the optimizer"):
        td.Monitor(model, probe=PROBE)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    next(model.parameters()).ds_id = 0  # as DeepSpeed marks what it keeps elsewhere
    with td.Monitor(model, opt, probe=PROBE, on_error="raise"):
        sft(model, data()).backward()
        with pytest.raises(ValueError, match="ZeRO-3"):
            opt.step()


def test_accelerate():
    """Its optimizer steps when accumulation ends; only then does a step end, and c is that of the mean over micro-batches."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.GradientState._reset_state()  # shared by a process: a trainer's finished loader would end every step
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny("llama")
    model, opt = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    with td.Monitor(model, opt, probe=PROBE, on_error="raise") as monitor:
        for n in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(sft(model, data(seed=n)))
                opt.step()
                assert (monitor.step_end() is not None) == (n % 2 == 1)
                opt.zero_grad()
    assert [step.passes for step in monitor.steps] == [2, 2]
    for step in monitor.steps:
        torch.testing.assert_close(step.c, torch.full((40,), 1 / 40), rtol=100 * EPS, atol=0)
        blamed = step.predicted[: sum(len(chi) for chi in PROBE["near"])]
        size = float(blamed.abs().sum()) + abs(step.carried) + float(step.forces.abs().sum())  # as where carried is tested
        assert abs(step.accounted - 1) * abs(float(blamed.sum()) - step.carried) < 100 * EPS * size


def test_without_an_optimizer_every_step_end_ends_a_step():
    model = tiny("llama")
    with td.Monitor(model, on_error="raise") as monitor:
        for _ in range(2):
            sft(model, data()).backward()
            assert monitor.step_end() is not None
    assert len(monitor.steps) == 2


def test_importing_tokdyn_loads_none_of_this():
    code = "import sys, tokdyn; print([n for n in ('trl', 'datasets', 'accelerate', 'tokdyn.monitor') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    assert callable(td.attach) and callable(td.tap) and td.Monitor.__name__ == "Monitor"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        td.nothing  # noqa: B018
