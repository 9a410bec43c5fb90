"""Adopt the fused operator in a model that exists, and leave it again: same classes, same parameters, same keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import nn

from .fuse_adjacent import adjacent_chains, hand_over
from .fuse_match import Chain, Left, join, why_not_fuse
from .fuse_plan import Plan, fused_class
from .fuse_trace import Untraceable, bare_copy
from .modules import _ConvBN, is_batch_norm, is_convolution, plain_class


@dataclass(frozen=True)
class FusionReport:
    """What :func:`fuse` did: every chain it fused, and every batch normalisation that it left, with the reason."""

    fused: tuple[Chain, ...]
    left: tuple[Left, ...]

    @property
    def share(self) -> float:
        """Fused part of the Conv+BN pairs; a batch normalisation that follows no convolution is no pair."""
        pairs = len(self.fused) + sum(entry.pair for entry in self.left)
        return len(self.fused) / pairs if pairs else 1.0

    def __str__(self) -> str:
        lines = [f"fused {len(self.fused)} of {len(self.fused) + sum(e.pair for e in self.left)} Conv+BN pairs"]
        lines += [f"  {chain}" for chain in self.fused]
        return "\n".join([*lines, *(f"  left {entry.bn}: {entry.reason}" for entry in self.left)])


def _shared(model: nn.Module) -> set[int]:
    """Modules that are registered under more than one name."""
    counts = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return {key for key, count in counts.items() if count > 1}


def _may_be_traced(module: nn.Module) -> bool:
    own_forward = type(module).forward is not nn.Module.forward
    return own_forward and bool(module._modules) and not isinstance(module, _ConvBN | torch.jit.ScriptModule)


def find(
    model: nn.Module, example: tuple[Any, ...] | None, why: Callable[..., str | None], memory: str
) -> tuple[dict[str, Plan], list[Chain], FusionReport]:
    """Chains of a plain model: plans of the containers that could be traced, and what the example shows beyond them."""
    shared = _shared(model)
    plans: dict[str, Plan] = {}
    fused: dict[str, Chain] = {}  # by the path of the convolution and of the batch normalisation
    left: dict[str, Left] = {}
    containers = [(path, module) for path, module in model.named_modules() if _may_be_traced(module)]
    for path, module in sorted(containers, key=lambda item: -item[0].count(".") - bool(item[0])):  # innermost first
        inside = {join(path, name): m for name, m in module.named_modules() if join(path, name) not in fused}
        norms = [name for name, m in inside.items() if is_batch_norm(m)]
        if not norms or not any(map(is_convolution, inside.values())):
            continue
        try:
            plan = Plan(module, lambda conv, bn: why(conv, bn, shared), memory)
        except Untraceable as refusal:
            where = f"in {path or 'the model'} ({type(module).__name__}): {refusal}"
            for name in norms:
                left.setdefault(name, Left(name, f"{where}; an example input may prove it", True))
            continue
        for chain in plan.chains.values():
            whole = chain.below(path)
            fused[whole.bn] = fused[whole.conv] = whole
        left |= {join(path, l.bn): replace(l, bn=join(path, l.bn)) for l in plan.left.values()}
        if plan.chains:
            plans[path] = plan
    shown = [] if example is None else adjacent_chains(model, example, shared, lambda conv, bn: why(conv, bn, shared))
    shown = [chain for chain in shown if chain.bn not in fused]
    fused |= {chain.bn: chain for chain in shown}
    order = [name for name, module in model.named_modules() if is_batch_norm(module)]
    left = {name: Left(name, "no forward that calls it could be traced", True) for name in order} | left
    chains = tuple(fused[name] for name in order if name in fused)
    return plans, shown, FusionReport(chains, tuple(left[name] for name in order if name not in fused))


def rebuild(model: nn.Module, change: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """The tree with some modules exchanged; the containers above them are copied, everything else is shared."""
    memo: dict[int, nn.Module] = {}  # also keeps shared modules shared

    def visit(path: str, module: nn.Module) -> nn.Module:
        if id(module) in memo:
            return memo[id(module)]
        children = {n: None if c is None else visit(join(path, n), c) for n, c in module._modules.items()}
        result = change(path, module)
        if any(child is not module._modules[name] for name, child in children.items()):
            if result is module:
                result = object.__new__(type(module))
                result.__dict__.update(module.__dict__)
            result._modules = children
        memo[id(module)] = result
        return result

    return visit("", model)


@overload
def fuse(model: nn.Module, example: Any = ..., *, memory: str = ..., report: Literal[False] = ...) -> nn.Module: ...
@overload
def fuse(
    model: nn.Module, example: Any = ..., *, memory: str = ..., report: Literal[True]
) -> tuple[nn.Module, FusionReport]: ...


def fuse(model: nn.Module, example: Any = None, *, memory: str = "save", report: bool = False) -> Any:
    """The model with every Conv→BN(→residual add)(→activation) that can be proven in one operator each.

    The modules stay where they are, and so do ``state_dict`` keys, parameters, buffers and classes: only the forward of
    the containers is rewritten. Containers are copied, everything else is shared with ``model``, which stays as it was.
    A convolution or batch normalisation is left alone that is shared, called twice, hooked or parametrized, or whose
    value in between is seen by anything else. A rewritten forward calls the modules again when hooks are added later.

    Args:
        model: nn.Sequential, forwards that torch.fx can trace, and any other with an example.
        example: an input tensor or a tuple of arguments. A copy of the model is called with it, in training and in
            eval mode, and shows which convolutions, batch normalisations and activations follow each other where no
            forward could be traced. It must take the path that later inputs take; another path raises RuntimeError.
        memory: what the backward passes start from, see :func:`conv_bn`.
        report: return (model, report).

    Returns:
        The fused model, or the fused model and a :class:`FusionReport`.
    """
    model = unfuse(model)
    arguments = example if example is None or isinstance(example, tuple) else (example,)
    plans, shown, found = find(model, arguments, why_not_fuse, memory)
    substitutes: dict[int, nn.Module] = {}
    for chain in shown:
        modules = [None if p is None else model.get_submodule(p) for p in (chain.conv, chain.bn, chain.activation)]
        substitutes |= hand_over(modules, chain.conv, memory)

    def change(path: str, module: nn.Module) -> nn.Module:
        if path not in plans:
            return substitutes.get(id(module), module)
        fused = object.__new__(fused_class(plain_class(module)))
        fused.__dict__.update(module.__dict__, _plan=plans[path])
        return fused

    result = rebuild(model, change)
    return (result, found) if report else result


def unfuse(model: nn.Module) -> nn.Module:
    """The same model in torch's own modules; parameters, buffers and ``state_dict`` keys stay.

    What :func:`fuse` rewrote becomes what it was; a ConvBN or LinearBN layer becomes an nn.Sequential of ``conv``,
    ``bn`` and ``act``, which takes no residual.
    """

    def change(path: str, module: nn.Module) -> nn.Module:
        if isinstance(module, _ConvBN):
            return module.unfused()
        return bare_copy(module) if hasattr(type(module), "_plain_class") else module

    return rebuild(model, change)
