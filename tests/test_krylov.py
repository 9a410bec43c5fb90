"""The verbs of csrc/krylov.h against float64, and what threads and instruction sets must not change."""

import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
import torch
from systems import DTYPES, grcar, laplacian

from convbn_ext import _C


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
    """The loops for fewer instructions than the machine has are run by lowering torch's capability."""
    outputs = {}
    capabilities = ["default", "avx2", "avx512"]
    if not torch.cpu._is_avx512_supported():
        capabilities.remove("avx512")  # torch would believe it
    for capability in capabilities:
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
