"""Whole networks: one training step and one answer of each reference network, beside its torch twin.

    dlkern bench networks [NAME ...] [--batch 16] [--layout channels_last] [--dtype bfloat16]

A step is forward, cross-entropy and backward; the parameters change between timed runs, as an optimiser's would. Four
sides, interleaved: torch; dlkern (convert); fused (convert(fuse=True)); in inference also frozen (freeze of that). Peak
memory is that of a process of its own that does two steps. Results go to bench/results/<device>/networks.json.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dlkern
from dlkern import models
from dlkern.bench import machine
from dlkern.bench.timing import interleave, ratio
from dlkern.report import Table, make_folder

__all__ = ["NETWORKS", "main", "measure"]

# name -> input channels and size: the smallest at which every layer has work, 32 x 32 where that is enough.
NETWORKS = {
    "mlp": (1, 32), "lenet": (1, 32), "alexnet": (3, 63), "vgg11": (3, 32), "vgg16": (3, 32), "nin": (3, 32),
    "googlenet": (3, 32), "resnet18": (3, 32), "resnet50": (3, 32), "preact_resnet18": (3, 32), "densenet121": (3, 32),
}  # fmt: skip


def _model(name: str, dtype: torch.dtype, layout: torch.memory_format) -> torch.nn.Module:
    torch.manual_seed(0)
    model = getattr(models, name)(nn=torch.nn)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # draws random numbers, which is not what is compared
            module.p = 0.0
    return model.to(dtype).to(memory_format=layout).train()


def _data(name: str, batch: int, dtype: torch.dtype, layout: torch.memory_format) -> tuple[torch.Tensor, torch.Tensor]:
    channels, size = NETWORKS[name]
    x = torch.randn(batch, channels, size, size).to(dtype).contiguous(memory_format=layout)
    return x, torch.randint(0, 10, (batch,))


def _step(model: torch.nn.Module, nn: Any, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()

    return step


def measure(name: str, batch: int, dtype: torch.dtype, layout: torch.memory_format, seconds: float) -> dict[str, Any]:
    """Ratios torch time / ours of each side, and torch's time in ms, for a training step and for inference."""
    x, y = _data(name, batch, dtype, layout)
    twin = _model(name, dtype, layout)
    sides = {
        "torch": twin, "dlkern": dlkern.convert(copy.deepcopy(twin)), "fused": dlkern.convert(copy.deepcopy(twin), fuse=True)
    }
    parameters = [p for model in sides.values() for p in model.parameters()]

    def between() -> None:
        with torch.no_grad():
            for p in parameters:
                p.mul_(1.0 - 1e-6)

    steps = {side: _step(model, torch.nn if side == "torch" else dlkern.nn, x, y) for side, model in sides.items()}
    training = interleave(steps, seconds=seconds, between=between)
    answers = {side: model.eval() for side, model in sides.items()}
    answers["frozen"] = dlkern.freeze(copy.deepcopy(sides["fused"])) if name != "mlp" else sides["fused"]
    with torch.inference_mode():
        inference = interleave({side: functools.partial(m, x) for side, m in answers.items()}, seconds=seconds / 2)
    row: dict[str, Any] = {"network": name}
    for what, samples in (("training", training), ("inference", inference)):
        row[f"{what} ms"] = round(samples["torch"].median, 2)
        row[what] = {side: round(ratio(samples["torch"], s).median, 3) for side, s in samples.items() if side != "torch"}
    return row


def _peak_of_this_process(name: str, batch: int, ours: bool, dtype: torch.dtype, layout: torch.memory_format) -> int:
    """MiB that two training steps added to this process, at the most."""
    import resource

    x, y = _data(name, batch, dtype, layout)
    model = _model(name, dtype, layout)
    step = _step(dlkern.convert(model, fuse=True) if ours else model, dlkern.nn if ours else torch.nn, x, y)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def _command(options: argparse.Namespace, *more: str) -> list[str]:
    settings = ["--batch", str(options.batch), "--layout", options.layout, "--dtype", options.dtype]
    return [sys.executable, "-m", "dlkern.bench.networks", *settings, "--seconds", str(options.seconds), *more]


def _mean(rows: list[dict[str, Any]], what: str, side: str) -> float:
    return math.exp(sum(math.log(row[what][side]) for row in rows) / len(rows))


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="dlkern bench networks", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NETWORKS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layout", choices=["contiguous", "channels_last"], default="contiguous")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--seconds", type=float, default=6.0, help="for a network's training steps")
    parser.add_argument("--output", type=Path, help="a folder; bench/results/<device> by default")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # measure this network in this process
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # peak memory of this network and side
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(NETWORKS)
    if unknown:
        parser.error(f"no network {', '.join(sorted(unknown))}")
    dtype = getattr(torch, options.dtype)
    layout = torch.channels_last if options.layout == "channels_last" else torch.contiguous_format
    if options.one:
        print(json.dumps(measure(options.one, options.batch, dtype, layout, options.seconds)))
        return 0
    if options.peak:
        name, side = options.peak.split(":")
        print(_peak_of_this_process(name, options.batch, side == "dlkern", dtype, layout))
        return 0

    def run(*more: str, settled: bool = True) -> Any:
        environment = machine.environment_for(None) if settled else None  # memory: the allocator as users have it
        return json.loads(subprocess.run(
            _command(options, *more), env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout)  # fmt: skip

    try:
        directory = make_folder(options.output or Path(__file__).resolve().parent / "results" / machine.device_slug("cpu"))
    except ValueError as error:
        parser.error(str(error))
    rows = []
    for name in options.names or NETWORKS:
        row = run("--one", name)
        row["peak MiB"] = {side: run("--peak", f"{name}:{side}", settled=False) for side in ("torch", "dlkern")}
        rows.append(row)
        print(f"{name}: training {row['training']}, inference {row['inference']}, peak MiB {row['peak MiB']}", flush=True)
    summary = {
        f"{what}, {side}": round(_mean(rows, what, side), 3) for what in ("training", "inference") for side in rows[0][what]
    }
    settings = {"batch": options.batch, "layout": options.layout, "dtype": options.dtype}
    record = {"machine": machine.describe("cpu"), "settings": settings, "geometric means": summary, "rows": rows}
    suffix = "" if (options.layout, options.dtype) == ("contiguous", "float32") else f"-{options.layout}-{options.dtype}"
    (directory / f"networks{suffix}.json").write_text(json.dumps(record, indent=1) + "\n")
    table = [(r["network"], r["training ms"], *r["training"].values(), r["inference ms"], *r["inference"].values(),
              r["peak MiB"]["dlkern"], r["peak MiB"]["torch"]) for r in rows]  # fmt: skip
    heads = ("network", "torch ms", "dlkern", "fused", "torch ms", "dlkern", "fused", "frozen", "MiB", "torch's")
    from rich.console import Console

    Console(highlight=False).print(Table(heads, table).rich("training step, then inference: torch time / ours"))
    print(summary)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
