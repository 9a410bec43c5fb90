"""gmres: SciPy's own tests, the classical hard cases, and what a batch, a thread count or a scale must not change."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg._isolve as scipy_solvers
import torch

import convbn_ext as cb
from convbn_ext import _C

# ---- SciPy's own gmres tests, run on our function ----------------------------------------------------------------


def _scipy_tests(name):
    """A test module of SciPy, loaded anew with our gmres where it imports SciPy's."""
    spec = importlib.util.find_spec(f"scipy.sparse.linalg._isolve.tests.{name}")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(scipy_solvers, "gmres", cb.gmres):
        spec.loader.exec_module(module)
    assert module.gmres is cb.gmres
    return module


theirs = _scipy_tests("test_iterative")
theirs._SOLVERS = [cb.gmres]  # for the tests that loop over all solvers
OUR_CASES = [case for case in theirs.cases if case.solver is cb.gmres]


@pytest.mark.parametrize("case", OUR_CASES, ids=repr)
@pytest.mark.parametrize(
    "test", [theirs.test_maxiter, theirs.test_convergence, theirs.test_precond_dummy, theirs.test_x0_equals_Mb]
)
def test_scipy_case(test, case):
    test(case)


@pytest.mark.parametrize("case", theirs.IterativeParams().cases[:6:4], ids=["poisson1d", "poisson2d"])
def test_scipy_precond_inverse(case):
    assert case.name.startswith("poisson")
    theirs.test_precond_inverse(case)


@pytest.mark.parametrize(
    "test",
    [
        theirs.test_atol,
        theirs.test_zero_rhs,
        theirs.test_maxiter_worsening,  # SciPy marks this one xfail for its own solvers
        theirs.test_x0_working,
        theirs.test_x0_solves_problem_exactly,
        theirs.test_positional_error,
    ],
)
def test_scipy_solver(test):
    test(cb.gmres)


@pytest.mark.parametrize("atol", ["legacy", None, -1])
def test_scipy_invalid_atol(atol):
    theirs.test_invalid_atol(cb.gmres, atol)


class TestSciPyGMRES(theirs.TestGMRES):
    """Inherits SciPy's test methods; they call our gmres."""


@pytest.mark.parametrize(("module", "suite"), [("test_lgmres", "TestLGMRES"), ("test_gcrotmk", "TestGCROTMK")])
def test_scipy_arnoldi_is_equivalent(module, suite):
    getattr(_scipy_tests(module), suite)().test_arnoldi()


# ---- The classical cases -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("name", SOLVABLE)
def test_solvable(name, dtype):
    matrix = dense(SOLVABLE[name], dtype)
    if dtype.is_complex:  # a unitary similarity keeps the curve and fills the imaginary parts
        phases = torch.polar(torch.ones(len(matrix)), torch.arange(len(matrix)).float()).to(dtype)
        matrix = phases[:, None] * matrix * phases.conj()
    b = torch.zeros(1, len(matrix), dtype=dtype)
    b[0, 0] = 1
    result = solve(matrix, b)
    assert result.status == ["converged"]
    assert result.iterations[0] <= len(matrix)
    assert result.cycles == 1
    exact = torch.linalg.solve(matrix, b[0])
    assert (result.x[0] - exact).norm() <= 1e-10 * torch.linalg.cond(matrix).real * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("name", SOLVABLE)
def test_solvable_single_precision(name, dtype):
    matrix = dense(SOLVABLE[name], dtype)
    b = torch.ones(2, len(matrix), dtype=dtype) * (1 + 0.5j if dtype.is_complex else 1)
    b[1, ::2] = -1
    assert solve(matrix, b, rtol=1e-4).status == ["converged"] * 2


def test_cyclic_shift_with_short_restart_is_stagnation():
    """First family of stagnation: the shift makes no progress before step n, so no restart below n ever will."""
    n = 25
    b = torch.zeros(1, n, dtype=torch.float64)
    b[0, 0] = 1
    result = solve(np.roll(np.eye(n), 1, axis=0), b, restart=n - 1)
    assert result.status == ["stagnation"]
    assert result.history[0] == [1.0] * n
    assert result.x.abs().max() == 0


