from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

def amx_available() -> bool: ...
def pool_bytes() -> tuple[int, int]: ...
def release_memory() -> None: ...
def conv_bn_forward(*args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def update_running_statistics(*args: object) -> None: ...

class LinearMap:
    def apply(self, v: Tensor) -> Tensor: ...
    def apply_adjoint(self, u: Tensor) -> Tensor: ...

class ConvMap(LinearMap):
    def __init__(
        self,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        padding_mode: str,
        spatial: Sequence[int],
    ) -> None: ...

class CirculantMap(LinearMap):
    def __init__(self, blocks: Tensor, spatial: Sequence[int]) -> None: ...

class DiagonalMap(LinearMap):
    def __init__(self, diagonal: Tensor) -> None: ...

class ComposedMap(LinearMap):
    def __init__(self, outer: LinearMap, inner: LinearMap) -> None: ...

class AdjointMap(LinearMap):
    def __init__(self, map: LinearMap) -> None: ...

class DenseMap(LinearMap):
    def __init__(self, matrix: Tensor) -> None: ...

class CsrMap(LinearMap):
    def __init__(self, row_start: Tensor, column: Tensor, value: Tensor, columns: int) -> None: ...

class BlockTridiagonalMap(LinearMap):
    finite: bool
    def __init__(
        self, lower: Tensor, diagonal: Tensor, upper: Tensor, shape: Sequence[int], axis: int, rows: int
    ) -> None: ...

class BlockPlan:
    def __init__(
        self, row: Tensor, column: Tensor, tap: Tensor, outer: int, size: int, inner: int, rows: int
    ) -> None: ...

class BlockSolution:
    z: Tensor
    residual: Tensor
    steps: Tensor
    history: Tensor
    met: Tensor
    all_met: bool

class BlockLU(LinearMap):
    finite: bool
    def __init__(self, plan: BlockPlan, weight: Tensor) -> None: ...
    def solve(self, x: Tensor, scale: Tensor, offset: Tensor, rtol: float, atol: float) -> BlockSolution: ...

class BorderMap(LinearMap):
    finite: bool
    def __init__(self, M: LinearMap, A: LinearMap, rows: Tensor, K: Tensor) -> None: ...

class CallableMap(LinearMap):
    def __init__(
        self, apply: Callable[[Tensor], Tensor], apply_adjoint: Callable[[Tensor], Tensor] | None = None
    ) -> None: ...

class GmresResult:
    x: Tensor
    status: list[str]
    iterations: list[int]
    residual: Tensor
    history: list[list[float]]
    cycles: int
    restart: int
    basis_limited: bool

class _Solver(Protocol):
    """What gmres, block_gmres and their versions for a device take."""

    def __call__(
        self,
        A: LinearMap,
        b: Tensor,
        x0: Tensor | None = None,
        M: LinearMap | None = None,
        *,
        rtol: float = 1e-5,
        atol: float = 0.0,
        restart: int = 0,
        maxiter: int = 0,
        max_cycles: int = 0,
        max_basis_bytes: int = 0,
        flexible: bool = False,
        least_reduction: float = 0.999,
        inner_dtype: torch.dtype | None = None,
        on_step: Callable[[Tensor, Callable[[], Tensor]], object] | None = None,
        on_cycle: Callable[[Tensor], object] | None = None,
    ) -> GmresResult: ...

gmres: _Solver
block_gmres: _Solver
device_gmres: _Solver
device_block_gmres: _Solver
