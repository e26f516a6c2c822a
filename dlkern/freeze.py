"""freeze() and unfreeze(): weights packed once, for inference.

A call normally packs the weight anew, because `weight.data[:] -= ...` changes neither version nor address and must be
seen. Where a model only answers, that is work without use, and at small batches much of a layer's time. A frozen module
keeps the packed weight beside it (never in state_dict, copies or pickles) and makes it anew where the weight's version,
address or dtype changes, as after load_state_dict or to().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dlkern import ops
from dlkern.ops import _plain

__all__ = ["freeze", "unfreeze"]

Model = TypeVar("Model", bound=torch.nn.Module)


class Frozen:
    """What a frozen module keeps, and of which state of which tensors it was made."""

    def __init__(self) -> None:
        self.state: tuple[Any, ...] = ()
        self.value: Any = None

    def __reduce__(self) -> tuple[type[Frozen], tuple[()]]:
        return Frozen, ()  # a copy, perhaps on another machine, packs for itself

    def kept(self, sources: tuple[torch.Tensor | float | None, ...], make: Callable[[], Any]) -> Any:
        """What make() returned when tensors and numbers were as they are now, as far as torch knows."""
        state = tuple(
            (t.data_ptr(), t._version, t.dtype, t.shape, t.stride()) if isinstance(t, torch.Tensor) else t for t in sources
        )
        if self.value is None or self.state != state:
            with torch.no_grad():
                self.value = make()
            self.state = state
        return self.value


def check_no_gradient(module: torch.nn.Module, *parameters: torch.Tensor | None) -> None:
    """Raises RuntimeError where a gradient of a frozen module's parameters would be recorded."""
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters):
        raise RuntimeError(
            f"{type(module).__name__} is frozen (dlkern.freeze) and has no gradients of its parameters: call it under "
            "torch.no_grad() or torch.inference_mode(), or dlkern.unfreeze(model) to train"
        )


def is_plain(conv: torch.nn.modules.conv._ConvNd, input: torch.Tensor, padding: Any) -> bool:
    """Whether a packed weight can serve this call; another one goes the usual way."""
    facts = ("grouped",) if conv.groups > 1 else ()
    return (
        not isinstance(padding, str)
        and conv.weight.shape[1] > 1  # a depthwise kernel reads the weight as it is
        and input.dim() == len(conv.kernel_size) + 2
        and not (torch.is_grad_enabled() and input.requires_grad)
        and _plain.column("conv2d", input, facts) == "cpu"
    )


def convolution(
    conv: torch.nn.modules.conv._ConvNd, frozen: Frozen, input: torch.Tensor, weight: torch.Tensor,
    bias: torch.Tensor | None, padding: str | tuple[int, ...],
) -> torch.Tensor | None:
    """A frozen Conv1d's or Conv2d's result; None where this call has to go the usual way."""
    check_no_gradient(conv, weight, bias)
    dims = len(conv.kernel_size)
    try:
        if isinstance(padding, str) or not is_plain(conv, input, padding):
            return None
        one, zero = (1,) * (2 - dims), (0,) * (2 - dims)
        settings = (one + conv.stride, zero + padding, one + conv.dilation, conv.groups)
        if dims == 1:
            input, weight = input.contiguous().unsqueeze(2), weight.unsqueeze(2)
        packed = frozen.kept((weight,), lambda: ops.conv.pack(weight, conv.groups))
        output = ops.conv.forward_packed(input, weight, packed, bias, None, *settings, 0)
    except _plain.REFUSALS:
        return None  # the usual way says what is wrong
    return output.squeeze(2) if dims == 1 else output


def freeze(model: Model) -> Model:
    """Makes `model` answer faster and not train: its dlkern.nn modules keep their packed weights between calls.

    For inference with weights that stay. A weight changed by assignment, load_state_dict(), an in-place operation or
    to() is packed again; one changed behind torch's back (`weight.data[:] = ...`) is not seen until unfreeze(). Packed
    weights take the memory of the weights once more, twice in 16-bit dtypes. Which modules profit: Conv1d and Conv2d on a
    CPU, and what convert(fuse=True) makes of them, then with batch norm folded in; others are left as they are, and so
    are calls that autocast, torch.compile or an open trace() send another way.

    Args:
        model: a module with dlkern.nn modules in it, as dlkern.convert() makes one. Freezing twice changes nothing more.

    Returns:
        The same object. A call that would need a gradient of a frozen module's parameters raises RuntimeError.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: it has no module that can be frozen.

    Example:
        >>> model = dlkern.freeze(dlkern.convert(model).eval())
        >>> with torch.inference_mode():
        ...     y = model(x)
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"freeze: expected a torch.nn.Module, got {type(model).__name__}")
    chosen = [module for module in model.modules() if hasattr(type(module), "_frozen")]
    if not chosen:
        raise ValueError("freeze: no module of dlkern.nn that keeps packed weights; dlkern.convert(model) first")
    for module in chosen:
        if module._frozen is None:
            module._frozen = Frozen()  # type: ignore[assignment]
    return model


def unfreeze(model: Model) -> Model:
    """Undoes freeze(), in place, and returns the model.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"unfreeze: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        vars(module).pop("_frozen", None)
    return model
