"""What every family's autograd shares.

The pattern: `Forward` (a torch.autograd.Function) runs a column's forward op; its backward runs the column's
backward op; and where that must itself be differentiable, it goes through `Backward`, a Function whose own
backward is the vector-Jacobian product of the family's reference, in plain torch expressions. So first gradients
always come from our kernels, and derivatives of any order exist, under torch.func as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_map_only

__all__ = ["Function", "apply", "asks_gradient", "functorch_active", "needs_grad", "recording", "use_reference", "vjp"]

functorch_active = torch._C._are_functorch_transforms_active


class Function(torch.autograd.Function):
    """Base of dlkern's autograd functions: setup_context style, with a generated vmap rule."""

    generate_vmap_rule = True
    fast_apply: Callable[..., Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # torch's own `apply` binds default arguments through inspect, 9 us a call; this is the C++ one beneath it.
        cls.fast_apply = super(torch.autograd.Function, cls).apply  # type: ignore[misc]


def use_reference() -> bool:
    """Whether a call must run on the reference: torch.compile over torch.func transforms ignores
    autograd.Function.backward and differentiates the forward's body instead, silently."""
    return functorch_active() and torch.compiler.is_compiling()


def recording() -> bool:
    """Whether autograd records. Not under torch.jit.trace: a graph of raw ops, unlike one of Functions, can be saved."""
    return torch.is_grad_enabled() and not torch.jit.is_tracing()


def asks_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records, and one of the tensors requires a gradient."""
    if recording():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a call must go through its autograd Function: a gradient may be asked of it, or a torch.func
    transform or forward-mode AD is at work (which the raw op would pass over in silence)."""
    return functorch_active() or forward_ad._current_level >= 0 or asks_gradient(*tensors)


def apply(function: type[Function], *args: Any) -> Any:
    """function.apply by the cheapest route that is right where we are."""
    if torch.compiler.is_compiling():
        return function.apply(*args)
    if has_torch_function(args):
        # A tensor subclass makes its results its own by a view, and a view made inside a Function can't be written to.
        return handle_torch_function(_apply, args, function, *args)
    return _apply(function, *args)


def _apply(function: type[Function], *args: Any) -> Any:
    if not functorch_active() and forward_ad._current_level < 0:
        return function.fast_apply(*args)
    try:
        results = function.apply(*args)
        # A generated vmap rule returns views made inside a Function, which can't be written to either.
        return tree_map_only(torch.Tensor, torch.clone, results)
    except NotImplementedError as error:
        # torch's message names no op. (A jvp that raises would be clearer, but Dynamo refuses classes with one.)
        if "jvp" not in str(error):
            raise
        raise NotImplementedError(
            f"dlkern: {function.__name__} has no forward-mode derivative (jvp); use reverse mode"
        ) from error


def vjp(function: Callable[..., Any], primals: tuple[Any, ...], cotangents: Any) -> tuple[Any, ...]:
    """Vector-Jacobian product of `function` at `primals`, None for what is not a floating-point tensor.

    Differentiable again, to any order, in eager autograd and under torch.func.
    """
    index = [i for i, p in enumerate(primals) if isinstance(p, torch.Tensor) and p.is_floating_point()]

    def of_tensors(*tensors: torch.Tensor) -> Any:
        full = list(primals)
        for i, tensor in zip(index, tensors):
            full[i] = tensor
        return function(*full)

    _, pull = torch.func.vjp(of_tensors, *[primals[i] for i in index])  # type: ignore[misc]  # three with has_aux only
    gradients: list[Any] = [None] * len(primals)
    for i, gradient in zip(index, pull(cotangents)):
        gradients[i] = gradient
    return tuple(gradients)
