"""Several processes over gloo against one process that holds the whole batch."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from several import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import convbn_ext as cb

SIZES = {2: [5, 3], 3: [4, 0, 3]}  # samples of each process: uneven, one without any


def layer(activation="relu"):
    torch.manual_seed(0)
    made = cb.ConvBN2d(3, 4, 3, padding=1, stride=2, activation=activation).double()
    with torch.no_grad():
        made.bn.weight.normal_()
        made.bn.bias.normal_()
    return made


def batch(shift=0.0):
    g = torch.Generator().manual_seed(1)
    x, residual, grad = (
        torch.randn(n, *s, generator=g, dtype=torch.float64) for n, *s in ((8, 3, 7, 6), (8, 4, 4, 3), (8, 4, 4, 3))
    )
    return x + shift, residual, grad


def train(model, x, residual, grad):
    """Output, gradients of inputs and parameters, and the state after one step of training mode."""
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    out = model(x, residual)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(out, [x, residual, *parameters], grad)
    return out.detach(), gradients[:2], gradients[2:], copy.deepcopy(model.state_dict())


def train_part(rank, world, shift):
    part = torch.arange(sum(SIZES[world])).split(SIZES[world])[rank]
    calls = []
    original = dist.all_reduce
    dist.all_reduce = lambda *a, **k: (calls.append(a), original(*a, **k))[1]
    x, residual, grad = (t[part] for t in batch(shift))
    found = train(cb.convert_sync(layer()), x, residual, grad)
    dist.all_reduce = original
    return *found, len(calls)


def every_part(rank, world):
    """All that this file asks of several processes, in one start of them."""
    found = {f"shift {shift}": train_part(rank, world, shift) for shift in (0.0, 1e4)}
    if world == 2:
        found |= {kind: fit_part(rank, world, kind) for kind in ("ddp", "fsdp")}
        found |= {method: solve_part(method) for method in ("auto", "gmres")}
    if world == 3:
        found |= {f"{N} samples": solve_part("auto", N) for N in (1, 2)} | {"no samples": refusal()}
    return found


@pytest.fixture(scope="module")
def parts():
    return {world: run(world, every_part, world) for world in SIZES}


@pytest.mark.parametrize("world", SIZES)
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_statistics_are_those_of_the_whole_batch(parts, world, shift):
    found = [part[f"shift {shift}"] for part in parts[world]]
    exact = train(layer(), *(t[: sum(SIZES[world])] for t in batch(shift)))
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10 * max(1.0, shift))
    close(torch.cat([part[0] for part in found]), exact[0])
    for i in range(2):
        close(torch.cat([part[1][i] for part in found]), exact[1][i])
    for ours, whole in zip(zip(*(part[2] for part in found), strict=True), exact[2], strict=True):
        close(sum(ours), whole)
    for part in found:
        for key, value in exact[3].items():
            close(part[3][key], value, msg=key)
        assert part[4] == 2  # one all-reduce forward, one backward


class Net(nn.Module):
    """Two blocks with a residual: what DistributedDataParallel and FSDP2 are given."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.bn2(self.conv2(y)) + y).mean((2, 3)))


def data():
    g = torch.Generator().manual_seed(2)
    return torch.randn(6, 3, 6, 6, generator=g, dtype=torch.float64), torch.randn(
        6, 4, generator=g, dtype=torch.float64
    )


def fit(model, x, y, whole):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        ((model(x) - y).square().sum() / whole).backward()
        optimizer.step()


def net():
    torch.manual_seed(0)
    return Net().double()


def fit_part(rank, world, kind):
    x, y = (t.chunk(world)[rank] for t in data())
    model = cb.fuse(cb.convert_sync(net()))
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
        fit(wrapped, x, y, len(x))  # DDP takes the mean over the processes
        return {k: v.clone() for k, v in model.state_dict().items()}
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    fully_shard(model, mesh=mesh)
    fit(model, x, y, len(x))
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_training_under(parts, kind):
    """Fused, synchronised and wrapped: after three steps the model of one process with the whole batch."""
    exact = net()
    x, y = data()
    fit(exact, x, y, len(x))
    for part in parts[2]:
        for key, value in exact.state_dict().items():
            torch.testing.assert_close(part[kind][key], value, msg=key)


