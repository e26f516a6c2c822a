"""What dlkern would do for a model: what convert() swaps, parity, and speed, whole and layer by layer."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from dlkern.bench import timing
from dlkern.convert import ModuleReport, conversion_report, convert
from dlkern.overrides import enabled
from dlkern.testing._parity import Row
from dlkern.testing._training import distances, move
from dlkern.trace import Record, trace

__all__ = ["Comparison", "Layer", "Timing", "compare_models", "interleave", "load_model", "parse_input"]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of the two sides, and torch's divided by dlkern's: the median over pairs timed side by side."""

    torch_ms: float
    dlkern_ms: float
    ratio: float


@dataclass(frozen=True)
class Layer:
    """One converted module on the input it got: its timing alone, forward and, where it has a gradient, backward."""

    name: str
    kind: str
    shape: tuple[int, ...]
    backends: str
    forward: Timing
    training: Timing | None


@dataclass
class Comparison:
    """What compare_models found."""

    modules: list[ModuleReport]
    calls: list[Record]  # of dlkern's ops in one forward
    functional: list[Record]  # further calls that dlkern.enabled() would take
    rows: list[Row]
    forward: Timing
    training: Timing | None
    layers: list[Layer] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether outputs and gradients keep the rule."""
        return all(row.ok for row in self.rows)


def load_model(target: str) -> torch.nn.Module:
    """The model that "package.module:factory" names: a function or class to call, or a module to take as it is.

    The current directory is searched first.

    Raises:
        ValueError: there is no such thing, with the reason.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"expected package.module:factory, got {target!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"cannot import {module_name}: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module_name} has no {attribute!r}")
        found = getattr(found, part)
    if not isinstance(found, torch.nn.Module):
        if not callable(found):
            raise ValueError(f"{target} is neither a model nor a function that makes one, but {type(found).__name__}")
        try:
            found = found()
        except Exception as error:
            raise ValueError(f"{target}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, torch.nn.Module):
        raise ValueError(f"{target}() gave {type(found).__name__}, not a torch.nn.Module")
    return found


def parse_input(text: str, generator: torch.Generator) -> torch.Tensor:
    """Random input from "8,3,224,224", or integers below 1000 from "8,128:int64:1000".

    Raises:
        ValueError: neither of these forms.
    """
    shape_text, _, rest = text.partition(":")
    dtype_text, _, high = rest.partition(":")
    try:
        shape = [int(size) for size in shape_text.split(",")]
        bound = int(high) if high else 2
    except ValueError:
        raise ValueError(f"expected sizes like 8,3,224,224 or 8,128:int64:1000, got {text!r}") from None
    dtype = getattr(torch, dtype_text or "float32", None)
    if not isinstance(dtype, torch.dtype) or min(shape) < 0:
        raise ValueError(f"expected sizes like 8,3,224,224 or 8,128:int64:1000, got {text!r}")
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, bound, shape, generator=generator).to(dtype)


def interleave(
    theirs: Callable[[], Any], ours: Callable[[], Any], device: torch.device, seconds: float = 1.0
) -> Timing:
    """Times two functions in turn, so that what else the machine does meets both alike."""
    samples = timing.interleave({"torch": theirs, "dlkern": ours}, device=device.type, seconds=seconds, minimum=5)
    ratio = timing.ratio(samples["torch"], samples["dlkern"]).median
    return Timing(samples["torch"].median, samples["dlkern"].median, ratio)


