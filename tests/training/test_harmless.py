"""Whatever goes wrong in a monitor is told and stays in it; what the loop does besides its steps is seen."""

import ast
import copy
import dataclasses
import functools
import gc
import inspect
import tracemalloc
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from loops import PROBE, PROMPT, answers, data, sft, train

import tokdyn as td
import tokdyn.training
from tokdyn import monitor as monitors
from tokdyn.testing import random_chis, tiny
from tokdyn.training import (
    capture,
    columns,
    diagnosis,
    distributed,
    forward,
    gradients,
    layout,
    loop,
    observation,
    probe,
    record,
    recorder,
    step_folder,
    step_log,
    steps,
    weighting,
)  # fmt: skip

EPS = torch.finfo(torch.float32).eps

# ---------------------------------------------------------------- one guard


def test_every_hook_of_a_training_goes_through_the_guard():
    """`Hooks.add` and `StepLog.listen` alone register hooks; passes of ours take off what they set themselves.

    The weights of an intervention are no observer's: what they lack is the user's to know. What `td.check` watches are
    passes that it makes itself.
    """
    places = set()
    for path in [*Path(tokdyn.training.__file__).parent.glob("*.py"), Path(monitors.__file__)]:
        for function in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]:
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    if node.func.attr.startswith("register_") and node.func.attr.endswith("hook"):
                        places.add((path.name, function.name))
    passes_of_ours = {("probe.py", "_pushed"), ("probe_sharded.py", "read")}
    assert {p for p in places if p[0] not in ("weighting.py", "isolation.py")} == {("step_log.py", "listen"), *passes_of_ours}


def ours():
    """Every function and method behind a monitor, as (owner, name)."""
    modules = (capture, columns, diagnosis, distributed, forward, gradients, layout, loop, observation, probe, record, recorder,
               step_folder, step_log, steps, weighting)  # fmt: skip
    for module in modules:
        for name, thing in vars(module).items():
            if getattr(thing, "__module__", "") != module.__name__:
                continue
            if inspect.isfunction(thing):
                yield module, name
            elif inspect.isclass(thing):
                yield from ((thing, n) for n, f in vars(thing).items() if inspect.isfunction(f) and not n.startswith("__"))
    for name, function in vars(td.Monitor).items():
        if inspect.isfunction(function) and name.startswith("_") and not name.startswith("__"):
            yield td.Monitor, name


# the guard itself, what takes hooks off, what the user calls and may raise, what a training step does not call, and what hears
# of the steps of all optimizers, which is silent
EXEMPT = {
    "note",
    "_noting",
    "remove",
    "guarded",
    "_report",
    "_hook_failed",
    "failed",
    "tap",
    "unwatched",
    "read",
    "_all_or_none",
    "_facts",
}


class Planted(Exception):
    """Raised in a place of ours."""


def test_an_error_in_any_function_of_ours_leaves_the_training_as_it_was(tmp_path, counted):
    """Planted in one after the other, after the start: the same weights bit by bit, no exception, no hook left."""
    model = tiny("llama")
    start, ids = copy.deepcopy(model.state_dict()), data(2, 7)

    def run(owner_and_name=None, place=None, spy=None, fails=False):
        model.load_state_dict(start)
        model.zero_grad()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = None
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if place is not None:
                monitor = td.Monitor(model, opt, probe={"near": random_chis([(2, 2)], seed=5)}, out=place)
                monitor.start()
            for owner, name in owner_and_name or ():
                patch.setattr(owner, name, planted(vars(owner)[name], (owner, name), spy, fails))
            if monitor is not None:
                monitor.step_begin()
            lp, H = answers(model, ids)
            td.tap(lp, ids[:, PROMPT:], entropy=H)
            (-(lp + 0.01 * H).mean()).backward()
            opt.step()
            if monitor is not None:
                monitor.step_end()
                monitor.close()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks
        return torch.cat([p.detach().flatten() for p in model.parameters()]).clone(), monitor

    def planted(function, place, spy, fails):
        @functools.wraps(function)
        def instead(*args, **kwargs):
            spy.add(place)
            if fails:
                raise Planted(place[1])
            return function(*args, **kwargs)

        return instead

    plain, called, quiet = run()[0], set(), []
    places = [(owner, name) for owner, name in ours() if name not in EXEMPT]
    assert torch.equal(run(places, tmp_path / "spied on", called)[0], plain) and len(called) > 80
    for n, place in enumerate(p for p in places if p in called):
        weights, monitor = run([place], tmp_path / str(n), set(), fails=True)
        assert torch.equal(weights, plain), place
        if not monitor.problems:
            quiet.append(f"{place[0].__name__}.{place[1]}")
    assert not quiet, f"nothing was said of an error in {quiet}"
    counted(len(called), "functions in which an error was planted")


# ---------------------------------------------------------------- what the loop does besides its steps


