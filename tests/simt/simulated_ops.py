"""The Krylov operators of the package by simulated kernels, so that the C++ solvers above them run as on a GPU.

``with simulated(sim): _C.device_gmres(...)`` registers them for CPU tensors; tensors are copied in and out of guarded
buffers, and every report of the simulator fails the call.
"""

import contextlib
import itertools
import math
import warnings

import torch

MODES = ["zeros", "circular", "reflect", "replicate"]
NAN = math.nan


class SimulatedOps:
    """Each method is one operator of csrc/ops.cpp; what *_cuda.cpp does between tensors and launchers is done here."""

    def __init__(self, sim, shared_bytes=16 << 10):
        self.sim, self.shared_bytes, self.launched = sim, shared_bytes, []

    def _run(self, name, *arguments):
        self.launched.append(name)
        self.sim.run(name, *arguments)
        reports = self.sim.reports()
        assert not reports, reports

    def _basis(self, V, rows, n):
        assert len(V) <= 2
        blocks = [self.sim.output(f"V{i}", block.contiguous()) for i, block in enumerate(V)]
        second = blocks[1] if len(blocks) == 2 else None
        return blocks, (blocks[0], second, len(V[0]), V[0].shape[1])

    def _scratch(self, systems, n, k):
        size = self.sim.call("krylov_scratch", systems, n, k)
        return self.sim.output("scratch", torch.full((size,), NAN, dtype=torch.float64))

    def krylov_orthonormalize(self, V, rows, k, w):
        n = w.shape[1]
        blocks, basis = self._basis(V, rows, n)
        H = self.sim.output("H", torch.full((len(rows), k + 2), complex(NAN, NAN), dtype=torch.complex128))
        head = (int(w.dtype == torch.float64), len(rows), n, self.sim.input("rows", rows))
        self._run("krylov_orthonormalize", *head, *basis, k, self.sim.input("w", w), self._scratch(len(rows), n, k), H)
        for mine, block in zip(V, blocks, strict=True):
            mine.copy_(block.read())
        result = H.read()
        self.sim.close()
        return result

    def krylov_combine(self, V, rows, y):
        n = V[0].shape[2]
        _, basis = self._basis(V, rows, n)
        out = self.sim.output("out", torch.full((len(rows), n), NAN, dtype=V[0].dtype))
        head = (int(out.tensor.dtype == torch.float64), len(rows), n, self.sim.input("rows", rows))
        self._run("krylov_combine", *head, *basis, y.shape[1], self.sim.input("y", y), out)
        result = out.read()
        self.sim.close()
        return result

    def krylov_norms(self, x):
        out = self.sim.output("norms", torch.full((len(x),), NAN, dtype=torch.float64))
        head = (int(x.dtype == torch.float64), *x.shape)
        self._run("krylov_norms", *head, self.sim.input("x", x), self._scratch(*x.shape, 0), out)
        result = out.read()
        self.sim.close()
        return result

    def krylov_rotate(self, small, H, limits, restart, eps):
        buffer = self.sim.output("small", small)
        inputs = (self.sim.input("H", H), self.sim.input("limits", limits))
        self._run("krylov_rotate", len(small), H.shape[1] - 2, eps, *inputs, restart, buffer)
        small.copy_(buffer.read())
        self.sim.close()

    def krylov_solve(self, small, restart, K):
        y = self.sim.output("y", torch.full((len(small), K), complex(NAN, NAN), dtype=torch.complex128))
        self._run("krylov_solve", len(small), self.sim.input("small", small), restart, K, y)
        result = y.read()
        self.sim.close()
        return result

    def gmres_cycle(
        self, r, limits, restart, eps, weight, row_scale, spatial, stride, padding, dilation, groups, padding_mode
    ):
        S, n = r.shape
        is_double, axes = int(r.dtype == torch.float64), len(spatial)
        lead = [1] * (3 - axes)
        kernel, before = list(weight.shape[2:]), list(padding[::2])
        out = [
            (size + sum(padding[2 * i : 2 * i + 2]) - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
            for i, size in enumerate(spatial)
        ]
        per_axis = [*(lead + list(v) for v in (spatial, out, kernel, stride, dilation)), [0] * len(lead) + before]
        sizes = [
            weight.shape[1] * groups,
            weight.shape[0],
            groups,
            *itertools.chain(*per_axis),
            MODES.index(padding_mode),
        ]
        near = self.sim.call("gmres_cycle_near", is_double, n, restart, self.shared_bytes)
        assert near >= 0
        problem = self.sim.call("small_problem_size", restart)
        small = self.sim.output("small", torch.full((S, problem), NAN, dtype=torch.float64))
        far = self.sim.output("far", torch.full((S, restart + 1 - near, n), NAN, dtype=r.dtype))
        u = self.sim.output("u", torch.full_like(r, NAN))
        inputs = [self.sim.input(name, t) for name, t in (("r", r), ("limits", limits), ("sizes", torch.tensor(sizes)))]
        scaling = None if row_scale is None else self.sim.input("row_scale", row_scale)
        outputs = (near, far, small, u)
        layer = (inputs[2], self.sim.input("weight", weight), scaling)
        self._run("gmres_cycle", is_double, S, n, restart, eps, *inputs[:2], *outputs, *layer)
        result = u.read(), small.read()
        self.sim.close()
        return result


@contextlib.contextmanager
def simulated(sim, *, cycle, **options):
    """Replace the operators for CPU tensors: the whole cycle in one launch, or the single verbs."""
    ops = SimulatedOps(sim, **options)
    verbs = ["krylov_orthonormalize", "krylov_combine", "krylov_norms", "krylov_rotate", "krylov_solve"]
    library = torch.library.Library("convbn_ext", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the override is meant
            for name in ["gmres_cycle"] if cycle else verbs:
                library.impl(name, getattr(ops, name), "CPU", allow_override=True)
        yield ops
    finally:
        library._destroy()
