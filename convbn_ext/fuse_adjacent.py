"""Conv→BN(→activation) where no trace exists: proven by a call with an example input, fused without touching a forward.

In that call, watched operator by operator, the batch normalisation must read the very tensor that the convolution made,
and nothing else may: no other operator, no view, no variable that outlives the call. Then the convolution does the
whole chain and marks its output, and the batch normalisation and the activation hand on what carries the mark. A value
without it means that the forward took another path than with the example: an error, never a wrong number.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .fuse_match import Chain, Reason
from .modules import call_is_fused, fused_call, has_hooks, is_activation, is_batch_norm, is_convolution, plain_class


class _Watch(TorchDispatchMode):
    """Who reads the outputs of the watched modules: per output the modules, or None for any other operator."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model  # alive, with whatever its forward has kept
        self.inside: list[str | None] = [None]
        self.made: dict[int, str] = {}  # storage → module whose output it is
        self.storages: list[Any] = []  # kept, so that no address is used twice
        self.outputs: dict[str, list[weakref.ref[Tensor]]] = defaultdict(list)
        self.inputs: dict[str, list[str | None]] = defaultdict(list)  # whose output the module was called with
        self.readers: dict[str, set[str | None]] = defaultdict(set)
        self.paths = {m: path for path, m in model.named_modules() if self._watched(m)}
        for module in self.paths:
            module.register_forward_pre_hook(self._enter, prepend=True)
            module.register_forward_hook(self._leave)

    @staticmethod
    def _watched(module: nn.Module) -> bool:
        return is_convolution(module) or is_batch_norm(module) or is_activation(module)

    def _maker(self, value: Any) -> str | None:
        known = isinstance(value, Tensor) and value.layout == torch.strided
        return self.made.get(value.untyped_storage()._cdata) if known else None

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        maker = self._maker(args[0]) if len(args) == 1 else None
        same = maker is not None and self.outputs[maker][-1]() is args[0]
        self.inputs[self.paths[module]].append(maker if same else None)
        self.inside.append(self.paths[module])

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        path = str(self.inside.pop())
        storage = output.untyped_storage()
        self.storages.append(storage)
        self.made[storage._cdata] = path
        self.outputs[path].append(weakref.ref(output))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            maker = self._maker(value)
            if maker is not None:
                self.readers[maker].add(self.inside[-1])
        return func(*args, **(kwargs or {}))


def _only_reader(watch: _Watch, maker: str) -> str | None:
    """The one module that reads the module's one output, which nobody keeps."""
    outputs, readers = watch.outputs[maker], watch.readers[maker]
    if len(outputs) != 1 or outputs[0]() is not None or len(readers) != 1:
        return None
    (reader,) = readers
    return reader if reader is not None and watch.inputs[reader] == [maker] else None


def _observe(model: nn.Module, example: tuple[Any, ...], training: bool) -> _Watch:
    probe = copy.deepcopy(model)
    if probe.training != training:
        probe.train(training)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _Watch(probe) as watch:
        result = probe(*example)
    for value in tree_leaves(result):  # what the caller gets is read by the caller
        maker = watch._maker(value)
        if maker is not None:
            watch.readers[maker].add(None)
    return watch


def adjacent_chains(model: nn.Module, example: tuple[Any, ...], shared: set[int], why: Reason) -> list[Chain]:
    """The chains that hold in a call in training mode and in one in eval mode; the model is not changed."""
    watches = [_observe(model, example, training) for training in (True, False)]
    chains = []
    for path, conv in model.named_modules():
        if not is_convolution(conv):
            continue
        readers = {_only_reader(watch, path) for watch in watches if watch.outputs[path]}
        bn_path = readers.pop() if len(readers) == 1 else None
        bn = None if bn_path is None else model.get_submodule(bn_path)
        if bn_path is None or not is_batch_norm(bn) or why(conv, bn) is not None:
            continue
        readers = {_only_reader(watch, bn_path) for watch in watches if watch.outputs[bn_path]}
        act_path = readers.pop() if len(readers) == 1 else None
        act = None if act_path is None else model.get_submodule(act_path)
        absorbs = act is not None and is_activation(act) and id(act) not in shared and not has_hooks(act)
        chains.append(Chain(path, bn_path, False, act_path if absorbs else None))
    return chains


def hand_over(modules: Sequence[nn.Module | None], path: str, memory: str) -> dict[int, nn.Module]:
    """Substitutes of a chain's modules, sharing all state with them, by the id of the module they stand for."""
    members = [m for m in modules if m is not None]
    substitutes: list[Any] = [object.__new__(_class(plain_class(m), i == 0)) for i, m in enumerate(members)]
    for substitute, module in zip(substitutes, members, strict=True):
        substitute.__dict__.update(module.__dict__, _chain=(*substitutes, None)[:3], _mark=path, _memory=memory)
    return {id(module): substitute for module, substitute in zip(members, substitutes, strict=True)}


@functools.cache
def _class(plain: Any, first: bool) -> Any:
    def convolve(self: Any, input: Tensor) -> Any:
        conv, bn, activation = self._chain
        fits = call_is_fused(conv, bn, input, None, activation)
        out: Any = fused_call(conv, bn, input, None, activation, self._memory) if fits else plain.forward(self, input)
        out._convbn_done = self._mark if fits else ""
        return out

    def hand_on(self: Any, input: Tensor) -> Tensor:
        done = getattr(input, "_convbn_done", None)
        if done == self._mark:
            return input
        if done is None and not any(has_hooks(module) for module in self._chain if module is not None):
            raise RuntimeError(
                f"fuse: the input of the {plain.__name__} behind {self._mark!r} is not that convolution's output: the "
                "model took another path than with the example; leave it with unfuse(model)"
            )
        out = plain.forward(self, input)
        out._convbn_done = ""
        return out

    def reduce_ex(self: Any, protocol: Any) -> Any:
        _, _, *rest = plain.__reduce_ex__(self, protocol)
        return (_new, (plain, first), *rest)

    members = {"forward": convolve if first else hand_on, "__reduce_ex__": reduce_ex, "_plain_class": plain}
    return type(plain.__name__, (plain,), members | {"__module__": plain.__module__})


def _new(plain: Any, first: bool) -> Any:
    cls = _class(plain, first)
    return cls.__new__(cls)
