"""What the optimisers share: the parameters of a step, and handing a step on to torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dlkern.ops import optim as ops

__all__ = ["Batch", "collect", "evaluated", "settings_on_a_gpu", "torch_step", "written"]


@dataclass
class Batch:
    """The parameters of one launch that have gradients, with the group each belongs to."""

    params: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What the closure returns, with gradients on; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def collect(
    optimizer: torch.optim.Optimizer, kind: Callable[[dict[str, Any]], bool], keys: tuple[str, ...] = ()
) -> tuple[dict[bool, Batch], str]:
    """Parameters with gradients, in two launches at most: of groups where kind(group), and of the others.

    The second result says why the step has to be torch's: something in it that no kernel takes.

    Args:
        keys: the state that kernels take beside parameter and gradient.
    """
    batches: dict[bool, Batch] = {}
    for number, group in enumerate(optimizer.param_groups):
        if group.get("differentiable") or group.get("capturable"):
            return {}, "differentiable or capturable"
        batch = None
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            state = optimizer.state.get(param) if keys else None
            kept = [state[key] for key in keys if state.get(key) is not None] if state else ()
            if reason := ops.refusal(param, grad, *kept):
                return {}, reason
            if batch is None:
                batch = batches.setdefault(kind(group), Batch())
            batch.params.append(param)
            batch.grads.append(grad)
            batch.groups.append(number)
    # Set by a GradScaler that leaves dividing the gradients to the optimiser (fused=True).
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        return {}, "gradients that are still scaled"
    return batches, ""


def settings_on_a_gpu(optimizer: torch.optim.Optimizer) -> str:
    """Why the step has to be torch's where reading a rate would wait for a GPU, else ""."""
    for group in optimizer.param_groups:
        for value in (group["lr"], *group.get("betas", ())):
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                return "a rate that is a tensor on a GPU"
    return ""


def written(*lists: list[torch.Tensor]) -> None:
    """Tells autograd that these tensors have changed."""
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)


def torch_step(cls: type[torch.optim.Optimizer], optimizer: torch.optim.Optimizer) -> None:
    """torch's own step, without the hooks that the step around it runs already."""
    step: Any = cls.step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    step(optimizer)
