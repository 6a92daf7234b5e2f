"""The direction of dependency: no arrow upwards, no circle; who hooks a module, and what kernels import of one another."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Rooms, lowest first. A module imports from its own room and from lower levels; rooms of one level do not know each other.
LEVELS = (
    ("_version", "_native", "_arguments", "_encoding", "_json", "_parquet"),
    ("_rows",),
    ("_console",),
    ("kernels",),
    ("ops",),
    ("sequences",),
    ("objective",),  # what the engine asks of a loss: GTerm and Objective
    ("objectives", "observables", "dynamics", "model"),
    ("data", "loading", "testing", "runs", "turns"),
    ("probes", "exact"),
    ("training",),
    ("live", "record", "prediction"),  # what forces answer while the model is there; what a run says of itself
    ("forces", "ntk", "squeeze", "verify", "steps"),
    ("report", "plot"),  # pages are drawn from tables, and a Run draws its own
    ("profile", "monitor", "interventions"),
    ("scan", "checks"),
    ("integrations",),
    ("tokdyn",),  # the names of the package itself, `import tokdyn as td`
    ("bench", "demo"),
    ("studies",),
    ("_app",),  # what commands share
    ("commands",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# Fast forms that share device code with another operator's, as they are. Mend one and take it out.
BETWEEN_KERNELS = {
    ("apply_A.triton", "token_stats.triton"),
    ("cotangent_attention.cpp", "tangent_attention.reference"),
    ("cotangent_attention.triton", "tangent_attention.triton"),
    ("linear_token_stats.triton", "token_stats.triton"),
    ("readout_forces.triton", "token_stats.triton"),
    ("softmax_jvp.triton", "apply_A.triton"),
    ("topk_log_probs.triton", "token_stats.triton"),
}


def named(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "tokdyn" else ("tokdyn", *parts))


@cache
def modules():
    """Every module of the package by its dotted name; the folder kernels/ is installed as tokdyn.kernels."""
    return {named(path): path for folder in ("tokdyn", "kernels") for path in (ROOT / folder).rglob("*.py")}


@cache
def arrows():
    """(importing module, imported module, line) of every import there is, inside functions and under TYPE_CHECKING too."""
    found = []
    for name, path in modules().items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                targets = [f"{source}.{alias.name}" for alias in node.names]
                targets = [target if target in modules() else source for target in targets]
            else:
                continue
            found += [(name, target, node.lineno) for target in targets if target in modules()]
    return found


def room(module):
    return module.split(".")[1] if "." in module else module


def where(module, line):
    return f"{modules()[module].relative_to(ROOT)}:{line}"


def test_every_module_has_its_level():
    unknown = {room(module) for module in modules()} - LEVEL.keys()
    assert not unknown, f"say in LEVELS where {', '.join(sorted(unknown))} stands, between what it imports and what imports it"


def test_no_arrow_points_up():
    upwards = {}
    for module, target, line in arrows():
        one, other = room(module), room(target)
        if one != other and LEVEL[one] <= LEVEL[other]:
            upwards.setdefault((module, target), where(module, line))
    found = {f"{place}: {a} imports {b}" for (a, b), place in upwards.items()}
    assert not found, "\n".join(sorted(found))


def test_no_circle():
    """No group of modules whose imports lead from each to every other."""
    onward = {name: {b for a, b, _ in arrows() if a == name and b != name} for name in modules()}

    def reached(name):
        seen, new = set(), {name}
        while new:
            seen |= (new := {b for a in new for b in onward[a]} - seen)
        return seen

    reach = {name: reached(name) for name in modules()}
    circles = {frozenset(b for b in reach[a] if a in reach[b]) for a in modules() if a in reach[a]}
    assert not circles, [sorted(circle) for circle in circles]


def test_only_model_and_training_hook_a_module():
    """Hooks on modules: nothing else has to know when one fires, or to take it off."""
    hook = re.compile(r"\.register_(?:full_)?(?:forward|backward)\w*hook\(|\.register_module_\w+hook\(")
    elsewhere = {name for name, path in modules().items() if hook.search(path.read_text(encoding="utf-8"))}
    elsewhere = {name for name in elsewhere if room(name) not in ("model", "training", "studies", "demo")}
    assert not elsewhere


def test_a_kernel_imports_no_other_kernels_implementation():
    """A fast form builds on what the kernels share and on its own folder; a reference may state itself by other references."""
    between = set()
    for module, target, _ in arrows():
        if room(module) == room(target) == "kernels" and target.count(".") == 3:
            references = module.endswith(".reference") and target.endswith(".reference")
            if module.rsplit(".", 1)[0] != target.rsplit(".", 1)[0] and not references:
                between.add((module.removeprefix("tokdyn.kernels."), target.removeprefix("tokdyn.kernels.")))
    assert between == BETWEEN_KERNELS


LONG_FILES = {  # path -> why it reads better whole
    "kernels/readout_forces/triton.py": "the forms of one kernel share their tiles",
    "kernels/tangent_attention/triton.py": "attention, its tangents and the tiles that cotangents share",
}
LONG_FUNCTIONS = {  # (path, function) -> why it reads better whole; signature and docstring do not count
    ("kernels/tangent_attention/triton.py", "_tangent_kernel"): "device code, one loop",
    ("kernels/token_stats/triton.py", "_row"): "device code, one row of running sums",
    ("kernels/topk_log_probs/triton.py", "_scan_kernel"): "device code, one loop",
}


def test_files_functions_and_signatures_stay_short():
    """At most 400 lines a file, 60 a function, and in exact/ five parameters: what is longer says why, above."""
    files, functions, parameters = set(), set(), set()
    for path in modules().values():
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        files |= {name} if len(text.splitlines()) > 400 else set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) and node.body[1:] else node.body
                functions |= {(name, node.name)} if node.end_lineno - body[0].lineno + 1 > 60 else set()
                args = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                args = [a for i, a in enumerate(args) if i or a not in ("self", "cls", "ctx")]
                parameters |= {(name, node.name)} if len(args) > 5 and name.startswith("tokdyn/exact/") else set()
    assert files == LONG_FILES.keys()
    assert functions == LONG_FUNCTIONS.keys()
    assert not parameters
