"""convert(fuse=True): layers that follow each other in a model, found with torch.fx and run as one op.

A convolution, a batch norm, the addition of a residual and a ReLU in a row, or any tail of that row with two members,
become one call. In training, convolution and batch norm stay two ops, of which the second takes the residual and the
activation along. Where nothing is to be differentiated and batch norm is in evaluation mode, its scale is folded into
the convolution's weight where that is the smaller work: anew in every call, or once and for all after dlkern.freeze.
The modules stay where they are and keep their parameters, so that state_dict does not change.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import dlkern.nn
from dlkern import ops
from dlkern._graph import trace
from dlkern.freeze import Frozen, check_no_gradient, is_plain
from dlkern.nn import functional as F
from dlkern.nn.functional.conv import result_size
from dlkern.ops import _plain
from dlkern.ops._activation import Activation
from dlkern.ops._layout import memory_format, suggests_channels_last
from dlkern.reference.linear import activate

__all__ = ["Fused", "Fusion", "fuse"]

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_WRITING_OPERATORS = (
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.ilshift, operator.irshift,
)  # fmt: skip
_RELUS = (torch.relu, torch.relu_, torch.nn.functional.relu, torch.nn.functional.relu_)
_OURS = (dlkern.nn.Conv2d, dlkern.nn.BatchNorm1d, dlkern.nn.BatchNorm2d, dlkern.nn.BatchNorm3d, type(None))
_METHODS_ADD, _METHODS_RELU = ("add", "add_"), ("relu", "relu_")


@dataclass(frozen=True)
class Fusion:
    """One fused row: the modules' names in named_modules(), and what happens in it ("conv + batch_norm + add + relu")."""

    modules: tuple[str, ...]
    what: str


