"""One module's forward written anew: the traces in every mode, the rewritten code, and the calls that it stands for."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from .fuse_match import Chain, Left, Match, Reason, find_chains, rewrite
from .fuse_trace import ListProxy, TensorProxy, Untraceable, parameters, trace

_Code = Callable[..., Any]
_BARE = frozenset(nn.Module().__dict__)  # attributes that every module has


def _compiled(graph: fx.Graph) -> _Code:
    for node in graph.nodes:
        node.type = None  # annotations may name what is not in scope here
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<convbn_ext.fuse>", "exec"), namespace)
    return namespace["forward"]


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Numbers, words and flags that a forward may branch on."""
    kinds = (bool, int, float, str, type(None))
    return {k: v for k, v in module.__dict__.items() if k not in _BARE and type(v) in kinds}


def _children(module: nn.Module) -> tuple[tuple[str, bool], ...]:
    return tuple((name, child is None) for name, child in module._modules.items())


class Plan:
    """The rewritten forwards of one module, and when they apply.

    It knows no module, so that copies of the module share it. A pickle leaves the code out, and :meth:`write` makes it
    again.
    """

    def __init__(self, module: nn.Module, why: Reason, memory: str) -> None:
        """Trace and rewrite a plain module's forward.

        Args:
            module: neither changed nor kept.
            why: why a convolution and a batch normalisation must stay apart, or None.
            memory: see :func:`conv_bn`.

        Raises:
            Untraceable: in no mode the forward is known from its trace.
        """
        self.memory = memory
        self.required, self.defaults = parameters(type(module).forward)
        self.attributes, self.children = _plain_attributes(module), _children(module)
        self.chains: dict[str, Chain] = {}
        self.left: dict[str, Left] = {}
        matches, left = self.write(module, why)
        self.chains = {match.chain.bn: match.chain for match in matches}
        self.left = {entry.bn: entry for entry in left if entry.bn not in self.chains}

    def write(self, module: nn.Module, reason: Reason) -> tuple[list[Match], list[Left]]:
        """Trace in every mode, rewrite and compile; what was matched and what was left."""
        self.codes: dict[tuple[bool, bool], _Code] = {}
        refusals: list[Untraceable] = []
        found: list[Match] = []
        left: list[Left] = []
        for training, is_list in itertools.product((True, False), (False, True)):
            try:
                graph = trace(module, ListProxy if is_list else TensorProxy, training)
            except Untraceable as refusal:
                refusals.append(refusal)
                continue
            matches, others = find_chains(graph, module, reason)
            found += matches
            left += others
            if matches:
                rewrite(graph, matches, self.memory)
                self.codes[training, is_list] = _compiled(graph)
        if len(refusals) == 4:
            raise refusals[0]
        return found, left

    def code_for(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Code | None, list[Any]]:
        """The rewritten forward for a call, and its arguments in order; None where the call is not a traced one."""
        names = (*self.required, *self.defaults)
        given = dict(zip(names, args, strict=False)) | kwargs
        fits = len(args) + len(kwargs) == len(given) and all(name in given for name in self.required)
        fits = fits and all(name in names for name in kwargs)
        fits = fits and all(given.get(name, default) is default for name, default in self.defaults.items())
        fits = fits and all(getattr(module, name, None) == value for name, value in self.attributes.items())
        if not fits or _children(module) != self.children:
            return None, []
        values = [given[name] for name in self.required]
        is_list = all(type(value) is list for value in values)
        if not is_list and not all(isinstance(value, Tensor) for value in values):
            return None, []
        return self.codes.get((module.training, is_list)), values

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "codes"}


@functools.cache
def fused_class(plain: Any) -> Any:
    """A subclass whose forward is the rewritten one; it is made once per class and pickles by the class it extends."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        code, values = self._plan.code_for(self, args, kwargs)
        return plain.forward(self, *args, **kwargs) if code is None else code(self, *values)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        _, _, *rest = plain.__reduce_ex__(self, protocol)
        return (_new_fused, (plain,), *rest)

    def setstate(self: Any, state: Any) -> None:
        plain.__setstate__(self, state)
        if not hasattr(self._plan, "codes"):  # from a pickle
            self._plan.write(self, lambda conv, bn: None)

    forward.__signature__ = inspect.signature(plain.forward)  # type: ignore[attr-defined]
    members = {"forward": forward, "__reduce_ex__": reduce_ex, "__setstate__": setstate}
    return type(plain.__name__, (plain,), members | {"_plain_class": plain, "__module__": plain.__module__})


def _new_fused(plain: Any) -> Any:
    cls = fused_class(plain)
    return cls.__new__(cls)
