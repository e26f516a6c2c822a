"""Raw ops called directly with arguments that hypothesis drew: served or refused, never a crash or an access out of
bounds. tests/test_builds.py runs this file under AddressSanitizer and UBSan, where such an access is seen."""

import functools
import os

import pytest
import test_fuzz as fuzz
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_contract import FIRST, record_raw_calls

import dlkern.nn.functional as F

EXAMPLES = int(os.environ.get("DLKERN_RAW_EXAMPLES", "25"))
random_calls = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
REFUSALS = (RuntimeError, ValueError, IndexError, NotImplementedError, TypeError, MemoryError, OverflowError)
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.bool]
INTS = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**62, -(2**62)]))


@functools.cache
def raw_calls(op: str) -> list:
    """(raw op, arguments) of a forward and backward of every kind the catalog knows of `op`."""
    return record_raw_calls(FIRST[op])


def one_in(draw, n: int) -> bool:
    return draw(st.integers(1, n)) == n


def redrawn(draw, x: torch.Tensor, sizes: dict[int, int]) -> torch.Tensor:
    """Sizes as `sizes` maps them (mostly), other strides, sometimes another dtype; a view that ends where its memory
    ends, so that one element too far is one too many."""
    shape = [draw(st.integers(0, 9)) if one_in(draw, 30) else sizes[n] for n in x.shape]
    if one_in(draw, 30):
        shape = shape[1:] if draw(st.booleans()) else [2, *shape]
    dtype = draw(st.sampled_from(DTYPES)) if one_in(draw, 30) else x.dtype
    order, strides, step = list(range(len(shape))), [0] * len(shape), draw(st.sampled_from([1, 1, 1, 2, 3]))
    if draw(st.booleans()):
        order = draw(st.permutations(order))
    for d in reversed(order):
        strides[d] = 0 if one_in(draw, 20) else step
        step *= max(shape[d], 1) + draw(st.sampled_from([0, 0, 0, 1]))
    last = sum((n - 1) * stride for n, stride in zip(shape, strides)) if 0 not in shape else -1
    offset = draw(st.sampled_from([0, 0, 1, 5]))
    values = torch.randn(last + 1 + offset, dtype=torch.float64) * 3
    if not dtype.is_floating_point and not one_in(draw, 5):  # targets and indices that are in range
        values = values.abs() % 2
    return values.to(dtype).as_strided(shape, strides, offset)


def changed(draw, argument, sizes):
    """Tensors get consistent new sizes, so that a good part of the calls is served; the rest changes now and then."""
    if isinstance(argument, torch.Tensor):
        return redrawn(draw, argument, sizes)
    if isinstance(argument, list | tuple | torch.Size):
        return [draw(INTS) if one_in(draw, 10) else sizes.get(n, n) for n in argument]
    if not one_in(draw, 5):
        return argument
    if isinstance(argument, bool):
        return draw(st.booleans())
    if isinstance(argument, int):
        return draw(INTS)
    if isinstance(argument, float):
        return draw(st.floats(-1, 2, width=32) | st.sampled_from([float("nan"), float("inf")]))
    return draw(st.sampled_from([None, torch.ones(1), torch.ones(3)]))


@pytest.mark.parametrize("op", FIRST)
def test_changed_arguments(op):
    @random_calls
    @given(st.data())
    def run(data):
        raw_op, arguments = data.draw(st.sampled_from(raw_calls(op)))
        torch.manual_seed(0)
        found = {n for argument in arguments if isinstance(argument, torch.Tensor) for n in argument.shape}
        sizes = {n: data.draw(st.sampled_from([n, n, 1, 2, 3, n + 1, 2 * n + 1, 0])) for n in sorted(found)}
        if data.draw(st.booleans()):
            sizes = {n: n for n in found}
        arguments = [changed(data.draw, argument, sizes) for argument in arguments]
        try:
            raw_op(*arguments)
        except REFUSALS:
            pass

    run()


VALID = {
    "conv2d": (fuzz.conv_calls(), lambda options: lambda *t: F.conv2d(*t, **options)),
    "max_pool2d": (fuzz.pool_calls(False), lambda options: lambda x: F.max_pool2d(x, **options)),
    "avg_pool2d": (fuzz.pool_calls(True), lambda options: lambda x: F.avg_pool2d(x, **options)),
    "adaptive_avg_pool2d": (fuzz.adaptive_calls(), lambda size: lambda x: F.adaptive_avg_pool2d(x, size)),
    "adaptive_max_pool2d": (fuzz.adaptive_calls(), lambda size: lambda x: F.adaptive_max_pool2d(x, size)),
    "lp_pool2d": (fuzz.lp_calls(), lambda options: lambda x: F.lp_pool2d(x, **options)),
    "linear": (fuzz.linear_calls(), None),
    "batch_norm": (
        fuzz.batch_norm_calls(),
        lambda training: lambda x, *affine: F.batch_norm(
            x, torch.zeros(x.shape[1]).to(x.dtype), torch.ones(x.shape[1]).to(x.dtype), *affine, training=training
        ),
    ),
}


@pytest.mark.parametrize("op", VALID)
def test_forward_and_backward_of_drawn_calls(op):
    """The public function, with gradients, on the shapes and layouts of tests/test_fuzz.py."""
    calls, function = VALID[op]

    @random_calls
    @given(calls)
    def run(call):
        inputs, *options, dtype = call
        inputs = [x for x in inputs if x is not None]
        result = fuzz.run(function(options[0]) if function else F.linear, inputs, dtype)
        # lp_pool with a norm of 0: Python's own error, in torch as well.
        assert not isinstance(result, Exception) or isinstance(result, (*REFUSALS, ZeroDivisionError)), result

    run()
