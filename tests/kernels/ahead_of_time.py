"""Compiles GPU kernels on a machine without a GPU and judges the machine code.

    python tests/kernels/ahead_of_time.py [--arch 90] [--jobs 2] [--json out.json] kernels/*/triton.py csrc/cuda/*.cu

A Triton module names its kernels by `variants()`, a CUDA file is one cubin. Of every kernel this prints registers, shared
memory, instructions of the main loop per element (of those with a budget), and its faults; the exit code is 1 if there is one.
A fault is:

* local memory: registers that were spilled, or an array that is indexed at run time;
* more shared memory than the architecture lends a block;
* more instructions per element in the main loop than the recorded budget. The loop is the longest one, with every branch in
  it counted as taken: what is rare is paid for as well, so that nothing hides in it;
* a wgmma whose left factor lies in registers, which ptxas before 13.3 may compile wrongly.

Nothing is taken from a cache and nothing is left in one. Needs Triton, whose wheel holds ptxas and cuobjdump, and nvcc for .cu.
It must not share a process with Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

ARCHITECTURES = (80, 90)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block can have
LOCAL_ACCESS = re.compile(r"\b(LDL|STL)\b")
REGISTER_WGMMA = re.compile(r"\b[HIQ]GMMA\S*\s+R\d+\s*,\s*-?R\d+")

# Main loops of CUDA kernels: elements that a thread handles in one turn, and the budget per element and architecture. An H200
# issues about 15 instructions for each bfloat16, 30 for each float, in the time that its bytes take.
CUDA_BUDGETS = {
    "token_stats_kernel<float>": (16, {80: 16.0, 90: 16.0}),
    "token_stats_kernel<__nv_bfloat16>": (32, {80: 15.0, 90: 11.5}),
}


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str


def longest_loop(code: list[Instruction]) -> int:
    """Instructions of the longest natural loop of a program, 0 where there is none.

    A branch from u back to v closes a loop if every way to u leads through v; what belongs to it can reach u without v. That
    leaves out the jumps with which code at the end of a program, where a warp that diverged goes on, returns to the middle.
    """
    at = {instruction.address: i for i, instruction in enumerate(code)}
    after: list[set[int]] = []  # where an instruction may lead
    reconverges: dict[str, int] = {}
    for i, instruction in enumerate(code):
        predicate, operation, operands = re.match(r"(@!?U?P\w+)?\s*(\S+)\s*(.*)", instruction.text).groups()  # type: ignore[union-attr]
        name = operation.split(".")[0]
        target = re.search(r"\b0x[0-9a-f]+$", operands)
        if name in ("BRX", "JMX", "BRXU"):
            raise RuntimeError(f"{operation}: where it leads is not in the code")
        leads = set() if name in ("EXIT", "RET", "BRA", "JMP", "BSYNC") and not predicate else {i + 1}
        if name in ("BRA", "JMP"):
            leads.add(at[int(target[0], 16)])  # type: ignore[index]
            if re.match(r"!?U?P\w", operands) or operation in ("BRA.DIV", "BRA.CONV"):
                leads.add(i + 1)
        elif name == "BSSY":
            reconverges[operands.split(",")[0]] = at[int(target[0], 16)]  # type: ignore[index]
        elif name == "BSYNC":
            leads.add(reconverges[operands])
        after.append({j for j in leads if j < len(code)})
    before: list[set[int]] = [set() for _ in code]
    for i, leads in enumerate(after):
        for j in leads:
            before[j].add(i)

    def reached(start: int, edges: list[set[int]], without: int) -> set[int]:
        found, waiting = {start}, [start]
        while waiting:
            new = edges[waiting.pop()] - found - {without}
            found |= new
            waiting += new
        return found

    longest = 0
    for u, leads in enumerate(after):
        for v in leads:
            if v < u and (v == 0 or u not in reached(0, after, without=v)):
                longest = max(longest, len(reached(u, before, without=v) | {v}))
    return longest


@dataclass(frozen=True)
class Kernel:
    """What came out of the compiler, and what it may cost: `elements` of a thread in one turn of its main loop, or 0."""

    name: str
    architecture: int
    registers: int
    stack: int
    shared: int
    code: list[Instruction]
    elements: float = 0
    budget: float = 0

    @cached_property
    def main_loop(self) -> int:
        return longest_loop(self.code)

    def per_element(self) -> float:
        return self.main_loop / self.elements if self.elements else 0.0

    def faults(self) -> list[str]:
        found = []
        local = sum(bool(LOCAL_ACCESS.search(i.text)) for i in self.code)
        if local or self.stack:
            found.append(f"{self.stack} bytes of local memory, {local} accesses to it")
        if self.shared > SHARED_MEMORY[self.architecture]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_MEMORY[self.architecture]} are there")
        if self.budget and not self.main_loop:
            found.append("has a budget but no loop")
        if self.budget and self.per_element() > self.budget:
            found.append(f"{self.per_element():.1f} instructions per element, the budget is {self.budget:.1f}")
        unsafe = sum(bool(REGISTER_WGMMA.search(i.text)) for i in self.code)
        if unsafe:
            found.append(f"{unsafe} wgmma with the left factor in registers")
        return found

    def row(self, source: Path) -> dict[str, Any]:
        names = ("name", "architecture", "registers", "stack", "shared", "main_loop", "budget")
        figures = {name: getattr(self, name) for name in names} | dict(per_element=round(self.per_element(), 2))
        return dict(source=str(source), instructions=len(self.code)) | figures | dict(faults=self.faults())


def kernels_in(cubin: Path, architecture: int, shared: int | None = None, *, read: bool = True) -> list[Kernel]:
    """Every kernel of a cubin; `shared` is what a launch asks for where the cubin does not say.

    Without `read` the code is left out: to disassemble takes a quarter of the time of a compilation, and what a kernel uses,
    local memory too, is in the cubin's own notes.
    """
    from triton import knobs

    def cuobjdump(what: str) -> str:
        return subprocess.run([knobs.nvidia.cuobjdump.path, what, cubin], capture_output=True, text=True, check=True).stdout

    code: dict[str, list[Instruction]] = {}
    for line in cuobjdump("-sass").splitlines() if read else ():
        if function := re.match(r"\s*Function : (\S+)", line):
            code[function[1]] = []
        elif instruction := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            code[list(code)[-1]].append(Instruction(int(instruction[1], 16), instruction[2]))
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", cuobjdump("-res-usage"))
    found = []
    for name, registers, stack, static, local in usage:
        lent = int(static) if shared is None else shared
        found.append(Kernel(name, architecture, int(registers), int(stack) + int(local), lent, code[name] if read else []))
    if not found or not all(kernel.code for kernel in found if read):
        raise RuntimeError(f"no machine code found in {cubin}: cuobjdump prints something else than expected")
    return found


def compile_variant(variant: Any, architecture: int) -> Kernel:
    """A Triton kernel as kernels/variant.py describes it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    if missing := set(names) - set(variant.signature) - set(variant.constexprs):
        raise ValueError(f"variant {variant.name!r} says nothing of {', '.join(sorted(missing))}")
    types = {name: "constexpr" if name in variant.constexprs else variant.signature[name] for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].endswith(":16")}
    signature = {name: kind.removesuffix(":16") for name, kind in types.items()}
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=variant.constexprs, attrs=attributes)
    options = dict(num_warps=variant.num_warps, num_stages=variant.num_stages, maxnreg=variant.maxnreg)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        looked_at = bool(variant.budget) or "wgmma" in compiled.asm["ptx"]  # for its length or for its form
        (kernel,) = kernels_in(cubin, architecture, compiled.metadata.shared, read=looked_at)
    per_thread = variant.elements / (32 * variant.num_warps)
    return replace(kernel, name=variant.name, elements=per_thread, budget=variant.budget)


