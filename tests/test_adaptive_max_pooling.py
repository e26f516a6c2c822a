"""adaptive_max_pool2d: torch's values, indices, gradients and errors; NumPy; special values; foreign indices."""

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from test_pooling import ADAPTIVE, DTYPES, INF, LAYOUTS, NAN, image, on_cpu, run, same

import dlkern.nn.functional as F
from dlkern.ops._registry import raw

SHAPES = [(2, 3, 7, 7), (1, 2, 12, 15), (2, 19, 9, 40), (1, 37, 14, 12), (2, 5, 1, 1), (3, 16, 4, 5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ADAPTIVE, ids=str)
def test_is_torchs(size, dtype):
    """Few integers, so that ties are everywhere; gradients of float64 and float32 are sums of integers."""
    for shape in SHAPES:
        for layout in LAYOUTS:
            x = image(shape, layout, dtype)
            for more in ({}, {"return_indices": True}):
                ours, theirs = on_cpu(run, F.adaptive_max_pool2d, x, output_size=size, **more), run(
                    TF.adaptive_max_pool2d, x, output_size=size, **more
                )
                same(ours, theirs)
                assert [t.stride() for t in ours[:-1]] == [t.stride() for t in theirs[:-1]]
            with torch.no_grad():
                assert torch.equal(F.adaptive_max_pool2d(x, size), theirs[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(dtype, layout):
    for width in range(1, 41):
        size = (2, 3, 5, width) if layout == torch.contiguous_format else (2, width, 5, 6)
        x = image(size, layout, dtype)
        for output_size in (1, 2, (2, 5)):
            options = dict(output_size=output_size, return_indices=True)
            same(run(F.adaptive_max_pool2d, x, **options), run(TF.adaptive_max_pool2d, x, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_special_values(layout, dtype):
    """NaN propagates and the last of a window wins; ties take the first; windows of minus infinity their first element."""
    x = image((2, 35, 13, 34), layout, dtype)
    chance = torch.rand(x.shape)
    special = x.clone(memory_format=torch.preserve_format)
    special[chance < 0.1] = NAN
    special[(chance > 0.1) & (chance < 0.3)] = -INF
    special[(chance > 0.3) & (chance < 0.33)] = INF
    for tensor in (special, torch.full_like(x, -INF), torch.full_like(x, NAN), torch.full_like(x, 2), torch.zeros_like(x) * -1):
        for size in (1, (3, 5), (20, 7)):
            options = dict(output_size=size, return_indices=True)
            same(run(F.adaptive_max_pool2d, tensor, **options), run(TF.adaptive_max_pool2d, tensor, **options))


def test_against_numpy():
    """Written from the definition: the first of the largest, the last NaN."""
    generator = np.random.default_rng(7)
    for _ in range(40):
        height, width, rows, columns = generator.integers(1, 12, 4)
        x = generator.integers(-4, 4, (3, height, width)).astype(np.float64)
        x[generator.random(x.shape) < 0.1] = np.nan
        x[generator.random(x.shape) < 0.2] = -np.inf
        for layout in LAYOUTS:
            tensor = torch.from_numpy(x)[None].float().contiguous(memory_format=layout)
            values, indices = F.adaptive_max_pool2d(tensor, (int(rows), int(columns)), return_indices=True)
            for c, i, j in np.ndindex(3, rows, columns):
                places = [
                    (y, z)
                    for y in range(i * height // rows, -(-(i + 1) * height // rows))
                    for z in range(j * width // columns, -(-(j + 1) * width // columns))
                ]
                nans = [at for at in places if np.isnan(x[(c, *at)])]
                best = nans[-1] if nans else max(places, key=lambda at, c=c: x[(c, *at)])
                assert indices[0, c, i, j] == best[0] * width + best[1]
                np.testing.assert_array_equal(values[0, c, i, j].double().numpy(), x[(c, *best)])


def test_unbatched_empty_and_views():
    base = torch.randn(4, 6, 18, 22)
    for x in (
        base[0], base[:0], base[:0].contiguous(memory_format=torch.channels_last), base[..., ::2], base[:, ::3],
        base.transpose(2, 3), base[:1].expand(4, -1, -1, -1), base[:, :1], base[..., :1, :1],
        base.contiguous(memory_format=torch.channels_last)[:, 1:5],
    ):  # fmt: skip
        before, options = x.clone(), dict(output_size=(2, None), return_indices=True)
        ours, theirs = run(F.adaptive_max_pool2d, x, **options), run(TF.adaptive_max_pool2d, x, **options)
        same(ours, theirs)
        assert ours[0].stride() == theirs[0].stride() or ours[0].numel() <= 1
        assert torch.equal(x, before)
    nothing = base.clone().requires_grad_()
    output, indices = F.adaptive_max_pool2d(nothing, (0, 2), return_indices=True)
    assert output.shape == indices.shape == (4, 6, 0, 2)
    output.sum().backward()
    assert nothing.grad.count_nonzero() == 0
    assert torch.equal(F.adaptive_max_pool2d_with_indices(base, 3)[1], TF.adaptive_max_pool2d_with_indices(base, 3)[1])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_derivatives(layout):
    x = torch.randperm(2 * 3 * 6 * 7).reshape(2, 3, 6, 7).double().contiguous(memory_format=layout).requires_grad_()
    for size in (1, (4, 3), (8, 2)):
        assert torch.autograd.gradcheck(lambda x, size=size: F.adaptive_max_pool2d(x, size), x)
        assert torch.autograd.gradgradcheck(lambda x, size=size: F.adaptive_max_pool2d(x, size), x)


def test_thread_counts_agree():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(3)
            results = []
            for layout in LAYOUTS:
                x = torch.randn(3, 37, 31, 45).contiguous(memory_format=layout)
                for size in (1, (4, 1), (5, 7)):
                    results += run(F.adaptive_max_pool2d, x, output_size=size)
            found.append(results)
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        same(other, found[0])


BAD_CALLS = {
    "no rows": lambda f, x: f.adaptive_max_pool2d(x[:, :, :0], 2),
    "no channels": lambda f, x: f.adaptive_max_pool2d(x[:, :0], 2),
    "integers": lambda f, x: f.adaptive_max_pool2d(x.long(), 2),
    "negative": lambda f, x: f.adaptive_max_pool2d(x, (-1, 2)),
    "one size in a tuple": lambda f, x: f.adaptive_max_pool2d(x, (2,)),
    "three sizes": lambda f, x: f.adaptive_max_pool2d(x, (1, 2, 3)),
    "None": lambda f, x: f.adaptive_max_pool2d(x, None),
    "two dimensions": lambda f, x: f.adaptive_max_pool2d(x[0, 0], 2),
    "five dimensions": lambda f, x: f.adaptive_max_pool2d(x[None], 2),
    "a string": lambda f, x: f.adaptive_max_pool2d(x, "2"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_are_torchs(name):
    x, found = torch.randn(2, 3, 5, 5), []
    for functions in (TF, F):
        with pytest.raises(Exception) as raised:
            BAD_CALLS[name](functions, x)
        found.append(raised.value)
    assert type(found[0]) is type(found[1]) and str(found[0]) == str(found[1])


def test_raw_ops_refuse():
    x = torch.randn(1, 2, 4, 4)
    forward, backward = raw["adaptive_max_pool2d_forward"]["cpu"], raw["adaptive_max_pool2d_backward"]["cpu"]
    output, indices = forward(x, [2, 2])
    for call, message in [
        (lambda: forward(x, [2]), "output_size must be 2"),
        (lambda: forward(x, [-1, 2]), "greater than or equal to 0"),
        (lambda: forward(x[0], [2, 2]), "expected a 4-D tensor"),
        (lambda: forward(x.long(), [2, 2]), "expected float32, float64, bfloat16 or float16"),
        (lambda: backward(output, indices.int(), [1, 2, 4, 4], False), "indices must be int64"),
        (lambda: backward(output, indices[..., :1], [1, 2, 4, 4], False), "wrong sizes"),
        (lambda: backward(output, indices, [1, 3, 4, 4], False), "wrong sizes"),
        (lambda: backward(output, indices, [1, 2], False), "expected a 4-D tensor"),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()


@pytest.mark.parametrize("channels_last", [False, True])
def test_foreign_indices_write_nothing_outside(channels_last):
    x = torch.randn(2, 3, 10, 12).contiguous(memory_format=LAYOUTS[channels_last])
    output, indices = raw["adaptive_max_pool2d_forward"]["cpu"](x, [3, 4])
    for foreign in (torch.full_like(indices, -1), torch.full_like(indices, 10**12), torch.full_like(indices, 120)):
        gradient = raw["adaptive_max_pool2d_backward"]["cpu"](torch.ones_like(output), foreign, x.shape, channels_last)
        assert gradient.count_nonzero() == 0 and gradient.shape == x.shape
