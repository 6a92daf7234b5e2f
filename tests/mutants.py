"""Errors planted in the core one at a time: a test must fail of each. `make mutants`; python tests/mutants.py --number 20

A mutant is one change in one expression: a comparison turned, + for -, * for /, another number, `and` for `or`, a sign. All
that were drawn stand in one copy of the package, each behind a switch: `(changed if __mutant__(7) else as_it_was)`. The
tests run once with all switches off, and note which switches each test asks; a mutant then runs the tests that ask its own,
the quickest first, until one fails, in a process forked from one that holds torch already. What is known stays in --work:
a run that was stopped goes on, and several share the work; those that live are tried again, so that a first run may give each
`--seconds` of tests and the next one all. What survives is listed with its line: a missing assertion, or a
change without an effect, which tests/mutants_without_effect.txt names with the reason.
"""

import argparse
import ast
import copy
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_EFFECT = ROOT / "tests" / "mutants_without_effect.txt"
SOURCES = (
    "tokdyn/dynamics.py tokdyn/objective.py tokdyn/objectives/*.py tokdyn/exact/*.py tokdyn/exact/modules/*.py "
    "tokdyn/exact/sweep/*.py tokdyn/model/*.py tokdyn/training/*.py kernels/*/reference.py"
).split()
TESTS = (
    "test_objectives*.py test_dynamics.py exact/test_*.py test_forces*.py model/test_*.py training/test_*.py test_monitor.py "
    "checks/test_*.py runs/test_*.py test_profile.py test_hostile.py kernels/test_native_*.py ops/test_*.py test_verify.py "
    "test_weighted*.py"
).split()
SLOW = {"tests/exact/test_architectures.py", "tests/exact/test_memory.py"}  # minutes, of what others reach too
SWAPPED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div,
    ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
SWITCH = '''"""The switches of the mutants: which one is on, and those that were asked."""

import builtins
import os

on, shared, process = (os.environ.get(name, "") for name in ("MUTANT", "MUTANTS_ASKED", "MUTANTS_PROCESS"))
on, asked = int(on or -1), set()


def switch(i):
    if shared and i not in asked:
        asked.add(i)
        if process != str(os.getpid()):  # a process that a test has started tells it by a file
            with open(shared, "a") as file:
                file.write(f"{i}\\n")
    return i == on


builtins.__mutant__ = switch
'''


# ---------------------------------------------------------------- mutants


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
    """The expressions of a module's functions that can be changed: no annotations, patterns, or messages of errors."""
    found = []

    def walk(node):
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "pattern"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, (ast.Raise, ast.JoinedStr)):
                    if changed(child) is not None:
                        found.append(child)
                    walk(child)

    inner = {id(child) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for child in node.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and id(node) not in inner:
            walk(node)
    return found


def drawn(number, seed, only):
    """The mutants of this run, {number: (path, place)}, and how many there are to draw from."""
    every = []
    for path in sorted(p for pattern in SOURCES for p in ROOT.glob(pattern)):
        if only in str(path.relative_to(ROOT)):
            every += [(path, i) for i in range(len(places(ast.parse(path.read_text(encoding="utf-8")))))]
    return dict(enumerate(random.Random(seed).sample(every, min(number, len(every))), 1)), len(every)


def span(source, node):
    """Where a node stands in the bytes of its source."""
    lines = source.splitlines(keepends=True)
    before = lambda line, column: sum(map(len, lines[: line - 1])) + column  # noqa: E731
    return before(node.lineno, node.col_offset), before(node.end_lineno, node.end_col_offset)


def described(path, i):
    """A mutant as text: "tokdyn/objective.py:31: `a < b` -> `a <= b` in `if a < b:`"."""
    source = path.read_bytes()
    node = places(ast.parse(source))[i]
    start, end = span(source, node)
    before, after = " ".join(source[start:end].decode().split()), ast.unparse(changed(node))
    line = source.splitlines()[node.lineno - 1].decode().strip()
    return f"{path.relative_to(ROOT)}:{node.lineno}: `{before}` -> `{after}` in `{line}`"


def switched(source, chosen):
    """A source with every one of its mutants, {place: number}, behind its switch."""
    nodes = places(ast.parse(source))
    spans = sorted(((*span(source, nodes[i]), i) for i in chosen), key=lambda s: (-s[0], s[1]))  # the inner one first
    made = {}  # start of what stands there already -> how much longer it has become
    text = source
    for start, end, i in spans:
        end += sum(longer for at, longer in made.items() if start <= at < end)
        new = f"(({ast.unparse(changed(nodes[i]))}) if __mutant__({chosen[i]}) else ({text[start:end].decode()}))".encode()
        made[start] = made.get(start, 0) + len(new) - (end - start)
        text = text[:start] + new + text[end:]
    return text


def planted(work, mutants):
    """A copy of the repository, tests as they are now, with every mutant behind its switch."""
    tree, site = work / "tree", work / "site"
    skipped = shutil.ignore_patterns("__pycache__", ".*", "build", "dist", "runs", "node_modules", "site", "tokdyn")
    shutil.copytree(ROOT, tree, ignore=skipped, dirs_exist_ok=True)
    if not site.exists():
        making = work / f"site-{os.getpid()}"
        hidden = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "tokdyn", making / "tokdyn", ignore=hidden)
        shutil.copytree(ROOT / "kernels", making / "tokdyn" / "kernels", ignore=hidden)
        of = {}
        for number, (path, i) in mutants.items():
            of.setdefault(path, {})[i] = number
        for path, chosen in of.items():
            inside = path.relative_to(ROOT)
            target = making / inside if inside.parts[0] == "tokdyn" else making / "tokdyn" / inside
            target.write_bytes(switched(path.read_bytes(), chosen))
            compile(target.read_bytes(), target, "exec")
        (making / "sitecustomize.py").write_text(SWITCH)
        making.rename(site)
    if not (tree / "tokdyn").exists():
        (tree / "tokdyn").symlink_to(site / "tokdyn")
    return tree, site


