"""The native extension and where the packages lie; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

Unit = tuple[str, str, list[tuple[str, str | None]], list[str]]  # source, folder of its object, macros, flags
ROOT = Path(__file__).resolve().parent
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-psabi"]
X86_LEVELS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx2", "-mfma", "-Wno-maybe-uninitialized"],  # gcc 12 warns about its own header
}
CUDA_ARCHITECTURES = ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80"]


def mapped_packages(folder: str, name: str) -> dict[str, str]:
    """Packages under a top-level folder that installs under another name, as {package: folder}."""
    found = {}
    for module in sorted((ROOT / folder).rglob("*.py")):
        parent = module.parent.relative_to(ROOT)
        found[".".join([name, *parent.parts[1:]])] = parent.as_posix()
    return found


def relative(*patterns: str) -> list[str]:
    """Files matching the patterns, relative to this folder as setuptools wants them."""
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


def find_nvcc() -> Path | None:
    """The CUDA compiler of $CUDA_HOME, of PATH, or of the usual place."""
    candidates = [os.environ.get("CUDA_HOME", "") and f"{os.environ['CUDA_HOME']}/bin/nvcc", shutil.which("nvcc")]
    for candidate in [*candidates, "/usr/local/cuda/bin/nvcc"]:
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    return None


def find_cudart(nvcc: Path) -> Path:
    """The folder that holds libcudart_static.a."""
    homes = [os.environ.get("CUDA_HOME"), nvcc.resolve().parents[1], "/usr/local/cuda"]
    for home in homes:
        for library in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib") if home else ():
            if (Path(home) / library / "libcudart_static.a").exists():
                return Path(home) / library
    raise CompileError(f"libcudart_static.a not found beside {nvcc}; set CUDA_HOME")


class BuildNative(build_ext):
    """Compiles csrc/: *_simd.cpp once per instruction set, the other C++ once, cuda/*.cu with nvcc where it exists.

    TOKDYN_CUDA=auto (default) builds CUDA when nvcc and .cu files are there, 1 insists on it, 0 leaves it out.
    """

    def build_extension(self, ext: Extension) -> None:
        """Every object in a thread of its own, for a compiler is a process of its own; setuptools then links them."""
        import pybind11

        ext.include_dirs = [pybind11.get_include(), "csrc"]
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        levels = {"portable": list[str](), **(X86_LEVELS if x86 else {})}
        plain, bindings = list[Unit](), list[str]()
        for source in ext.sources:
            if source.endswith("_simd.cpp"):
                plain += [(source, level, [("TOKDYN_SIMD", level)], flags) for level, flags in levels.items()]
            elif source.endswith("bindings.cpp"):
                bindings.append(source)
            else:
                plain.append((source, "plain", [], []))
        with ThreadPoolExecutor(self.parallel or os.cpu_count()) as pool:
            begun = pool.map(lambda unit: self.compile_unit(ext, *unit), plain)
            cuda_objects, cuda_note = self.compile_cuda(ext, pool)
            macros = [*ext.define_macros, *((f"TOKDYN_HAS_{level.upper()}", "1") for level in levels if level != "portable"),
                      ("TOKDYN_SIMD_BUILT", f'"{", ".join(levels)}"'), ("TOKDYN_CUDA_NOTE", f'"{cuda_note}"')]  # fmt: skip
            last = pool.map(lambda source: self.compile_unit(ext, source, "plain", macros, []), bindings)
            ext.extra_objects = [*cuda_objects, *(name for names in (*begun, *last) for name in names)]
        every_source, ext.sources = ext.sources, []
        try:
            super().build_extension(ext)
        finally:
            ext.sources = every_source
        print(f"tokdyn: built the CPU kernels for {', '.join(levels)}; CUDA: {cuda_note}", file=sys.stderr)

    def compile_unit(
        self, ext: Extension, source: str, folder: str, macros: list[tuple[str, str | None]], flags: list[str]
    ) -> list[str]:
        """The object of one source file; *_simd.cpp have one for each instruction set, chosen among at run time."""
        return self.compiler.compile(
            [source],
            output_dir=str(Path(self.build_temp) / folder),
            macros=macros,
            include_dirs=ext.include_dirs,
            extra_postargs=[*ext.extra_compile_args, *flags],
            depends=ext.depends,
        )

    def compile_cuda(self, ext: Extension, pool: ThreadPoolExecutor) -> tuple[list[str], str]:
        """The objects of csrc/cuda/*.cu and one line that says what was built, or why nothing was."""
        mode = os.environ.get("TOKDYN_CUDA", "auto")
        if mode not in ("auto", "0", "1"):
            raise ValueError(f"TOKDYN_CUDA must be auto, 0 or 1, got {mode!r}")
        sources, nvcc = relative("csrc/cuda/*.cu"), find_nvcc()
        for absent, reason in (
            (mode == "0", "TOKDYN_CUDA=0"),
            (not sources, "this version has no CUDA sources"),
            (nvcc is None, "nvcc not found"),
        ):
            if absent:
                if mode == "1":
                    raise RuntimeError(f"TOKDYN_CUDA=1, but {reason}")
                return [], f"not built: {reason}"
        assert nvcc is not None
        try:
            ext.library_dirs = [str(find_cudart(nvcc))]
            objects = list(pool.map(lambda source: self.compile_one_cuda(nvcc, source), sources))
        except (CompileError, OSError, subprocess.CalledProcessError) as error:
            if mode == "1":
                raise RuntimeError(f"TOKDYN_CUDA=1, but the CUDA build failed: {error}") from error
            return [], "not built: nvcc failed, see the build log"
        ext.libraries = ["cudart_static", "rt", "pthread", "dl"]
        ext.define_macros.append(("TOKDYN_HAS_CUDA", "1"))
        return objects, "built: sm_80, sm_90a, PTX compute_80"

    def compile_one_cuda(self, nvcc: Path, source: str) -> str:
        """One .cu file to an object for every architecture in CUDA_ARCHITECTURES."""
        target = Path(self.build_temp) / "cuda" / f"{Path(source).stem}.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        gencode = [f"-gencode={architecture}" for architecture in CUDA_ARCHITECTURES]
        host = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        command = [str(nvcc), "-O3", "-std=c++17", "--threads=2", *host, *gencode, "-c", source, "-o", str(target)]
        print(" ".join(command), file=sys.stderr)
        subprocess.run(command, check=True)
        return str(target)


extension = Extension(
    "tokdyn._C",
    sources=relative("csrc/bindings.cpp", "csrc/cpu/*.cpp", "csrc/cuda/*.cpp"),
    depends=relative("csrc/**/*.h", "csrc/**/*.cu"),
    language="c++",
    extra_compile_args=CXX_FLAGS,
    extra_link_args=[] if sys.platform == "darwin" else ["-pthread"],
    optional=True,  # without a C++ compiler the package still installs; tokdyn._native says so
)
mapped = mapped_packages("kernels", "tokdyn.kernels")
setup(
    packages=find_packages(include=["tokdyn", "tokdyn.*"]) + list(mapped),
    package_dir=mapped,
    ext_modules=[extension],
    cmdclass={"build_ext": BuildNative},
)
