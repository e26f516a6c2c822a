"""Layers of one's own: without parameters, with a parameter, and one that reduces an image to a number for each class.

A layer is a module with a forward; its gradients come from the ops it calls. The first here takes the batch's mean away, the
second multiplies by one learned number, and TensorReduction, y[b, k] = bias[k] + sum over i, j of W[k, i, j] x[b, i, j], gives
each of the ten digits a matrix of weights of the image's own shape, so nothing is flattened.

What to see: each digit's weights (one picture a digit) have become a template: red where ink speaks for that digit, blue where
it speaks against it, such as the middle of the 0.
"""

import torch
from common import figure, losses, run, save

import dlkern
from dlkern import nn
from dlkern.training import batches, digits


class Centred(torch.nn.Module):
    """Without parameters: takes the mean of all elements away."""

    def forward(self, x):
        return x - x.mean()


class Scaled(torch.nn.Module):
    """One parameter: the logarithm of a factor, which so stays positive."""

    def __init__(self):
        super().__init__()
        self.log_factor = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x * self.log_factor.exp()


def main(steps=300, report=None):
    data = digits()
    reduction = nn.TensorReduction((8, 8), 10)
    model = torch.nn.Sequential(nn.AvgPool2d(4), torch.nn.Flatten(0, 1), Centred(), Scaled(), reduction)  # [n, 8, 8] inside
    losses(model, batches(data, 64, 0), steps, dlkern.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-3))
    drawing, axes = figure(1, 10, (16, 2))
    largest = reduction.weight.detach().abs().max()
    for digit, (place, weight) in enumerate(zip(axes[0], reduction.weight.detach())):
        place.imshow(weight.numpy(), cmap="coolwarm", vmin=-largest, vmax=largest)
        place.set(title=str(digit), xticks=[], yticks=[])
    save(drawing, report, "custom_layers")
    with torch.no_grad():
        right = (model(data.test_images).argmax(1) == data.test_labels).double().mean().item()
        model.double()
        x = torch.randn(128, 8, 8).double()
        expected = torch.einsum("kij,bij->bk", reduction.weight, x) + reduction.bias
        difference = ((reduction(x) - expected).abs().max() / expected.abs().max()).item()
    return {
        "accuracy": right, "parameters": sum(p.numel() for p in model.parameters()),
        "learned factor": model[3].log_factor.exp().item(), "mean behind the centred layer": Centred()(x).mean().item(),
        "reduction over an einsum, largest difference": difference,
    }


if __name__ == "__main__":
    run(main, 300)
