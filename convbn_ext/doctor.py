"""What is installed, what the extension was built for, and what to do where the two do not fit.

Runs also when the extension does not load (`_load.load_extension` calls it then), so nothing of the package, nor torch,
is imported at the top.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._version import __version__

_BUILD = "pip install --no-build-isolation ."
_OPENMP = ("libgomp", "libiomp", "libomp")


@dataclass
class Report:
    """Facts in the order they are printed, and problems with their remedy."""

    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(map(len, self.facts)) + 2
        lines = [f"{name:<{width}}{value}" for name, value in self.facts.items()]
        return "\n".join(
            [*lines, "", *(f"PROBLEM  {p}" for p in self.problems)] if self.problems else [*lines, "", "ok"]
        )


def examine(load_error: ImportError | None = None) -> Report:
    """Collect the facts.

    Args:
        load_error: why the extension did not load, if it did not.

    Returns:
        The report; ``problems`` is empty when everything fits.
    """
    report = Report()
    report.facts["convbn_ext"] = f"{__version__} in {Path(__file__).parent}"
    report.facts["python"] = f"{platform.python_version()}, {platform.platform()}"
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        report.facts["torch"] = "not importable"
    else:
        _torch_facts(report, torch)
    build = _build_info()
    if build is not None:
        report.facts["built against"] = f"torch {build.TORCH_VERSION}, CUDA {build.CUDA_VERSION or 'left out'}"
    report.facts["compiler here"] = _first_line(os.environ.get("CXX", "c++"), "--version")
    report.facts["nvcc here"] = shutil.which("nvcc") or "not found (needed for a CUDA build only)"
    if load_error is not None:
        report.problems.append(str(load_error))
    elif "torch" in sys.modules and build is not None:
        _extension_facts(report, sys.modules["torch"], build)
    runtimes = openmp_runtimes()
    report.facts["OpenMP runtimes"] = ", ".join(runtimes) or "none loaded"
    if len(runtimes) > 1:
        report.problems.append(
            "two OpenMP runtimes are loaded and their threads fight for the cores: build again without LDFLAGS that "
            f"link one ({_BUILD}), and do not preload another"
        )
    return report


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP libraries mapped into this process (Linux; empty elsewhere).

    A copy that another wheel carries for itself (``scikit_learn.libs/``) serves that wheel alone and is left out.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if len(line.split(maxsplit=5)) == 6}
    return sorted(p for p in paths if Path(p).name.startswith(_OPENMP) and not Path(p).parent.name.endswith(".libs"))


def _torch_facts(report: Report, torch: Any) -> None:
    with_compiler = [
        line.strip(" -") for line in torch.__config__.show().splitlines() if "GCC" in line or "clang" in line
    ]
    report.facts["torch"] = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {', '.join(with_compiler[:1])}"
    chosen = os.environ.get("ATEN_CPU_CAPABILITY")
    report.facts["instruction set"] = torch.backends.cpu.get_cpu_capability() + (
        f" (ATEN_CPU_CAPABILITY={chosen})" if chosen else ""
    )
    report.facts["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} processors"


def _build_info() -> Any:
    try:
        return importlib.import_module("convbn_ext._build_info")
    except ImportError:
        return None


def _extension_facts(report: Report, torch: Any, build: Any) -> None:
    extension: Any = importlib.import_module("convbn_ext._C")
    report.facts["extension"] = f"{extension.__file__}, compiled by {getattr(extension, 'compiler', 'unknown')}"
    report.facts["AMX"] = "used for bfloat16" if extension.amx_available() else "not available, or not allowed"
    built = list(getattr(build, "CUDA_ARCHITECTURES", ()))
    report.facts["CUDA architectures"] = ", ".join(built) or "none: built for the CPU alone"
    if not torch.cuda.is_available():
        report.facts["GPU"] = "none in use"
        return
    major, minor = torch.cuda.get_device_capability()
    report.facts["GPU"] = f"{torch.cuda.get_device_name()}, sm_{major}{minor}"
    if not built:
        report.problems.append(
            f"torch sees a GPU, but the CUDA kernels are not built in: put nvcc on PATH and run {_BUILD}"
        )
    elif not _runs_on(major, minor, built):
        report.problems.append(
            f"no kernel for this GPU (sm_{major}{minor}) is built in: TORCH_CUDA_ARCH_LIST={major}.{minor} {_BUILD}"
        )


def _runs_on(major: int, minor: int, built: list[str]) -> bool:
    """sm_XY runs on later minor revisions of X; compute_XY (PTX) on every later architecture."""
    for name in built:
        kind, _, number = name.partition("_")
        x, y = divmod(int(number.rstrip("af")), 10)
        if (x == major and y <= minor) if kind == "sm" else (x, y) <= (major, minor):
            return True
    return False


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return f"{command[0]} not found: install a C++20 compiler to build the extension"


def main(load_error: ImportError | None = None) -> int:
    """Print the report; the exit code is 1 when something is wrong."""
    report = examine(load_error)
    print(report)
    return 1 if report.problems else 0
