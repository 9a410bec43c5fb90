"""Memory that the fused layers keep for their next tensors on the CPU."""

from __future__ import annotations

from . import _C


def release_memory() -> None:
    """Give back the memory of freed tensors that the fused operators keep for the next training step.

    Counterpart of ``torch.cuda.empty_cache`` for the CPU. Tensors of 4 MB and more that ``conv_bn`` makes reuse the
    memory of earlier ones, because fresh memory costs several times a pass over it (the system clears every page).
    What is kept and what is in use together never exceed the most that was in use at one time.
    ``CONVBN_EXT_POOL=0`` in the environment turns it off.
    """
    _C.release_memory()
