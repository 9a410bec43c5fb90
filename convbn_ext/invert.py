"""The inverse of Conv+BN as a differentiable function.

Let F(z, θ) = BN(Conv(z)) = A z + b̂ with θ = (weight, bias, γ, β, mean, var), and z with F(z, θ) = x. For a loss with
g = ∂loss/∂z the implicit function theorem gives, with λ = A⁻ᵀ g,

    d loss = ⟨λ, dx − dF(z, θ)⟩ .

With the pseudo-inverse (more or fewer outputs than inputs) there is one more term (Golub & Pereyra, 1973):

    minimum norm:    λ = (A Aᵀ)⁻¹ A g,  + ⟨u, dA h⟩,  u = (A Aᵀ)⁻¹ A (z − z₀),  h = g − Aᵀ λ
    least squares:   λ = A w,           + ⟨x − F(z), dA w⟩,  w = (Aᵀ A)⁻¹ g

One adjoint solve with the transposed preconditioner or the same factor, and torch differentiates F in θ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .batch_statistics import live_statistics
from .choice import choose
from .least_squares import solve_normal_equations
from .methods import KrylovOptions, Target
from .run import run_transpose
from .solve import SolveResult, solve


class ConvergenceError(RuntimeError):
    """Not every sample was solved; ``result`` is the SolveResult, or None for a failure in the backward pass."""

    def __init__(self, message: str, result: SolveResult | None = None) -> None:
        super().__init__(message)
        self.result = result


def invert(conv: Any, bn: Any, x: Tensor, *, stats: Any = "running", **options: Any) -> Tensor:
    """Find z with BN(Conv(z)) = x, differentiably in x and in every parameter of the layer.

    Args:
        conv: convolution or linear layer.
        bn: batch normalisation.
        x: (N, C_out, *out).
        stats: "running"; (mean, var), which receive gradients; or "batch", where var is a function of x, γ and β.
        **options: as for ``solve``. A callable preconditioner M serves the backward pass too where its attribute
            ``rmatvec`` gives Mᵀ, (B, C_in, *spatial) -> (B, C_out, *out). x0 gets no gradient.

    Returns:
        z (N, C_in, *spatial). Least squares returns the least-squares z also where no z gives x.

    Raises:
        ConvergenceError: a sample did not converge, here or in the backward pass; ``error.result`` tells which.
        TypeError: as for ``solve``.
        ValueError: as for ``solve``.

    Under ``torch.func.vmap`` x may have extra batch dimensions; they are solved as one batch. The layer may not.
    """
    if torch._C._functorch.is_batchedtensor(x) and ((isinstance(stats, str) and stats == "batch") or "x0" in options):
        raise TypeError(
            'invert: stats="batch" and x0 do not work under torch.func.vmap: put all samples into one batch'
        )
    if isinstance(stats, str) and stats == "batch":
        checked = solve(conv, bn, x, stats="batch", **options)  # the consistency of x is its business
        _raise_unless_solved(checked)
        live = live_statistics(bn, x, options.get("rtol", 1e-6))
        stats, options = (live.mean, live.var), {**options, "x0": checked.z}
    if isinstance(stats, str) or len(stats) != 2:
        mean, var = getattr(bn, "running_mean", None), getattr(bn, "running_var", None)
    else:
        mean, var = stats
    parameters = (conv.weight, conv.bias, bn.weight, bn.bias, mean, var)
    return _Invert.apply(_Problem(conv, bn, stats, options), x, *parameters)  # type: ignore[no-any-return]


def _raise_unless_solved(result: SolveResult) -> None:
    accepted = {"converged", "inconsistent"} if result.reason.startswith("least squares") else {"converged"}
    failed = {i: status for i, status in enumerate(result.status) if status not in accepted}
    if failed:
        first = ", ".join(
            f"{i}: {status} (residual {result.residual[i]:.1e})" for i, status in list(failed.items())[:5]
        )
        raise ConvergenceError(
            f"invert: {len(failed)} of {len(result.status)} samples: {first}; {result.reason}", result
        )


@dataclass
class _Problem:
    """What ``solve`` needs beside tensors that carry gradients, and what it found."""

    conv: Any
    bn: Any
    stats: Any
    options: dict[str, Any]
    result: SolveResult | None = None


class _Invert(torch.autograd.Function):
    @staticmethod
    def forward(problem: _Problem, x: Tensor, *parameters: Tensor | None) -> Tensor:
        stats = problem.stats
        frozen: Any = stats
        if not isinstance(stats, str):
            frozen = tuple(s.detach() if isinstance(s, Tensor) else s for s in stats)
        result = solve(problem.conv, problem.bn, x, stats=frozen, **problem.options)
        _raise_unless_solved(result)
        problem.result = result
        return result.z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        problem, x, *parameters = inputs
        ctx.problem = problem
        ctx.save_for_backward(x, output, problem.options.get("x0"), *parameters)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], problem: _Problem, x: Tensor, *parameters: Any) -> tuple[Tensor, int]:
        if any(dim is not None for dim in in_dims[2:]):
            raise TypeError(
                "invert: torch.func.vmap over parameters or statistics of the layer: they must be the same for all x"
            )
        z = _Invert.apply(problem, x.movedim(in_dims[1], 0).flatten(0, 1), *parameters)
        return z.unflatten(0, (info.batch_size, -1)), 0

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        x, z, z0, *parameters = ctx.saved_tensors
        problem: _Problem = ctx.problem
        conv, bn, result = problem.conv, problem.bn, problem.result
        assert result is not None
        op = result.operator
        g = grad_z.double().flatten(1)
        rtol = problem.options.get("rtol", 1e-6)
        second = None  # (cotangent of A v, v), flattened
        if result.method == "lsq":
            normal = {"precondition": result.preconditioner == "circulant", "rtol": rtol}
            if op.shape[0] <= op.shape[1]:
                lam = _settled(solve_normal_equations(op, op.map.apply(g), outputs=True, **normal))
                moved = (z - z0 if z0 is not None else z).double().flatten(1)
                u = _settled(solve_normal_equations(op, op.map.apply(moved), outputs=True, **normal))
                second = (u, g - op.map.apply_adjoint(lam))
            else:
                w = _settled(solve_normal_equations(op, g, outputs=False, **normal))
                lam = op.map.apply(w)
                residual = x.double().flatten(1) - op.channel_vector(op.offset) - op.map.apply(z.double().flatten(1))
                second = (residual, w)
        else:
            # a callable without Mᵀ serves A alone; the adjoint system then gets the preconditioner that auto would take
            user = problem.options.get("preconditioner", "auto")
            given = user if callable(user) and hasattr(user, "rmatvec") else None
            krylov = result.method in ("gmres", "block_gmres") and not callable(user)
            asked = "callable" if given is not None else result.preconditioner if krylov else "auto"
            choice = choose(op, len(g), result.method, asked)
            norm = torch.linalg.vector_norm(g, dim=1)
            options = KrylovOptions(x.dtype, problem.options.get("restart"), problem.options.get("maxiter"))
            lam = _settled(
                run_transpose(op, choice, given or choice.preconditioner, g, Target(rtol * norm, norm), options)
            )

        needed = [p is not None and need for p, need in zip(parameters, ctx.needs_input_grad[2:], strict=True)]
        gradients: list[Tensor | None] = [None] * len(parameters)
        if any(needed):
            with torch.enable_grad():
                leaves = [None if p is None else p.detach().double().requires_grad_() for p in parameters]
                lam_x = lam.reshape(x.shape)
                value = -(lam_x * _layer(conv, bn.eps, z.double(), leaves)).sum()
                if second is not None:
                    v = second[1].reshape(z.shape)
                    linear = _layer(conv, bn.eps, v, leaves) - _layer(conv, bn.eps, torch.zeros_like(v), leaves)
                    value = value + (second[0].reshape(x.shape) * linear).sum()
                wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need and leaf is not None]
                found = iter(torch.autograd.grad(value, wanted, allow_unused=True))
            for i, (p, need) in enumerate(zip(parameters, needed, strict=True)):
                if need:
                    gradient = next(found)
                    gradients[i] = None if gradient is None else gradient.to(p.dtype)
        grad_x = lam.reshape(x.shape).to(x.dtype) if ctx.needs_input_grad[1] else None
        return (None, grad_x, *gradients)


def _settled(outcome: Any) -> Tensor:
    failed = [f"{i}: {status}" for i, status in enumerate(outcome.status) if status != "converged"]
    if failed:
        raise ConvergenceError(f"invert: the adjoint solve of the backward pass failed for samples {', '.join(failed)}")
    return outcome.z


def _layer(conv: Any, eps: float, z: Tensor, parameters: list[Tensor | None]) -> Tensor:
    """BN(Conv(z)) with frozen statistics as a function of (weight, bias, γ, β, mean, var)."""
    weight, bias, gamma, beta, mean, var = parameters
    assert weight is not None
    assert mean is not None
    assert var is not None
    y = conv._conv_forward(z, weight, bias) if hasattr(conv, "_conv_forward") else F.linear(z, weight, bias)
    shape = (1, -1, *[1] * (y.dim() - 2))
    scale = (var + eps).rsqrt() if gamma is None else gamma * (var + eps).rsqrt()
    normalised = (y - mean.reshape(shape)) * scale.reshape(shape)
    return normalised if beta is None else normalised + beta.reshape(shape)
