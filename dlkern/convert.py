"""convert() and revert(): swap the classes of a model's modules, in place.

A module keeps being the same object: parameters, buffers, hooks, train or eval mode, state_dict and the optimizer
that holds its parameters stay; only `module.__class__` changes, to dlkern.nn's subclass of the same torch class.
That is why converting costs nothing, works before or after DDP and torch.compile, and can be undone.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn.utils import parametrize

import dlkern.nn
from dlkern.nn.modules.rnn import allow_in_dynamo
from dlkern.report import Table

__all__ = ["ModuleReport", "conversion_report", "convert", "revert"]

Model = TypeVar("Model", bound=torch.nn.Module)
Skip = Callable[[str, torch.nn.Module], bool]

# torch class -> dlkern class: every module dlkern.nn exports under the name torch.nn has it.
TO_DLKERN: dict[type, type] = {}
for _name in dlkern.nn.__all__:
    _ours, _theirs = getattr(dlkern.nn, _name), getattr(torch.nn, _name, None)
    if isinstance(_ours, type) and isinstance(_theirs, type) and issubclass(_ours, _theirs):
        TO_DLKERN[_theirs] = _ours
TO_TORCH = {ours: theirs for theirs, ours in TO_DLKERN.items()}

# Modules that only hold others or only change a view.
_NO_WORK = (
    torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.ParameterList, torch.nn.ParameterDict,
    torch.nn.Identity, torch.nn.Flatten, torch.nn.Unflatten, parametrize.ParametrizationList,
)  # fmt: skip


@dataclass(frozen=True)
class ModuleReport:
    """One module of a model, and whose kernels it runs on.

    Attributes:
        name: its name in named_modules(); "" for the model itself.
        kind: its class.
        status: "dlkern" (runs on dlkern), "convertible" (torch's now, convert() swaps it) or "torch" (stays torch's).
        reason: why convert() leaves it alone; "" where it does not.
    """

    name: str
    kind: str
    status: str
    reason: str = ""


def _is_parametrized(module: torch.nn.Module) -> bool:
    # parametrize gives such a module a class of its own, made from the module's class.
    return type(module).__module__ == parametrize.__name__ and parametrize.is_parametrized(module)


def _plain_class(module: torch.nn.Module) -> type:
    return type(module).__bases__[0] if _is_parametrized(module) else type(module)


def _set_class(module: torch.nn.Module, cls: type) -> None:
    if _is_parametrized(module):
        body = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), body)
    module.__class__ = cls


def _recompile() -> None:
    """Dynamo of torch before 2.13 does not look whether a module has another class: all that is compiled is made anew."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13) and "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _learn(cls: type) -> None:
    """Adds dlkern's counterpart of a class outside torch to the tables, when a model with such a module comes."""
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        from dlkern.huggingface import Conv1D  # noqa: F401  (it is made, and entered in the tables, on its first import)


def _target(module: torch.nn.Module) -> tuple[type | None, str]:
    """The class convert() gives a module, or None and why it does not."""
    cls = _plain_class(module)
    _learn(cls)
    if cls in TO_DLKERN:
        if "forward" in vars(module):
            return None, "its forward was replaced on the instance"
        return TO_DLKERN[cls], ""
    if isinstance(module, torch.jit.ScriptModule):
        return None, "TorchScript holds compiled code"
    if cls is torch.nn.modules.linear.NonDynamicallyQuantizableLinear:
        return None, "never called: MultiheadAttention reads its weights"
    for base in (*TO_TORCH, *TO_DLKERN):
        if isinstance(module, base):
            return None, f"a subclass of {base.__name__} with code of its own"
    if cls.__module__ == torch.nn.modules.activation.__name__ and cls is not torch.nn.MultiheadAttention:
        return None, "activations stay torch's"
    if cls.__module__.startswith("torch."):
        return None, f"dlkern has no {cls.__name__}"
    return None, "not a torch.nn module; dlkern.enabled() reaches the functions it calls"


def _report(name: str, module: torch.nn.Module) -> ModuleReport:
    kind = type(module).__name__
    if _plain_class(module) in TO_TORCH or _plain_class(module).__module__.startswith(f"{dlkern.nn.__name__}."):
        return ModuleReport(name, kind, "dlkern")
    target, reason = _target(module)
    return ModuleReport(name, kind, "torch" if target is None else "convertible", reason)


