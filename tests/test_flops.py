"""Counted floating-point operations: those torch counts for its own ops."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dlkern
from dlkern import models
from dlkern.nn import functional as F


@pytest.fixture(autouse=True, scope="module")
def _registered():
    dlkern.register_flop_formulas()
    dlkern.register_flop_formulas()  # again: nothing


def counted(function, *inputs):
    with FlopCounterMode(display=False) as counter:
        function(*inputs).sum().backward()
    return counter.get_total_flops()


def image(*shape):
    return torch.randn(shape).requires_grad_()


def test_groups():
    """By the formula: torch 2.13 counts the weight's gradient as if there were no groups."""
    x, w = image(2, 6, 9, 8), image(4, 3, 3, 3)
    assert counted(lambda x, w: F.conv2d(x, w, groups=2), x, w) == 3 * 2 * (2 * 4 * 7 * 6) * 3 * 3 * 3


@pytest.mark.parametrize("fuse", [False, True])
def test_a_network(fuse):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, dilation=2),
        torch.nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1), torch.nn.Conv2d(6, 12, 1),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(12, 10),
    )
    expected = counted(model, image(2, 3, 19, 17))
    with dlkern.trace() as calls:
        assert counted(dlkern.convert(model, fuse=fuse), image(2, 3, 19, 17)) == expected
    assert {call.backend for call in calls} == {"cpu"}


def test_lenet_without_an_input_gradient():
    ours, theirs = models.lenet(), models.lenet(nn=torch.nn)
    x = torch.randn(2, 1, 32, 32)
    assert counted(ours, x) == counted(theirs, x)


def test_attention():
    q, k, v = image(2, 3, 5, 8), image(2, 3, 7, 8), image(2, 3, 7, 6)

    def plain(q, k, v):
        return torch.softmax(q @ k.mT, -1) @ v

    again = 2 * 2 * 3 * 5 * 7 * 8  # our backward makes the scores again
    assert counted(F.scaled_dot_product_attention, q, k, v) == counted(plain, q, k, v) + again


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_recurrent(kind):
    layer = getattr(dlkern.nn, kind)(5, 7, num_layers=2, bidirectional=True)
    x = image(6, 3, 5)
    weights = sum(p.numel() for name, p in layer.named_parameters() if name.startswith("weight"))
    assert counted(lambda x: layer(x)[0], x) == 3 * 2 * 6 * 3 * weights