def compile_cuda(source: Path, architecture: int) -> list[Kernel]:
    """Every kernel of a CUDA file."""
    real = {80: "80", 90: "90a"}[architecture]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        flags = ["-O3", "-std=c++17", f"-gencode=arch=compute_{real},code=sm_{real}", "-cubin"]
        subprocess.run(["nvcc", *flags, source, "-o", cubin], check=True)
        if b"Function" not in cubin.read_bytes() and b".text." not in cubin.read_bytes():
            return []  # host code only
        kernels = kernels_in(cubin, architecture)
    mangled = "\n".join(kernel.name for kernel in kernels)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    found = []
    for kernel, long_name in zip(kernels, names, strict=True):
        name = re.sub(r"^void |tokdyn::cuda::|\(anonymous namespace\)::", "", long_name).split("(")[0]
        elements, budgets = CUDA_BUDGETS.get(name, (0, {}))
        found.append(replace(kernel, name=name, elements=elements, budget=budgets.get(architecture, 0)))
    return found


def load(path: Path) -> Any:
    """The Triton module at a path; those of the project by the name under which they are installed."""
    path = path.resolve()
    kernels = Path(__file__).resolve().parents[2] / "kernels"
    if path.is_relative_to(kernels):
        return importlib.import_module(".".join(["tokdyn.kernels", *path.relative_to(kernels).with_suffix("").parts]))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unlisted(module: Any) -> list[str]:
    """Kernels of a module that a grid can launch, by their name's ending, and that no variant compiles."""
    from triton.runtime.jit import JITFunction

    listed = {variant.kernel.fn for variant in module.variants()}
    own = {name: f for name, f in vars(module).items() if isinstance(f, JITFunction) and f.fn.__module__ == module.__name__}
    return sorted(name for name, f in own.items() if name.endswith("_kernel") and f.fn not in listed)