def inverse_problem():
    torch.manual_seed(3)
    conv, bn = nn.Conv2d(2, 2, 3, padding=1).double(), nn.BatchNorm2d(2).double()
    z = torch.rand(5, 2, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        bn(conv(z))
        return conv, bn.eval(), bn(conv(z))


def solve_part(method, N=5):
    conv, bn, x = inverse_problem()
    x0 = torch.zeros_like(x[:N]) if method == "gmres" else None
    with torch.no_grad():
        result = cb.solve_sharded(conv, bn, x[:N], rtol=1e-10, method=method, x0=x0)
    return result.z, result.status, result.iterations, result.residual, result.history


def refusal():
    conv, bn, x = inverse_problem()
    with pytest.raises(ValueError, match="x must have shape") as raised:
        cb.solve_sharded(conv, bn, x[:0])
    return str(raised.value)


def check_solved(part, whole):
    z, status, iterations, residual, history = part
    torch.testing.assert_close(z, whole.z, rtol=1e-6, atol=1e-7)  # κ·rtol
    assert status == whole.status == ["converged"] * len(whole.z)
    assert len(history) == len(whole.z)
    assert iterations.shape == residual.shape == (len(whole.z),)
    assert residual.max() <= 1e-10


@pytest.mark.parametrize("method", ["auto", "gmres"])
def test_a_solve_shared_out(parts, method):
    whole = cb.solve(*inverse_problem(), rtol=1e-10, method=method)
    for part in parts[2]:
        check_solved(part[method], whole)


@pytest.mark.parametrize("N", [1, 2])
def test_a_solve_with_fewer_samples_than_processes(parts, N):
    conv, bn, x = inverse_problem()
    whole = cb.solve(conv, bn, x[:N], rtol=1e-10)
    for part in parts[3]:
        check_solved(part[f"{N} samples"], whole)


def test_no_samples_are_refused_in_every_process(parts):
    for part in parts[3]:
        assert "x must have shape (N, 2, S1, S2) with N ≥ 1, got (0, 2, 5, 5)" in part["no samples"]


def test_one_process_needs_no_group():
    assert cb.solve_sharded(*inverse_problem()).converged
    x, residual, grad = batch()
    exact, synced = (train(make, x, residual, grad) for make in (layer(), cb.convert_sync(layer())))
    torch.testing.assert_close(synced, exact, rtol=0, atol=0)
    with pytest.raises(ValueError, match="stats must be 'running'"):
        cb.solve_sharded(*inverse_problem(), stats="batch")


def test_convert_sync_shares_state_and_keeps_keys():
    plain = net()
    model = cb.convert_sync(plain)
    kinds = [type(m).__name__ for m in model.modules()]
    assert kinds.count("SyncBatchNorm2d") == 2
    assert isinstance(model.bn1, nn.BatchNorm2d)
    assert all(a is b for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert list(model.state_dict()) == list(plain.state_dict())
    fused, report = cb.fuse(model, report=True)
    assert report.share == 1
    x, _ = data()
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))


def test_conversion_after_fusing_with_an_example_is_refused():
    class Branching(Net):
        def forward(self, x):
            return super().forward(x) if float(x.detach().mean()) < 9 else x

    fused = cb.fuse(Branching().double(), data()[0])
    with pytest.raises(ValueError, match="bn1 was fused with an example; call fuse after convert_sync"):
        cb.convert_sync(fused)


ENDS = """
import time
from contextlib import suppress
from pathlib import Path
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import convbn_ext as cb

def train():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    DistributedDataParallel(cb.ConvBN2d(1, 2, 3))(torch.randn(2, 1, 5, 5)).sum().backward()
    dist.destroy_process_group()

def threads():
    names = []
    for task in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # ended meanwhile
            names.append(task.read_text().strip())
    return names

train()
patience = time.monotonic() + 5  # a thread that has been joined is listed a moment longer
while any("gloo" in name for name in threads()) and time.monotonic() < patience:
    time.sleep(0.1)
print(*threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of a process's threads")
def test_no_thread_of_the_process_group_is_left_when_a_program_ends():
    """One that is may abort the process while the interpreter shuts down."""
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "python" in done.stdout
    assert "gloo" not in done.stdout
