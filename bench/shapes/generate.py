"""Writes the networks' tables (resnet50.csv, vgg16.csv, …) from torchvision's models, and lenet.csv from LeCun 1998.

    python bench/shapes/generate.py

Needed only when a network is added: the tables are committed. Each layer is listed once with how often it occurs.
GoogLeNet is the paper's: torchvision's has 3x3 filters where the paper has 5x5, and pools without padding but with
ceil_mode, which gives the same sizes.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import torch
from torch import nn

COLUMNS = (
    "op",
    "name",
    "repeat",
    "batch",
    "channels",
    "height",
    "width",
    "out_channels",
    "kernel",
    "stride",
    "padding",
    "dilation",
    "groups",
    "input_grad",
)
BATCH = 64


def pair(value) -> str:
    first, second = (value, value) if isinstance(value, int) else tuple(value)
    return str(first) if first == second else f"{first}x{second}"


def describe(module: nn.Module, input: torch.Tensor, output: torch.Tensor) -> dict | None:
    """One row, without name and repeat."""
    if not isinstance(input, torch.Tensor):  # a block, not a layer
        return None
    row: dict = {"batch": BATCH, "channels": input.shape[1]}
    if input.dim() == 4:
        row |= {"height": input.shape[2], "width": input.shape[3]}
    if isinstance(module, nn.Conv2d):
        row |= {
            "op": "conv2d",
            "out_channels": module.out_channels,
            "kernel": pair(module.kernel_size),
            "stride": pair(module.stride),
            "padding": pair(module.padding),
            "dilation": pair(module.dilation),
            "groups": module.groups,
            "input_grad": int(input.shape[1] > 3),
        }
    elif isinstance(module, nn.MaxPool2d):
        padding = 1 if module.ceil_mode and module.kernel_size == 3 and module.stride == 2 else module.padding
        if module.ceil_mode and module.kernel_size == 2:
            padding = 0
        row |= {
            "op": "max_pool2d",
            "kernel": pair(module.kernel_size),
            "stride": pair(module.stride),
            "padding": pair(padding),
        }
    elif isinstance(module, nn.AvgPool2d):
        row |= {"op": "avg_pool2d", "kernel": pair(module.kernel_size), "stride": pair(module.stride)}
    elif isinstance(module, nn.AdaptiveAvgPool2d):
        if input.shape == output.shape:
            return None
        row |= {"op": "adaptive_avg_pool2d", "kernel": pair(module.output_size)}
    elif isinstance(module, nn.BatchNorm2d):
        row |= {"op": "batch_norm"}
    elif isinstance(module, nn.Linear):
        row |= {"op": "linear", "out_channels": module.out_features}
    else:
        return None
    return row


def rows_of(model: nn.Module, size: tuple[int, ...]) -> list[dict]:
    found: dict[tuple, dict] = {}

    def hook(name):
        def record(module, inputs, output):
            row = describe(module, inputs[0], output)
            if row is not None:
                key = tuple(row.items())
                if key in found:
                    found[key]["repeat"] += 1
                else:
                    found[key] = {"name": name, "repeat": 1, **row}

        return record

    for name, module in model.named_modules():
        module.register_forward_hook(hook(name))
    with torch.no_grad():
        model.eval()(torch.empty(1, *size, device="meta"))
    return list(found.values())


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.Sigmoid(),
        nn.AvgPool2d(2, 2),
        nn.Conv2d(6, 16, 5),
        nn.Sigmoid(),
        nn.AvgPool2d(2, 2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.Linear(120, 84),
        nn.Linear(84, 10),
    )


def main() -> None:
    stub = torch.library.Library("torchvision", "DEF")  # torchvision imports without its compiled part
    for op in ("nms", "qnms"):
        stub.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision.models.googlenet  # noqa: F401
    from torchvision import models

    googlenet_module = sys.modules["torchvision.models.googlenet"]

    with torch.device("meta"):
        googlenet = models.googlenet(weights=None, init_weights=False, aux_logits=False)
        for module in googlenet.modules():
            if isinstance(module, googlenet_module.Inception):
                third = module.branch3[1].conv
                module.branch3[1].conv = nn.Conv2d(third.in_channels, third.out_channels, 5, padding=2, bias=False)
        networks = {
            "resnet50": (models.resnet50(), (3, 224, 224)),
            "vgg16": (models.vgg16(), (3, 224, 224)),
            "googlenet": (googlenet, (3, 224, 224)),
            "densenet121": (models.densenet121(), (3, 224, 224)),
            "alexnet": (models.alexnet(), (3, 224, 224)),
            "lenet": (lenet(), (1, 28, 28)),
        }
        for name, (model, size) in networks.items():
            rows = rows_of(model, size)
            with (Path(__file__).parent / f"{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            print(f"{name}.csv: {len(rows)} rows")


if __name__ == "__main__":
    main()
