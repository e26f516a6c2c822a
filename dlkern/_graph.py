"""A model as a torch.fx.GraphModule that train() and eval() still reach.

A trace runs the model's Python code once, and what that code reads of `self.training` would stay what it was. Here
modules that read it are kept whole where they hold no others (DropPath, StochasticDepth), and a call of a function
that gets it (`dropout(x, 0.5, self.training)`) becomes a module. Which argument that is shows in a second trace: it is
True in training and False in evaluation.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import fx

__all__ = ["InMode", "Tracer", "trace"]


class InMode(torch.nn.Module):
    """A function to which `training` is given in the arguments at these places and under these names."""

    def __init__(self, function: Any, places: tuple[int, ...], names: tuple[str, ...]) -> None:
        super().__init__()
        self.function, self.places, self.names = function, places, names

    def extra_repr(self) -> str:
        return str(getattr(self.function, "__name__", self.function))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args = tuple(self.training if i in self.places else arg for i, arg in enumerate(args))
        return self.function(*args, **kwargs | dict.fromkeys(self.names, self.training))


class Tracer(fx.Tracer):
    """torch.fx's, which also keeps whole what reads its mode and holds no modules."""

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        code = getattr(type(m).forward, "__code__", None)
        reads_mode = code is not None and "training" in code.co_names and next(m.children(), None) is None
        return reads_mode or super().is_leaf_module(m, module_qualified_name)


def trace(model: torch.nn.Module) -> fx.GraphModule:
    """The model as a graph. Where the two modes take different ways, it is that of the mode the model is in, and a
    warning says so."""
    modes = {module: module.training for module in model.modules()}
    try:
        graph, twin = Tracer().trace(model.train()), Tracer().trace(model.eval())
        calls = _calls_with_mode(graph, twin)
    except Exception:
        calls = None  # perhaps one of the modes can be traced
    finally:
        for module, mode in modes.items():
            module.training = mode
    if calls is None:
        graph = Tracer().trace(model)
        now = "train()" if model.training else "eval()"
        warnings.warn(
            f"convert(fuse=True): {type(model).__name__} takes another way in train() than in eval(); the result always "
            f"takes that of {now}, the mode it is in now",
            stacklevel=4,
        )
    result = fx.GraphModule(model, graph, type(model).__name__)
    for number, (node, places, names) in enumerate(calls or ()):
        stack = list(node.meta.get("nn_module_stack", {"": ("", None)}).values())
        owner = stack[-1][0] if stack else ""
        name = f"{owner}.in_mode_{number}".lstrip(".")
        result.add_submodule(name, InMode(node.target, places, names).train(model.get_submodule(owner).training))
        node.op, node.target = "call_module", name
        node.kwargs = {key: value for key, value in node.kwargs.items() if key not in names}
    return result


def _calls_with_mode(train: fx.Graph, evaluation: fx.Graph) -> list[tuple[fx.Node, tuple[int, ...], tuple[str, ...]]] | None:
    """The calls of functions that get the mode, with the places and names of the arguments that it is given in; None
    where the two graphs differ by more."""
    if len(train.nodes) != len(evaluation.nodes):
        return None
    twins: dict[fx.Node, fx.Node] = {}
    found = []
    for node, twin in zip(train.nodes, evaluation.nodes):
        twins[twin] = node
        args, kwargs = fx.node.map_arg((twin.args, twin.kwargs), twins.__getitem__)
        if not _same_target(node, twin) or len(node.args) != len(args) or list(node.kwargs) != list(kwargs):
            return None
        places = tuple(i for i, pair in enumerate(zip(node.args, args)) if _is_mode(*pair))
        names = tuple(name for name in kwargs if _is_mode(node.kwargs[name], kwargs[name]))
        same = all(i in places or mine == theirs for i, (mine, theirs) in enumerate(zip(node.args, args)))
        if not same or any(name not in names and node.kwargs[name] != kwargs[name] for name in kwargs):
            return None
        if places or names:
            if node.op != "call_function":
                return None
            found.append((node, places, names))
    return found


def _is_mode(in_training: Any, in_evaluation: Any) -> bool:
    return in_training is True and in_evaluation is False


def _same_target(node: fx.Node, twin: fx.Node) -> bool:
    if node.op == twin.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
        return str(twin.target).startswith("_tensor_constant")  # numbered on from trace to trace
    return (node.op, node.target) == (twin.op, twin.target)