def test_gradients_that_are_thrown_away_are_no_part_of_the_record():
    """A batch tried again, by zero_grad() of either kind, by hand, between micro-batches and right before the step."""
    for throw in (
        lambda m, opt: opt.zero_grad(),
        lambda m, opt: opt.zero_grad(set_to_none=False),
        lambda m, opt: m.zero_grad(),
        lambda m, opt: [setattr(p, "grad", None) for p in m.parameters()],
    ):
        model = tiny("llama")
        opt = torch.optim.SGD(model.parameters(), lr=0.01)
        with td.Monitor(model, opt, probe=PROBE, on_error="raise") as monitor:
            sft(model, data(seed=1)).backward()  # a batch that is skipped, as its loss was NaN
            throw(model, opt)
            for seed in (2, 3):
                (sft(model, data(seed=seed)) / 2).backward()
            opt.step()
            step = monitor.step_end()
            opt.zero_grad()
        assert step.passes == 2 and step.tokens.num_rows == 40
        torch.testing.assert_close(step.c, torch.full((40,), 1 / 40), rtol=100 * EPS, atol=0)
        assert step.accounted == pytest.approx(1, abs=1e-3)
        assert step.notes == [
            "the gradients of one pass were thrown away (zero_grad without a step): they are no part of this step"
        ]


def test_a_step_without_any_gradient_left_says_so():
    model = tiny("llama")
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    with td.Monitor(model, opt, on_error="raise") as monitor:
        sft(model, data()).backward()
        opt.zero_grad()
        opt.step()
        with pytest.raises(ValueError, match=r"the gradients of one pass were thrown away .* and no further pass came"):
            monitor.step_end()


def test_gradients_that_come_in_several_passes_all_count():
    """Accumulation, two passes before one backward, a loss in two parts, and a step that zero_grad() follows at once."""
    model = tiny("llama")
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    with td.Monitor(model, opt, on_error="raise") as monitor:
        for _ in range(2):
            (sft(model, data(seed=1)) + sft(model, data(seed=2))).backward()
            sft(model, data(seed=3)).backward()
            opt.step()
            opt.zero_grad()
            step = monitor.step_end()
            assert step.passes == 3 and step.notes == []


def test_another_optimizer_that_steps_is_named():
    model = tiny("llama")
    given, other = torch.optim.SGD(model.parameters(), lr=0.01), torch.optim.AdamW(model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match=r"nothing is recorded: the optimizer .* has not stepped, and another has \(AdamW\)"):
        with td.Monitor(model, given) as monitor:
            for n in range(5):
                sft(model, data()).backward()
                other.step()
                monitor.step_end()
                other.zero_grad()
                assert len(monitor._capture.step.forwards) <= 2 and bool(monitor.problems) == (n > 0)
            assert not monitor.steps


def test_two_optimizers_of_one_model_are_as_they_should_be():
    model = tiny("llama")
    rest = list(model.parameters())
    own, other = torch.optim.SGD(rest[:3], lr=0.01), torch.optim.SGD(rest[3:], lr=0.01)
    with td.Monitor(model, own, on_error="raise") as monitor:
        for _ in range(4):
            sft(model, data()).backward()
            other.step()
            own.step()
            assert monitor.step_end() is not None
            own.zero_grad(), other.zero_grad()


def test_a_model_that_was_replaced_is_named():
    model, new = tiny("llama"), tiny("llama")
    given, other = torch.optim.SGD(model.parameters(), lr=0.01), torch.optim.SGD(new.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match="give the monitor the model and the optimizer that train"):
        with td.Monitor(model, given) as monitor:
            for _ in range(2):
                sft(new, data()).backward()
                other.step()
                monitor.step_end()
        assert len(monitor.problems) == 1


# ---------------------------------------------------------------- what a monitor holds


@pytest.mark.parametrize("closed", [True, False])
def test_a_monitor_keeps_no_model_alive(closed):
    """A closed one that is still held for its records, and a forgotten one that was never closed."""
    _, parameters, monitor = train(sft, steps=1)
    model = tiny("llama").train()
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = td.Monitor(model, opt, probe=PROBE, on_error="raise")
    monitor.start()
    monitor.step_begin()
    sft(model, data()).backward()
    opt.step()
    monitor.step_end()
    gone, records = weakref.ref(model), monitor.steps
    if closed:
        monitor.close()
    else:
        del monitor
    del model, opt
    gc.collect()
    assert gone() is None and len(records) == 1 and records[0].tokens.num_rows == 20
    assert not closed or monitor.model is None


def test_records_that_are_on_the_disk_take_no_memory(tmp_path):
    """Python's own memory grows by less than 0.5 KiB a step with `out` and a probe; the tables of a step take 40 times that."""
    like = train(sft, steps=1)[2].steps[0]
    watch, taken = steps.Records(20), []
    folder = step_folder.Folder(tmp_path / "run", 0, {})
    tracemalloc.start()
    for n in range(1, 401):
        values = {name: of.clone() if isinstance(of, torch.Tensor) else list(of) for name, of in like._tokens.items()}
        step = dataclasses.replace(like, step=n, _tokens=values, metrics=dict(like.metrics), sums=dict(like.sums), notes=[])
        watch.append(step, True)
        folder.add(step)
        if n in (200, 400):
            gc.collect()
            taken.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    folder.close("complete")
    assert len(watch) == 400 and watch[7].step == 8 and watch[399].step == 400
    assert (taken[1] - taken[0]) / 200 < 512