class Task(NamedTuple):
    """One compilation for one architecture: a variant of a Triton module by its number, or with None a CUDA file."""

    source: Path
    number: int | None
    architecture: int


def plan(sources: list[Path], architectures: tuple[int, ...]) -> tuple[list[Task], list[dict[str, Any]]]:
    """What has to be compiled, in the order of the sources, and rows for kernels that nobody lists."""
    tasks: list[Task] = []
    rows: list[dict[str, Any]] = []
    for source in sources:
        if source.suffix == ".cu":
            tasks += [Task(source, None, a) for a in architectures]
            continue
        module = load(source)
        if not hasattr(module, "variants"):
            rows.append(dict(source=str(source), name=source.parent.name, faults=["has no variants()"]))
            continue
        rows += [dict(source=str(source), name=name, faults=["listed by no variant"]) for name in unlisted(module)]
        tasks += [Task(source, i, a) for i, v in enumerate(module.variants()) for a in architectures if a in v.architectures]
    return tasks, rows


def judge(task: Task) -> list[dict[str, Any]]:
    """One row per kernel that a task compiles."""
    source, number, architecture = task
    variant = None if number is None else load(source).variants()[number]
    try:
        kernels = [compile_variant(variant, architecture)] if variant else compile_cuda(source, architecture)
        return [kernel.row(source) for kernel in kernels]
    except Exception as error:  # whatever a compiler raises is the finding
        said = (str(error).strip() or "nothing").splitlines()[-1]
        about = dict(source=str(source), name=variant.name if variant else source.name, architecture=architecture)
        return [about | dict(faults=[f"{type(error).__name__}: {said}"])]


def judge_all(tasks: list[Task], jobs: int) -> Iterator[dict[str, Any]]:
    """The rows of all tasks in their order, from `jobs` forks of this process, each taking the next task when it is free."""
    if any(task.number is not None for task in tasks):
        from triton.runtime.cache import triton_key

        triton_key()  # reads every file of Triton's package: here once, not in each fork
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for rows in pool.imap(judge, tasks):
            yield from rows


def main() -> int:
    """Compile, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="one architecture only")
    parser.add_argument("--jobs", type=int, default=1, help="kernels that are compiled at a time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as the versions before 3.10 do unasked
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_ALWAYS_COMPILE": "1"}
        tasks, rows = plan(args.sources, (args.arch,) if args.arch else ARCHITECTURES)
        for row in itertools.chain(rows, judge_all(tasks, args.jobs)):
            found.append(row)
            columns = ("architecture", "registers", "shared", "main_loop", "per_element", "budget")
            print(f"{row['source']}: {row['name']}: " + ", ".join(f"{k} {row.get(k, '-')}" for k in columns), flush=True)
            for fault in row["faults"]:
                print(f"    FAULT {fault}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return int(any(row["faults"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
