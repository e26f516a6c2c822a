"""Layer-wise adaptive rate scaling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dlkern.ops import optim as ops
from dlkern.optim._common import collect, evaluated, written
from dlkern.reference import optim as reference

__all__ = ["LARS"]


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose rate for each parameter tensor is lr times trust_coefficient ‖p‖ / (‖g‖ + weight_decay ‖p‖).

    torch has no twin. You, Gitman and Ginsburg 2017, "Large batch training of convolutional networks", algorithm 1:
    v = momentum v + rate (g + weight_decay p); p -= v. Where a norm is 0 the rate is lr. Give biases and the parameters of
    batch norm a group with trust_coefficient=None: their rate is lr.

    Norms are summed in double in a fixed order: the same bits every time. float32, float64, bfloat16 and float16; other
    parameters run on plain torch expressions, and dlkern.trace() says so.

    Args:
        params: parameters, or dictionaries of parameter groups.
        lr: the rate of all layers.
        momentum: of v.
        weight_decay: times p, added to the gradient.
        trust_coefficient: the paper's η; None: no scaling.
        eps: added below the fraction.
        maximize: climb.

    Raises:
        ValueError: a negative argument.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0,
        trust_coefficient: float | None = 1e-3, eps: float = 0.0, *, maximize: bool = False,
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient, eps=eps)
        for name, value in defaults.items():
            if value is not None and not value >= 0:
                raise ValueError(f"LARS: {name} must not be negative, got {value}")
        super().__init__(params, {**defaults, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Returns what `closure`, which evaluates the model anew, returns."""
        loss = evaluated(closure)
        batches, reason = collect(self, lambda group: group["momentum"] != 0, ("momentum_buffer",))
        if reason:
            raise RuntimeError(f"LARS: {reason}")
        every = [p for batch in batches.values() for p in batch.params]
        if not every:
            return loss
        column = ops.choose("lars", every)
        launch = reference.lars if column == "reference" else ops.raw_op("lars", column)
        settings: list[float] = []
        for group in self.param_groups:
            trust = group["trust_coefficient"]
            settings += [float(group["lr"]), float(group["momentum"]), float(group["weight_decay"])]
            settings += [-1.0 if trust is None else float(trust), float(group["eps"]), float(group["maximize"])]
        for keeps, batch in batches.items():
            buffers: list[torch.Tensor] = []
            for param in batch.params if keeps else ():
                state = self.state[param]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                buffers.append(state["momentum_buffer"])
            launch(batch.params, batch.grads, buffers, batch.groups, settings)
            if column != "reference":
                written(batch.params, buffers)
        return loss