class Fused(torch.nn.Module):
    """activation(batch_norm(conv(x)) + residual) of modules that live elsewhere in the model.

    Attributes:
        conv: a dlkern.nn.Conv2d, or None.
        norm: a dlkern.nn.BatchNorm1d, 2d or 3d, or None.
        activation: what comes last.
    """

    conv: Any
    norm: Any
    activation: Activation
    _frozen: Frozen | None = None

    def __init__(self, conv: torch.nn.Module | None, norm: torch.nn.Module | None, activation: Activation) -> None:
        super().__init__()
        # Not registered: their parameters belong to the modules' own names.
        vars(self).update(conv=conv, norm=norm)
        self.activation = activation

    def extra_repr(self) -> str:
        return " + ".join(part for part in (
            "conv" if self.conv is not None else "", "batch_norm" if self.norm is not None else "",
            self.activation.name.lower() if self.activation else "",
        ) if part)  # fmt: skip

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        conv, norm, activation = self.conv, self.norm, self.activation
        if not isinstance(conv, _OURS) or not isinstance(norm, _OURS):  # revert() made them torch's
            y = x if conv is None else conv(x)
            y = y if norm is None else norm(y)
            return activate(y if residual is None else y + residual, activation)
        if conv is not None and self._frozen is not None:
            output = self._answer(self._frozen, x, residual)
            if output is not None:
                return output
        if norm is not None and not self._folds(x):
            y = x if conv is None else conv(x)
            if _fits(residual, y.shape, y.dtype):
                return norm(y, activation=activation, residual=residual)
            assert residual is not None
            return activate(norm(y) + residual, activation)
        weight, bias = (conv.weight, conv.bias) if norm is None else folded(conv, norm)
        settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
        if _fits(residual, result_size(x, weight, *settings[:3]), x.dtype):
            return F.conv2d_act(x, weight, bias, *settings, activation=activation, residual=residual)
        assert residual is not None
        return activate(F.conv2d(x, weight, bias, *settings) + residual, activation)


    def _folds(self, x: torch.Tensor) -> bool:
        """Whether to fold batch norm into the weight, which must be possible and less work than going over the result."""
        conv, norm = self.conv, self.norm
        if conv is None or norm.training or norm.running_mean is None or torch.is_grad_enabled():
            return False
        size = result_size(x, conv.weight, conv.stride, conv.padding, conv.dilation)
        return size is not None and conv.weight.numel() < math.prod(size)

    def _answer(self, frozen: Frozen, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor | None:
        """The result from weights that are kept, folded and packed; None where this call has to go the usual way."""
        conv, norm = self.conv, self.norm
        check_no_gradient(self, conv.weight, conv.bias)
        if norm is not None and (norm.training or norm.running_mean is None):
            return None
        try:
            if not is_plain(conv, x, conv.padding):
                return None
            sources: tuple[torch.Tensor | float | None, ...] = (conv.weight, conv.bias)
            if norm is not None:
                sources += (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)

            def make() -> tuple[torch.Tensor, ...]:
                weight, bias = (conv.weight, conv.bias) if norm is None else folded(conv, norm)
                return weight, bias, ops.conv.pack(weight, conv.groups)

            weight, bias, packed = frozen.kept(sources, make)
            settings = (conv.stride, conv.padding, conv.dilation)
            if residual is not None:
                if not _fits(residual, result_size(x, weight, *settings), x.dtype):
                    return None
                channels_last = suggests_channels_last(x) or suggests_channels_last(weight)
                residual = residual.contiguous(memory_format=memory_format(channels_last))
            return ops.conv.forward_packed(x, weight, packed, bias, residual, *settings, conv.groups, int(self.activation))
        except _plain.REFUSALS:
            return None  # the usual way says what is wrong


def _fits(residual: torch.Tensor | None, size: Any, dtype: torch.dtype) -> bool:
    """Whether a kernel can add the residual; an addition in a model may broadcast or change the dtype."""
    return residual is None or (residual.shape == size and residual.dtype == dtype)


def folded(conv: Any, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the convolution that does both in evaluation:
    weight · scale and (bias - running_mean) · scale + norm.bias, with scale = norm.weight / sqrt(running_var + eps)."""
    # What has one element a channel in double, which costs nothing; the weight is rounded once in 16 bits.
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = -norm.running_mean.double() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    dtype = conv.weight.dtype
    factor = scale if dtype == torch.float64 else scale.float()
    return (conv.weight * factor.reshape(-1, 1, 1, 1)).to(dtype), bias.to(dtype)


def _has_hooks(module: torch.nn.Module) -> bool:
    return any(
        getattr(module, name)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


class _Finder:
    """The rows of one graph."""

    def __init__(self, model: fx.GraphModule) -> None:
        self.model = model

    def module(self, node: fx.Node, *classes: type) -> Any:
        """The node's module where it is exactly of one of the classes, called with one tensor, and has no hooks."""
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        module = self.model.get_submodule(str(node.target))
        plain = type(module) in classes and not _has_hooks(module) and "forward" not in vars(module)
        return module if plain else None

    def is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return self.module(node, torch.nn.ReLU) is not None
        if node.op == "call_function":
            return node.target in _RELUS
        return node.op == "call_method" and node.target in _METHODS_RELU

    def is_addition(self, node: fx.Node) -> bool:
        function = node.op == "call_function" and node.target in _ADDITIONS
        method = node.op == "call_method" and node.target in _METHODS_ADD
        return (function or method) and len(node.args) == 2 and not node.kwargs and all(
            isinstance(a, fx.Node) for a in node.args
        )

    def writes_to(self, node: fx.Node) -> Any:
        """What an addition writes its result into, or None."""
        return node.args[0] if node.target in (operator.iadd, "add_") else None

    def writes(self, node: fx.Node) -> bool:
        """Whether a node may write to a tensor that is there already."""
        if node.op == "call_module":
            return bool(getattr(self.model.get_submodule(str(node.target)), "inplace", False))
        if node.op not in ("call_function", "call_method"):
            return False
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or node.target in _WRITING_OPERATORS
        return in_place or bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None

    def is_disturbed(self, row: _Row) -> bool:
        """Whether something between a row's first and last node writes: the row then would read another input, late."""
        own, node = {*row.nodes, row.addition}, row.nodes[0]
        while (node := node.next) is not row.last:
            if node not in own and self.writes(node):
                return True
        return False

    def conv(self, node: Any) -> Any:
        conv = self.module(node, dlkern.nn.Conv2d) if isinstance(node, fx.Node) and len(node.users) == 1 else None
        return conv if conv is not None and conv.padding_mode == "zeros" and conv.weight.shape[1] else None

    def norm(self, node: Any) -> Any:
        classes = (dlkern.nn.BatchNorm1d, dlkern.nn.BatchNorm2d, dlkern.nn.BatchNorm3d)
        return self.module(node, *classes) if isinstance(node, fx.Node) and len(node.users) == 1 else None

    def producer(self, node: Any) -> tuple[list[fx.Node], Any, Any] | None:
        """The nodes of a batch norm or convolution that ends at `node`, first to last, and the two modules."""
        norm = self.norm(node)
        if norm is not None:
            conv = self.conv(node.args[0]) if isinstance(norm, dlkern.nn.BatchNorm2d) else None
            return ([node.args[0], node] if conv is not None else [node]), conv, norm
        conv = self.conv(node)
        return ([node], conv, None) if conv is not None else None


@dataclass(frozen=True)
class _Row:
    """What one op replaces: the modules' nodes, the last node, the modules, the residual's node, whether a ReLU ends it, and
    the node of the addition."""

    nodes: list[fx.Node]
    last: fx.Node
    conv: Any
    norm: Any
    residual: Any
    relu: bool
    addition: Any = None


def _replace(model: fx.GraphModule, row: _Row, number: int) -> Fusion:
    name = f"fused_{number}"
    model.add_submodule(name, Fused(row.conv, row.norm, Activation.RELU if row.relu else Activation.NONE))
    source = row.nodes[0].args[0]
    with model.graph.inserting_after(row.last):
        node = model.graph.call_module(name, (source,) if row.residual is None else (source, row.residual))
    row.last.replace_all_uses_with(node)
    modules = tuple(str(n.target) for n in row.nodes)
    words = (row.conv, "conv"), (row.norm, "batch_norm"), (row.residual, "add"), (row.relu or None, "relu")
    return Fusion(modules, " + ".join(word for there, word in words if there is not None))


def fuse(model: torch.nn.Module) -> tuple[fx.GraphModule, list[Fusion]]:
    """A torch.fx.GraphModule that runs `model` with rows of layers as one op, and the rows it found.

    Both share modules, parameters and buffers; submodules of the result have the names they had.

    Raises:
        ValueError: torch.fx cannot trace the model; the error says where.
    """
    try:
        graph_module = trace(model)
    except Exception as error:
        raise ValueError(f"convert(fuse=True): torch.fx cannot trace {type(model).__name__}: {error}") from error
    finder, found = _Finder(graph_module), list[Fusion]()
    for ends in (finder.is_relu, finder.norm):  # a batch norm ends a row only where no ReLU took it along
        for node in list(graph_module.graph.nodes):
            row = _row_at(finder, node) if not node._erased and ends(node) else None
            if row is not None and not finder.is_disturbed(row):
                found.append(_replace(graph_module, row, len(found)))
                graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()
    # What the graph does not call, any more or at all, stays for its parameters.
    for name, module in model.named_modules(remove_duplicate=False):
        if name and not _has(graph_module, name) and next(module.children(), None) is None:
            graph_module.add_submodule(name, module)
    for name in [name for name in graph_module._buffers if name.startswith("_tensor_constant")]:
        graph_module._non_persistent_buffers_set.add(name)  # what the trace made, and no state_dict has
    for name, module in model.named_modules(remove_duplicate=False):
        if not _has(graph_module, name):
            continue
        copy = graph_module.get_submodule(name)
        copy.training = module.training
        for own_name, parameter in module._parameters.items():
            if own_name not in copy._parameters:
                copy.register_parameter(own_name, parameter)
        for own_name, buffer in module._buffers.items():
            if own_name not in copy._buffers:
                copy.register_buffer(own_name, buffer, own_name not in module._non_persistent_buffers_set)
    # In the model's order: an optimizer's state_dict counts on it.
    for name, module in model.named_modules():
        if _has(graph_module, name):
            mine = graph_module.get_submodule(name)._modules
            rest = [key for key in mine if key not in module._modules]
            mine |= {key: mine.pop(key) for key in (*(k for k in module._modules if k in mine), *rest)}
    graph_module.training = model.training
    return graph_module, found


def _has(model: torch.nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _row_at(finder: _Finder, node: fx.Node) -> _Row | None:
    """The row that ends at `node`, a ReLU or a batch norm."""
    if not finder.is_relu(node):
        made = finder.producer(node)
        return None if made is None or made[1] is None else _Row(made[0], node, made[1], made[2], None, False)
    before = node.args[0] if node.args else None
    if not isinstance(before, fx.Node) or len(before.users) != 1:
        return None
    if not finder.is_addition(before):
        made = finder.producer(before)
        return None if made is None else _Row(made[0], node, made[1], made[2], None, True)
    for mine, other in (before.args, reversed(before.args)):
        made = finder.producer(mine)
        if made is not None and mine is not other and finder.writes_to(before) is not other:  # others may see it
            return _Row(made[0], node, made[1], made[2], other, True, before)
    return None
