"""Where `tokdyn` and `python -m tokdyn` begin: Ctrl-C is answered in a sentence from here on, imports included."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; interrupted while it is imported, it says so and exits with 130."""
    try:
        from .cli import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted before there was anything to keep; nothing was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
