#!/usr/bin/env bash
# Everything that needs a GPU, in one command and within 8 minutes: builds the extension without a network, tests the kernels
# against float64, reads their machine code, and measures them against the machine's limits.
#
#     [PYTHON=python3] benchmarks/gpu.sh [--minutes 8] [--out DIR] [--dry-run]
#
# Leaves <GPU>-<date>.json and .md in DIR ($OUT, or benchmarks/results); a stage that fails is recorded and the others go on.
# benchmarks/gpu.py lists the stages; 15 minutes add the matrix of 4096 x 4096 tokens under the 0.5B shape. --dry-run shows them
# and checks their commands, which needs no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
exec "$python" -P benchmarks/gpu.py --out "${OUT:-benchmarks/results}" "$@"
