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


def pytested(*arguments):
    """A run of pytest that can load the build, and lets through what a sanitizer writes before it ends the process."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # leaks are the interpreter's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # the C++ library too: the interceptor of `throw` looks for it when the process starts, long before torch loads it
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
    }
    run = [Path(sys.executable).with_name("pytest"), "-q", "--capture=sys", "-p", "no:cacheprovider", *arguments]
    found = subprocess.run(run, cwd=ROOT, env=os.environ | options, capture_output=True, text=True)
    return found.returncode, (found.stdout + found.stderr)[-8000:]


FAULTS = """
#include <climits>
#include <stdexcept>
#include <vector>
extern "C" int outside(int n) { return std::vector<int>(n)[n]; }
extern "C" int overflow(int n) { return INT_MAX + n; }
extern "C" int thrown(int n) { try { throw std::runtime_error("caught"); } catch (std::exception &) { return n; } }
"""
needs_sanitizers = pytest.mark.skipif(not library("libasan.so"), reason="the compiler has no AddressSanitizer")


@needs_sanitizers
def test_a_fault_ends_the_process_and_is_told(tmp_path):
    """One read outside, one overflow, under a pytest that keeps their output; what is thrown and caught is no fault."""
    (tmp_path / "faults.cpp").write_text(FAULTS)
    built = ["g++", *FLAGS.split(), "-shared", "-fPIC", "-o", tmp_path / "faults.so", tmp_path / "faults.cpp"]
    subprocess.run(built, check=True, capture_output=True)
    for name, report in (("thrown", ""), ("outside", "heap-buffer-overflow"), ("overflow", "signed integer overflow")):
        (tmp_path / f"test_{name}.py").write_text(
            f"import ctypes\n\ndef test(): assert ctypes.CDLL('{tmp_path}/faults.so').{name}(3) == 3\n"
        )
        code, told = pytested("--rootdir", tmp_path, tmp_path / f"test_{name}.py")
        assert (code == 0) == (report == "") and report in told, told


@needs_sanitizers
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
    code, told = pytested(
        "--native", native, *sorted((ROOT / "tests/kernels").glob("test_native_*.py")), ROOT / "tests/ops/test_fuzz.py"
    )
    assert code == 0, told
