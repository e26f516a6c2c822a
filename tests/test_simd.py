"""exp, sigmoid and tanh of csrc/cpu/simd.h over dense ranges, through ops on single numbers."""

import numpy as np
import pytest
import torch

from dlkern.ops._registry import raw

DTYPES = [torch.float32, torch.float64]
POINTS = 200_001
wide = pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="long double is no wider than double here")


def dense(low, high, dtype):
    return torch.linspace(low, high, POINTS, dtype=torch.float64).to(dtype)


def exact(x):
    return x.numpy().astype(np.longdouble)


def units(value, reference, dtype):
    """Largest error in units in the last place of the reference."""
    spacing = np.spacing(np.abs(reference).astype(np.float64 if dtype == torch.float64 else np.float32))
    return float(np.max(np.abs(value.numpy().astype(np.longdouble) - reference) / spacing))


def softmax_tail(x):
    """e^x of very negative x: the gradient of sum(cross_entropy) at logits [0, x], target 0, is [.., e^x / (1 + e^x)]."""
    logits = torch.stack([torch.zeros_like(x), x], 1)
    target = torch.zeros(len(x), dtype=torch.long)
    loss, lse, total = raw["cross_entropy_forward"]["cpu"](logits, target, None, None, 2, -100, 0.0)
    saved = (logits, target, None, None, lse, total)
    return raw["cross_entropy_backward"]["cpu"](torch.ones_like(loss), *saved, 2, -100, 0.0)[:, 1]


@wide
@pytest.mark.parametrize("dtype, low, high", [(torch.float32, -87.3, -18.0), (torch.float64, -745.0, -38.0)])
def test_exp_is_within_its_units(dtype, low, high):
    x = dense(low, high, dtype)
    assert units(softmax_tail(x), np.exp(exact(x)), dtype) < 2.0


def test_exp_where_it_ends():
    for dtype, low in ((torch.float32, -90.0), (torch.float64, -746.0)):
        x = torch.tensor([low, -1e5, float("-inf")] * 7, dtype=dtype)
        assert (softmax_tail(x) == 0).all()


def activated(x, code):
    return raw["linear_forward"]["cpu"](x[:, None], torch.ones(1, 1, dtype=x.dtype), None, code)[:, 0]


@wide
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, code", [("sigmoid", 3), ("tanh", 2)])
def test_activations_are_as_exact_as_torchs(name, code, dtype):
    for low, high in ((-1e-3, 1e-3), (-1.0, 1.0), (-20.0, 20.0), (-80.0, 80.0)):
        x = dense(low, high, dtype)
        z = exact(x)
        reference = np.tanh(z) if name == "tanh" else 1 / (1 + np.exp(-z))
        unit = np.finfo(np.float32 if dtype == torch.float32 else np.float64).eps / 2
        for measure in (np.linalg.norm, lambda v: np.abs(v).max()):
            scale = measure(reference) * unit
            ours, torchs = (measure(y.numpy().astype(np.longdouble) - reference) / scale
                            for y in (activated(x, code), getattr(torch, name)(x)))
            assert ours <= max(2 * torchs, 1.0), (low, high, ours, torchs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_and_nan(dtype):
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e30, -1e30, 0.0], dtype=dtype)
    for code, function in ((2, torch.tanh), (3, torch.sigmoid)):
        assert torch.equal(torch.nan_to_num(activated(x, code), nan=7.0), torch.nan_to_num(function(x), nan=7.0))
