"""run.yaml: the options that make a run again, written beside it and read by `--config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .._version import __version__
from ..runs.folder import RECIPE
from ..runs.manifest import replace

NOT_KEPT = {
    "out",
    "overwrite",
    "resume",
    "config",
    "json_",
    "dry_run",
    "unit",
    "per",
    "scan",
    "row",
}  # where to, and how it is shown


def write(folder: Path, options: dict[str, Any]) -> None:
    """Write the options of a command into the folder of what it made."""
    import yaml

    kept = {name.rstrip("_"): value for name, value in options.items() if name not in NOT_KEPT and value is not None}
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    replace(folder / RECIPE, f"# tokdyn {__version__}: tokdyn profile --config {RECIPE} --out ...\n{text}".encode())


class FromFile(TyperCommand):
    """A command that takes its defaults from the file that --config names; options on the command line win."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the file before the options are read.

        Raises:
            typer.BadParameter: it cannot be read, or names an option that there is not.
        """
        for i, word in enumerate(args):
            if word == "--config" and i + 1 < len(args):
                ctx.default_map = self.defaults(Path(args[i + 1]))
            elif word.startswith("--config="):
                ctx.default_map = self.defaults(Path(word.removeprefix("--config=")))
        try:
            return super().parse_args(ctx, list(args))
        except Exception as error:  # a UsageError, which typer takes from click or from itself, as its version is
            said = str(getattr(error, "message", ""))
            files = [word for word in args if Path(word).is_file() and f"({word})" in said]
            if files and any(each.name == "data" for each in self.params):
                error.message = f"{said}: the data are --data {files[0]}"  # type: ignore[attr-defined]
            raise

    def defaults(self, path: Path) -> dict[str, Any]:
        """The options of a file by the names of the command's parameters."""
        import yaml

        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise typer.BadParameter(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(found, dict):
            raise typer.BadParameter(f"{path} must hold NAME: VALUE lines, as a run's {RECIPE} does")
        known = {str(each.name).rstrip("_"): str(each.name) for each in self.params if each.name not in NOT_KEPT}
        names = {str(name): str(name).replace("-", "_") for name in found}
        if unknown := [name for name, plain in names.items() if plain not in known]:
            raise typer.BadParameter(f"{path} names {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
        return {known[names[str(name)]]: value for name, value in found.items()}


Config = Annotated[Path | None, typer.Option("--config", help=f"file of options, the {RECIPE} of a run; the command line wins")]
