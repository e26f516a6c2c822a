"""Layers that find their sizes themselves, and one layer used in many places.

A lazy network is written without input sizes; the first call fills them in, so that the same lines serve 32 x 32 and 24 x 24
images. Then two deep networks: eight layers of their own, and one layer that is used eight times.

What to see: the shared layer's gradient (left, dots) is the sum of what eight copies of it get, each in its place (lines),
element by element. The shared network has an eighth of the inner parameters; both learn the digits (right), the shared one
a little slower, since one matrix must serve all eight places.
"""

import torch
from common import figure, losses, run, save

import dlkern
from dlkern import nn
from dlkern.training import batches, digits

DEPTH, WIDTH = 8, 32


def lazy():
    """No layer is told its input's size."""
    return torch.nn.Sequential(
        nn.LazyConv2d(8, 5), nn.LazyBatchNorm2d(), torch.nn.ReLU(), nn.MaxPool2d(2), torch.nn.Flatten(), nn.LazyLinear(10)
    )


def deep(shared):
    """A first layer, DEPTH inner ones or one DEPTH times, and a last one."""
    inner = [nn.Linear(WIDTH, WIDTH) for _ in range(1 if shared else DEPTH)] * (DEPTH if shared else 1)
    middle = [part for layer in inner for part in (layer, torch.nn.Tanh())]
    return torch.nn.Sequential(
        nn.AvgPool2d(4), torch.nn.Flatten(), nn.Linear(64, WIDTH), torch.nn.Tanh(), *middle, nn.Linear(WIDTH, 10)
    )


def main(steps=200, report=None):
    data, numbers = digits(), {}
    for size in (32, 24):
        model = lazy()
        before = model[5].in_features
        model(data.train_images[:4, :, :size, :size])
        numbers[f"lazy, {size} x {size}: inputs of the last layer"] = (before, model[5].in_features)
        numbers[f"lazy, {size} x {size}: it became"] = type(model[5]).__name__
    # Gradients of one shared layer, and of copies with its values, each in its own place.
    shared, apart = deep(True).double(), deep(False).double()
    apart.load_state_dict(shared.state_dict())
    images, labels = data.train_images[:64].double(), data.train_labels[:64]
    for model in (shared, apart):
        nn.functional.cross_entropy(model(images), labels).backward()
    each = torch.stack([apart[4 + 2 * i].weight.grad for i in range(DEPTH)])  # [DEPTH, WIDTH, WIDTH]
    together = shared[4].weight.grad
    off = (together - each.sum(0)).abs().max() / together.abs().max()
    numbers["shared gradient, off the sum of the copies' by"] = off.item()
    drawing, ((a, b),) = figure(1, 2, (13, 4.5))
    a.plot(each[:, 0].T, linewidth=0.8)
    a.plot(each.sum(0)[0], color="black", label="sum of the copies'")
    a.plot(together[0], "o", label="shared")
    a.set(title="gradient of the first row of weights", xlabel="element")
    a.legend()
    for name, is_shared in (("one layer eight times", True), ("eight layers", False)):
        torch.manual_seed(0)
        model = nn.init.xavier_uniform_(deep(is_shared))
        curve = losses(model, batches(data, 64, 0), steps, dlkern.optim.Adam(model.parameters(), lr=3e-3))
        b.plot(curve, label=name)
        numbers[f"{name}: parameters"] = sum(p.numel() for p in model.parameters())
        numbers[f"{name}: first and last loss"] = (curve[0], sum(curve[-5:]) / len(curve[-5:]))
    b.set(title="loss", xlabel="step")
    b.legend()
    save(drawing, report, "lazy_and_shared")
    return numbers


if __name__ == "__main__":
    run(main, 200)
