"""Load the compiled extension, or say in one message what is wrong and what to run."""

from __future__ import annotations

import importlib
import sys
from itertools import pairwise
from pathlib import Path

_BUILD = "pip install --no-build-isolation ."


def _release(version: str) -> str:
    return ".".join(version.split(".")[:2])


def load_extension() -> None:
    """Load the extension; a broken one must not keep ``python -m convbn_ext doctor`` from saying what is wrong.

    Raises:
        ImportError: see `_load`.
    """
    try:
        _load()
    except ImportError as error:
        if not _doctor_is_asked(sys.orig_argv):
            raise
        from . import doctor

        sys.exit(doctor.main(error))


def _doctor_is_asked(command: list[str]) -> bool:
    """Whether the process is ``python -m convbn_ext doctor`` or ``convbn doctor``."""
    return any(
        Path(program).name in ("convbn", "convbn_ext") and argument == "doctor"
        for program, argument in pairwise(command)
    )


def _load() -> None:
    """Import torch and then convbn_ext._C, which registers the operators.

    Raises:
        ImportError: torch is missing, the extension is not built, was built against another torch release, or does
            not load; the message says which, and the command that mends it.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"convbn_ext needs torch >= 2.10, which is not installed: pip install torch, then {_BUILD}"
        ) from error
    try:
        build = importlib.import_module("convbn_ext._build_info")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"convbn_ext: the compiled extension is missing (a source folder, not an installation?): run {_BUILD}"
        ) from error
    if _release(build.TORCH_VERSION) != _release(torch.__version__):
        raise ImportError(
            f"convbn_ext was built against torch {build.TORCH_VERSION}, but torch {torch.__version__} is installed; "
            f"build it again against this torch: {_BUILD}"
        )
    try:
        importlib.import_module("convbn_ext._C")
    except ImportError as error:
        raise ImportError(
            f"convbn_ext: the extension built against torch {build.TORCH_VERSION} (CUDA {build.CUDA_VERSION}) does not "
            f"load with torch {torch.__version__} (CUDA {torch.version.cuda}): {error}; build it again: {_BUILD}"
        ) from error
