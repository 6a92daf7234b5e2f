"""`make fuzz`: the operators and the readers on a million cases, in parts: a run that was stopped goes on.

    python tests/fuzz.py --cases 1000000 --minutes 10        tests/fuzz.py --count

Every part runs each of the tests on `--part` new cases; what it counts is the cases that Hypothesis made of those that passed.
The first failure ends it, with what repeats it. A part counts for the sources that it ran on.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/ops/test_fuzz.py", "tests/test_readers.py"


def sources():
    """A checksum of what is tried, and of the tests."""
    files = [
        p for folder in ("tokdyn", "kernels", "csrc") for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h")
    ]
    files = [*sorted(files), *(ROOT / test for test in TESTS)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--part", type=int, default=500, help="cases of each test in a part")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no part after so many")
    parser.add_argument("--log", type=Path, default=Path("/tmp/tokdyn-fuzz.jsonl"), help="what has been counted")
    parser.add_argument("--count", action="store_true", help="only say what has been")
    args = parser.parse_args()
    end, now = time.monotonic() + 60 * args.minutes, sources()

    def counted():
        lines = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log.exists() else []
        return sum(line["cases"] for line in lines), sum(line["cases"] for line in lines if line["sources"] == now)

    while not args.count and counted()[0] < args.cases and time.monotonic() < end:
        told = args.log.with_suffix(".part")
        told.unlink(missing_ok=True)
        run = [Path(sys.executable).with_name("pytest"), "-q", "-x", "--fuzz", str(args.part), "--fuzz-count", told, *TESTS]
        code = subprocess.run(run, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        if code:
            sys.exit(code)
        with args.log.open("a") as file:
            file.write(
                json.dumps({"cases": int(told.read_text()), "sources": now, "at": time.strftime("%Y-%m-%d %H:%M")}) + "\n"
            )
    print("{:,} cases without a failure, {:,} of them on the sources as they are".format(*counted()))


if __name__ == "__main__":
    main()
