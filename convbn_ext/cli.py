"""The command line: ``python -m convbn_ext`` and the console script ``convbn``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import doctor
from ._version import __version__
from .solve import METHODS, PRECONDITIONERS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convbn", description="Fused convolution + batch normalisation, and its inverse by matrix-free GMRES."
    )
    parser.add_argument("--version", action="version", version=f"convbn_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | solve | experiment | doctor")

    demo = commands.add_parser("demo", help="train on real digits and invert real image crops")
    demo.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder of demo.json and demo.png (%(default)s)"
    )
    demo.add_argument("--json", action="store_true", help="print demo.json instead of the report")
    demo.add_argument("--epochs", type=int, default=8, help="passes over the training digits (%(default)s)")
    demo.add_argument("--crops", type=int, default=128, help="image crops to invert (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of every random choice (%(default)s)")

    solve = commands.add_parser(
        "solve",
        help="recover z from x = BN(Conv(z)) for a saved layer and input, or for an image",
        description="INPUT is a tensor x of shape (N, C, H, W) saved by torch.save or numpy.save and --layer the saved "
        "state_dict of a ConvBN2d (keys conv.* and bn.*). Or INPUT is an image: it is sent through the layer (by "
        "default a random 3→3 convolution whose statistics are the image's own) and recovered.",
    )
    solve.add_argument("input", type=Path, metavar="INPUT", help=".pt, .npy, or an image")
    solve.add_argument("--layer", type=Path, help="state_dict of a ConvBN2d saved by torch.save")
    solve.add_argument("--out", type=Path, help="where z goes: .pt, .npy or an image (INPUT with _z)")
    solve.add_argument("--padding", type=int, help="of the convolution (default: keep the image size)")
    solve.add_argument("--dilation", type=int, default=1, help="of the convolution (%(default)s)")
    solve.add_argument("--groups", type=int, default=1, help="of the convolution (%(default)s)")
    solve.add_argument("--stride", type=int, default=1, help="of the convolution (%(default)s)")
    solve.add_argument("--padding-mode", default="zeros", choices=["zeros", "circular", "reflect", "replicate"])
    solve.add_argument("--eps", type=float, default=1e-5, help="of the batch normalisation (%(default)s)")
    solve.add_argument("--method", default="auto", choices=METHODS)
    solve.add_argument("--preconditioner", default="auto", choices=PRECONDITIONERS)
    solve.add_argument("--rtol", type=float, default=1e-6, help="relative residual to reach (%(default)s)")
    solve.add_argument("--maxiter", type=int, help="limit of Arnoldi steps")
    solve.add_argument("--size", type=int, default=64, help="longer side an image is scaled to (%(default)s)")

    experiment = commands.add_parser("experiment", help="every method on random batches, hard layers and real images")
    experiment.add_argument(
        "--out", type=Path, default=Path("out/experiment"), help="folder of the results (%(default)s)"
    )
    experiment.add_argument("--quick", action="store_true", help="fewer and smaller batches")
    experiment.add_argument("--cifar", type=Path, help="folder with CIFAR-10 in its binary version")
    experiment.add_argument(
        "--scipy-alone",
        type=int,
        default=1,
        metavar="N",
        help="batches on which SciPy's call runs to its own end, minutes each, though it stands still (%(default)s)",
    )

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
    try:
        if arguments.command == "demo":
            from . import demo

            return demo.main(arguments)
        if arguments.command == "experiment":
            from . import experiment

            return experiment.main(arguments)
        from . import invert_file

        return invert_file.main(arguments)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("sklearn", "PIL", "matplotlib", "scipy", "tqdm"):
            raise
        print(f"convbn {arguments.command} needs {error.name}: pip install convbn_ext[demo]", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"convbn {arguments.command}: {error}", file=sys.stderr)
    return 1
