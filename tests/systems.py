"""Matrices, maps and a checked solve that the tests of the Krylov solvers share."""

import threading
import time

import numpy as np
import scipy.sparse
import torch

from convbn_ext import _C

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


def dense(matrix, dtype=torch.float64):
    return torch.as_tensor(np.asarray(matrix), dtype=dtype)


def sparse_map(matrix):
    """A matrix as CsrMap, whose products do not depend on batch or threads."""
    csr = scipy.sparse.csr_array(np.asarray(matrix))
    parts = (torch.from_numpy(part) for part in (csr.indptr, csr.indices, csr.data))
    return _C.CsrMap(*parts, csr.shape[1])


def solve(matrix, b, **options):
    """_C.gmres on a matrix; every claim of the result is checked against the matrix itself."""
    matrix = dense(matrix, b.dtype) if not isinstance(matrix, torch.Tensor) else matrix
    options.setdefault("rtol", 1e-10)
    x0 = options.pop("x0", None)
    x0_before = None if x0 is None else x0.clone()
    result = _C.gmres(sparse_map(matrix), b, x0, options.pop("M", None), **options)
    if x0 is not None:
        assert torch.equal(x0, x0_before)
    for s, status in enumerate(result.status):
        assert len(result.history[s]) == result.iterations[s] + 1
        assert torch.isfinite(result.x[s]).all() or not torch.isfinite(b[s] if x0 is None else x0[s]).all()
        true = float(
            (b[s].to(torch.complex128) - matrix.to(torch.complex128) @ result.x[s].to(torch.complex128)).norm()
        )
        size = float(matrix.abs().nan_to_num().sum(1).max() * result.x[s].abs().max()) if status != "nonfinite" else 0
        if status != "nonfinite":
            rounding = 10 * len(b[s]) * torch.finfo(b.dtype).eps * (size + float(b[s].abs().max()))
            assert abs(float(result.residual[s]) - true) <= rounding + 1e-322
        target = max(options["rtol"] * float(torch.ops.convbn_ext.krylov_norms(b[s : s + 1])), options.get("atol", 0.0))
        assert (status == "converged") == bool(result.residual[s] <= target and np.isfinite(target))
    return result


def laplacian(n):
    return scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(n, n)).toarray()


def convection_diffusion(n, peclet):
    up, down = -1 + peclet / 2, -1 - peclet / 2
    one = scipy.sparse.diags_array([down, 2.0, up], offsets=[-1, 0, 1], shape=(n, n))
    return scipy.sparse.kronsum(one, scipy.sparse.csr_array(laplacian(n))).toarray()


def polar_poisson(rings, rays):
    """Poisson's equation on the disc: rings of growing radius; strongly varying coefficients, nonsymmetric."""
    matrix = np.zeros((rings * rays, rings * rays))
    for i in range(rings):
        r, h, t = i + 0.5, 1.0, 2 * np.pi / rays
        for j in range(rays):
            row = i * rays + j
            matrix[row, row] = 2 / h**2 + 2 / (r * t) ** 2
            matrix[row, i * rays + (j + 1) % rays] -= 1 / (r * t) ** 2
            matrix[row, i * rays + (j - 1) % rays] -= 1 / (r * t) ** 2
            if i + 1 < rings:
                matrix[row, row + rays] -= (1 + h / (2 * r)) / h**2
            if i > 0:
                matrix[row, row - rays] -= (1 - h / (2 * r)) / h**2
    return matrix


def grcar(n):
    return scipy.sparse.diags_array([-1.0, 1.0, 1.0, 1.0, 1.0], offsets=[-1, 0, 1, 2, 3], shape=(n, n)).toarray()


def prescribed_curve(curve):
    """A and b whose GMRES residual norms are the given non-increasing curve (Greenbaum, Pták & Strakoš, 1996)."""
    curve = np.append(curve, 0.0)
    n = len(curve) - 1
    eta = np.sqrt(curve[:-1] ** 2 - curve[1:] ** 2)
    B = np.column_stack([eta, np.eye(n)[:, : n - 1]])
    W = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    return W @ np.linalg.inv(B) @ W.T, W @ eta


rng = np.random.default_rng(1)
SOLVABLE = {
    "SPD": laplacian(40),  # the easy end: κ ~ 700, real positive spectrum
    "indefinite": laplacian(40) - np.eye(40),  # eigenvalues on both sides of 0: no smooth decay
    "nonsymmetric": rng.standard_normal((60, 60)),  # eigenvalues surround 0: n steps are needed
    "polar Poisson": polar_poisson(8, 12),  # row scales that differ by 100
    "convection-diffusion": convection_diffusion(10, 5.0),  # nonnormal: a long slow start
    "Grcar": grcar(50),  # nonnormal, pseudospectrum far from the spectrum
    "Jordan": 2 * np.eye(30) + np.diag(np.ones(29), 1),  # defective: eigenvalues say nothing
    "cyclic shift": np.roll(np.eye(25), 1, axis=0),  # no progress at all before step n
}


def slow_system():
    """A system that never converges and stays in C++: 20 steps a cycle without end."""
    csr = scipy.sparse.csr_array(convection_diffusion(60, 0.0) - 1.3 * np.eye(3600))
    return _C.CsrMap(*(torch.from_numpy(p) for p in (csr.indptr, csr.indices, csr.data)), 3600)


def assert_other_threads_run(call):
    """While a thread is in ``call``, this one gets at least every twentieth of its turns."""
    seconds = []

    def work():
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)

    thread = threading.Thread(target=work)
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    thread.join()
    assert seconds, "the call failed"
    assert turns >= 0.05 * seconds[0] / 0.001
