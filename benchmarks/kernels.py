"""The operators beside plain torch, torch.compile, liger-kernel and cut-cross-entropy: times, peak memory, share of the floor.

    python benchmarks/kernels.py [OPERATOR...] [--device cuda] [--quick] [--json FILE] [--markdown FILE]

The same as `tokdyn bench`, whose options it takes; the cases and their sizes are in tokdyn/bench/cases.py.
"""

import sys

from tokdyn.cli import app

if __name__ == "__main__":
    app(["bench", *sys.argv[1:]], prog_name="kernels.py")
