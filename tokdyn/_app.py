"""What the commands of the command line share: the application, its own options, and errors as sentences."""

from __future__ import annotations

import contextlib
import json
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ._arguments import printable_json, sentence
from ._console import err_console, out_console
from ._version import __version__

ORDER = ("profile", "report", "explain", "diff", "scan", "check", "serve", "probe", "study", "demo", "bench", "doctor")


class InOrder(TyperGroup):
    """The commands as a newcomer needs them, wherever they are defined, their help as paragraphs."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command; rich would keep the line breaks of a docstring, which are those of the source."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and command.help:
            command.help = re.sub(r"(?<!\n)\n(?!\n)", " ", command.help)
        return command

    def list_commands(self, ctx: Any) -> list[str]:
        """Those of ORDER first, in its order."""
        return sorted(super().list_commands(ctx), key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


app = typer.Typer(cls=InOrder, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")

options = {"debug": False}  # of `tokdyn` itself, as `about` last read them
DATA = "'demo', or a file with prompt/completion, prompt/chosen/rejected, messages …: .jsonl, .json, .csv (.gz) or .parquet"


def _print_version(wanted: bool) -> bool:
    if wanted:
        out_console.print(f"tokdyn {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,  # fmt: skip
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """tokdyn: which token of an update moved which token of an answer, which way, how much, and why."""
    options["debug"] = debug


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Print what goes wrong as one sentence and exit with 2, with 130 after Ctrl-C; warnings are one line each."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        if options["debug"]:
            err_console.print_exception()
        err_console.print("error:", style="bold red", end=" ")
        err_console.print(sentence(error), markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        err_console.print("interrupted before there was anything to keep; nothing was written", style="yellow")
        raise typer.Exit(130) from None


def _print_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """A warning as a note of one line; what libraries say to their own developers is left out."""
    if not issubclass(category, (DeprecationWarning, FutureWarning)):
        note(" ".join(str(message).split()))


def note(text: str) -> None:
    err_console.print(f"note: {text}", style="yellow", markup=False, soft_wrap=True)


Json = Annotated[bool, typer.Option("--json", help="print one JSON document, and nothing else on standard output")]


def print_json(document: Any) -> None:
    """Print a value as JSON: NaN and infinities are null, what JSON does not know is text; nothing in it steers a terminal."""
    print(printable_json(json.dumps(_plain(document), ensure_ascii=False, indent=1, allow_nan=False, default=str)))


def data_file(name: str) -> Path:
    """The data file that an argument names.

    Raises:
        FileNotFoundError: there is none.
    """
    from ._rows import require_file
    from .loading import DEMO_PAIRS

    path = DEMO_PAIRS if name == "demo" else Path(name)
    require_file(path)
    return path


def load_profile(path: Path) -> Any:
    """The profile in a folder, a `Run`.

    Raises:
        FileNotFoundError, ValueError: as `td.load`; the folder holds something of another kind.
    """
    import tokdyn as td

    from .runs.folder import kind_of

    found = td.load(path)
    if not isinstance(found, td.Run):
        raise ValueError(f"{path} holds a run of kind {kind_of(path)}, not a profile: read it with td.load")
    return found


def tell(facts: dict[str, Any], as_json: bool) -> None:
    """Print facts as NAME  VALUE lines, or as JSON."""
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        out_console.print(f"{name:22} {value}", markup=False, soft_wrap=True)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
