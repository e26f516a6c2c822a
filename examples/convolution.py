"""The arithmetic of convolutions and poolings: padding, stride, channels, 1 x 1, and what pooling forgives.

An n pixels wide image, padded by p on both sides, has n + 2p - d (k - 1) places for a kernel of k taps that are d apart; with
a stride of s every s-th is taken: floor((n + 2p - d (k - 1) - 1) / s) + 1 outputs. Over channels a convolution sums: one
kernel for each input channel, one set of them for each output channel.

What to see: in the first row a digit, its horizontal and vertical edges (two kernels, one input channel), their mean, which a
1 x 1 convolution of the two makes, at each pixel by itself as a linear layer would; and the largest of each 4 x 4 pixels. In
the second row a blur: without padding the image shrinks by k - 1, with a padding of k // 2 it stays, a stride of 2 halves it,
taps that are 3 apart look at more of it with as many weights. Last panel: digits moved to the right. The edges of the moved
and the unmoved image soon have little in common; their largest values over places of 8 x 8 stay alike for longer; over the
whole image they are the same, until digits leave it.
"""

import itertools

import torch
from common import figure, run, save

from dlkern import nn
from dlkern.training import digits

F = nn.functional


def size(n, k, p, s, d):
    """Outputs along a side: the formula."""
    return (n + 2 * p - d * (k - 1) - 1) // s + 1


def likeness(a, b):
    """Cosine of the angle between two batches of images, each image by itself, on average."""
    a, b = a.flatten(1), b.flatten(1)
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)).mean().item()


def main(steps=24, report=None):
    """steps: how many images to move."""
    images, numbers = digits().train_images + 1, {}  # 0 where there is no ink, as beyond the borders
    image = images[3:4]
    sobel = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]]) / 4
    edges = torch.stack([sobel, sobel.T])[:, None]  # [2, 1, 3, 3]: from one channel to two
    found = F.conv2d(image, edges, padding=1)
    mean = F.conv2d(found, torch.full((1, 2, 1, 1), 0.5))
    # A 1 x 1 convolution is a linear layer at every pixel; a convolution over channels is a sum over channels.
    as_linear = F.linear(found.movedim(1, -1), torch.full((1, 2), 0.5)).movedim(-1, 1)
    x, weight = torch.randn(2, 3, 9, 9).double(), torch.randn(4, 3, 3, 3).double()
    one_by_one = sum(F.conv2d(x[:, i : i + 1], weight[:, i : i + 1].contiguous()) for i in range(3))
    whole = F.conv2d(x, weight)
    numbers["1 x 1 is linear, off by"] = (mean - as_linear).abs().max().item()
    numbers["channels are summed, off by"] = ((whole - one_by_one).abs().max() / whole.abs().max()).item()
    cases = list(itertools.product(range(7, 13), (1, 3, 5), (0, 1, 2), (1, 2, 3), (1, 2)))
    cases = [case for case in cases if size(*case) > 0]
    wrong = 0
    for n, k, p, s, d in cases:
        one, kernel = torch.ones(1, 1, n, n), torch.ones(1, 1, k, k)
        wrong += F.conv2d(one, kernel, stride=s, padding=p, dilation=d).shape[-1] != size(n, k, p, s, d)
        if p <= k // 2:
            wrong += F.max_pool2d(one, k, stride=s, padding=p, dilation=d).shape[-1] != size(n, k, p, s, d)
    numbers["sizes tried"], numbers["sizes off the formula"] = len(cases), wrong
    drawing, axes = figure(2, 5, (17, 7))
    blur = torch.ones(1, 1, 5, 5) / 25
    pictures = [
        ("a digit", image), ("horizontal edges", found[:, :1]), ("vertical edges", found[:, 1:]), ("1 x 1: their mean", mean),
        ("max pooling", F.max_pool2d(image, 4)),
        ("no padding", F.conv2d(image, blur)), ("padding 2", F.conv2d(image, blur, padding=2)),
        ("stride 2", F.conv2d(image, blur, padding=2, stride=2)),
        ("taps 3 apart", F.conv2d(image, blur, padding=6, dilation=3)),
    ]  # fmt: skip
    *places, last = [place for row in axes for place in row]
    for place, (title, picture) in zip(places, pictures):
        place.imshow(picture[0, 0].numpy(), cmap="gray")
        place.set_title(f"{title}: {picture.shape[-2]} x {picture.shape[-1]}")
    curves = {"edges": lambda y: y, "pooled, 8 x 8": lambda y: F.max_pool2d(y, 8),
              "pooled, whole image": lambda y: F.adaptive_max_pool2d(y, 1)}  # fmt: skip
    some = images[:steps]
    moves = range(9)
    for name, pool in curves.items():
        still = pool(F.conv2d(some, edges, padding=1).abs())
        alike = []
        for move in moves:
            moved = torch.zeros_like(some)
            moved[..., move:] = some[..., : some.shape[-1] - move]
            alike.append(likeness(pool(F.conv2d(moved, edges, padding=1).abs()), still))
        last.plot(moves, alike, "o-", label=name)
        numbers[f"{name}: likeness after a move of 4 pixels"] = alike[4]
    last.set(title="likeness of moved digits", xlabel="pixels")
    last.legend()
    save(drawing, report, "convolution")
    return numbers


if __name__ == "__main__":
    run(main, 24)