# ---------------------------------------------------------------- tests


class Recorder:
    """A plugin of pytest: which switches each test of a file asks, and how long it takes."""

    def __init__(self):
        import sitecustomize

        self.asked, self.file, self.tests, self.bad = sitecustomize.asked, set(), {}, []
        self.shared = Path(os.environ["MUTANTS_ASKED"])

    def pytest_runtest_logstart(self, nodeid):
        self.file |= self.taken()

    def pytest_runtest_logreport(self, report):
        asked, seconds = self.tests.setdefault(report.nodeid, [[], 0.0])
        now = self.taken()
        self.file |= now if report.when == "setup" else set()
        self.tests[report.nodeid] = [sorted({*asked, *now}), seconds + report.duration]
        if report.outcome != "passed":
            self.bad.append(report.nodeid)

    def taken(self):
        found = set(self.asked)
        if self.shared.exists():
            found |= {int(line) for line in self.shared.read_text().split()}
            self.shared.unlink()
        self.asked.clear()
        return found


class Chosen:
    """A plugin of pytest: these tests alone, in this order."""

    def __init__(self, names):
        self.place = {name: n for n, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((item for item in items if item.nodeid in self.place), key=lambda item: self.place[item.nodeid])


def forked(log, seconds, act):
    """Call `act` in a forked process that writes to a log; what it returned, None where it took too long.

    Too long is so many seconds of a processor, or ten times that: the machine may be busy with other things.
    """
    child = os.fork()
    if not child:
        code = 70
        try:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(fd, 1), os.dup2(fd, 2)
            code = int(act())
            sys.stdout.flush()
        finally:
            os._exit(code)
    end = time.monotonic() + 10 * seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            _end_group(child)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    _end_group(child)
    os.waitpid(child, 0)
    return None


def _end_group(child):
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass


def pytested(files, plugin, *options, env):
    """A run of pytest on files of the tree in this process, which imports tokdyn for it."""
    import pytest

    os.environ |= env | {"MUTANTS_PROCESS": str(os.getpid())}
    import sitecustomize  # noqa: F401

    return pytest.main(["-q", "-p", "no:cacheprovider", "--tb=line", *options, *files], plugins=[plugin])


def recorded(work, file):
    """Which switches the tests of a file ask."""

    def act():
        env = {"MUTANTS_ASKED": str(work / "asked" / Path(file).name), "MUTANT": "0"}
        os.environ |= env
        import sitecustomize  # noqa: F401

        recorder = Recorder()
        code = pytested([file], recorder, env=env)
        about = {"file": sorted(recorder.file), "tests": recorder.tests, "bad": recorder.bad}
        target.with_suffix(".part").write_text(json.dumps(about))
        target.with_suffix(".part").rename(target)
        return code

    target = work / "asked" / f"{file.replace('/', '+')}.json"
    if not target.exists():
        print(f"asked by {file}: {forked(work / 'logs' / target.stem, 3600, act)}", flush=True)


def tests_of(mutant, asked, most):
    """The tests that ask a mutant's switch: [(file, [tests, quickest first], seconds)], the quickest file first.

    Of all that ask it those that fit into `most` seconds, by what they took when their switches were noted.
    """
    found = []
    for file, about in asked.items():
        good = {name: value for name, value in about["tests"].items() if name not in about["bad"]}
        own = sorted((n for n, (switches, _) in good.items() if mutant in switches), key=lambda n: good[n][1])
        rest = sorted((n for n in good if n not in own), key=lambda n: good[n][1]) if mutant in about["file"] else []
        if own or rest:
            found.append((file, own + rest, good))
    kept = []
    for file, names, good in sorted(found, key=lambda each: sum(each[2][n][1] for n in each[1])):
        left = most - sum(seconds for *_, seconds in kept)
        until = list(accumulate(good[n][1] for n in names))
        names = names[: sum(end <= left for end in until)]
        kept += [(file, names, until[len(names) - 1])] if names else []
    return kept


def survives(work, mutant, asked, most):
    """What became of a mutant: "dead", "alive" or "not reached"."""
    found = tests_of(mutant, asked, most)
    if not found:
        return "not reached"
    for part in filter(None, (found[:2], found[2:8], found[8:])):
        names = [name for _, tests, _ in part for name in tests]
        log = work / "logs" / f"mutant-{mutant}"
        seconds = 60 + 4 * sum(each[2] for each in part)
        act = lambda part=part, names=names: pytested(  # noqa: E731
            [file for file, *_ in part], Chosen(names), "-x", env={"MUTANT": str(mutant)}
        )
        if forked(log, seconds, act) != 0:
            return "dead"
    return "alive"


def once(work, name, act):
    """Do a part of the work that no other process is at; whether it was done here."""
    import fcntl

    with open(work / "locks" / name.replace("/", "+"), "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        act()
    return True


# ---------------------------------------------------------------- all of it


def prepared(site):
    """This process as the ones that are forked from it need it: all large packages imported, and none of ours."""
    sys.path[:] = [str(site), *(p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "tests"))]
    os.environ |= {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.modules.pop("sitecustomize", None)
    for name in "beartype hypothesis jaxtyping numpy pyarrow.parquet pytest torch transformers peft accelerate trl".split():
        __import__(name)
    assert not [name for name in sys.modules if name.split(".")[0] == "tokdyn"]


def report(mutants, every, seed, results):
    """The figure and the survivors, as Markdown."""
    told = dict(line.rsplit(" # ", 1) for line in WITHOUT_EFFECT.read_text().splitlines() if " # " in line)
    alive = {n: described(*mutants[n]) for n, result in results.items() if result != "dead"}
    without_lines = lambda text: text.split(":", 1)[0] + ":" + text.split(":", 2)[2]  # noqa: E731
    equal = {n: told[without_lines(text)] for n, text in alive.items() if without_lines(text) in told}
    counted, dead = len(results) - len(equal), len(results) - len(alive)
    figure = (
        f"{dead} of {counted} mutants died, {dead / max(counted, 1):.1%}; {len(equal)} more change nothing that can be seen. "
        f"Drawn: {len(results)} of {every}, seed {seed}. `make mutants`."
    )
    rows = [f"- {text}{' (no test comes there)' * (results[n] != 'alive')}" for n, text in alive.items() if n not in equal]
    same = [f"- {alive[n]}: {why}" for n, why in equal.items()]
    return "\n".join(["# Mutants", "", figure, "", "Alive:", "", *rows, "", "Without an effect:", "", *same, ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the path of the sources")
    parser.add_argument("--tests", nargs="*", help="files below tests/, by default those of the core")
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/tokdyn-mutants"), help="where copies and what is known are kept"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of tests, the quickest first, for one mutant")
    parser.add_argument("--markdown", type=Path, help="where to write the figure and the survivors")
    args = parser.parse_args()
    mutants, every = drawn(args.number, args.seed, args.only)
    about = hashlib.sha256(b"".join(p.read_bytes() + str(i).encode() for p, i in mutants.values())).hexdigest()[:12]
    work = args.work / about
    for name in ("asked", "logs", "locks", "results"):
        (work / name).mkdir(parents=True, exist_ok=True)
    tree, site = planted(work, mutants)
    prepared(site)
    os.chdir(tree)
    patterns = args.tests or TESTS
    files = sorted(str(p.relative_to(tree)) for pattern in patterns for p in (tree / "tests").glob(pattern))
    files = [file for file in files if args.tests or file not in SLOW]
    for file in files:
        once(work, file, lambda file=file: recorded(work, file))
    known = lambda file: work / "asked" / f"{file.replace('/', '+')}.json"  # noqa: E731
    while not all(known(file).exists() for file in files):  # another process is at it
        time.sleep(1)
    asked = {file: json.loads(known(file).read_text()) for file in files}
    results = {}

    def settle(n):
        target = work / "results" / str(n)
        if not target.exists() or target.read_text() != "dead":
            target.write_text(survives(work, n, asked, args.seconds))
            print(f"{n}/{len(mutants)} {target.read_text()} {described(*mutants[n])}", flush=True)

    for n in mutants:
        once(work, f"mutant {n}", lambda n=n: settle(n))
        results |= {n: (work / "results" / str(n)).read_text()} if (work / "results" / str(n)).exists() else {}
    found = report(mutants, every, args.seed, results)
    print(found)
    if args.markdown:
        args.markdown.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
