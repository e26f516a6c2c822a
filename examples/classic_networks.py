"""The classic networks: what each of them spends its parameters and operations on, and why depth needs a short way.

AlexNet made networks deep, VGG regular (blocks of 3 x 3), NiN gave each pixel a small network (1 x 1 convolutions) and did
without linear layers, GoogLeNet has branches side by side, ResNet adds a block's input to its output, DenseNet hands on all
that came before. Left: parameters, and multiply-adds for one image of the size that the network was made for (NiN 32 x 32,
the others 224 x 224), by kind of layer. Right: four networks of 24 convolutions learn the digits: plain, with batch norm, of
ResNet's blocks (all with 16 channels), and of DenseNet's (each adds 4 channels to 16).

What to see: nearly all parameters of AlexNet and VGG are in their linear layers, nearly all of their work is in convolutions.
The later ones have one linear layer at most and get by on a tenth of VGG's parameters. VGG works the most by far. The plain
network of 24 convolutions does not learn at all; batch norm lets it begin; with sums and joins, through which a gradient
reaches the first layers undiminished, it learns several times faster.
"""

import torch
from common import figure, losses, run, save
from torch.utils.flop_counter import FlopCounterMode

import dlkern
from dlkern import models, nn
from dlkern.models.densenet import DenseLayer
from dlkern.models.resnet import BasicBlock
from dlkern.training import batches, digits

NETWORKS = {"alexnet": 224, "vgg11": 224, "nin": 32, "googlenet": 224, "resnet18": 224, "densenet121": 224}
DEPTH, CHANNELS = 24, 16


def cost(network, size):
    """Millions of parameters in convolutions and in linear layers, and of multiply-adds for one image in each."""
    parameters = [
        sum(p.numel() for m in network.modules() if isinstance(m, kind) for p in m.parameters(recurse=False))
        for kind in (torch.nn.Conv2d, torch.nn.Linear)
    ]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.randn(1, 3, size, size))
    operations = [0, 0]
    for op, count in counter.get_flop_counts()["Global"].items():
        operations["linear" in str(op)] += count // 2
    return [n / 1e6 for n in parameters], [n / 1e6 for n in operations]


def deep(kind):
    """[n, 1, 8, 8] to logits, through DEPTH convolutions."""
    first, last = nn.Conv2d(1, CHANNELS, 3, padding=1), CHANNELS
    if kind == "plain":
        middle = [part for _ in range(DEPTH) for part in (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), torch.nn.ReLU())]
    elif kind == "batch norm":
        middle = [
            part for _ in range(DEPTH)
            for part in (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), torch.nn.ReLU())
        ]  # fmt: skip
    elif kind == "residual":
        middle = [BasicBlock(CHANNELS, CHANNELS, 1, False, nn=nn) for _ in range(DEPTH // 2)]  # of two convolutions
    else:
        middle = [DenseLayer(CHANNELS + 4 * i, 4, nn=nn) for i in range(DEPTH // 2)]
        last = CHANNELS + 4 * len(middle)
    return torch.nn.Sequential(
        nn.AvgPool2d(4), first, *middle, nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), nn.Linear(last, 10)
    )


def train(kind, data, steps):
    """Losses, smoothed over five steps."""
    torch.manual_seed(0)
    model = deep(kind)
    curve = losses(model, batches(data, 64, 0), steps, dlkern.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    return torch.tensor(curve).unfold(0, min(5, steps), 1).mean(1).tolist()


def main(steps=80, report=None):
    dlkern.register_flop_formulas()
    drawing, ((a, b, c),) = figure(1, 3, (17, 4.5))
    numbers = {}
    costs = [cost(getattr(models, name)().eval(), size) for name, size in NETWORKS.items()]
    for axes, pairs in zip((a, b), zip(*costs)):
        of_convolutions, of_linear = zip(*pairs)
        axes.bar(list(NETWORKS), of_convolutions, label="convolutions")
        axes.bar(list(NETWORKS), of_linear, bottom=of_convolutions, label="linear")
    for name, (parameters, operations) in zip(NETWORKS, costs):
        numbers[f"{name}: millions of parameters in convolutions, linear layers"] = [round(n, 2) for n in parameters]
        numbers[f"{name}: millions of multiply-adds in convolutions, linear layers"] = [round(n, 2) for n in operations]
    a.set(title="parameters, millions")
    b.set(title="multiply-adds for an image, millions")
    data = digits()
    for kind in ("plain", "batch norm", "residual", "dense"):
        curve = train(kind, data, steps)
        c.plot(curve, label=kind)
        numbers[f"{kind}: last loss"] = curve[-1]
    c.set(title=f"{DEPTH} convolutions: loss", xlabel="step")
    for axes in (a, b, c):
        axes.legend()
        axes.tick_params("x", rotation=20)
    save(drawing, report, "classic_networks")
    return numbers


if __name__ == "__main__":
    run(main, 80)
