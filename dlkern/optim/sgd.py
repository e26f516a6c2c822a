"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dlkern.ops import optim as ops
from dlkern.optim._common import collect, evaluated, settings_on_a_gpu, torch_step, written

__all__ = ["SGD"]


class SGD(torch.optim.SGD):
    """torch.optim.SGD on dlkern's kernels: momentum, dampening, Nesterov, weight decay, maximize.

    All parameters are updated in one pass, each element read and written once, on a GPU by one launch for each dtype.
    float32, float64, bfloat16 and float16; what has no kernel (sparse gradients, differentiable=True, a rate on a GPU)
    runs torch's own step, and dlkern.trace() says so. `foreach` and `fused` change nothing. 16-bit parameters are
    computed in float32 and rounded once.

    Formula: g = grad + weight_decay p; b = momentum b + (1 - dampening) g, at first b = g; p -= lr b, with nesterov
    p -= lr (g + momentum b). Sutskever et al. 2013, "On the importance of initialization and momentum", as torch has it.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Returns what `closure`, which evaluates the model anew, returns."""
        loss = evaluated(closure)
        keys = ("momentum_buffer",) if any(group["momentum"] for group in self.param_groups) else ()
        batches, reason = collect(self, lambda group: group["momentum"] != 0, keys)
        reason = reason or settings_on_a_gpu(self)
        every = [p for batch in batches.values() for p in batch.params]
        if not reason and not every:
            return loss
        column = ops.choose("sgd", every or self.param_groups[0]["params"], "torch", reason)
        if column == "torch":
            torch_step(torch.optim.SGD, self)
            return loss
        settings = [
            float(group[name])
            for group in self.param_groups
            for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        ]
        for keeps, batch in batches.items():
            buffers = [self.state[p].get("momentum_buffer") for p in batch.params] if keeps else []
            fresh = [buffer is None for buffer in buffers]
            made = [torch.empty_like(p) if b is None else b for p, b in zip(batch.params, buffers)]
            ops.raw_op("sgd", column)(batch.params, batch.grads, made, fresh, batch.groups, settings)
            written(batch.params, made)
            for param, buffer, new in zip(batch.params, made, fresh):
                if new:
                    self.state[param]["momentum_buffer"] = buffer
        return loss
