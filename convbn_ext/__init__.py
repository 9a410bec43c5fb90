"""Fused convolution + batch normalisation for PyTorch, and its inverse by matrix-free GMRES."""

from ._load import load_extension

load_extension()

from ._version import __version__  # noqa: E402
from .errors import errors  # noqa: E402
from .operator import ConvBNOperator  # noqa: E402
from .receptive_field import receptive_field, receptive_field_of  # noqa: E402
from .solve import SolveResult, solve  # noqa: E402

__all__ = ["ConvBNOperator", "SolveResult", "__version__", "errors", "receptive_field", "receptive_field_of", "solve"]
