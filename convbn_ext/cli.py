"""The command line: ``python -m convbn_ext`` and the console script ``convbn``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import doctor
from ._version import __version__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convbn", description="Fused convolution + batch normalisation, and its inverse by matrix-free GMRES."
    )
    parser.add_argument("--version", action="version", version=f"convbn_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="doctor")

    commands.add_parser("doctor", help="what is installed, what is built, and what to do about a mismatch")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; the process's own by default.

    Returns:
        Exit code: 0, or 1 with one message on stderr when something is wrong.
    """
    arguments = _parser().parse_args(argv)
    if arguments.command == "doctor":
        return doctor.main()
    return 1
