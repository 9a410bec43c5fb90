"""gmres as Python sees it: SciPy's own tests, argument forms and dtypes, callbacks, the GIL and ctrl-C."""

import importlib.util
import inspect
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg._isolve as scipy_solvers
import torch
from scipy._lib import _array_api
from systems import SOLVABLE, assert_other_threads_run, dense, laplacian, slow_system

import convbn_ext as cb
from convbn_ext import _C

# ---- SciPy's own gmres tests, run on our function ----------------------------------------------------------------


def _scipy_tests(name):
    """A test module of SciPy, loaded anew with our gmres where it imports SciPy's."""
    spec = importlib.util.find_spec(f"scipy.sparse.linalg._isolve.tests.{name}")
    module = importlib.util.module_from_spec(spec)
    table = getattr(_array_api, "xp_capabilities_table", {})  # from SciPy 1.18 on its tests look functions up there
    if scipy_solvers.gmres in table:
        table[cb.gmres] = table[scipy_solvers.gmres]
    with mock.patch.object(scipy_solvers, "gmres", cb.gmres):
        spec.loader.exec_module(module)
    assert module.gmres is cb.gmres
    return module


theirs = _scipy_tests("test_iterative")
theirs._SOLVERS = [cb.gmres]  # for the tests that loop over all solvers
OUR_CASES = [case for case in theirs.cases if case.solver is cb.gmres]
scipys = pytest.mark.skipif(
    "xp" in inspect.signature(theirs.test_maxiter).parameters, reason="this SciPy's tests take fixtures of its own"
)


@scipys
@pytest.mark.parametrize("case", OUR_CASES, ids=repr)
@pytest.mark.parametrize(
    "test", [theirs.test_maxiter, theirs.test_convergence, theirs.test_precond_dummy, theirs.test_x0_equals_Mb]
)
def test_scipy_case(test, case):
    test(case)


@scipys
@pytest.mark.parametrize("case", theirs.IterativeParams().cases[:6:4], ids=["poisson1d", "poisson2d"])
def test_scipy_precond_inverse(case):
    assert case.name.startswith("poisson")
    theirs.test_precond_inverse(case)


@scipys
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


@scipys
@pytest.mark.parametrize("atol", ["legacy", None, -1])
def test_scipy_invalid_atol(atol):
    theirs.test_invalid_atol(cb.gmres, atol)


@scipys
class TestSciPyGMRES(theirs.TestGMRES):
    """Inherits SciPy's test methods; they call our gmres."""


@pytest.mark.parametrize(("module", "suite"), [("test_lgmres", "TestLGMRES"), ("test_gcrotmk", "TestGCROTMK")])
def test_scipy_arnoldi_is_equivalent(module, suite):
    getattr(_scipy_tests(module), suite)().test_arnoldi()


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


def test_gil_is_released():
    A, b = slow_system(), torch.ones(1, 3600, dtype=torch.float64)
    assert_other_threads_run(lambda: _C.gmres(A, b, rtol=0.0, restart=300, maxiter=600, least_reduction=1.0))


_INTERRUPTED = """
import signal, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
sys.path.insert(0, {tests!r})
from systems import _C, slow_system
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
