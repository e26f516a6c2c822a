"""Initialisers: fans as counted by the layers themselves, and activations that keep their size through depth."""

import math

import pytest
import torch
from torch import nn

import dlkern
from dlkern.nn import init

# layer, input, which elements of the output (for fan_in) and of the input (for fan_out) lie away from the borders
LAYERS = {
    "linear": (lambda n: n.Linear(6, 10, bias=False), (2, 6), (), ()),
    "conv2d": (lambda n: n.Conv2d(4, 6, 3, bias=False), (1, 4, 9, 9), (), (slice(2, -2),) * 2),
    "grouped": (lambda n: n.Conv2d(8, 12, 3, groups=4, bias=False), (1, 8, 9, 9), (), (slice(2, -2),) * 2),
    "strided": (lambda n: n.Conv2d(4, 6, (4, 2), stride=2, bias=False), (1, 4, 12, 12), (), (slice(2, -2),) * 2),
    "conv1d": (lambda n: n.Conv1d(4, 6, 5, bias=False), (1, 4, 20), (), (slice(4, -4),)),
    "transposed": (lambda n: n.ConvTranspose2d(4, 6, 3, bias=False), (1, 4, 9, 9), (slice(2, -2),) * 2, ()),
    "transposed, grouped, strided": (
        lambda n: n.ConvTranspose2d(8, 4, 4, stride=2, groups=2, bias=False), (1, 8, 9, 9), (slice(2, -2),) * 2, (),
    ),
    "transposed1d": (lambda n: n.ConvTranspose1d(4, 2, 3, stride=3, bias=False), (1, 4, 9), (slice(3, -3),), ()),
}


@pytest.mark.parametrize("library", [nn, dlkern.nn], ids=["torch", "dlkern"])
@pytest.mark.parametrize("name", LAYERS)
def test_fans_are_what_a_layer_of_ones_counts(name, library):
    """With weights and inputs of ones, an output is the number of its inputs, and a gradient that of its outputs."""
    make, shape, inner_output, inner_input = LAYERS[name]
    layer = make(library)
    nn.init.ones_(layer.weight)
    x = torch.ones(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    counted = y[(..., *inner_output)].mean().item(), x.grad[(..., *inner_input)].mean().item()
    assert init.fans(layer) == pytest.approx(counted)


def test_fans_of_reductions_recurrent_and_attention_layers():
    assert init.fans(dlkern.nn.TensorReduction((3, 4), 5)) == (12, 5)
    assert init.fans(nn.LSTM(3, 5)) == (3, 5)  # of one gate, not of four in one matrix
    assert init.fans(nn.MultiheadAttention(8, 2)) == (8, 8)
    for module in (nn.Embedding(3, 4), nn.BatchNorm2d(3), nn.Sequential(nn.Linear(2, 2))):
        with pytest.raises(ValueError, match=type(module).__name__):
            init.fans(module)


FILLS = {
    "xavier_uniform_": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "xavier_normal_": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "kaiming_uniform_": lambda fan_in, fan_out: 2 / fan_in,
    "kaiming_normal_": lambda fan_in, fan_out: 2 / fan_in,
}


@pytest.mark.parametrize("name", FILLS)
def test_variances_of_every_weight(name):
    """The sample variance is within five of its standard errors (2/n of a normal's, less of a uniform's)."""
    model = nn.ModuleList([
        nn.Linear(300, 200), nn.Conv2d(32, 64, 3, groups=4), nn.ConvTranspose2d(32, 64, 4, stride=2),
        dlkern.nn.LSTM(60, 50, 2, bidirectional=True, proj_size=20), nn.GRUCell(60, 80), nn.MultiheadAttention(64, 4),
        nn.MultiheadAttention(64, 4, kdim=32), dlkern.nn.TensorReduction((20, 30), 50), nn.BatchNorm2d(64),
        nn.Embedding(10, 20),
    ])  # fmt: skip
    kept = [p.detach().clone() for p in (*model[8].parameters(), *model[9].parameters())]
    assert getattr(init, name)(model) is model
    seen = 0
    for module in model.modules():
        for weight, fan_in, fan_out in init._blocks(module):
            expected = FILLS[name](fan_in, fan_out)
            assert abs(weight.var().item() / expected - 1) < 5 * math.sqrt(2 / weight.numel())
            if "uniform" in name:
                assert weight.abs().max() <= math.sqrt(3 * expected) * (1 + 1e-6)
            else:
                assert weight.abs().max() > math.sqrt(3 * expected) * 1.2
            seen += weight.numel()
    matrices = [p for p in model.parameters() if p.dim() >= 2 and p is not model[9].weight]
    assert seen == sum(p.numel() for p in matrices)  # nothing left out, nothing twice
    assert all(p.eq(0).all() for n, p in model.named_parameters() if p.dim() == 1 and "bias" in n)
    assert all(torch.equal(a, b) for a, b in zip(kept, (*model[8].parameters(), *model[9].parameters())))


def test_tables_stay():
    """Weights of two dimensions that no input is multiplied by."""
    tables = [nn.LayerNorm((3, 4)), dlkern.nn.LayerNorm((3, 4)), nn.RMSNorm((3, 4)), nn.Embedding(3, 4), nn.EmbeddingBag(3, 4)]
    tables += [dlkern.nn.LearnedPositions(5, 4), dlkern.nn.RelativePositionBias(2)]
    for table in tables:
        before = table.weight.detach().clone()
        for name in FILLS:
            getattr(init, name)(table)
        assert torch.equal(table.weight, before), table
        with pytest.raises(ValueError, match="no weight matrix"):
            init.fans(table)


@pytest.mark.parametrize("name", FILLS)
def test_wrong_targets_raise_and_write_nothing(name):
    fill = getattr(init, name)
    for wrong in (None, "weight", [1.0], nn.Linear):
        with pytest.raises(TypeError, match="tensor or a module"):
            fill(wrong)
    for last in (dlkern.nn.LazyLinear(3), nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))):
        model = nn.Sequential(nn.Linear(2, 2), last)
        before = model[0].weight.detach().clone()
        with pytest.raises(ValueError):
            fill(model)
        assert torch.equal(model[0].weight, before)
    empty = fill(nn.Linear(0, 3))
    assert empty.weight.shape == (3, 0) and empty.bias.eq(0).all()


