"""freeze(): the same bits, faster; nothing stale that torch can know of; nothing that travels."""

import copy
import io

import pytest
import torch

import dlkern
from dlkern.nn import Conv1d, Conv2d


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        Conv2d(5, 20, 3, padding=1), torch.nn.ReLU(), Conv2d(20, 33, (3, 2), stride=2, bias=False),
        torch.nn.BatchNorm2d(33), Conv2d(33, 66, 1, groups=3), Conv2d(66, 66, 3, groups=66, padding="same"),
        Conv2d(66, 10, 3, padding=1, padding_mode="reflect"), torch.nn.Flatten(2), Conv1d(10, 7, 5, padding=2),
    ).eval()  # fmt: skip


@pytest.fixture
def image():
    return torch.randn(2, 5, 17, 13)


def packed(module):
    return [m._frozen.value for m in module.modules() if getattr(m, "_frozen", None) is not None]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_same_bits(image, dtype, channels_last):
    plain, x = model().to(dtype), image.to(dtype)
    if channels_last:
        plain = plain[:7].to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    expected = plain(x)
    dlkern.freeze(plain)
    for _ in range(2):
        got = plain(x)
        assert torch.equal(got, expected) and got.stride() == expected.stride()
    assert sum(p is not None for p in packed(plain)) >= 3  # the packed way was gone, not only the usual one


@torch.no_grad()
def test_weights_that_torch_knows_to_have_changed_are_seen(image):
    frozen, plain = dlkern.freeze(model()), model()
    frozen(image)
    for change in (
        lambda m: m[0].weight.mul_(1.5),
        lambda m: m.load_state_dict({k: v + 1 if v.is_floating_point() else v for k, v in m.state_dict().items()}),
        lambda m: setattr(m[2], "weight", torch.nn.Parameter(m[2].weight * 2)),
        lambda m: m.double(),
    ):
        change(frozen)
        change(plain)
        x = image.to(plain[0].weight.dtype)
        assert torch.equal(frozen(x), plain(x))


@torch.no_grad()
def test_what_is_changed_behind_torchs_back_is_seen_after_unfreeze(image):
    frozen = dlkern.freeze(model())
    before = frozen(image)
    frozen[0].weight.data[:] = 0
    assert torch.equal(frozen(image), before)  # documented
    assert dlkern.unfreeze(frozen) is frozen and not packed(frozen)
    assert not torch.equal(frozen(image), before)


def test_a_gradient_of_a_parameter_raises_and_one_of_the_input_is_right(image):
    frozen = dlkern.freeze(model())
    with pytest.raises(RuntimeError, match=r"Conv2d is frozen.*unfreeze"):
        frozen(image)
    x = image.requires_grad_()
    gradients = []
    for each in (frozen.requires_grad_(False), model().requires_grad_(False)):
        gradients += torch.autograd.grad(each(x).sum(), x)
    assert torch.equal(*gradients)
    dlkern.unfreeze(frozen.requires_grad_())(image).sum().backward()
    assert frozen[0].weight.grad is not None


@torch.no_grad()
def test_nothing_packed_travels(image):
    frozen = dlkern.freeze(model())
    expected = frozen(image)
    assert frozen.state_dict().keys() == model().state_dict().keys()
    stream = io.BytesIO()
    torch.save(frozen, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(frozen), torch.load(stream, weights_only=False)):
        assert all(p is None for p in packed(twin))
        assert torch.equal(twin(image), expected)
    dlkern.revert(frozen)
    assert not packed(frozen) and torch.equal(frozen(image).isfinite(), expected.isfinite())


@torch.no_grad()
def test_compiled_traced_and_autocast_calls_go_the_usual_way(image):
    frozen = dlkern.freeze(model())
    expected = frozen(image)
    assert torch.equal(torch.compile(frozen, fullgraph=True, backend="aot_eager")(image), expected)
    with dlkern.trace() as calls:
        assert torch.equal(frozen(image), expected)
    assert {c.op for c in calls} == {"conv1d", "conv2d"} and {c.backend for c in calls} == {"cpu"}
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(image).dtype == torch.bfloat16


@torch.no_grad()
def test_fused_rows(image):
    """Folded and packed once: what the fused model gives without, and again after a change of the statistics."""
    def net():
        torch.manual_seed(0)
        body = torch.nn.Sequential(
            torch.nn.Conv2d(5, 20, 3, padding=1), torch.nn.BatchNorm2d(20), torch.nn.ReLU(),
            torch.nn.Conv2d(20, 20, 3, padding=1, groups=20), torch.nn.BatchNorm2d(20), torch.nn.ReLU(),
            torch.nn.Conv2d(20, 9, 1), torch.nn.ReLU(),
        )  # fmt: skip
        return dlkern.convert(body.eval(), fuse=True)

    frozen, fused = dlkern.freeze(net()), net()
    for x in (image, image[:1], image.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(frozen(x), fused(x))
    assert sum(p is not None for p in packed(frozen)) == 2  # the depthwise one has nothing to pack
    for model in (frozen, fused):
        model.get_submodule("1").running_var.mul_(2)
    assert torch.equal(frozen(image), fused(image))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="Fused is frozen"):
        frozen.get_submodule("fused_2")(torch.randn(1, 20, 4, 4))


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"):
        dlkern.freeze(3)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"):
        dlkern.unfreeze(3)
    with pytest.raises(ValueError, match="convert"):
        dlkern.freeze(torch.nn.Conv2d(3, 4, 3))
    frozen = dlkern.freeze(Conv2d(3, 4, 3).requires_grad_(False))
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        frozen(torch.randn(1, 2, 5, 5))
    with pytest.raises(RuntimeError, match="packed is not what conv2d_pack makes"):
        weight = torch.randn(4, 3, 3, 3)
        torch.ops.dlkern.conv2d_forward_packed_cpu(
            torch.randn(1, 3, 5, 5), weight, torch.randn(7), None, None, [1, 1], [0, 0], [1, 1], 1, 0
        )