@pytest.mark.parametrize(
    "curve",
    [
        0.7 ** np.arange(12),  # steady
        np.array([1.0] * 8 + [0.3]),  # plateau, then all at once
        np.array([1.0, 0.8, 0.8, 0.8, 0.5, 0.5, 0.5, 0.3, 0.3]),  # stairs
    ],
    ids=["steady", "plateau", "stairs"],
)
def test_prescribed_residual_curves(curve):
    """Second family: any non-increasing curve is the residual curve of some matrix; ours must follow it."""
    matrix, b = prescribed_curve(curve)
    result = solve(matrix, dense(b)[None], rtol=1e-9)
    assert result.status == ["converged"]
    np.testing.assert_allclose(result.history[0][: len(curve)], curve, rtol=1e-8)


def test_singular_and_inconsistent():
    """A Krylov space that ends on a singular A: b has a part out of reach; the best x of the space is returned."""
    result = solve([[0, 1, 0], [1, 0, 0], [0, 0, 0]], dense([[1.0, 0, 1]]))
    assert result.status == ["singular"]
    assert result.residual[0] == pytest.approx(1.0, rel=1e-14)
    torch.testing.assert_close(result.x, dense([[0.0, 1, 0]]))


def test_nilpotent():
    """A b = 0 at the very first step."""
    result = solve([[0, 1], [0, 0]], dense([[1.0, 0]]))
    assert (result.status, result.iterations) == (["singular"], [1])
    assert result.x.abs().max() == 0


def test_singular_but_consistent():
    """The periodic Laplacian is singular, but b lies in its range."""
    matrix = 2 * np.eye(30) - np.roll(np.eye(30), 1, axis=0) - np.roll(np.eye(30), -1, axis=0)
    b = dense(matrix @ np.arange(30.0) ** 2)[None]
    assert solve(matrix, b).status == ["converged"]


def test_defective_preconditioner():
    """M of rank 2: the third unknown is out of reach, whatever A is."""
    M = sparse_map(np.diag([1.0, 1.0, 0.0]))
    result = solve(np.diag([2.0, 3.0, 4.0]), dense([[1.0, 1, 1]]), M=M)
    assert result.status == ["singular"]
    torch.testing.assert_close(result.x, dense([[1 / 2, 1 / 3, 0]]))


def test_almost_singular_is_not_called_solved():
    """Hilbert, κ ~ 1e16: below what float64 can give, the status says so."""
    hilbert = 1 / (np.arange(12)[:, None] + np.arange(12) + 1.0)
    result = solve(hilbert, torch.ones(1, 12, dtype=torch.float64), rtol=1e-14)
    assert result.status[0] in ("stagnation", "breakdown")
    assert result.residual[0] < 1e-6


def test_exact_x0_and_zero_b():
    """Nothing to do: no step, x0 returned as it is; b = 0 has x = 0 from any x0."""
    matrix, x0 = laplacian(20), torch.arange(20, dtype=torch.float64)[None]
    result = solve(matrix, x0 @ dense(matrix), x0=x0)
    assert (result.status, result.iterations, result.cycles) == (["converged"], [0], 0)
    assert torch.equal(result.x, x0)
    result = solve(matrix, torch.zeros_like(x0), x0=x0, rtol=0.0)
    assert (result.status, result.iterations) == (["converged"], [0])
    assert result.x.abs().max() == 0


def test_close_x0_takes_fewer_steps():
    matrix, x = convection_diffusion(10, 5.0), torch.randn(1, 100, dtype=torch.float64)
    b = x @ dense(matrix).T
    assert solve(matrix, b, x0=x + 1e-8).iterations[0] < solve(matrix, b).iterations[0]


