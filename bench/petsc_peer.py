"""PETSc's solvers as a peer, where petsc4py can be imported.

Debian's python3-petsc4py 3.18 is made for Python 3.11 and NumPy 1; torch and SciPy run with either NumPy:

    apt-get install python3-petsc4py
    pip install --target out/numpy1 numpy==1.26.4
    PYTHONPATH=out/numpy1:/usr/lib/petscdir/petsc3.18/x86_64-linux-gnu-real/lib/python3/dist-packages \
        python bench/bench_solve.py
"""

from __future__ import annotations

import importlib
from typing import Any

import scipy.sparse

try:
    PETSc: Any = importlib.import_module("petsc4py.PETSc")
except (ImportError, ValueError, AttributeError) as error:  # not installed, or built for another NumPy
    PETSc = None
    print(f"without PETSc: {error}")


def petsc_solver(
    A: scipy.sparse.csr_array, kind: str, atol: float, steps: int, M: Any = None, twice: bool = False
) -> Any:
    """A KSP of PETSc (float64): "lu", or "gmres" without restart, preconditioned from the right by M.

    PETSc orthogonalises by classical Gram–Schmidt, once by default and twice, as ours does, on demand.
    """
    matrix = PETSc.Mat().createAIJWithArrays(A.shape, (A.indptr.astype("int32"), A.indices.astype("int32"), A.data))
    ksp = PETSc.KSP().create(PETSc.COMM_SELF)
    ksp.setOperators(matrix)
    ksp.setType("preonly" if kind == "lu" else "gmres")
    ksp.getPC().setType({"lu": "lu"}.get(kind, "none" if M is None else "python"))
    if kind == "lu":
        ksp.getPC().setFactorOrdering("nd")
    else:
        ksp.setPCSide(PETSc.PC.Side.RIGHT)
        ksp.setGMRESRestart(steps)
        ksp.setTolerances(rtol=1e-300, atol=atol, max_it=steps)
        PETSc.Options()["ksp_gmres_cgs_refinement_type"] = "refine_always" if twice else "refine_never"
        ksp.setFromOptions()
        if M is not None:
            ksp.getPC().setPythonContext(_PetscPreconditioner(M))
    ksp.setUp()
    return ksp


class _PetscPreconditioner:
    def __init__(self, M: Any) -> None:
        self.M = M

    def apply(self, pc: Any, x: Any, y: Any) -> None:
        y.setArray(self.M(x.getArray().copy()))
