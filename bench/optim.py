"""Optimisers and gradient clipping: a step over a network's parameters, beside torch's.

    dlkern bench optim [--device cuda] [--network resnet18] [--seconds 2] [--output FOLDER]

Interleaved: dlkern (on a GPU each of its columns, too), torch's foreach, fused and single-tensor steps, each on
parameters of its own. torch has no LARS: its side is the formula in foreach functions. On a GPU the time is the device's
from the first launch to the last, waits for the host included. Floor: the bytes that have to cross the bus (parameters
and state read and written, gradients read; clipping by norm reads gradients twice and writes them once, by value once
each) over the machine's bandwidth. Results go to bench/results/<device>/optim.json.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import dlkern
from dlkern import models
from dlkern.bench import machine
from dlkern.bench.timing import interleave, ratio
from dlkern.report import Table, make_folder

__all__ = ["main", "measure"]

_MOMENTUM = dict(lr=1e-3, momentum=0.9)
# name -> (class, settings, passes over the parameters' bytes)
STEPS: dict[str, tuple[str, dict[str, Any], int]] = {
    "sgd": ("SGD", dict(lr=1e-3), 3),
    "sgd, momentum": ("SGD", _MOMENTUM, 5),
    "sgd, momentum, decay": ("SGD", dict(**_MOMENTUM, weight_decay=1e-4), 5),
    "sgd, Nesterov, decay": ("SGD", dict(**_MOMENTUM, weight_decay=1e-4, nesterov=True), 5),
    "adam": ("Adam", dict(lr=1e-3), 7),
    "adamw": ("AdamW", dict(lr=1e-3), 7),
    "adamw, amsgrad": ("AdamW", dict(lr=1e-3, amsgrad=True), 9),
    "lars": ("LARS", dict(**_MOMENTUM, weight_decay=1e-4), 7),
    "clip_grad_norm_": ("", {}, 3),
    "clip_grad_value_": ("", {}, 2),
}
TORCHS = ("foreach", "fused", "single")
COLUMNS = ("triton", "cuda")


def _sides(device: str) -> tuple[str, ...]:
    return ("dlkern", *(COLUMNS if device == "cuda" else ()), *TORCHS)


def _parameters(network: str, device: str) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    parameters = list(getattr(models, network)(nn=torch.nn).to(device).parameters())
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-3
    return parameters


def _foreach_lars(
    parameters: Sequence[torch.Tensor], lr: float, momentum: float, weight_decay: float, trust: float = 1e-3
) -> Callable[[], object]:
    """A step of LARS as one writes it without a kernel for it."""
    parameters = list(parameters)
    buffers = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step() -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        size, slope = (torch.stack(torch._foreach_norm(tensors)) for tensors in (parameters, grads))
        rates = lr * torch.where((size > 0) & (slope > 0), trust * size / (slope + weight_decay * size), 1.0)
        updates = torch._foreach_add(grads, parameters, alpha=weight_decay)
        torch._foreach_mul_(updates, rates.unbind())
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, updates)
        torch._foreach_sub_(parameters, buffers)

    return step


def _side(name: str, side: str, network: str, device: str) -> Callable[[], object] | None:
    """A step of one side, or None where it has none."""
    kind, settings, _ = STEPS[name]
    parameters = _parameters(network, device)
    ways = {"foreach": dict(foreach=True), "fused": dict(fused=True), "single": dict(foreach=False)}
    if side in TORCHS:
        if kind == "LARS":
            return _foreach_lars(parameters, **settings) if side == "foreach" else None
        if kind:
            return getattr(torch.optim, kind)(parameters, **settings, **ways[side]).step
        if side == "fused":
            return None
        theirs = getattr(torch.nn.utils, name)
        return lambda: theirs(parameters, 1e-30, **ways[side])
    if kind:
        step = getattr(dlkern.optim, kind)(parameters, **settings).step
    else:  # so small a limit that gradients are scaled every time
        step = functools.partial(getattr(dlkern.nn.utils, name), parameters, 1e-30)

    def run() -> None:
        with dlkern.backend(side) if side in COLUMNS else contextlib.nullcontext():
            step()

    return run


def measure(name: str, network: str, seconds: float, floors: machine.Floors) -> dict[str, Any]:
    """One row: milliseconds of each side, theirs over ours, and the floor."""
    device = floors.device
    functions = {side: step for side in _sides(device) if (step := _side(name, side, network, device)) is not None}
    samples = interleave(functions, device=device, seconds=seconds)
    size = sum(p.numel() * p.element_size() for p in _parameters(network, "cpu"))
    floor, _ = floors.floor_ms(0, STEPS[name][2] * size, torch.float32)
    return {
        "step": name,
        "ms": {side: round(s.median, 3) for side, s in samples.items()},
        "ratio": {side: round(ratio(s, samples["dlkern"]).median, 2) for side, s in samples.items() if side != "dlkern"},
        "floor ms": round(floor, 3),
        "% of floor": round(100 * floor / samples["dlkern"].median, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("dlkern bench optim", description="Time of an optimiser's step, dlkern's and torch's.")
    parser.add_argument("steps", nargs="*", choices=[*STEPS, []], help="which (default: all)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--network", default="resnet18", help="a name in dlkern.models")
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long a row may take")
    parser.add_argument("--output", type=Path, help="folder of the results")
    options = parser.parse_args(arguments)
    if options.network not in models.__all__:
        parser.error(f"no network {options.network!r}")
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    try:
        directory = make_folder(options.output or Path(__file__).resolve().parent / "results" / machine.device_slug(device))
    except ValueError as error:
        parser.error(str(error))
    sides = _sides(device)
    floors = machine.Floors(device, quick=True)
    rows = [measure(name, options.network, options.seconds, floors) for name in options.steps or STEPS]
    record = {
        "machine": machine.describe(device), "threads": torch.get_num_threads(), "network": options.network, "rows": rows,
    }
    (directory / "optim.json").write_text(json.dumps(record, indent=1) + "\n")
    table = [
        (r["step"], *(r["ms"].get(s, "–") for s in sides), *(r["ratio"].get(s, "–") for s in sides[1:]), r["floor ms"],
         r["% of floor"]) for r in rows
    ]  # fmt: skip
    heads = ("step", *(f"{s} ms" for s in sides), *(f"{s} / ours" for s in sides[1:]), "floor ms", "% of floor")
    from rich.console import Console

    Console(highlight=False, width=140).print(Table(heads, table).rich(f"a step over {options.network}'s parameters"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
