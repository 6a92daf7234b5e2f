"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: their tests and the fuzz, on a build of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1"


def library(name):
    """A library of the compiler that a process must load before all others; "" where there is none."""
    try:
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found if Path(found).is_absolute() else ""


@pytest.mark.skipif(not library("libasan.so"), reason="the compiler has no AddressSanitizer")
def test_nothing_is_read_or_written_outside_its_memory(tmp_path):
    """Whatever the sanitizers find ends the process with what they found."""
    flags = {"CFLAGS": FLAGS, "CXXFLAGS": FLAGS, "LDFLAGS": "-fsanitize=address,undefined", "TOKDYN_CUDA": "0"}
    build = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        tmp_path / "lib",
        "--build-temp",
        tmp_path / "objects",
    ]
    subprocess.run(build, cwd=ROOT, env=os.environ | flags, check=True, capture_output=True)
    (native,) = (tmp_path / "lib" / "tokdyn").glob("_C*.so")
    assert b"__asan_init" in native.read_bytes()
    # leaks are the interpreter's own; torch throws across libraries, which the interceptors must not take for an error
    options = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", "LD_PRELOAD": library("libasan.so")}
    tests = [*sorted((ROOT / "tests/kernels").glob("test_native_*.py")), ROOT / "tests/ops/test_fuzz.py"]
    run = [Path(sys.executable).with_name("pytest"), "-q", "-p", "no:cacheprovider", "--native", native, *tests]
    found = subprocess.run(run, cwd=ROOT, env=os.environ | options, capture_output=True, text=True)
    assert found.returncode == 0, (found.stdout + found.stderr)[-5000:]
