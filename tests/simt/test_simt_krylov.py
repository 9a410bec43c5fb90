"""The Krylov verbs against float64 linear algebra: orthonormal to rounding, coefficients, norms, extreme scales."""

import harness
import pytest
import torch
from simulated_ops import SimulatedOps

NAN = float("nan")
SLOTS, SPLIT = 3, 4  # the basis holds three slots; its second block begins with vector 4


def orthonormal_basis(n, count, dtype):
    """(count, SLOTS, n) with orthonormal vectors in each slot."""
    generator = torch.Generator().manual_seed(n + count)
    columns = torch.randn(SLOTS, n, count, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(columns)[0].permute(2, 0, 1).to(dtype).contiguous()


def blocks(basis, capacity):
    """The basis as two blocks, NaN behind its vectors."""
    whole = torch.full((capacity, *basis.shape[1:]), NAN, dtype=basis.dtype)
    whole[: len(basis)] = basis
    return [whole[:SPLIT], whole[SPLIT:]]


def orthonormalize(sim, basis, rows, w):
    V = blocks(basis, max(len(basis) + 1, SPLIT + 1))
    H = SimulatedOps(sim).krylov_orthonormalize(V, rows, len(basis), w)
    assert torch.equal(H.imag, torch.zeros_like(H.imag))
    return torch.cat(V), H.real.contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 0), (37, 3), (300, 4), (1023, 11), (1024, 8), (2100, 9)])
