from collections.abc import Sequence

from torch import Tensor

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
