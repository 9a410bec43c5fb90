"""Build convbn_ext._C against the torch that is installed.

Environment:
    USE_CUDA=0        leave the CUDA kernels out although torch has CUDA
    DEBUG=1           -O0 -g and assertions
    SANITIZE=x        -O1 -g -fsanitize=x, for example address,undefined (`make asan` builds and runs that)
    EMULATE_AVX512=1  AVX-512's loops with AVX2's instructions, for a CPU without it; GCC (`make wide`)
    MAX_JOBS=n        compiler processes at once
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit(
        "convbn_ext: building needs torch >= 2.10, and it is not importable here.\n"
        "  1. install the torch you want, for example:  pip install torch\n"
        "  2. build against it:                         pip install --no-build-isolation .\n"
        "pip's build isolation hides an installed torch, so --no-build-isolation is needed in any case."
    )

if int(setuptools.__version__.split(".")[0]) < 77:  # older ones refuse pyproject.toml with pages of schema
    sys.exit(f"convbn_ext: needs setuptools >= 77, found {setuptools.__version__}: pip install -U setuptools")

ROOT = Path(__file__).parent.resolve()
DEBUG = os.environ.get("DEBUG", "0") == "1"
SANITIZE = os.environ.get("SANITIZE", "")
MIN_TORCH = (2, 10)

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
    sys.exit(
        f"convbn_ext: needs torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]}, found {torch.__version__}: pip install -U torch"
    )


def cuda_wanted() -> bool:
    """CUDA kernels are built when torch has CUDA, unless USE_CUDA=0."""
    if os.environ.get("USE_CUDA", "1") == "0" or torch.version.cuda is None:
        return False
    if cpp_extension.CUDA_HOME is None and shutil.which("nvcc") is None:
        sys.exit(
            f"convbn_ext: torch {torch.__version__} has CUDA {torch.version.cuda}, but nvcc was not found.\n"
            "  put nvcc on PATH or set CUDA_HOME, or build for the CPU alone:\n"
            "  USE_CUDA=0 pip install --no-build-isolation ."
        )
    return True


def sources(with_cuda: bool) -> list[str]:
    """Every backend registers itself, so a CPU build simply leaves csrc/cuda out."""
    patterns = ["*.cpp", "cpu/*.cpp"] + (["cuda/*.cpp", "cuda/*.cu"] if with_cuda else [])
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / "csrc").glob(pattern))


def cuda_package() -> Path | None:
    """The CUDA headers and libraries that pip installs with torch: a bare nvcc has no cuBLAS beside it."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else []
    folders = [Path(root) / f"cu{torch.version.cuda.partition('.')[0]}" for root in roots]
    return next((folder for folder in folders if (folder / "include").is_dir()), None)


def fused_multiply_adds() -> list[str]:
    """GCC 13 and newer tune x86-64 by splitting some multiply-adds, depending on the loop around them.

    The same product in a loop of another shape then rounds otherwise, and results depend on how rows are grouped.
    """
    flag = "--param=avoid-fma-max-bits=0"
    command = [*cpp_extension.get_cxx_compiler().split(), "-Werror", flag, "-x", "c++", "-fsyntax-only", os.devnull]
    return [flag] if subprocess.run(command, capture_output=True, check=False).returncode == 0 else []


def extension(with_cuda: bool):
    """One extension module; OpenMP pragmas are compiled, but libgomp comes from torch alone.

    Linking our own -lgomp could load a second OpenMP runtime whose threads fight torch's for the cores; libtorch_cpu
    already brings one, and the loader resolves GOMP_* from it.
    """
    openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
    optimize = ["-O0", "-g", "-UNDEBUG"] if DEBUG else ["-O3", "-g0"]
    if SANITIZE:  # torch's own classes carry no type information for vptr
        optimize = ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}", "-fno-sanitize=vptr"]
    emulate = ["-DCONVBN_EMULATE_AVX512"] if os.environ.get("EMULATE_AVX512", "0") == "1" else []
    cxx = ["-std=c++20", *emulate, *optimize, *openmp, "-Wall", "-Wno-psabi", *fused_multiply_adds()]
    options = {
        "include_dirs": [str(ROOT / "csrc")],
        "extra_compile_args": {"cxx": cxx},
        "extra_link_args": [f"-fsanitize={SANITIZE}"] if SANITIZE else [],
    }
    if not with_cuda:
        return cpp_extension.CppExtension("convbn_ext._C", sources(False), **options)
    if package := cuda_package():  # behind the toolkit's own, which match nvcc
        options["extra_compile_args"]["cxx"] += ["-idirafter", str(package / "include")]
        options["library_dirs"] = [str(package / "lib")]
    options["extra_compile_args"]["nvcc"] = ["-std=c++20", "-O3", "-lineinfo", "--expt-relaxed-constexpr"]
    return cpp_extension.CUDAExtension("convbn_ext._C", sources(True), **options)


def cuda_architectures() -> list[str]:
    """What BuildExtension makes nvcc compile for, from TORCH_CUDA_ARCH_LIST or the GPUs here: sm_90, compute_90, …"""
    return [flag.rpartition("code=")[2] for flag in cpp_extension._get_cuda_arch_flags()]


class Build(cpp_extension.BuildExtension):
    """BuildExtension that reads torch's headers once and writes down which torch the library was built against."""

    def run(self):
        kind = f"sanitize-{SANITIZE}" if SANITIZE else "debug" if DEBUG else "release"
        # object files stay, also after an editable install: only what changed is compiled again
        self.build_temp = str(ROOT / "build" / f"temp-{torch.__version__}-{kind}")
        super().run()
        target = Path(self.get_ext_fullpath("convbn_ext._C")).with_name("_build_info.py")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            f'''"""Written by setup.py: what the extension was built against."""

TORCH_VERSION = {str(torch.__version__)!r}
CUDA_VERSION = {torch.version.cuda if WITH_CUDA else None!r}
CUDA_ARCHITECTURES: list[str] = {cuda_architectures() if WITH_CUDA else []!r}
'''
        )

    def build_extension(self, ext):
        """To read torch's headers takes longer than to compile what follows them: GCC can keep what it has read.

        Where it finds other flags, or cannot do this, it reads csrc/torch_headers.h as ever.
        """
        flags = ext.extra_compile_args["cxx"]
        header, precompiled = ROOT / "csrc" / "torch_headers.h", Path(self.build_temp) / "torch_headers.h.gch"
        if not precompiled.exists() or precompiled.stat().st_mtime < max(map(os.path.getmtime, (header, __file__))):
            precompiled.parent.mkdir(parents=True, exist_ok=True)
            include = [f"-I{folder}" for folder in (*ext.include_dirs, *self.compiler.include_dirs)]
            compiler = [*cpp_extension.get_cxx_compiler().split(), *self.compiler.compiler_so[1:], *include, *flags]
            subprocess.run([*compiler, "-x", "c++-header", header, "-o", precompiled], check=False)
        ext.include_dirs.insert(0, str(precompiled.parent))  # ahead of csrc: the first of the two that GCC meets
        flags += ["-include", header.name]
        super().build_extension(ext)


WITH_CUDA = cuda_wanted()
setup(ext_modules=[extension(WITH_CUDA)], cmdclass={"build_ext": Build})