def _workers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules that compute something themselves, as far as one can tell from outside."""
    known = (*TO_DLKERN, torch.nn.MultiheadAttention)
    for name, module in model.named_modules():
        if "parametrizations" in name.split(".") or isinstance(module, _NO_WORK):
            continue
        if isinstance(module, known) or next(module.children(), None) is None:
            yield name, module


def conversion_report(model: torch.nn.Module) -> list[ModuleReport]:
    """What runs on dlkern in `model`, what convert() would still swap, what it leaves alone and why.

    One record for each module that computes something itself (containers are left out), in the order of
    named_modules(). Works before and after convert().
    """
    return [_report(name, module) for name, module in _workers(model)]


def convert(
    model: Model, *, skip: Skip | None = None, fuse: bool = False, memory_format: torch.memory_format | None = None,
    verbose: bool = False,
) -> Model:
    """Makes `model` run on dlkern, in place: each torch.nn module dlkern has becomes dlkern.nn's of the same name.

    Parameters, buffers, hooks, state_dict, train/eval mode and the identity of every object stay. Users' own
    subclasses, modules whose forward was replaced on the instance, and modules dlkern has no counterpart of are left
    alone; `dlkern.conversion_report(model)` says which and why. Calls of torch.nn.functional inside forward methods
    are not modules: `with dlkern.enabled():` runs those on dlkern.

    Args:
        model: any torch.nn.Module, a single layer too. Converting twice changes nothing more.
        skip: a function of (name, module) that returns True where a module is to stay torch's.
        fuse: run convolution, batch norm, addition and ReLU that follow each other as one op, where torch.fx can trace
            the model and the modules have no hooks. The result is then a torch.fx.GraphModule that shares all
            parameters and buffers, under their names; its `fusions` lists what was fused. Functions called with
            `self.training` and modules that read it follow train() and eval(); where a forward otherwise differs between
            the two, a warning says so, and the result takes the way of the mode the model was in.
        memory_format: torch.channels_last, say: what to bring the parameters to; give inputs in it, too.
        verbose: print what was swapped and what was not, and why, and what was fused.

    Returns:
        The same object; with fuse=True, a torch.fx.GraphModule of it.

    torch.jit.script and torch.ao.quantization know torch's own classes alone: give them dlkern.revert(model).

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: fuse=True, and torch.fx cannot trace the model, which is then unchanged.

    Example:
        >>> model = dlkern.convert(torchvision.models.resnet18())
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"convert: expected a torch.nn.Module, got {type(model).__name__}")
    swapped = []
    for name, module in model.named_modules():
        if skip is not None and skip(name, module):
            continue
        target, _ = _target(module)
        if target is not None:
            swapped.append((module, _plain_class(module)))
            _set_class(module, target)
            if isinstance(module, torch.nn.RNNBase):
                allow_in_dynamo()
    if swapped:
        _recompile()
    result: torch.nn.Module = model
    if fuse:
        from dlkern import fusion

        try:
            result, found = fusion.fuse(model)
        except ValueError:
            for module, cls in swapped:
                _set_class(module, cls)
            raise
        result.fusions = found  # type: ignore[assignment]
    if memory_format is not None:
        result.to(memory_format=memory_format)  # type: ignore[call-overload]
    if verbose:
        _print_report(model)
        if fuse:
            _print_fusions(found)
    return result  # type: ignore[return-value]


def revert(model: Model) -> Model:
    """Gives every dlkern.nn module in `model` torch.nn's class again, in place, and returns the model.

    The result needs no dlkern to be unpickled. Modules that were built as dlkern.nn's become torch's as well, and frozen
    ones are frozen no more. Recurrent modules with options that torch does not have stay dlkern.nn's.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"revert: expected a torch.nn.Module, got {type(model).__name__}")
    ours = [
        module for module in model.modules()
        if _plain_class(module) in TO_TORCH and not getattr(module, "beyond_torch", False)
    ]  # fmt: skip
    for module in ours:
        _set_class(module, TO_TORCH[_plain_class(module)])
        vars(module).pop("_frozen", None)
    if ours:
        _recompile()
    return model


def _print_report(model: torch.nn.Module) -> None:
    from rich.console import Console

    Console(highlight=False).print(report_table(conversion_report(model)).rich("whose kernels each module runs on"))


def _print_fusions(found: list[Any]) -> None:
    from rich.console import Console

    rows = [(fusion.what, ", ".join(fusion.modules)) for fusion in found]
    Console(highlight=False).print(Table(("fused", "modules"), rows).rich("what runs as one op"))


def report_table(records: list[ModuleReport]) -> Table:
    """The records as a table, one line for each class and reason."""
    first: dict[tuple[str, str, str], str] = {}
    counts: Counter[tuple[str, str, str]] = Counter()
    for record in sorted(records, key=lambda r: (r.status != "dlkern", r.kind)):
        key = (record.status, record.kind, record.reason)
        first.setdefault(key, record.name)
        counts[key] += 1
    rows = []
    for (status, kind, reason), count in counts.items():
        why = "convert() takes it" if status == "convertible" else reason
        rows.append(("dlkern" if status == "dlkern" else "torch", kind, count, first[status, kind, reason], why))
    return Table(("runs on", "class", "count", "the first", "why not dlkern"), rows)


def _make_our_modules_fx_leaves() -> None:
    # torch.fx keeps torch.nn's modules whole, by their module path; ours belong there as well.
    original = torch.fx.Tracer.is_leaf_module

    def is_leaf_module(self: torch.fx.Tracer, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return type(m) in TO_TORCH or original(self, m, module_qualified_name)

    is_leaf_module.__doc__ = original.__doc__
    torch.fx.Tracer.is_leaf_module = is_leaf_module  # type: ignore[method-assign]


_make_our_modules_fx_leaves()


def _make_our_modules_refuse_script() -> None:
    # torch.jit.script asks a module for what to compile in its place; a copy would take the module's place for good.
    def refuse(self: torch.nn.Module) -> torch.nn.Module:
        raise RuntimeError(
            f"torch.jit.script cannot compile dlkern's {type(self).__name__}: script dlkern.revert(copy.deepcopy(model)), "
            "which runs on torch, or use torch.jit.trace or torch.export, which keep dlkern's kernels"
        )

    for ours in TO_TORCH:
        ours.__prepare_scriptable__ = refuse  # type: ignore[attr-defined]


_make_our_modules_refuse_script()
