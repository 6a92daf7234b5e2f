"""Shapes and types of tokdyn's signatures are checked while the tests run; --simd limits what the C++ kernels may use."""

import importlib
import importlib.util
import inspect
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

import pytest
import torch
from jaxtyping import install_import_hook
from torch.overrides import TorchFunctionMode

# where a float is expected an integer will do, as PEP 484 has it
hook = install_import_hook("tokdyn", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


@classmethod
def _unchecked(cls):
    """A mode is called for every torch function of a model; checking arguments that are Any took half of the tests' time."""
    if "__torch_function__" in vars(cls):
        cls.__torch_function__ = inspect.unwrap(vars(cls)["__torch_function__"])


TorchFunctionMode.__init_subclass__ = _unchecked


class TritonModules:
    """Finds kernels/<op>/triton.py before the hook does: Triton reads a kernel's source, which a type check would wrap."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, path) if name.startswith("tokdyn.kernels.") and name.endswith(".triton") else None


sys.meta_path.insert(0, TritonModules)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--simd", help="the best instruction set the C++ kernels may use: portable, avx2 or avx512")

    parser.addoption("--native", help="another build of tokdyn._C to test, e.g. one with sanitizers")
    parser.addoption("--fuzz", type=int, default=25, help="cases that Hypothesis makes up for each of its tests")
    parser.addoption("--studies", type=Path, help="a folder in which the studies that are tested stay")
    parser.addoption("--fuzz-count", help="a file that takes how many those were in all")
    parser.addoption("--counted", action="store_true", help="print what tests have counted: the figures of docs/reliability.md")


@pytest.fixture
def counted(request: pytest.FixtureRequest):
    """`counted(n, what)`: how much of something a test has tried, for --counted."""
    return lambda n, what: request.node.user_properties.append((what, n))


def pytest_terminal_summary(terminalreporter) -> None:
    if terminalreporter.config.getoption("--counted"):
        for report in terminalreporter.getreports("passed"):
            for what, n in report.user_properties if report.when == "call" else ():
                terminalreporter.write_line(f"{n:6} {what}: {report.nodeid}")


@pytest.fixture
def studies(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where a tested study is written: a folder of its name in here."""
    return request.config.getoption("--studies") or tmp_path


@pytest.fixture
def fuzz_cases(request: pytest.FixtureRequest) -> int:
    """How many cases a test with Hypothesis tries."""
    return request.config.getoption("--fuzz")


@pytest.fixture(scope="session")
def tokenizer_of_words():
    """The tokenizer of the tests of real trainers: a word is a token."""
    return importlib.import_module("trainers").word_tokenizer()


@pytest.fixture(scope="session")
def model_of_words(tokenizer_of_words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of their model, which nobody writes to."""
    return importlib.import_module("trainers").save_model(tmp_path_factory.mktemp("model"), tokenizer_of_words)


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("--native")) is not None:
        spec = importlib.util.spec_from_file_location("tokdyn._C", path)
        built = importlib.util.module_from_spec(spec)
        sys.modules["tokdyn._C"] = importlib.import_module("tokdyn")._C = built
        spec.loader.exec_module(built)
    if (best := config.getoption("--simd")) is not None:
        try:
            built = importlib.import_module("tokdyn._C")
            sys.modules["tokdyn._C"] = sys.modules["tokdyn"]._C = limited(built, best)
        except (ImportError, ValueError) as error:
            raise pytest.UsageError(f"--simd={best}: {error}") from error


def limited(built: ModuleType, best: str) -> ModuleType:
    """tokdyn._C as it is on a processor whose best instruction set is `best`; ValueError where this one has no such set."""
    levels = built.simd_levels()
    if best not in levels:
        raise ValueError(f"not among what is built and what this processor has: {', '.join(levels)}")

    def with_default(function):
        return lambda *args, simd="", **options: function(*args, simd=simd or best, **options)

    copy = ModuleType(built.__name__)
    copy.__dict__.update(vars(built))
    for name, function in vars(built).items():
        if "simd: str" in (getattr(function, "__doc__", None) or ""):
            setattr(copy, name, with_default(function))
    copy.simd_levels = lambda: levels[: levels.index(best) + 1]
    return copy


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (path := session.config.getoption("--fuzz-count")) is not None:
        from cases import made

        Path(path).write_text(str(made[0]))


def pytest_report_header(config: pytest.Config) -> str:
    kernels = config.getoption("--simd") or "the best there is"
    return f"torch: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s); C++ kernels: {kernels}"
