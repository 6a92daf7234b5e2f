"""The operators beside plain torch, torch.compile, liger-kernel and cut-cross-entropy: times, peak memory, share of the floor.

    python benchmarks/kernels.py [OPERATOR...] [--device cuda] [--quick] [--json FILE] [--markdown FILE]
    python benchmarks/kernels.py join RUN.json... --json FILE --markdown FILE     several runs on one machine as one table

The first is `tokdyn bench` and takes its options; the cases and their sizes are in tokdyn/bench/cases.py. The second is for
machines that are quiet for a minute at a time: a run for a few operators, one for memory, and so on.
"""

import argparse
import json
import sys
from pathlib import Path

from tokdyn.bench import join, report
from tokdyn.cli import app


def joined(arguments: list[str]) -> None:
    """The command `join`: several runs as one table."""
    parser = argparse.ArgumentParser(prog="kernels.py join")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    found = join([json.loads(run.read_text()) for run in options.runs])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if options.markdown:
        options.markdown.write_text(report.markdown(found))
    else:
        print(report.markdown(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["join"]:
        joined(sys.argv[2:])
    else:
        app(["bench", *sys.argv[1:]], prog_name="kernels.py")
