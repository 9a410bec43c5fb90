"""nn.BatchNorm whose training statistics are those of all processes, on any device (torch's needs a GPU)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .normalize import Normalisation, active_group, normalize, update_running


def training_step(bn: Any) -> tuple[bool, float]:
    """Whether a call in the present mode moves the running statistics, and by which weight of the new batch."""
    counts = bn.training and bn.track_running_stats
    if bn.momentum is None:  # cumulative average
        return counts, 1.0 / float(bn.num_batches_tracked + 1) if counts else 0.0
    return counts, bn.momentum


class _Synced(nn.modules.batchnorm._BatchNorm):
    process_group: Any = None

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by the statistics of all processes in training mode, and as nn.BatchNorm does otherwise."""
        group = active_group(self.process_group) if self.training else None
        if group is None:
            return super().forward(input)
        self._check_input_dim(input)
        counts, momentum = training_step(self)
        options = Normalisation(None, group, self.eps, "identity", 0.0)
        out, mean, var, values = normalize(input, self.weight, self.bias, None, None, options)
        if counts:
            running = self.running_mean, self.running_var, self.num_batches_tracked
            update_running(running, mean, var, None, int(values), momentum)
        return out


class SyncBatchNorm1d(_Synced, nn.BatchNorm1d):
    """nn.BatchNorm1d over all processes."""


class SyncBatchNorm2d(_Synced, nn.BatchNorm2d):
    """nn.BatchNorm2d over all processes."""


class SyncBatchNorm3d(_Synced, nn.BatchNorm3d):
    """nn.BatchNorm3d over all processes."""


SYNCED: dict[type[Any], type[Any]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
}


def group_of(bn: nn.Module) -> Any:
    """The processes that a batch normalisation takes its statistics over now; None for this one alone."""
    is_synced = isinstance(bn, _Synced | nn.SyncBatchNorm) and bn.training
    return active_group(bn.process_group) if is_synced else None
