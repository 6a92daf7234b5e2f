"""Errors planted in the core one at a time: a test must fail of each. `make mutants`; python tests/mutants.py --number 20

A mutant is one change in one expression: a comparison turned, + for -, * for /, another number, `and` for `or`, a sign. It
lives in a copy of the package. What survives is listed with its line: a missing assertion, or a change without an effect.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXACT = "kinds engines groups readout fused rotary".split()
NATIVE = "token_stats topk readout_forces dual_gram linear_token_stats cotangent_attention".split()
TESTS = {  # sources -> the tests that must notice, the quickest first
    "tokdyn/objectives/*.py tokdyn/objectives.py tokdyn/objective.py": ["tests/test_objectives.py"],
    "tokdyn/dynamics.py": ["tests/test_dynamics.py"],
    "tokdyn/exact/*.py tokdyn/exact/modules/*.py tokdyn/exact/sweep/*.py": [
        *(f"tests/exact/test_{name}.py" for name in EXACT),
        "tests/test_forces.py",
    ],
    "tokdyn/model/*.py": ["tests/model", "tests/test_forces.py"],
    "tokdyn/training/*.py": ["tests/training", "tests/test_monitor.py"],
    "tokdyn/runs/*.py": ["tests/runs", "tests/test_profile.py", "tests/training/test_step_folder.py"],
    "kernels/*/reference.py": [
        *(f"tests/kernels/test_native_{name}.py" for name in NATIVE),
        "tests/ops",
        "tests/model/test_attention.py",
    ],
}
SWAPPED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div,
    ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def changed(node):
    """A mutated copy of an expression, None where there is nothing to change."""
    new = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        new.ops[0] = SWAPPED[type(node.ops[0])]()
    elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPPED:
        new.op = SWAPPED[type(node.op)]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        return new.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        new.value = not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        new.value = node.value + 1
    else:
        return None
    return new


def places(tree):
    """The expressions of a module's functions that can be changed: no annotations, no messages of errors."""
    found = []

    def walk(node):
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, (ast.Raise, ast.JoinedStr)):
                    if changed(child) is not None:
                        found.append(child)
                    walk(child)

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not any(
            isinstance(p, ast.FunctionDef) and node in p.body for p in ast.walk(tree)
        ):
            walk(node)
    return found


def mutants():
    """Every (path, number of its place, tests) there is."""
    for sources, tests in TESTS.items():
        for path in sorted(p for pattern in sources.split() for p in ROOT.glob(pattern)):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            yield from ((path, i, tests) for i in range(len(places(tree))))


def survives(path, i, tests, seconds):
    """Whether all tests pass with the change, and what it is."""
    source = path.read_text(encoding="utf-8")
    node = places(ast.parse(source))[i]
    lines = source.splitlines(keepends=True)
    start = sum(len(line.encode()) for line in lines[: node.lineno - 1]) + node.col_offset
    end = sum(len(line.encode()) for line in lines[: node.end_lineno - 1]) + node.end_col_offset
    before, after = source.encode()[start:end].decode(), f"({ast.unparse(changed(node))})"
    with tempfile.TemporaryDirectory() as place:
        package = Path(place) / "tokdyn"
        shutil.copytree(ROOT / "tokdyn", package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
        target = (
            package.parent / path.relative_to(ROOT)
            if path.is_relative_to(ROOT / "tokdyn")
            else package / path.relative_to(ROOT)
        )
        target.write_bytes(source.encode()[:start] + after.encode() + source.encode()[end:])
        command = [Path(sys.executable).with_name("pytest"), "-x", "-q", "-p", "no:cacheprovider", *tests]
        try:
            run = subprocess.run(
                command, cwd=ROOT, env=os.environ | {"PYTHONPATH": place}, capture_output=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return False, f"{before} -> {after}"
    return run.returncode == 0, f"{' '.join(before.split())} -> {after}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the path of the sources")
    parser.add_argument("--seconds", type=float, default=900, help="a mutant whose tests take longer is dead")
    parser.add_argument("--markdown", type=Path, help="where to list them")
    args = parser.parse_args()
    every = [each for each in mutants() if args.only in str(each[0])]
    chosen = random.Random(args.seed).sample(every, min(args.number, len(every)))
    alive = []
    for n, (path, i, tests) in enumerate(chosen, 1):
        lives, what = survives(path, i, tests, args.seconds)
        line = places(ast.parse(path.read_text(encoding="utf-8")))[i].lineno
        alive += [f"{path.relative_to(ROOT)}:{line}: `{what}`"] * lives
        print(f"{n}/{len(chosen)} {'ALIVE' if lives else 'dead '} {path.relative_to(ROOT)}:{line}: {what}", flush=True)
    told = f"{len(chosen) - len(alive)} of {len(chosen)} mutants out of {len(every)} died (seed {args.seed})."
    print(told)
    if args.markdown:
        args.markdown.write_text("\n".join(["# Mutants", "", told, "", "Alive:", "", *(f"- {each}" for each in alive), ""]))


if __name__ == "__main__":
    main()
