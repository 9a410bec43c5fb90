"""GMRES with SciPy's signature over the compiled Arnoldi loop; NumPy and SciPy in → NumPy out, torch in → torch out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _C

_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def gmres(
    A: Any,
    b: Any,
    x0: Any = None,
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    restart: int | None = None,
    maxiter: int | None = None,
    M: Any = None,
    callback: Callable[[Any], object] | None = None,
    callback_type: str | None = None,
) -> tuple[Any, int]:
    """Solve A x = b by restarted GMRES until ‖b − A x‖ ≤ max(rtol·‖b‖, atol); ``scipy.sparse.linalg.gmres``, faster.

    Signature and meaning are SciPy's: ``maxiter`` counts restart cycles (in :func:`convbn_ext.solve`: Arnoldi
    steps). Two differences: preconditioning is from the right, so the residual that is minimised is the true one, and a
    solve whose residual no longer changes ends early. ``info = 0`` is never returned unless the true residual shows it.
    Method: Saad & Schultz (1986), classical Gram–Schmidt applied twice.

    Args:
        A: (n, n) array, sparse matrix or LinearOperator; torch: matrix (dense or sparse), or a callable or an object
            with ``matvec`` that maps (n,) to (n,).
        b: right-hand side (n,) or (n, 1), real or complex; a torch tensor selects torch, anything else NumPy.
        x0: initial guess like b, or "Mb" for M b; zeros by default. It is not changed.
        rtol: relative tolerance.
        atol: absolute tolerance.
        restart: Arnoldi steps per cycle, min(20, n) by default.
        maxiter: restart cycles, 10 n by default.
        M: approximation of A⁻¹ in any of the forms of A.
        callback: called as told by ``callback_type``.
        callback_type: "x": the iterate (n,), after each cycle; "pr_norm": ‖M r‖ / ‖b‖, after each Arnoldi step;
            "legacy" (default): as "pr_norm", and maxiter counts Arnoldi steps.

    Returns:
        x (n,), and info: 0 for success, otherwise maxiter.

    Raises:
        ValueError: shapes that do not fit, an unknown callback_type, a negative tolerance.
        TypeError: A or M cannot be applied to vectors, or the dtype is not floating point (torch).
    """
    if callback is not None and callback_type is None:
        warnings.warn(
            "gmres called without specifying `callback_type`: SciPy's default is 'legacy', in which `maxiter` counts "
            "Arnoldi steps; give callback_type='pr_norm', 'x' or 'legacy'",
            DeprecationWarning,
            stacklevel=2,
        )
    kind = None if callback is None else callback_type or "legacy"
    if callback_type not in (None, "x", "pr_norm", "legacy"):
        raise ValueError(f"gmres: callback_type must be 'x', 'pr_norm' or 'legacy', got {callback_type!r}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"gmres: {name} must be a real number that is not negative, got {value!r}")

    system = _torch_system if isinstance(b, Tensor) else _numpy_system
    map_A, map_M, rows, to_output = system(A, b, M)
    n = rows.shape[1]
    steps = 10 * n if maxiter is None else int(maxiter)
    start = _initial_guess(x0, rows, map_M)
    if steps < 1:
        return to_output(torch.zeros_like(rows) if start is None else start), steps

    norm_b = _norm(rows)

    def on_step(norms: Tensor, residuals: Callable[[], Tensor]) -> None:
        norm = float(norms) if map_M is None else _norm(map_M.apply(residuals()))
        callback(np.float64(norm / norm_b))  # type: ignore[misc]

    result = _C.gmres(
        map_A,
        rows,
        start,
        map_M,
        rtol=float(rtol),
        atol=float(atol),
        restart=min(20 if restart is None else int(restart), n),
        maxiter=steps if kind == "legacy" else 0,
        max_cycles=0 if kind == "legacy" else steps,
        least_reduction=1.0,
        on_step=on_step if kind in ("legacy", "pr_norm") else None,
        on_cycle=(lambda x: callback(to_output(x.clone()))) if kind == "x" else None,  # type: ignore[misc]
    )
    return to_output(result.x), 0 if result.status[0] == "converged" else steps


def _norm(rows: Tensor) -> float:
    return float(torch.ops.convbn_ext.krylov_norms(rows))


def _initial_guess(x0: Any, rows: Tensor, M: _C.LinearMap | None) -> Tensor | None:
    """x0 as (1, n) in the dtype of ``rows``; None for zeros, which then cost no product with A."""
    if x0 is None:
        return None
    if isinstance(x0, str):
        if x0 != "Mb":
            raise ValueError(f"gmres: x0 must be a vector, None or 'Mb', got {x0!r}")
        return rows.clone() if M is None else M.apply(rows)
    n = rows.shape[1]
    guess = torch.as_tensor(x0)
    if tuple(guess.shape) not in ((n,), (n, 1)):
        raise ValueError(f"gmres: x0 must have shape ({n},) or ({n}, 1), got {tuple(guess.shape)}")
    guess = guess.reshape(1, n).to(rows, copy=True)
    return guess if guess.any() else None


_System = tuple[_C.LinearMap, _C.LinearMap | None, Tensor, Callable[[Tensor], Any]]


def _check_rhs(shape: tuple[int, ...], n: int) -> None:
    if shape not in ((n,), (n, 1)):
        raise ValueError(f"gmres: b must have shape ({n},) or ({n}, 1) for A {n}x{n}, got {shape}")


def _check_square(shape: Any, name: str) -> None:
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"gmres: {name} must be square, got shape {tuple(shape)}")


def _torch_system(A: Any, b: Tensor, M: Any) -> _System:
    """Maps, right-hand side (1, n) and the way back for torch tensors."""
    _check_rhs(tuple(b.shape), b.shape[0] if b.dim() else 0)
    dtype = torch.promote_types(b.dtype, A.dtype) if isinstance(A, Tensor) else b.dtype
    if dtype not in _DTYPES:
        raise TypeError(f"gmres: b must be float32, float64, complex64 or complex128, got {b.dtype}")
    rows = b.detach().reshape(1, -1).to(dtype)
    n = rows.shape[1]

    def to_map(operator: Any, name: str) -> _C.LinearMap:
        if isinstance(operator, _C.LinearMap):
            return operator
        if isinstance(operator, Tensor):
            _check_square(operator.shape, name)
            if operator.shape[0] != n:
                raise ValueError(f"gmres: {name} has shape {tuple(operator.shape)}, but b has {n} entries")
            if operator.layout == torch.strided:
                return _C.DenseMap(operator.to(dtype))
            csr = operator.detach().to(dtype).to_sparse_csr()
            return _C.CsrMap(csr.crow_indices(), csr.col_indices(), csr.values(), n)
        matvec = getattr(operator, "matvec", operator)
        if not callable(matvec):
            raise TypeError(f"gmres: {name} must be a matrix, a callable or have matvec, got {type(operator).__name__}")
        return _C.CallableMap(lambda v: matvec(v.reshape(n)).detach().reshape(1, n).to(dtype))

    return to_map(A, "A"), None if M is None else to_map(M, "M"), rows, lambda x: x.reshape(n)


def _numpy_system(A: Any, b: Any, M: Any) -> _System:
    """The same for whatever ``scipy.sparse.linalg.aslinearoperator`` accepts."""
    from scipy import sparse
    from scipy.sparse.linalg import LinearOperator, aslinearoperator

    b = np.asanyarray(b)
    operator = aslinearoperator(A)
    _check_square(operator.shape, "A")
    n = operator.shape[0]
    _check_rhs(b.shape, n)
    dtype = np.result_type(np.float32, operator.dtype or b.dtype, b.dtype)
    if dtype not in (np.float32, np.float64, np.complex64, np.complex128):
        dtype = np.dtype(np.complex128 if dtype.kind == "c" else np.float64)
    rows = torch.from_numpy(np.array(b, dtype=dtype).reshape(1, n))

    def tensor(array: Any) -> Tensor:
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))

    def to_map(given: Any, name: str) -> _C.LinearMap:
        if getattr(given, "shape", (n, n)) != (n, n):
            raise ValueError(f"gmres: {name} must have shape ({n}, {n}), got {given.shape}")
        if sparse.issparse(given):
            csr = given.tocsr()
            return _C.CsrMap(tensor(csr.indptr), tensor(csr.indices), tensor(csr.data.astype(dtype)), n)
        if isinstance(given, np.ndarray):
            return _C.DenseMap(tensor(given.astype(dtype)))
        linear = aslinearoperator(given)

        def apply(v: Tensor) -> Tensor:
            return tensor(np.asarray(linear.matvec(v.numpy().reshape(n)), dtype=dtype)).reshape(1, n)

        return _C.CallableMap(apply)

    if M is None and hasattr(A, "psolve"):  # SciPy lets an operator bring its preconditioner
        M = LinearOperator(operator.shape, matvec=A.psolve, dtype=operator.dtype)
    return to_map(A, "A"), None if M is None else to_map(M, "M"), rows, lambda x: x.reshape(n).numpy()
