"""gmres: the classical hard cases, restarts and limits, and what a batch or a scale must not change."""

import numpy as np
import pytest
import torch
from systems import SOLVABLE, convection_diffusion, dense, laplacian, prescribed_curve, solve, sparse_map

from convbn_ext import _C

# ---- The classical cases -----------------------------------------------------------------------------------------


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
