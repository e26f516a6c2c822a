"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dlkern.ops import optim as ops
from dlkern.optim._common import collect, evaluated, settings_on_a_gpu, torch_step, written

__all__ = ["Adam", "AdamW"]

_STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def _countable(step: Any, param: torch.Tensor) -> bool:
    """On the host, or where torch keeps it with fused=True."""
    if not isinstance(step, torch.Tensor):
        return False
    if step.device.type == "cpu":
        return step.dtype in (torch.float32, torch.float64)
    return step.device == param.device and step.dtype is torch.float32


def _step(optimizer: torch.optim.Adam, theirs: type[torch.optim.Optimizer]) -> None:
    batches, reason = collect(optimizer, lambda group: bool(group["amsgrad"]), _STATE)
    every = [p for batch in batches.values() for p in batch.params]
    if not reason and not every:
        return
    states = {p: optimizer.state[p] for p in every}
    reason = reason or settings_on_a_gpu(optimizer)
    if any(state and not _countable(state.get("step"), p) for p, state in states.items()):
        reason = reason or "steps that are no tensors of float32 or float64 on the host or their parameter's device"
    column = ops.choose("adam", every or optimizer.param_groups[0]["params"], "torch", reason)
    if column == "torch":
        torch_step(theirs, optimizer)
        return
    settings: list[float] = []
    for group in optimizer.param_groups:
        settings += [float(group["lr"]), *map(float, group["betas"]), float(group["eps"]), float(group["weight_decay"])]
        settings += [float(group["decoupled_weight_decay"]), float(group["maximize"])]
    counter = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    for amsgrad, batch in batches.items():
        for param, number in zip(batch.params, batch.groups):
            state = states[param]
            if not state:
                fused = bool(optimizer.param_groups[number].get("fused"))  # then torch counts on the device, in float32
                device, dtype = (param.device, torch.float32) if fused else (torch.device("cpu"), counter)
                state["step"] = torch.zeros((), dtype=dtype, device=device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
                if amsgrad:
                    state["max_exp_avg_sq"] = torch.zeros_like(param)
        averages, squares, steps = ([states[p][key] for p in batch.params] for key in ("exp_avg", "exp_avg_sq", "step"))
        largest = [states[p]["max_exp_avg_sq"] for p in batch.params] if amsgrad else []
        ops.raw_op("adam", column)(
            batch.params, batch.grads, averages, squares, largest, steps, batch.groups, settings
        )
        written(batch.params, averages, squares, largest, steps)


class Adam(torch.optim.Adam):
    """torch.optim.Adam on dlkern's kernels: amsgrad, weight decay (decoupled too), maximize.

    All parameters are updated in one pass, each element read and written once, on a GPU by one launch for each dtype.
    float32, float64, bfloat16 and float16; what has no kernel (sparse gradients, capturable or differentiable, a rate on
    a GPU) runs torch's own step, and dlkern.trace() says so. `foreach` changes nothing, `fused` only where steps are
    counted: on the device, as in torch. 16-bit parameters are computed in float32 and rounded once.

    Formula: m += (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g²; p -= lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t))
    + eps). Kingma and Ba 2015, algorithm 1; amsgrad: Reddi, Kale and Kumar 2018, algorithm 2.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Returns what `closure`, which evaluates the model anew, returns."""
        loss = evaluated(closure)
        _step(self, torch.optim.Adam)
        return loss


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW on dlkern's kernels: Adam whose weight decay multiplies the parameters by 1 - lr weight_decay
    and stays out of the averages (Loshchilov and Hutter 2019, algorithm 2). Everything else as in `Adam`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Returns what `closure`, which evaluates the model anew, returns."""
        loss = evaluated(closure)
        _step(self, torch.optim.AdamW)
        return loss
