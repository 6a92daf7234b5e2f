"""Processes of a job, as a launcher starts them."""

import os
import socket
import subprocess
import sys


def launched(script, *words, ranks):
    """Python processes of a script, each with what torchrun puts into the environment; of one alone nothing is put there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = os.environ | {"OMP_NUM_THREADS": "1"}
    if ranks > 1:
        base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [
        subprocess.Popen([sys.executable, str(script), *map(str, words)], env=base | ({"RANK": str(r)} if ranks > 1 else {}),
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for r in range(ranks)
    ]  # fmt: skip
