"""Every benchmark still runs, in its quick form, and what it compares agrees."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokdyn import _native, bench
from tokdyn.bench import cases, measure, report

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_exact_forces_runs_and_both_sides_agree(tmp_path):
    command = [sys.executable, BENCHMARKS / "exact_forces.py", "--quick", "--by", "layer", "--json", tmp_path / "b.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["error"] < 1e-5
    assert "structured tangents:" in done.stdout and set(found["figures"]) == {"naive", "tangent", "by=layer"}
    assert "parts: by=layer costs" in done.stdout


def test_every_shape_runs_and_both_sides_agree(tmp_path):
    shapes = ["pairs", "experts", "qwen-experts", "demo"]  # the others are like "pairs"
    command = [
        sys.executable,
        BENCHMARKS / "exact_forces.py",
        "--quick",
        "--profile",
        "--json",
        tmp_path / "b.json",
        "--shape",
        *shapes,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "b.json").read_text())
    ours, naive = found["figures"]["tangent"], found["figures"]["naive"]
    assert [row["shape"] for row in ours] == [row["shape"] for row in naive] == shapes
    assert all(row["error"] < 1e-5 for row in ours)
    assert all((row["share"] is None) == (row["shape"] == "demo") for row in ours)
    assert all(f"{shape}: one gradient per token takes" in done.stdout for shape in shapes)
    assert all(f"{shape}, profiled: forward passes" in done.stdout for shape in shapes[:-1])


def test_costs_against_the_number_of_pairs_are_timed(tmp_path):
    command = [sys.executable, BENCHMARKS / "exact_forces.py", "--quick", "--pairs", "1", "2", "--json", tmp_path / "b.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "b.json").read_text())["figures"]
    assert [[row["batch"] for row in figures[side]] for side in ("tangent", "groups=sequence", "reduce=update")] == [[2, 4]] * 3


def test_multiplications_of_a_shape_are_those_of_its_products(monkeypatch):
    """One dense layer, counted by hand: pulls, E, and inner products of two sequences of 5 tokens, 3 of them scored."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from exact_forces_shapes import Shape, weights_and_widths

    shape = Shape("x", 2, 3, 2, 32, layers=1, vocabulary=11)
    attention, kv, mlp = 32 * 32, 32 * 16, 32 * 88  # Qwen2: q and o, k and v, gate, up and down
    P, q = 2 * attention + 2 * kv + 3 * mlp, 2 * 32 + 2 * 16 + 2 * 88 + 32
    assert weights_and_widths(shape.model()) == (P, q)
    tokens, positions = 2 * 3, 2 * 5
    pulls, made, met = 2 * P * 5 * 2 * tokens, 2 * q * 5 * tokens * positions, 2 * q * 5 * tokens * tokens
    assert shape.flops() == pulls + made + met
    one = Shape("x", 2, 3, 2, 32, "qwen3_moe", layers=1, vocabulary=11)  # 2 of 8 experts: gate and up [32, 32], down [32, 16]
    assert weights_and_widths(one.model()) == (2 * attention + 2 * kv + 2 * (32 * 32 + 32 * 16), 96 + 2 * (32 + 32))


def overhead(*options):
    return subprocess.run([sys.executable, BENCHMARKS / "overhead.py", *options], capture_output=True, text=True)


