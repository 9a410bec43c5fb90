"""Find Conv→BN(→residual add)(→activation) in the graph of a forward, and replace each by one call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from .modules import PAIRS, belongs, call_conv_bn, computes_as, has_hooks, is_activation, is_batch_norm, is_convolution

Reason = Callable[[Any, Any], str | None]  # why a convolution and a batch normalisation must stay two modules
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.silu: "silu", F.gelu: "gelu", F.hardswish: "hardswish", F.leaky_relu: "leaky_relu", F.leaky_relu_: "leaky_relu",
}  # fmt: skip


def why_not_join(conv: Any, bn: Any, shared: set[int]) -> str | None:
    """The reason why bn(conv(·)) must stay two modules whatever would be made of them, or None."""
    for name, module in (("convolution", conv), ("batch normalisation", bn)):
        if id(module) in shared:
            return f"the {name} is used more than once"
        if has_hooks(module):
            return f"the {name} has hooks"
        if parametrize.is_parametrized(module):
            return f"the {name} is parametrized"
    if conv.training != bn.training:
        return "train/eval flags differ"
    return None


def why_not_fuse(conv: Any, bn: Any, shared: set[int]) -> str | None:
    """The reason why the fused operator cannot compute bn(conv(·)), or None."""
    norm = next((norm for kind, norm in PAIRS.items() if computes_as(conv, kind)), None)
    if norm is None:
        own = not type(conv).__module__.startswith("torch.nn.")
        return f"{type(conv).__name__} has {'a forward of its own' if own else 'no fused operator'}"
    if not belongs(conv, bn):
        return f"{type(bn).__name__} after {type(conv).__name__} is not nn.{norm.__name__}"
    if bn.num_features != conv.weight.shape[0]:
        return f"{bn.num_features} features after {conv.weight.shape[0]} channels"
    return why_not_join(conv, bn, shared)


@dataclass(frozen=True)
class Chain:
    """A convolution and what was fused with it: paths of modules; a functional activation has a name and no path."""

    conv: str
    bn: str
    residual: bool = False
    activation: str | None = None
    functional: str | None = None

    def below(self, prefix: str) -> Chain:
        """The same chain, seen from further up."""
        paths = (self.conv, self.bn, self.activation)
        conv, bn, activation = (join(prefix, path) if path else path for path in paths)
        return replace(self, conv=conv, bn=bn, activation=activation)  # type: ignore[arg-type]

    def __str__(self) -> str:
        activation = self.activation or self.functional
        return f"{self.conv} → {self.bn}" + " + residual" * self.residual + (f" → {activation}" if activation else "")


def join(prefix: str, path: str) -> str:
    """The path of a module below the module with the first path."""
    return ".".join(filter(None, (prefix, path)))


@dataclass(frozen=True)
class Left:
    """A batch normalisation that was not fused; ``pair`` where a convolution is, or may be, right before it."""

    bn: str
    reason: str
    pair: bool


def _is_pure(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node surely writes to none of its arguments."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    if node.op == "call_module":
        return all(
            type(m).__module__.startswith("torch.nn.") and not getattr(m, "inplace", False) and not has_hooks(m)
            for m in root.get_submodule(name).modules()
        )
    if node.op == "call_method":
        return not name.endswith("_")
    if node.op == "call_function":
        home = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
        if home in ("_operator", "operator"):
            return not name.startswith("i") and name != "setitem"
        flagged = node.kwargs.get("inplace", False) or any(argument is True for argument in node.args)
        return home == "torch" and not name.endswith("_") and not flagged
    return True


def _activation_of(node: fx.Node, value: fx.Node, root: nn.Module) -> dict[str, Any]:
    """The activation that a node applies to a value, as fields of its chain; empty where it does something else."""
    if not node.args or node.args[0] is not value:
        return {}
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        fits = len(node.args) == 1 and not node.kwargs and is_activation(module) and not has_hooks(module)
        return {"activation": str(node.target)} if fits else {}
    name = _FUNCTIONS.get(node.target)
    options = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    if name == "leaky_relu":
        slope = options.pop("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
        name = f"leaky_relu({slope!r})" if isinstance(slope, float | int) else None
    elif name == "gelu" and options.pop("approximate", "none") != "none":
        name = None
    return {"functional": name} if name and not options else {}


def _is_sum(node: fx.Node, value: fx.Node) -> bool:
    """Whether a node adds another value to this one, and writes to no other."""
    if node.target not in (operator.add, operator.iadd, torch.add, "add", "add_") or node.kwargs or len(node.args) != 2:
        return False
    a, b = node.args
    in_place = node.target in (operator.iadd, "add_")
    return isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b and (a is value or not in_place)


@dataclass
class Match:
    """A chain and its nodes in the graph."""

    chain: Chain
    nodes: list[fx.Node]  # convolution, batch normalisation, then sum and activation

    @property
    def residual(self) -> Any:
        """The other summand, as it is now: rewriting another match may have replaced it."""
        return next((a for a in self.nodes[2].args if a is not self.nodes[1]), None) if self.chain.residual else None


def _grow(match: Match, root: nn.Module) -> Iterator[Match]:
    """The match, then what it becomes with the node behind it, as long as nothing else sees the values in between."""
    yield match
    chain, last = match.chain, match.nodes[-1]
    if chain.activation or chain.functional or len(last.users) != 1:
        return
    (user,) = last.users
    if activation := _activation_of(user, last, root):
        yield Match(replace(chain, **activation), [*match.nodes, user])
    elif not chain.residual and _is_sum(user, last):
        yield from _grow(Match(replace(chain, residual=True), [*match.nodes, user]), root)


def find_chains(graph: fx.Graph, root: nn.Module, why: Reason) -> tuple[list[Match], list[Left]]:
    """Every chain, the longest that can be proven, and every batch normalisation in none, with the reason."""
    order = list(graph.nodes)
    position = {node: index for index, node in enumerate(order)}
    called = [root.get_submodule(str(n.target)) if n.op == "call_module" else None for n in order]
    matches: list[Match] = []
    left: list[Left] = []
    taken: set[fx.Node] = set()
    for node, bn in zip(order, called, strict=True):
        if not is_batch_norm(bn):
            continue
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        conv = called[position[source]] if isinstance(source, fx.Node) else None
        path = str(node.target)
        if not isinstance(source, fx.Node) or not is_convolution(conv):
            left.append(Left(path, "no convolution is right before it", False))
            continue
        reason = why(conv, bn)
        if reason is None and (called.count(conv) > 1 or called.count(bn) > 1):
            reason = "the convolution or the batch normalisation is called more than once"
        if reason is None and len(source.users) > 1:
            reason = "the convolution's output is used elsewhere too"
        if reason is None and (len(source.args) != 1 or source.kwargs):
            reason = "the convolution is called with more than its input"
        if reason is not None:
            left.append(Left(path, reason, True))
            continue
        longest = None
        for match in _grow(Match(Chain(str(source.target), path), [source, node]), root):
            between = order[position[source] + 1 : position[match.nodes[-1]]]
            if all(n in match.nodes or _is_pure(n, root) for n in between) and not taken.intersection(match.nodes):
                longest = match
        if longest is None:
            left.append(Left(path, "something may be written in place between the two", True))
        else:
            matches.append(longest)
            taken.update(longest.nodes)
    return matches, left


def rewrite(graph: fx.Graph, matches: Sequence[Match], memory: str) -> None:
    """Replace every match by one call of :func:`call_conv_bn`, at the place of its last node."""
    for match in matches:
        conv, *_, last = match.nodes
        with graph.inserting_before(last):
            chain = match.chain
            modules: list[Any] = [graph.get_attr(path) for path in (chain.conv, chain.bn)]
            activation = graph.get_attr(chain.activation) if chain.activation else chain.functional
            arguments = (*modules, conv.args[0], match.residual, activation, memory)
            fused = graph.call_function(call_conv_bn, arguments)
        last.replace_all_uses_with(fused)
        for node in reversed(match.nodes):
            graph.erase_node(node)