def test_gains_modes_generators_and_tensors():
    first, second = (
        init.kaiming_normal_(nn.Linear(50, 20), generator=torch.Generator().manual_seed(3)).weight for _ in range(2)
    )
    assert torch.equal(first, second)
    wide = init.kaiming_normal_(nn.Linear(800, 50), mode="fan_out", nonlinearity="linear").weight
    assert abs(wide.var().item() * 50 - 1) < 0.05
    assert abs(init.xavier_uniform_(nn.Linear(300, 300), gain=2.0).weight.var().item() * 300 / 4 - 1) < 0.05
    for name in FILLS:
        torch.manual_seed(1)
        ours = getattr(init, name)(torch.empty(5, 4))
        torch.manual_seed(1)
        assert torch.equal(ours, getattr(nn.init, name)(torch.empty(5, 4)))
    with pytest.raises(ValueError, match="fan_around"):
        init.kaiming_normal_(nn.Linear(2, 2), mode="fan_around")


def alternating(i):
    """Strided down, transposed up again, in groups: where fans by shape alone are wrong."""
    if i % 2 == 0:
        return dlkern.nn.Conv2d(64, 128, 4, stride=2, groups=2)
    return dlkern.nn.ConvTranspose2d(128, 64, 4, stride=2, groups=2)


DEPTH = 20
STACKS = {
    # layers, input, layer-wise activation, initialiser, numbers a layer's mean square is an average of
    "linear, Xavier": (lambda i: dlkern.nn.Linear(512, 512), (32, 512), lambda x: x, init.xavier_normal_, 512),
    "linear and ReLU, He": (lambda i: dlkern.nn.Linear(512, 512), (32, 512), torch.relu, init.kaiming_uniform_, 512),
    "grouped convolution and ReLU, He": (
        lambda i: dlkern.nn.Conv2d(128, 128, 3, groups=2, padding=1, padding_mode="circular"), (2, 128, 8, 8),
        torch.relu, init.kaiming_normal_, 128,
    ),
    "strided and transposed and ReLU, He": (alternating, (2, 64, 14, 14), torch.relu, init.kaiming_normal_, 64),
}


@pytest.mark.parametrize("name", STACKS)
def test_activations_keep_their_size_through_twenty_layers(name):
    """The mean square stays within three standard deviations of what chance does to it: of a layer n wide the logarithm
    of the mean square moves by about sqrt(5 / n) with ReLU (Hanin and Rolnick 2018), and sqrt(DEPTH) times that in all."""
    layers, shape, activation, fill, width = STACKS[name]
    x = torch.randn(shape)
    start = x.square().mean().item()
    for i in range(DEPTH):
        layer = fill(layers(i))
        with torch.no_grad():
            y = layer(activation(x) if i else x * (1 if activation(-torch.ones(1)) else math.sqrt(0.5)))
        if isinstance(layer, nn.ConvTranspose2d):  # borders see fewer taps
            y = y[..., 1:-1, 1:-1]
            assert y.shape[-1] == 14 or y.shape[-1] == 12
            y = torch.nn.functional.pad(y, (1, 1, 1, 1), mode="circular") if y.shape[-1] == 12 else y
        x = y
    change = math.log(x.square().mean().item() / start)
    assert abs(change) < 3 * math.sqrt(DEPTH * 5 / width), change
