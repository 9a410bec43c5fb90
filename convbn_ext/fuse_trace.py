"""What one forward does, by symbolic tracing with every child module as a leaf.

A trace is taken for the forward only where it is the forward: what reads values, changes the module, switches autograd
or draws random numbers while it is being traced is refused.
"""

from __future__ import annotations

import inspect
import operator
import random
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from .modules import is_batch_norm, is_convolution, plain_class

FUSE_ATTRIBUTES = ("_plan", "_chain", "_mark", "_memory")  # what fused modules carry


class Untraceable(Exception):
    """Why a forward is not known from its trace."""


class _Proxy(fx.Proxy):
    """A value of the trace that answers isinstance like the real one, and keeps in-place operators in place."""

    kind: type[Any] = fx.Proxy
    _is_param = False  # what isinstance(·, nn.Parameter) asks

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        return self.kind


class TensorProxy(_Proxy):
    """Stands for a tensor."""

    kind = Tensor


class ListProxy(_Proxy):
    """Stands for a list of tensors."""

    kind = list


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    target = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    """Children are leaves; required arguments are proxies, the others keep their defaults."""

    def __init__(self, argument: type[_Proxy]) -> None:
        super().__init__()
        self.argument = argument

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        required, defaults = parameters(root_fn)
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in required]
        return root_fn, [self.root, *proxies, *defaults.values()]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if node.op == "placeholder":
            return self.argument(node, self)
        if node.op == "call_module" and (is_convolution(self._called(node)) or is_batch_norm(self._called(node))):
            return TensorProxy(node, self)
        return _Proxy(node, self)

    def _called(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(str(node.target))

    def create_arg(self, a: Any) -> Any:
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)


class _OnlyProxies(TorchFunctionMode):
    """Refuses what the trace would freeze: random numbers, constants, the grad mode, autocast."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(issubclass(kind, fx.Proxy) for kind in types):
            raise Untraceable(f"its forward calls {getattr(func, '__name__', func)} on what is no input")
        return func(*args, **(kwargs or {}))


def parameters(forward: Any) -> tuple[list[str], dict[str, Any]]:
    """Names of a method's required parameters, and the others with their defaults."""
    required: list[str] = []
    defaults: dict[str, Any] = {}
    for p in list(inspect.signature(forward).parameters.values())[1:]:
        if p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            raise Untraceable(f"its forward takes {p}")
        if p.default is p.empty:
            required.append(p.name)
        else:
            defaults[p.name] = p.default
    return required, defaults


def _state(module: nn.Module) -> dict[str, Any]:
    """What a forward could change: every attribute, containers with their items."""
    state: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | set) else ()
        state[name] = (id(value), [id(item) for item in items])
    return state


def trace(module: nn.Module, argument: type[_Proxy], training: bool) -> fx.Graph:
    """The graph of a module's own forward.

    Raises:
        Untraceable: the forward is more than its graph; the message says why.
    """
    view = bare_copy(module)  # what the forward changes is changed here
    view.__dict__.update({k: v.copy() for k, v in view.__dict__.items() if isinstance(v, dict | list | set)})
    view.training = training
    before, generator = _state(view), random.getstate()
    try:
        with _OnlyProxies():
            graph = _Tracer(argument).trace(view)
    except Untraceable:
        raise
    except Exception as error:  # whatever a forward does when it meets a proxy
        raise Untraceable(f"torch.fx cannot trace its forward: {str(error).splitlines()[0][:120]}") from error
    if _state(view) != before:
        raise Untraceable("its forward changes the module")
    if random.getstate() != generator:
        raise Untraceable("its forward draws random numbers")
    return graph


def bare_copy(module: nn.Module) -> nn.Module:
    """A module of the plain class with the same children, parameters and attributes."""
    view: nn.Module = object.__new__(plain_class(module))
    view.__dict__.update({name: value for name, value in module.__dict__.items() if name not in FUSE_ATTRIBUTES})
    return view