def test_overhead_of_recording_is_timed(tmp_path):
    """By the clock and in processor time; the other part, peak memory, takes three more processes."""
    done = overhead("--quick", "--part", "time", "--loss", "fused", "--json", str(tmp_path / "o.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "o.json").read_text())
    ways = {"every step", "every 10th, probe"}
    assert set(found["figures"]["time"]) == ways | {f"{way} processor" for way in ways} | {"seconds per step, off"}
    assert all(len(values) == 1 for values in found["figures"]["time"].values())


def test_results_of_overhead_were_made_with_settings_that_it_takes():
    files = sorted((BENCHMARKS / "results").glob("overhead-*.json"))
    settings = [json.loads(file.read_text())["settings"] for file in files]
    names = ("loss", "batch", "length", "probe", "steps", "rounds", "threads", "part")
    done = overhead(*[f"--{name}={of[name]}" for of in settings for name in names], "--help")  # looks at those before it
    assert files and done.returncode == 0, done.stderr


def test_protect_is_timed_against_a_plain_step(tmp_path):
    command = [sys.executable, BENCHMARKS / "protect.py", "--quick", "--json", tmp_path / "p.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "p.json").read_text())["figures"]
    (plain,), (protected,) = found["seconds"]["plain"], found["seconds"]["protected"]
    assert found["ratio"]["processor"] == [protected / plain] and "protected / plain, processor" in done.stdout


def kernels(folder, *options):
    command = [sys.executable, BENCHMARKS / "kernels.py", "--quick", "--device", "cpu", "--rounds", "2", *options]
    command += ["--json", folder / "k.json", "--markdown", folder / "k.md"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "k.json").read_text()), (folder / "k.md").read_text()


def test_every_operator_is_timed_and_the_sides_agree(tmp_path):
    wanted = ["cpp", "reference", "eager", "torch.func", "bare matmul", "liger"]
    found, page = kernels(tmp_path, "--no-memory", *[word for side in wanted for word in ("--side", side)])
    rows = found["rows"]
    ops = {"token_stats", "linear_token_stats", "topk_log_probs", "apply_A", "softmax_jvp", "readout_forces", "dual_gram"}
    assert {row["op"] for row in rows} == ops | {"tangent_attention", "cotangent_attention"}
    for row in rows:
        if row["side"].startswith("liger"):  # needs a GPU, and need not be installed
            assert not row["ran"] and row["why"]
        elif row["side"] != "cpp" or _native.load()[0] is not None:
            assert row["ran"], row
    compared = [row for row in rows if row.get("differs") is not None and row["dtype"] == "float32"]
    assert {row["side"] for row in compared} >= {"reference", "eager", "torch.func"}
    assert all(row["differs"] < 1e-5 for row in compared)
    assert len(found["floors"]["tflop_per_s"]) == 2 and found["floors"]["gb_per_s"] > 0
    assert found["versions"]["torch"] == torch.__version__ and found["machine"]["threads"] and found["date"]
    assert page.count("\n| ") == 1 + len(rows) and "did not run" in page


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_is_measured_to_the_page():
    """A result of 48 MiB made through another of 64 that is given back at once: 64 + 48 at most, whatever was there before."""
    code = """
import torch
from tokdyn.bench.measure import peak_memory
def call(n=2**24):
    first = torch.ones(n)
    kept = first[: 3 * n // 4] + 1
    del first
    return kept
call(2**17)  # the code itself has to be loaded
before = torch.ones(2**25)
del before
print(peak_memory(call, torch.device("cpu")) / 2**20, peak_memory(lambda: None, torch.device("cpu")) / 2**20)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | measure.steady_memory()
    )
    peak, nothing = map(float, done.stdout.split())
    assert abs(peak - 112) < 1 and nothing < 1, done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_of_a_case_comes_from_a_process_of_its_own(tmp_path):
    found, _ = kernels(tmp_path, "linear_token_stats", "--side", "eager", "--side", "cpp")
    assert {row["case"] for row in found["rows"]} == {"linear_token_stats", "linear_token_stats, memory"}
    assert all(row["peak_mib"] >= 0 for row in found["rows"] if row["side"] == "eager")
    assert not [row for row in found["rows"] if "memory_why" in row]


def test_bars_are_met_missed_or_not_measured():
    case = cases.Case("x", "x", torch.float32, {}, lambda device: (), {})
    rows = {
        "cpp": dict(median_ms=2.0, peak_mib=10.0, floor_share=0.4),
        "eager": dict(median_ms=21.0, peak_mib=90.0),
        "compile": dict(ran=False),
    }
    for bar, value, met in (
        (cases.Bar("cpp", "speedup", 10, "eager"), 10.5, True),
        (cases.Bar("cpp", "speedup", 11, "eager"), 10.5, False),
        (cases.Bar("cpp", "speedup", 2, "compile"), None, None),
        (cases.Bar("cuda", "floor", 0.85), None, None),
        (cases.Bar("cpp", "floor", 0.3), 0.4, True),
        (cases.Bar("cpp", "memory", 0.1, "eager"), 1 / 9, False),
        (cases.Bar("cpp", "times", 0.2, "eager"), 2 / 21, True),
        (cases.Bar("cpp", "ms", 1.9), 2.0, False),
        (cases.Bar("cpp", "mib", 10), 10.0, True),
    ):
        found = bench.held(bar, case, rows)
        assert (found["value"], found["met"]) == (value, met), bar


def test_unknown_names_are_refused():
    for options, words in (
        (dict(device="tpu"), "device"),
        (dict(ops=["token_stat_s"]), "no operator 'token_stat_s'"),
        (dict(sides=["jax"]), "no side 'jax'"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=words):
            bench.bench(quick=True, **options)


def test_runs_on_one_machine_join():
    """A row keeps the time of the first run that has it and takes what it lacks from others; floors stay with their runs."""
    sizes = dict(quick=True, sides=["eager"], rounds=1, memory=False)
    one, two = (bench.bench(ops=[op], **sizes) for op in ("token_stats:float32", "topk_log_probs"))
    again = json.loads(json.dumps(one))
    for row in again["rows"]:
        row |= dict(median_ms=1e9, peak_mib=3.0)
    found = bench.join([one, two, again])
    assert [(row["op"], row["dtype"]) for row in found["rows"]] == [("token_stats", "float32"), ("topk_log_probs", "float32")]
    assert found["rows"][0]["median_ms"] == one["rows"][0]["median_ms"] and found["rows"][0]["peak_mib"] == 3.0
    assert [part["floors"] for part in found["parts"]] == [one["floors"], two["floors"], one["floors"]]
    assert report.markdown(found).count("Floor, measured in the run of") == 3
    with pytest.raises(ValueError, match="different machines, versions or sizes"):
        bench.join([one, dict(two, versions={})])
    with pytest.raises(ValueError, match="at least one run"):
        bench.join([])


def test_compiled_sides_run_where_there_is_a_compiler(tmp_path, monkeypatch):
    """Without torch's switch for narrower vectors: under ATEN_CPU_CAPABILITY=avx2 inductor's own sums are wrong on AVX-512."""
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    found, _ = kernels(tmp_path, "token_stats:float32", "--no-memory", "--side", "compile", "--side", "eager")
    compiled = next(row for row in found["rows"] if row["side"] == "compile")
    assert compiled["differs"] < 1e-5 if compiled["ran"] else "compiler" in compiled["why"].lower(), compiled


def test_memory_of_a_scans_pass_is_as_estimated():
    """Within 15 %, which is what td.scan.estimate says; in a process whose allocator gives memory back."""
    command = [sys.executable, BENCHMARKS / "scan.py", "--passes", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | measure.steady_memory())
    found = [line.split("|")[-2] for line in done.stdout.splitlines()[2:]]
    assert len(found) == 2 and all(abs(int(apart.strip(" %"))) <= 15 for apart in found), done.stdout


def test_memory_of_long_sequences_is_as_told_and_packed_ones_are_those_alone(tmp_path):
    """Within 15 %: reductions, layers made again or not, scoring, the readout's forces. Packed or by itself, F is the same."""
    command = [sys.executable, BENCHMARKS / "long.py", "--quick", "--json", tmp_path / "long.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "long.json").read_text())
    assert len(found["rows"]) == 5
    for row in found["rows"]:
        assert abs(row["told_mib"] / row["peak_mib"] - 1) < 0.15, row
    assert found["short"]["apart"] < 1e-5  # sums in another order, as in tests/exact