@pytest.mark.parametrize("where", ["b", "A", "x0"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite(where, value):
    matrix, b, x0 = laplacian(10), torch.ones(1, 10, dtype=torch.float64), torch.zeros(1, 10, dtype=torch.float64)
    if where == "A":
        matrix[3, 4] = value
    else:
        (b if where == "b" else x0)[0, 3] = value
    result = _C.gmres(sparse_map(matrix), b, x0 if where == "x0" else None)
    assert result.status == ["nonfinite"]


@pytest.mark.parametrize("s", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("t", [1e-310, 1e-30, 1e-10, 1.0, 1e30])
def test_scale_invariance(s, t):
    """(sA, tb) has the solution (t/s) x by the same steps: nothing in the solver is absolute."""
    if t == 1e-310 and s != 1:
        s = 1e-5 * s**0.1  # denormal b; keep x within range
    matrix = SOLVABLE["nonsymmetric"]
    b = torch.linspace(-1, 1, 60, dtype=torch.float64)[None]
    plain, scaled = solve(matrix, b), solve(s * matrix, t * b)
    assert scaled.status == ["converged"]
    assert scaled.iterations == plain.iterations
    torch.testing.assert_close(scaled.x / t * s, plain.x, rtol=1e-7, atol=1e-9)


def test_float32_far_from_one():
    """Squares of 1e±25 leave the range of float32; norms and dot products must not."""
    matrix = SOLVABLE["convection-diffusion"]
    b = torch.ones(1, 100)
    plain = solve(matrix, b, rtol=1e-5)
    for t in (2.0**-90, 2.0**90):
        scaled = solve(matrix, t * b, rtol=1e-5)
        assert scaled.status == ["converged"]
        assert scaled.iterations == plain.iterations


# ---- Restarts, limits, options -----------------------------------------------------------------------------------


def test_true_residual_has_the_last_word():
    """float32 on an ill-conditioned matrix: the recurrence falls below the target, the true residual cannot."""
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((50, 50)))[0]
    matrix = dense(Q @ np.diag(np.logspace(0, 6, 50)) @ Q.T, torch.float32)
    result = solve(matrix, torch.ones(1, 50), rtol=1e-7)
    assert result.status[0] in ("stagnation", "breakdown")
    assert min(result.history[0]) < result.residual[0]


def test_restart_and_maxiter_count_arnoldi_steps():
    matrix, b = SOLVABLE["convection-diffusion"], torch.ones(1, 100, dtype=torch.float64)
    result = solve(matrix, b, restart=10)
    assert result.status == ["converged"]
    assert result.cycles > 1
    assert (np.diff(result.history[0]) <= 1e-12).all()
    limited = solve(matrix, b, restart=10, maxiter=17)
    assert (limited.status, limited.iterations, limited.cycles) == (["maxiter"], [17], 2)
    assert solve(matrix, b, restart=10, max_cycles=2).iterations == [20]


def test_preconditioner_is_applied_from_the_right():
    """With M = A⁻¹ one step is enough, and the history holds true residuals."""
    matrix = SOLVABLE["nonsymmetric"]
    M = sparse_map(np.linalg.inv(matrix))
    result = solve(matrix, torch.ones(1, 60, dtype=torch.float64), M=M)
    assert (result.status, result.iterations) == (["converged"], [1])


def test_flexible_accepts_a_varying_preconditioner():
    """M = a few steps of an inner solve, different at every call: FGMRES converges, its x fits its residual."""
    matrix = dense(SOLVABLE["convection-diffusion"])
    A, calls = sparse_map(matrix), []

    def inner(v):
        calls.append(len(calls))
        return _C.gmres(A, v, rtol=1e-1, maxiter=3 + len(calls) % 5).x

    b = torch.ones(1, 100, dtype=torch.float64)
    result = solve(matrix, b, M=_C.CallableMap(inner), flexible=True)
    assert result.status == ["converged"]
    assert len(calls) == result.iterations[0] < solve(matrix, b).iterations[0]


def test_float32_loop_reaches_float64_accuracy():
    matrix, b = SOLVABLE["nonsymmetric"], torch.ones(2, 60, dtype=torch.float64)
    result = solve(matrix, b, inner_dtype=torch.float32, rtol=1e-12)
    assert result.status == ["converged"] * 2
    assert result.cycles > 1


def test_memory_ceiling_is_stated():
    matrix, b = SOLVABLE["nonsymmetric"], torch.ones(1, 60, dtype=torch.float64)
    result = solve(matrix, b, max_basis_bytes=11 * 60 * 8, maxiter=100)
    assert (result.restart, result.basis_limited) == (10, True)
    assert result.status[0] in ("maxiter", "stagnation")
    free = solve(matrix, b, max_basis_bytes=2**20)
    assert (free.restart, free.basis_limited, free.status) == (60, False, ["converged"])


def test_operator_may_return_what_it_was_given():
    """The identity returns its argument, a row of the basis itself; it must not be written to."""
    b = torch.randn(2, 30, dtype=torch.float64)
    seen = []
    result = _C.gmres(_C.CallableMap(lambda v: seen.append(v) or v), b)
    assert result.status == ["converged"] * 2
    torch.testing.assert_close(result.x, b)


def test_read_only_operator_output():
    """A LinearOperator may return an array that cannot be written to."""
    A = laplacian(10)

    def matvec(v):
        y = A @ v
        y.flags.writeable = False
        return y

    x, info = cb.gmres(scipy.sparse.linalg.LinearOperator((10, 10), matvec=matvec, dtype=float), np.ones(10))
    assert info == 0
    np.testing.assert_allclose(A @ x, np.ones(10), rtol=1e-4)


# ---- A batch: each system as if it were alone --------------------------------------------------------------------


def mixed_batch():
    """Easy, hard, zero, NaN, already solved (by x0), tiny and inconsistent right-hand sides of one matrix."""
    n = 60
    matrix = np.zeros((n, n))
    matrix[:40, :40] = SOLVABLE["nonsymmetric"][:40, :40]
    matrix[40:59, 40:59] = np.eye(19)  # the last unknown: a zero row
    b = torch.zeros(7, n, dtype=torch.float64)
    x0 = torch.zeros_like(b)
    b[0, 45] = 1.0  # one step
    b[1, :40] = torch.linspace(-1, 1, 40)  # forty steps
    b[3, 7] = float("nan")
    x0[4, :50] = 1.0
    b[4] = dense(matrix) @ x0[4]
    b[5, :59] = 1e-200
    b[6, 3] = b[6, 59] = 1.0
    return matrix, b, x0


@pytest.mark.parametrize("restart", [0, 12])
def test_each_system_of_a_batch_equals_its_solo_run(restart):
    matrix, b, x0 = mixed_batch()
    options = {"restart": restart, "maxiter": 200, "rtol": 1e-9}
    A = sparse_map(matrix)
    batch = _C.gmres(A, b, x0, **options)
    if restart == 0:
        assert batch.status == ["converged"] * 3 + ["nonfinite", "converged", "converged", "singular"]
    for s in range(len(b)):
        solo = _C.gmres(A, b[s : s + 1], x0[s : s + 1], **options)
        assert solo.status == batch.status[s : s + 1]
        assert solo.iterations == batch.iterations[s : s + 1]
        np.testing.assert_array_equal(solo.history[0], batch.history[s])
        assert torch.equal(solo.x[0], batch.x[s])


def test_finished_systems_leave_the_batch():
    matrix, b, x0 = mixed_batch()
    rows = []
    A = sparse_map(matrix)
    _C.gmres(_C.CallableMap(lambda v: rows.append(len(v)) or A.apply(v)), b, x0)
    assert rows[0] == 7  # b − A x₀
    assert rows[1] == 4  # zero, NaN and solved never start
    assert rows[-2] == 2  # the hard ones are alone at the end
    assert rows[-1] == 4  # true residuals


# ---- The verbs ---------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


def basis_and_vector(n, k, dtype, systems=1):
    torch.manual_seed(n + k)
    V = torch.zeros(k + 1, systems, n, dtype=dtype)
    for s in range(systems):
        V[:k, s] = torch.linalg.qr(torch.randn(n, k, dtype=dtype)).Q.T
    return V, torch.randn(systems, n, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 0), (7, 3), (64, 17), (1023, 5), (3072, 130), (5000, 300)])
