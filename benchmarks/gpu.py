"""The stages of gpu.sh: what runs on a machine with a GPU, in which order, for how long, and the page that comes of it.

The project is installed into a folder of its own (build/gpu), so that nothing of the machine's Python changes. A stage that
fails, runs out of time or lacks a package is recorded with the reason; the next one runs all the same. Exit code 0: every stage
passed; 1: some did not; 2: there is no CUDA device.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu"
TAIL = 6000  # characters of a stage's output that are kept
LIBRARY = ("torch", "triton", "numpy", "transformers", "safetensors", "jaxtyping")
LONG = 15  # minutes from which on the matrix of 4096 tokens is measured as well
OPERATORS = {
    "rows": ("token_stats", "topk_log_probs", "apply_A", "softmax_jvp"),
    "products": ("linear_token_stats", "readout_forces", "dual_gram"),
    "attention": ("tangent_attention", "cotangent_attention"),
}
EXTENSION = """
from tokdyn import _native
for part, what in _native.parts().items():
    print(f"{part}: {what}")
raise SystemExit(not _native.parts()["cuda"].startswith("built"))
"""


@dataclass(frozen=True)
class Stage:
    """One command: stages of a phase run side by side, `limit` seconds each; `needs` are packages, or programs that end in "!".

    makes: the JSON file of figures that it leaves in the scratch folder.
    """

    name: str
    phase: int
    command: list[str]
    limit: int
    needs: tuple[str, ...] = LIBRARY
    makes: str = ""


def stages(python: str, scratch: Path, minutes: float = 8.0) -> list[Stage]:
    """The stages in the order they run; those of one phase run side by side. In LONG minutes there is one more."""
    triton = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("kernels/*/triton.py"))
    cuda = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu"))
    install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--upgrade"]
    pytest = [python, "-P", "-m", "pytest", "-q", "--confcutdir", "tests/gpu", "-p", "no:cacheprovider"]
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    # every tensor an allocation of its own, or what lies beyond one is another's and not noticed
    sanitized = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, "--error-exitcode", "9", "--tool"]
    small = [*pytest, "tests/gpu/test_small_on_gpu.py"]
    gate = ["tests/kernels/ahead_of_time.py", "--arch", "90", "--jobs", str(max(1, (os.cpu_count() or 2) // 2))]
    bench = [python, "-P", "benchmarks/kernels.py", "--device", "cuda", "--rounds", "7", "--seconds", "4"]
    exact = [python, "-P", "benchmarks/exact_forces_gpu.py", "--length", "1024", "--reduced", "32768"]
    tested, shown = (*LIBRARY, "pytest"), (*LIBRARY, "typer", "rich")

    def figures(name: str) -> list[str]:
        return ["--json", str(scratch / name)]

    found = [
        Stage("build", 0, [*install, "--target", str(SITE), "."], 120, ("pip", "setuptools", "pybind11", "nvcc!")),
        Stage("extension", 1, [python, "-P", "-c", EXTENSION], 30),
        Stage("tests", 2, [*pytest, *parallel, "tests/gpu"], 120, tested),
        Stage("memcheck", 2, [*sanitized, "memcheck", *small], 120, (*tested, f"{sanitizer}!")),
        Stage("racecheck", 2, [*sanitized, "racecheck", *small, "-k", "cuda"], 120, (*tested, f"{sanitizer}!")),
        Stage("machine code", 2, [python, "-P", *gate, *figures("code.json"), *triton, *cuda], 120, makes="code.json"),
    ]
    for phase, (name, ops) in enumerate(OPERATORS.items(), 3):  # apart, so that one that takes too long takes no other with it
        found.append(Stage(f"operators: {name}", phase, [*bench, *figures(f"{name}.json"), *ops], 80, shown, f"{name}.json"))
    found.append(Stage("exact forces", 9, [*exact, *figures("exact.json")], 100, makes="exact.json"))
    rows = [*exact, "--rows", "pairs", "experts", *figures("rows.json")]
    found.append(Stage("exact forces: pairs, experts", 10, rows, 120, makes="rows.json"))
    long = [python, "-P", "benchmarks/exact_forces_gpu.py", "--length", "4096", "--rows", "matrix", *figures("long.json")]
    return [*found, *([Stage("exact forces: 4096 x 4096", 11, long, 400, makes="long.json")] if minutes >= LONG else [])]


def missing(stage: Stage) -> str:
    """Packages and programs that a stage needs and this machine lacks, as a sentence; "" when it can start."""
    packages = [name for name in stage.needs if not name.endswith("!")]
    absent = [f"the package {name}" for name in packages if not importlib.util.find_spec(name)]
    for name in (name[:-1] for name in stage.needs if name.endswith("!")):
        if not (shutil.which(name) or Path("/usr/local/cuda/bin", name).exists()):
            absent.append(f"the program {name}")
    return f"needs {', '.join(absent)}" if absent else ""


def run(found: list[Stage], deadline: float) -> list[dict[str, Any]]:
    """The stages, phase by phase, each until its limit or the deadline of time.monotonic(): one record per stage."""
    path = os.pathsep.join(str(folder) for folder in (SITE, os.environ.get("PYTHONPATH")) if folder)
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    records = []
    for _, phase in itertools.groupby(found, key=lambda stage: stage.phase):
        running: list[tuple[Stage, subprocess.Popen[bytes] | None, IO[bytes], float, str]] = []
        for stage in phase:
            why = missing(stage) or ("" if time.monotonic() < deadline - 5 else "the time was up")
            output = tempfile.TemporaryFile()  # noqa: SIM115
            began = time.monotonic()
            process = None
            if not why:
                print(f"{stage.name}: {shlex.join(stage.command)}"[:240], flush=True)
                process = subprocess.Popen(
                    stage.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
            running.append((stage, process, output, began, why))
        for stage, process, output, began, why in running:
            record: dict[str, Any] = dict(name=stage.name, command=shlex.join(stage.command), limit_s=stage.limit)
            if process is None:
                record |= dict(outcome="not run", why=why, seconds=0.0)
            else:
                code = _wait(process, min(began + stage.limit, deadline))
                outcome = {None: "out of time", 0: "passed"}.get(code, "failed")
                record |= dict(outcome=outcome, exit=code, seconds=round(time.monotonic() - began, 1))
                output.seek(0)
                record["output"] = output.read().decode(errors="replace")[-TAIL:]
            output.close()
            print(f"{stage.name}: {record['outcome']} {record.get('why', '')}", flush=True)
            if record["outcome"] == "failed":
                print(record["output"][-1500:], flush=True)
            records.append(record)
    return records


def _wait(process: subprocess.Popen[bytes], until: float) -> int | None:
    """Exit code of a process, or None after ending it and whatever it started."""
    try:
        return process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def check(found: list[Stage]) -> list[str]:
    """What is wrong with the commands: files that are gone, options that their programs no longer have."""
    wrong: list[str] = []
    helps: dict[tuple[str, ...], str] = {}
    for stage in found:
        words = stage.command[stage.command.index("--tool") + 2 :] if "--tool" in stage.command else stage.command
        files = [word for word in words if re.fullmatch(r"(benchmarks|tests|kernels|csrc)(/\S+)?", word)]
        wrong += [f"{stage.name}: there is no {name}" for name in files if not (ROOT / name).exists()]
        ends = [i + 1 for i, word in enumerate(words) if word.endswith(".py") or word in ("pytest", "install")]
        if not ends:
            continue
        program = tuple(words[: ends[0]])
        if program not in helps:
            wide = os.environ | {"COLUMNS": "300"}
            helps[program] = subprocess.run([*program, "--help"], cwd=ROOT, capture_output=True, text=True, env=wide).stdout
        options = [word for word in words[ends[0] :] if re.fullmatch(r"-{1,2}[a-zA-Z][\w-]*", word)]
        wrong += [f"{stage.name}: no option {o}" for o in options if not re.search(rf"(?<![\w-]){o}\b", helps[program])]
    return wrong


def about_machine() -> dict[str, Any]:
    """The GPU, versions of what takes part, the date and the commit."""
    import torch

    gpu = torch.cuda.get_device_properties(0)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    compiler = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if Path(nvcc).exists() else ""
    release = re.search(r"release (\S+),", compiler)
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda, "nvcc": release[1] if release else "none"}
    for name in LIBRARY:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    about = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} multiprocessors"
    return dict(gpu=about, versions=versions, commit=git.stdout.strip() or None, date=time.strftime("%Y-%m-%d"))


def page(result: dict[str, Any]) -> str:
    """The run as Markdown; where there are figures, there is the package that knows how to show them."""
    sys.path.insert(0, str(SITE))
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"# {result['gpu']}, {result['date']}", "", f"{packages}; commit {result['commit']}.", ""]
    lines += ["| stage | outcome | seconds | |", "|---|---|---|---|"]
    for stage in result["stages"]:
        counted = re.findall(r"^\d+ (?:passed|failed|skipped).*", stage.get("output", ""), re.M)
        remark = stage.get("why", counted[-1] if counted else "").replace("|", "\\|")
        lines.append(f"| {stage['name']} | {stage['outcome']} | {stage['seconds']:.0f} | {remark} |")
    code = result["figures"].get("machine code")
    if code:
        faulty = [f"{row['name']} (sm_{row.get('architecture')}): {fault}" for row in code for fault in row["faults"]]
        lines += ["", f"Machine code of {len(code)} kernels: {'; '.join(faulty) or 'no spill, no fault'}.", ""]
    if operators := [result["figures"][key] for key in result["figures"] if key.startswith("operators: ")]:
        from tokdyn.bench.report import markdown

        merged = operators[0] | {key: [row for part in operators for row in part[key]] for key in ("rows", "bars")}
        lines += [
            "",
            markdown(merged).replace("# tokdyn bench", "## Operators: tokdyn bench").replace("\n## Held", "\n### Held"),
        ]
    for name in (name for name in result["figures"] if name.startswith("exact forces")):
        exact = result["figures"][name]
        lines += [
            "",
            f"## {name.capitalize()}",
            "",
            exact["about"],
            "",
            "| what | seconds | peak MiB | relative error | bar |",
            "|---|---|---|---|---|",
        ]
        for row in exact["rows"]:
            cells = (row["what"], f"{row['seconds']:.1f}", f"{row['peak_mib']:.0f}", row["error"], row["bar"])
            lines.append(
                "| " + " | ".join("" if c is None else f"{c:.1e}" if isinstance(c, float) else c for c in cells) + " |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Check the machine, run the stages, and write the results as JSON and Markdown; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--dry-run", action="store_true", help="show the commands and check that what they name is there")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes - 10  # to write down what was found
    with tempfile.TemporaryDirectory() as scratch:
        found = stages(sys.executable, Path(scratch), args.minutes)
        if args.dry_run:
            for stage in found:
                lacks = missing(stage)
                print(f"{stage.name} (at most {stage.limit} s){': ' + lacks if lacks else ''}\n    {shlex.join(stage.command)}")
            wrong = check(found)
            print("\n".join(wrong) or "every file and option is there")
            return int(bool(wrong))
        import torch

        if not torch.cuda.is_available():
            print(f"there is no CUDA device: torch {torch.__version__} sees none. Nothing was run.", file=sys.stderr)
            return 2
        records = run(found, deadline)
        figures = {
            stage.name: json.loads((Path(scratch) / stage.makes).read_text())
            for stage in found
            if stage.makes and (Path(scratch) / stage.makes).exists()
        }
    result = about_machine() | dict(stages=records, figures=figures)
    args.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", result["gpu"].split(",")[0].lower()) + "-" + result["date"]
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / f"{name}.md").write_text(page(result))
    print((args.out / f"{name}.md").read_text())
    return int(any(record["outcome"] != "passed" for record in records))


if __name__ == "__main__":
    sys.exit(main())