def _floats(output: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _cotangents(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outputs]


def _results(model: torch.nn.Module, inputs: Sequence[torch.Tensor], backward: bool) -> dict[str, torch.Tensor]:
    outputs = _floats(model(*inputs))
    seen = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if backward:
        pairs = [(o, c) for o, c in zip(outputs, _cotangents(outputs)) if o.requires_grad]
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        gradients = () if not pairs or not named else torch.autograd.grad(
            [o for o, _ in pairs], [p for _, p in named], [c for _, c in pairs], allow_unused=True
        )
        seen |= {f"grad of {n}": g for (n, _), g in zip(named, gradients) if g is not None}
    return seen


def _without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.eval()
    return model


def _parity(
    model: torch.nn.Module, inputs: Sequence[torch.Tensor], dtype: torch.dtype, backward: bool
) -> list[Row]:
    def widened(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [t.double() if t.is_floating_point() else t for t in tensors]

    generator = torch.Generator().manual_seed(2)
    exact = _results(_without_dropout(copy.deepcopy(model)).double(), widened(inputs), backward)
    theirs = []
    for _ in range(5):
        other = _without_dropout(copy.deepcopy(model))
        if not any(x.is_floating_point() for x in inputs):  # integers choose rows of embeddings: those are moved
            with torch.no_grad():
                for module in other.modules():
                    if isinstance(module, torch.nn.Embedding):
                        module.weight.copy_(move(module.weight, generator))
        theirs.append(_results(other, [move(x, generator) for x in inputs], backward))
    ours = _results(_without_dropout(convert(copy.deepcopy(model))), inputs, backward)
    return distances(ours, theirs, exact, dtype)


def _step(model: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> Callable[[], None]:
    outputs = _floats(model(*inputs))
    cotangents = _cotangents(outputs)

    def step() -> None:
        model.zero_grad()
        found = _floats(model(*inputs))
        pairs = [(o, c) for o, c in zip(found, cotangents) if o.requires_grad]
        if pairs:  # none in a model without parameters
            torch.autograd.backward([o for o, _ in pairs], [c for _, c in pairs])

    return step


def _forward(model: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.no_grad():
            return model(*inputs)

    return forward


def _layer_inputs(model: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    """The positional arguments each module that convert() swaps gets, in the order of the calls."""
    seen: dict[str, tuple[Any, ...]] = {}
    names = {r.name for r in conversion_report(model) if r.status == "convertible"}
    handles = []
    for name, module in model.named_modules():
        if name in names and next(module.children(), None) is None:

            def note(module: torch.nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                if args and all(isinstance(a, torch.Tensor) for a in args):
                    seen.setdefault(name, tuple(a.detach() for a in args))

            handles.append(module.register_forward_pre_hook(note))
    try:
        _forward(model, inputs)()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _time_layers(
    model: torch.nn.Module, inputs: Sequence[torch.Tensor], backward: bool, seconds: float
) -> list[Layer]:
    modules = dict(model.named_modules())
    known: dict[Any, Layer] = {}
    layers = []
    for name, args in _layer_inputs(model, inputs).items():
        theirs = modules[name]
        key = (repr(theirs), tuple((a.shape, a.stride(), a.dtype) for a in args))
        if key not in known:  # the same layer on the same shape is timed once
            theirs = copy.deepcopy(theirs)
            ours = convert(copy.deepcopy(theirs))
            device = args[0].device
            with trace() as calls, torch.no_grad():
                ours(*args)
            forward = interleave(_forward(theirs, args), _forward(ours, args), device, seconds)
            training = None
            if backward and args[0].is_floating_point():
                leaves = [a.requires_grad_(a.is_floating_point()) for a in args]
                training = interleave(_step(theirs, leaves), _step(ours, leaves), device, seconds)
            kind = type(theirs).__name__
            backends = ", ".join(dict.fromkeys(c.backend for c in calls))
            known[key] = Layer(name, kind, tuple(args[0].shape), backends, forward, training)
        found = known[key]
        layers.append(Layer(name, found.kind, found.shape, found.backends, found.forward, found.training))
    return layers


def compare_models(
    model: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    *,
    backward: bool = True,
    seconds: float = 2.0,
    layer_seconds: float = 0.1,
) -> Comparison:
    """Compares a torch model with its converted copy.

    Args:
        model: left as it is, but for buffers that its forward updates; compared in the mode it is in, with dropout off
            where parity is checked.
        inputs: its positional arguments.
        backward: compare and time gradients as well.
        seconds, layer_seconds: how long to time the whole model and each different layer, for each of forward and
            training step.

    Returns:
        A Comparison. The measure of parity is five torch runs whose inputs were moved by one unit in the last place.
    """
    device = inputs[0].device
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    converted = convert(copy.deepcopy(model))
    with trace() as calls:
        _forward(converted, inputs)()
    with trace() as more, enabled():
        _forward(converted, inputs)()
    functional = list(more)
    for call in calls:
        match = next((i for i, c in enumerate(functional) if (c.op, c.shapes) == (call.op, call.shapes)), None)
        if match is not None:
            del functional[match]
    rows = _parity(model, inputs, dtype, backward)
    theirs = copy.deepcopy(model)
    forward = interleave(_forward(theirs, inputs), _forward(converted, inputs), device, seconds)
    training = interleave(_step(theirs, inputs), _step(converted, inputs), device, seconds) if backward else None
    layers = _time_layers(theirs, inputs, backward, layer_seconds)
    return Comparison(conversion_report(converted), list(calls), functional, rows, forward, training, layers)