def test_orthonormalize(n, k, dtype):
    """Against float64: coefficients, norms and direction; orthogonal to a few eps."""
    V, w = basis_and_vector(n, k, dtype)
    w = w + (V[: min(k, 1)].sum(0) if k else 0) * 1e3  # cancellation, so that once is not enough
    blocks = list(V.split([k // 2, k + 1 - k // 2])) if k > 1 else [V]
    H = torch.ops.convbn_ext.krylov_orthonormalize(blocks, torch.tensor([0]), k, w)[0]
    W, exact = V[:k, 0].to(torch.complex128), w[0].to(torch.complex128)
    h = W.conj() @ exact
    rest = exact - W.T @ h
    eps = torch.finfo(dtype).eps
    size = float(exact.norm()) * (1 + n**0.5 / 20)  # the reference sums in float64 too
    assert (H[:k] - h).abs().max() <= 20 * eps * size if k else True
    assert abs(H[k + 1] - float(exact.norm())) <= 20 * eps * size
    assert abs(H[k].real - float(rest.norm())) <= 50 * eps * size
    v = V[k, 0].to(torch.complex128)
    assert abs(v.norm() - 1) <= 10 * eps
    assert (W.conj() @ v).abs().max() <= 20 * eps if k else True
    assert (v - rest / rest.norm()).norm() <= 100 * eps * size / float(rest.norm())


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine(dtype):
    V, _ = basis_and_vector(777, 9, dtype, systems=3)
    y = torch.randn(2, 9, dtype=torch.complex128)
    y = y if dtype.is_complex else y.real.to(torch.complex128)
    y[1, 4:] = 0
    got = torch.ops.convbn_ext.krylov_combine([V], torch.tensor([2, 0]), y)
    exact = torch.stack([y[i] @ V[:9, s].to(torch.complex128) for i, s in enumerate((2, 0))])
    assert (got.to(torch.complex128) - exact).abs().max() <= 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norms(dtype, scale):
    x = torch.randn(3, 501, dtype=dtype) * scale
    x[1] = 0
    x[2, 17] = float("nan")
    norms = torch.ops.convbn_ext.krylov_norms(x)
    assert norms[0] == pytest.approx(float(x[0].to(torch.complex128).norm()), rel=1e-6)
    assert norms[1] == 0
    assert norms[2].isnan()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("systems", [1, 5])
def test_results_do_not_depend_on_the_number_of_threads(threads, dtype, systems):
    matrix = scipy.sparse.kronsum(grcar(60), laplacian(60)).toarray()
    csr = scipy.sparse.csr_array(matrix)
    A = _C.CsrMap(*(torch.from_numpy(p) for p in (csr.indptr, csr.indices, csr.data)), 3600)
    b = torch.linspace(-1, 2, systems * 3600, dtype=torch.float64).sin().to(dtype).reshape(systems, 3600)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(_C.gmres(A, b, rtol=1e-4, restart=40, maxiter=90))
    for other in results[1:]:
        assert torch.equal(other.x, results[0].x)
        assert other.history == results[0].history


_CAPABILITY = """
import sys, torch, convbn_ext as cb
print(torch.backends.cpu.get_cpu_capability())
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.complex128):
    A = torch.randn(300, 300, dtype=torch.complex128).to(dtype) / 30 + torch.eye(300)
    b = torch.randn(300, dtype=torch.complex128).to(dtype)
    x, info = cb.gmres(A, b, rtol=1e-5, restart=300)
    print(info, float((b - A @ x).norm() / b.norm()), " ".join(repr(abs(complex(v))) for v in x[:5]))
"""


def test_every_instruction_set_gives_the_same_solution():
    """The suite's machine may have AVX-512; the loops for AVX2 and for none are run by lowering torch's capability."""
    outputs = {}
    for capability in ("default", "avx2", "avx512"):
        env = dict(os.environ, ATEN_CPU_CAPABILITY=capability)
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _CAPABILITY], env=env, capture_output=True, text=True, check=True
        )
        lines = run.stdout.splitlines()
        outputs[lines[0]] = [[float(field) for field in line.split()] for line in lines[1:]]
    assert {"DEFAULT", "AVX2"} <= set(outputs) or "x86" not in os.uname().machine
    for values in outputs.values():
        for value, reference in zip(values, outputs["DEFAULT"], strict=True):
            assert value[0] == 0
            assert value[1] <= 1e-5
            np.testing.assert_allclose(value[2:], reference[2:], rtol=1e-4)


# ---- Python around the loop --------------------------------------------------------------------------------------


def test_torch_in_torch_out():
    matrix = dense(SOLVABLE["convection-diffusion"])
    b = torch.ones(100, dtype=torch.float64)
    forms = {
        "dense": matrix,
        "sparse": matrix.to_sparse(),
        "callable": lambda v: matrix @ v,
        "linear map": _C.DenseMap(matrix),
    }
    for name, A in forms.items():
        x, info = cb.gmres(A, b, rtol=1e-9, restart=100)
        assert info == 0, name
        assert isinstance(x, torch.Tensor)
        assert x.shape == b.shape
        assert (matrix @ x - b).norm() <= 1e-9 * b.norm()
    x, info = cb.gmres(matrix, b, M=torch.linalg.inv(matrix), rtol=1e-9, maxiter=1, restart=2)
    assert info == 0


def test_numpy_dtypes():
    for A, b, expected in [
        (np.eye(3, dtype=int) * 2, np.ones(3, dtype=int), np.float64),
        (np.eye(3, dtype=np.float32), np.ones(3, dtype=np.float32), np.float32),
        (np.eye(3) * 1j, np.ones(3), np.complex128),
        (scipy.sparse.eye_array(3, dtype=np.complex64), np.ones((3, 1), dtype=np.float32), np.complex64),
    ]:
        x, info = cb.gmres(A, b)
        assert (info, x.dtype, x.shape) == (0, expected, (3,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"A": np.ones((3, 4))}, "A must be square"),
        ({"b": np.ones(4)}, "b must have shape"),
        ({"x0": np.ones(4)}, "x0 must have shape"),
        ({"x0": "bM"}, "x0 must be a vector"),
        ({"M": np.ones((2, 2))}, "M must have shape"),
        ({"callback_type": "residual"}, "callback_type must be"),
        ({"rtol": -1.0}, "rtol must be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        cb.gmres(**({"A": np.eye(3), "b": np.ones(3)} | arguments))


def test_exception_in_a_callback_ends_the_solve():
    def stop(norm):
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        cb.gmres(SOLVABLE["nonsymmetric"], np.ones(60), callback=stop, callback_type="pr_norm")


def slow_system():
    """A system that never converges and stays in C++: 20 steps a cycle without end."""
    csr = scipy.sparse.csr_array(convection_diffusion(60, 0.0) - 1.3 * np.eye(3600))
    return _C.CsrMap(*(torch.from_numpy(p) for p in (csr.indptr, csr.indices, csr.data)), 3600)


def test_gil_is_released():
    A, b = slow_system(), torch.ones(1, 3600, dtype=torch.float64)
    seconds = []

    def work():
        start = time.perf_counter()
        _C.gmres(A, b, rtol=0.0, restart=300, maxiter=600, least_reduction=1.0)
        seconds.append(time.perf_counter() - start)

    thread = threading.Thread(target=work)
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    thread.join()
    assert turns >= 0.05 * seconds[0] / 0.001


_INTERRUPTED = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_gmres import _C, slow_system
A, b = slow_system(), torch.ones(1, 3600, dtype=torch.float64)
print("ready", flush=True)
try:
    for _ in range(1000):
        _C.gmres(A, b, rtol=0.0, restart=300, least_reduction=1.0)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_is_prompt():
    script = _INTERRUPTED.format(tests=os.path.dirname(__file__))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.5)
        start = time.perf_counter()
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "interrupted\n"
        assert time.perf_counter() - start < 2


# ---- Block GMRES -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_gmres_shares_one_space(dtype):
    """60 unknowns and 8 right-hand sides: ⌈60/8⌉ block steps; every column is checked by its own true residual."""
    matrix = dense(SOLVABLE["nonsymmetric"], dtype)
    b = torch.randn(8, 60, dtype=dtype, generator=torch.Generator().manual_seed(0))
    rtol = 1e-10 if torch.finfo(dtype).eps < 1e-10 else 1e-4
    result = _C.block_gmres(_C.DenseMap(matrix), b, rtol=rtol)
    assert result.status == ["converged"] * 8
    assert result.iterations == [8] * 8
    true = (b - result.x @ matrix.T).norm(dim=1)
    assert (true <= 1.01 * rtol * b.norm(dim=1)).all()


def test_block_gmres_deflates_dependent_right_hand_sides():
    """Rank 2 of 6, scales from 1e-20 to 1e20, one zero and one that is not finite."""
    matrix = dense(SOLVABLE["convection-diffusion"])
    b = torch.randn(2, 100, dtype=torch.float64)
    b = torch.stack([b[0], 1e20 * b[0], b[1] - b[0], 1e-20 * b[1], torch.zeros(100), torch.full((100,), float("inf"))])
    sizes = []
    A = sparse_map(matrix)
    result = _C.block_gmres(_C.CallableMap(lambda v: sizes.append(len(v)) or A.apply(v)), b, rtol=1e-9)
    assert result.status == ["converged"] * 5 + ["nonfinite"]
    assert max(sizes[:-1]) == 2
    assert result.iterations[4:] == [0, 0]
    exact = torch.linalg.solve(matrix, b[:4].T).T
    assert ((result.x[:4] - exact).norm(dim=1) <= 1e-6 * exact.norm(dim=1)).all()


def test_block_gmres_statuses():
    """Singular and inconsistent, limited by maxiter, restarted, flexible: as for single GMRES."""
    singular = _C.DenseMap(dense([[0.0, 1, 0], [1, 0, 0], [0, 0, 0]]))
    result = _C.block_gmres(singular, dense([[1.0, 0, 1], [0, 1, 0]]))
    assert result.status == ["singular", "converged"]
    matrix = SOLVABLE["convection-diffusion"]
    A, b = sparse_map(matrix), torch.randn(3, 100, dtype=torch.float64)
    assert _C.block_gmres(A, b, maxiter=4).status == ["maxiter"] * 3
    restarted = _C.block_gmres(A, b, restart=30, rtol=1e-8)
    assert restarted.status == ["converged"] * 3
    assert restarted.cycles > 1
    M = sparse_map(np.linalg.inv(matrix + 0.1 * np.eye(100)))
    for flexible in (False, True):
        preconditioned = _C.block_gmres(A, b, None, M, flexible=flexible, rtol=1e-8)
        assert preconditioned.status == ["converged"] * 3
        assert preconditioned.iterations[0] < restarted.iterations[0]
    mixed = _C.block_gmres(A, b, inner_dtype=torch.float32, rtol=1e-12)
    assert mixed.status == ["converged"] * 3


@pytest.mark.parametrize(("size", "steps"), [(8, 3), (16, 4)])
def test_block_gmres_with_circulant_preconditioner_takes_rank_over_batch_steps(size, steps):
    """Spec S15: 64 right-hand sides, 3×8×8 in 3 block steps and 3×16×16 in 4."""
    from convbn_ext.preconditioners import circulant_inverse

    torch.manual_seed(0)
    conv, bn = torch.nn.Conv2d(3, 3, 3, padding=1).double(), torch.nn.BatchNorm2d(3).double().eval()
    op = cb.ConvBNOperator(conv, bn, (3, size, size))
    M, _ = circulant_inverse(op, torch.float64)
    z = torch.randn(64, 3 * size * size, dtype=torch.float64)
    result = _C.block_gmres(op.conv_map, op.conv_map.apply(z), None, M, rtol=1e-8)
    assert result.status == ["converged"] * 64
    assert result.iterations == [steps] * 64
