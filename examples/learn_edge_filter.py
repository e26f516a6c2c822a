"""Gradient descent finds an edge filter from pictures before and after it.

An image is white with a black band; its edges are where neighbouring columns differ, which a 1 x 2 convolution with
weights (1, -1) finds. Here nobody tells the weights: a convolution starts from random ones and follows the gradient of the
squared error.

What to see: the learned output (third panel) becomes the edges (second panel), and the two weights (fourth) settle at 1 and
-1 after some ten steps. After its first steps the error falls in a straight line on its logarithmic axis: each step shrinks
it by one factor.
"""

import torch
from common import figure, run, save

import dlkern
from dlkern import nn


def main(steps=30, report=None):
    image = torch.ones(1, 1, 6, 8)
    image[..., 2:6] = 0
    edges = nn.functional.conv2d(image, torch.tensor([[[[1.0, -1.0]]]]))
    conv = nn.Conv2d(1, 1, (1, 2), bias=False)
    optimizer = dlkern.optim.SGD(conv.parameters(), lr=0.03)
    weights, errors = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        error = (conv(image) - edges).square().sum()
        error.backward()
        weights.append(conv.weight.detach().flatten().tolist())
        errors.append(error.item())
        optimizer.step()
    drawing, ((a, b, c, d, e),) = figure(1, 5, (15, 3))
    for axes, picture, title in ((a, image, "input"), (b, edges, "edges"), (c, conv(image).detach(), "learned")):
        axes.imshow(picture[0, 0].numpy(), cmap="gray", vmin=0 if picture is image else -1, vmax=1)
        axes.set_title(title)
    d.plot(weights, label=["left weight", "right weight"])
    d.set(title="weights", xlabel="step")
    d.legend()
    e.semilogy(errors)
    e.set(title="squared error", xlabel="step")
    save(drawing, report, "learn_edge_filter")
    left, right = conv.weight.detach().flatten().tolist()
    return {"left weight": left, "right weight": right, "first error": errors[0], "last error": errors[-1]}


if __name__ == "__main__":
    run(main, 30)
