"""Fused convolution + batch normalisation for PyTorch, and its inverse by matrix-free GMRES."""

from ._load import load_extension

load_extension()

from ._version import __version__  # noqa: E402
from .conv_bn import conv_bn  # noqa: E402
from .distributed import convert_sync, solve_sharded  # noqa: E402
from .errors import errors  # noqa: E402
from .fold import fold  # noqa: E402
from .fuse import FusionReport, fuse, unfuse  # noqa: E402
from .gmres import gmres  # noqa: E402
from .invert import ConvergenceError, invert  # noqa: E402
from .memory import release_memory  # noqa: E402
from .modules import ConvBN1d, ConvBN2d, ConvBN3d, LinearBN  # noqa: E402
from .operator import ConvBNOperator  # noqa: E402
from .receptive_field import receptive_field, receptive_field_of  # noqa: E402
from .solve import SolveResult, solve  # noqa: E402

__all__ = [
    "ConvBN1d",
    "ConvBN2d",
    "ConvBN3d",
    "ConvBNOperator",
    "ConvergenceError",
    "FusionReport",
    "LinearBN",
    "SolveResult",
    "__version__",
    "conv_bn",
    "convert_sync",
    "errors",
    "fold",
    "fuse",
    "gmres",
    "invert",
    "receptive_field",
    "receptive_field_of",
    "release_memory",
    "solve",
    "solve_sharded",
    "unfuse",
]
