"""A layer, what it made of a batch, and the matrix that peers get as a gift."""

from __future__ import annotations

import copy

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

import convbn_ext as cb


class Problem:
    """A square layer with default initialisation that has seen its batch, and x = BN(Conv(z)) (N, C, H, W)."""

    def __init__(self, shape: tuple[int, ...], batch: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.conv = nn.Conv2d(shape[0], shape[0], 3, padding=1).to(dtype)
        bn = nn.BatchNorm2d(shape[0], momentum=None).to(dtype)
        with torch.no_grad():
            z = torch.rand(batch, *shape, dtype=dtype)
            bn(self.conv(z))
            self.bn = bn.eval()
            self.x = bn(self.conv(z))
        self.dtype, self.op = dtype, cb.ConvBNOperator(self.conv, self.bn, shape)
        conv, bn = (copy.deepcopy(module).cpu() for module in (self.conv, self.bn))
        self.host_op = cb.ConvBNOperator(conv, bn, shape)  # for peers that know no other device
        self.shift = self.host_op.channel_vector(self.host_op.offset)
        A = cb.ConvBNOperator(conv.double(), bn.double(), shape).to_sparse()
        self.csr = scipy.sparse.csr_array((A.values().numpy(), tuple(A.indices().numpy())), shape=A.shape)

    def rhs(self, inside: torch.dtype) -> Tensor:
        """x − b̂ (N, n), on the host."""
        return (self.x.double().cpu().flatten(1) - self.shift).to(inside)

    def matrix(self, inside: torch.dtype) -> scipy.sparse.csr_array:
        return self.csr.astype(np.float32 if inside == torch.float32 else np.float64)

    def residual(self, z: Tensor) -> float:
        """Largest ‖x − BN(Conv(z))‖ / ‖x‖ over the samples solved, in float64, of z in the layer's dtype."""
        z = z.to(self.dtype).double().cpu().reshape(len(z), -1)
        x = self.x[: len(z)].double().cpu().flatten(1)
        error = x - self.shift - torch.from_numpy((self.csr @ z.numpy().T).T)
        return float((error.norm(dim=1) / x.norm(dim=1)).max())
