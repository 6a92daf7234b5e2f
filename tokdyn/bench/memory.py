"""Peak memory of the sides of one case, in a process of its own: `python -m tokdyn.bench.memory '{"case": ...}'`.

Prints one line of JSON for each side, as it is done. bench() starts it with an allocator that gives memory back.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from .cases import cases_on
from .measure import MIB, peak_memory


def main(request: dict[str, Any]) -> None:
    """Measure the sides that the request names, each after a call at a small size, so that loading a library is not counted."""
    torch.set_num_threads(request["threads"])
    device = torch.device("cpu")

    def named(quick: bool) -> Any:
        fitting = [case for case in cases_on(device, quick) if case.name == request["case"]]
        exact = [case for case in fitting if str(case.dtype) == request["dtype"]]
        return (exact or fitting)[0]

    case, small = named(request["quick"]), named(True)
    inputs, few = case.make(device), small.make(device)
    for name in request["sides"]:
        with torch.no_grad():
            small.sides[name](*few)
            if name == "compile":  # compiling is not its memory either
                case.sides[name](*inputs)
            start = time.perf_counter()
            taken = peak_memory(lambda name=name: case.sides[name](*inputs), device)  # type: ignore[misc]
            seconds = time.perf_counter() - start
        answer = dict(side=name, peak_mib=round(taken / MIB, 1))
        print(json.dumps(answer if case.timed else answer | dict(median_ms=1e3 * seconds)), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