def test_orthonormalize(sim, n, k, dtype):
    basis, rows = orthonormal_basis(n, k, dtype), torch.tensor([2, 0])
    w = torch.randn(2, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    V, H = orthonormalize(sim, basis, rows, w)
    eps = torch.finfo(dtype).eps
    assert torch.equal(V[:k], basis)  # the basis is not touched
    assert V[k, 1].isnan().all()  # nor the slot that is not named
    for s, slot in enumerate(rows.tolist()):
        known, vector = basis[:, slot].double(), w[s].double()
        h = known @ vector
        rest = vector - known.T @ h
        torch.testing.assert_close(H[s, :k], h, rtol=0, atol=8 * eps * vector.norm().item())
        torch.testing.assert_close(H[s, k], rest.norm(), rtol=8 * eps * (k + 1), atol=0)
        torch.testing.assert_close(H[s, k + 1], vector.norm(), rtol=4 * eps, atol=0)
        new = V[k, slot].double()
        assert abs(new.norm().item() - 1) <= 4 * eps
        assert k == 0 or (known @ new).abs().max() <= 4 * eps


def test_second_projection_makes_orthogonal_what_lies_in_the_span(sim):
    """w within 1e-6 of the span: one projection would leave 1e-10 of the basis in the result, two leave rounding."""
    basis, rows = orthonormal_basis(300, 6, torch.float64), torch.tensor([0])
    w = (
        basis[:, 0].sum(0, keepdim=True)
        + 1e-6 * torch.randn(1, 300, generator=torch.Generator().manual_seed(1)).double()
    )
    V, _ = orthonormalize(sim, basis, rows, w)
    assert (basis[:, 0] @ V[6, 0]).abs().max() <= 1e-15


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e300])
def test_extreme_scales(sim, scale):
    basis, rows = orthonormal_basis(64, 2, torch.float64), torch.tensor([1])
    w = torch.randn(1, 64, generator=torch.Generator().manual_seed(2)).double()
    V, H = orthonormalize(sim, basis, rows, w)
    scaled_V, scaled_H = orthonormalize(sim, basis, rows, w * scale)
    torch.testing.assert_close(scaled_V[2, 1], V[2, 1], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(scaled_H / scale, H, rtol=1e-13, atol=1e-15)


def test_a_zero_vector_stays_zero(sim):
    V, H = orthonormalize(sim, orthonormal_basis(40, 2, torch.float64), torch.tensor([0]), torch.zeros(1, 40).double())
    assert torch.equal(H, torch.zeros(1, 4).double())
    assert torch.equal(V[2, 0], torch.zeros(40).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("K", [1, 3, 4, 7])
def test_combine(sim, K, dtype):
    n, rows = 1500, torch.tensor([1, 2])
    basis = orthonormal_basis(n, K, dtype)
    y = torch.randn(2, K, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y[1, K // 2 :] = 0  # where a system has made fewer steps the basis may hold anything
    V = blocks(basis, max(K, SPLIT + 1))
    V[0][K // 2 : K, 2] = NAN
    V[1][max(K // 2 - SPLIT, 0) : max(K - SPLIT, 0), 2] = NAN
    out = SimulatedOps(sim).krylov_combine(V, rows, y.to(torch.complex128))
    exact = torch.einsum("ak,kan->an", y, basis[:, rows].double())
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2 * torch.finfo(dtype).eps * exact.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms(sim, dtype):
    x = torch.randn(6, 1100, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    big, small = (1e200, 1e-200) if dtype == torch.float64 else (1e30, 1e-30)
    x[1] *= big
    x[2] *= small
    x[3] = 0
    x[4, 17] = NAN
    x[5, 600] = float("inf")
    norms = SimulatedOps(sim).krylov_norms(x)
    scale = torch.tensor([1, big, small, 1], dtype=torch.float64)
    exact = (x[:4].double() / scale[:, None]).norm(dim=1) * scale
    torch.testing.assert_close(norms[:4], exact, rtol=1e-14 if dtype == torch.float64 else 1e-7, atol=0)
    assert norms[4].isnan()
    assert norms[5].isinf()


def test_schedules_agree_bit_for_bit(sim):
    basis, rows = orthonormal_basis(300, 5, torch.float32), torch.tensor([2, 0])
    w = torch.randn(2, 300, generator=torch.Generator().manual_seed(6))
    results = []
    for order in harness.ORDERS:
        sim.schedule(order)
        V, H = orthonormalize(sim, basis, rows, w)
        results.append((V.nan_to_num(), H))
    for V, H in results[1:]:
        assert torch.equal(V, results[0][0])
        assert torch.equal(H, results[0][1])


def test_rotate_and_solve_minimise(sim):
    """Columns of random Hessenberg matrices against numpy's least squares; a done system is left alone."""
    generator, restart = torch.Generator().manual_seed(7), 9
    H = torch.randn(3, restart + 1, restart, generator=generator, dtype=torch.float64).triu(-1)
    H.diagonal(-1, 1, 2).abs_()
    H[2, 4, 3] = 0  # exhausted after four columns
    limits = torch.tensor([[0.0, 99], [0.0, 6], [0.0, 99]], dtype=torch.float64)
    ops = SimulatedOps(sim)
    small = torch.full((3, sim.call("small_problem_size", restart)), NAN, dtype=torch.float64)
    for k in range(1, restart + 1):
        column = H[:, : k + 1, k - 1]
        w_norm = column.norm(dim=1, keepdim=True)
        ops.krylov_rotate(small, torch.cat([column, w_norm], 1).to(torch.complex128), limits, restart, 2.0**-52)
    y = ops.krylov_solve(small, restart, restart).real
    for s, steps in enumerate((9, 6, 4)):
        assert small[s, 0] == steps
        e1 = torch.eye(steps + 1, 1, dtype=torch.float64)
        exact = torch.linalg.lstsq(H[s, : steps + 1, :steps], e1).solution[:, 0]
        torch.testing.assert_close(y[s, :steps], exact, rtol=1e-9, atol=1e-12)
        assert (y[s, steps:] == 0).all()
        residual = (e1[:, 0] - H[s, : steps + 1, :steps] @ exact).norm()
        torch.testing.assert_close(small[s, 2 + steps], residual, rtol=1e-9, atol=1e-12)
    assert small[:, 1].tolist() == [0, 3, 2]  # End::restart, maxiter, exhausted
