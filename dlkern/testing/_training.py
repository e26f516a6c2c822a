"""Parity of whole networks and of training: dlkern's run against torch's, both measured by their float64 twin.

Rounding errors grow from layer to layer and from step to step, so one torch run says little about how far apart two
right runs may be. The measure here is five torch runs whose inputs were moved by one unit in the last place: our
distance to the float64 run is at most twice the largest of theirs. Tokens choose vectors, of an embedding or of the
first layer's weight: where no input is floating point, those are moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import dlkern.nn
from dlkern.testing._parity import Certificate, Row, unit_roundoff

__all__ = ["TrainingCertificate", "check_training", "distances"]

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass
class TrainingCertificate(Certificate):
    """What check_training found; `losses` holds the curves: "dlkern", "torch" and "float64"."""

    losses: dict[str, list[float]] = field(default_factory=dict)


def move(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each element one unit in the last place up or down, by chance; integers as they are."""
    if not tensor.is_floating_point():
        return tensor
    up = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor.device, torch.bool)
    infinity = torch.full((), float("inf"), dtype=tensor.dtype, device=tensor.device)
    return torch.where(up, torch.nextafter(tensor, infinity), torch.nextafter(tensor, -infinity))


def distances(
    ours: dict[str, torch.Tensor],
    theirs: Sequence[dict[str, torch.Tensor]],
    exact: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> list[Row]:
    """Rows for each named tensor: our distance to `exact` against twice the largest of several torch runs.

    Where the exact tensor is zero but for rounding (the gradient of a convolution's bias before batch norm),
    absolute sizes are compared.
    """
    rows = []
    u = unit_roundoff(dtype)
    for name, reference in exact.items():
        r = reference.detach().double().cpu().reshape(-1)
        runs = [run[name].detach().double().cpu().reshape(-1) for run in theirs]
        if r.numel() == 0:
            continue
        zero = r.abs().max() <= u * u * max(run.abs().max() for run in runs)
        difference = ours[name].detach().double().cpu().reshape(-1) - r
        for measure, p in (("norm", 2.0), ("max", float("inf"))):
            scale = 1.0 if zero else torch.linalg.vector_norm(r, p).item() + torch.finfo(torch.float64).tiny
            error = torch.linalg.vector_norm(difference, p).item() / scale
            baseline = max(torch.linalg.vector_norm(run - r, p).item() for run in runs) / scale
            rows.append(Row(name, "whole", measure, error, baseline, max(2 * baseline, 0.0 if zero else u)))
    return rows


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def _cross_entropy(nn: Any, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output, target)


@dataclass(frozen=True)
class _Task:
    """What every run does, whatever its network computes in."""

    start: dict[str, torch.Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    loss: Callable[..., torch.Tensor]
    draws: int

    def moved(self, model: torch.nn.Module, dtype: torch.dtype, generator: torch.Generator) -> _Task:
        """The same from a start where the vectors that tokens choose are moved."""
        tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)] or list(model.parameters())[:1]
        new = {id(table): move(table.detach().to(dtype), generator) for table in tables}
        named = model.named_parameters(remove_duplicate=False)  # tied ones have several names
        return dataclasses.replace(self, start=self.start | {n: new[id(p)] for n, p in named if id(p) in new})

    def run(
        self, model: torch.nn.Module, nn: Any, batches: Sequence[Batch], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Outputs and gradients at the start, then the loss curve, parameters and buffers of a training."""
        model = model.to(dtype).train()
        batches = [(x.to(dtype) if x.is_floating_point() else x, target) for x, target in batches]
        parts: dict[str, list[torch.Tensor]] = {}
        for x, target in batches[: self.draws]:
            model.load_state_dict(self.start)
            model.zero_grad()
            output = model(x)
            self.loss(nn, output, target).backward()
            parts.setdefault("output", []).append(output.detach().reshape(-1))
            for name, p in model.named_parameters():
                if p.grad is not None:
                    parts.setdefault(f"grad of {name}", []).append(p.grad.reshape(-1).clone())
        seen = {name: torch.cat(tensors) for name, tensors in parts.items()}
        model.load_state_dict(self.start)
        steps = self.optimizer(model.parameters())
        curve = []
        for x, target in batches:
            value = self.loss(nn, model(x), target)
            steps.zero_grad()
            value.backward()
            steps.step()
            curve.append(value.detach())
        seen["loss curve"] = torch.stack(curve)
        seen["parameters at the end"] = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        seen |= {f"{n} at the end": b.detach().clone() for n, b in model.named_buffers() if b.is_floating_point()}
        return seen


def check_training(
    make: Callable[[Any], torch.nn.Module],
    batches: Sequence[Batch],
    *,
    dtype: torch.dtype = torch.float32,
    optimizer: Callable[..., torch.optim.Optimizer] = _sgd,
    loss: Callable[..., torch.Tensor] = _cross_entropy,
    runs: int = 5,
    draws: int = 4,
    name: str = "training",
) -> TrainingCertificate:
    """Trains a network on dlkern and its torch twin, a step a batch, and compares both to the twin in float64.

    Args:
        make: builds the network; called with dlkern.nn and with torch.nn, whose results have the same state_dict.
        batches: pairs of input and target.
        dtype: what to train in.
        optimizer: makes the optimiser from the parameters.
        loss: function of (nn, output, target), nn being dlkern.nn or torch.nn; cross-entropy by default.
        runs: how many torch runs with moved inputs are the measure.
        draws: how many of the batches the output and the gradients at the start are compared on; the ten numbers a
            bias may have say little about an error.
        name: for the certificate's heading.

    Returns:
        A certificate over output and every gradient at the start, the loss curve, and the parameters and buffers at
        the end. A network must not drop out at random: its two runs could not be compared.
    """
    ours, twin = make(dlkern.nn), make(torch.nn)
    task = _Task({n: t.clone() for n, t in twin.state_dict().items()}, optimizer, loss, draws)
    rounded = [(x.to(dtype) if x.is_floating_point() else x, target) for x, target in batches]
    generator = torch.Generator().manual_seed(0)
    exact = task.run(twin, torch.nn, rounded, torch.float64)
    plain = task.run(twin, torch.nn, rounded, dtype)
    if any(x.is_floating_point() for x, _ in rounded):
        moved = [[(move(x, generator), t) for x, t in rounded] for _ in range(runs)]
        theirs = [task.run(twin, torch.nn, data, dtype) for data in moved]
    else:
        twin.load_state_dict(task.start)
        tasks = [task.moved(twin, dtype, generator) for _ in range(runs)]
        theirs = [each.run(twin, torch.nn, rounded, dtype) for each in tasks]
    mine = task.run(ours, dlkern.nn, rounded, dtype)
    certificate = TrainingCertificate(name, dtype, distances(mine, theirs, exact, dtype))
    for label, seen in (("dlkern", mine), ("torch", plain), ("float64", exact)):
        certificate.losses[label] = seen["loss curve"].tolist()
    return certificate
