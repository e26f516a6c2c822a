"""Reference networks against their torch twins."""

import pytest
import torch
from torchvision_stub import torchvision

import dlkern
from dlkern import models
from dlkern.testing._training import check_training
from dlkern.training import Data, batches, digits, train_side_by_side


def lenet(nn):
    torch.manual_seed(0)
    return models.lenet(nn=nn)


def resnet18(nn):
    torch.manual_seed(0)
    return models.resnet18(10, nn=nn)


def digit_batches(count, size, colour=False):
    stream = batches(digits(), size, seed=3)
    for _ in range(count):
        x, y = next(stream)
        yield x[..., 4:28, 4:28].expand(-1, 3, -1, -1).contiguous() if colour else x, y


@pytest.mark.parametrize("make", [lenet, resnet18])
def test_twins_have_the_same_start_and_state(make):
    ours, twin = make(dlkern.nn), make(torch.nn)
    assert repr(ours) == repr(twin)
    assert ours.state_dict().keys() == twin.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), twin.state_dict().values(), strict=True))
    assert {type(m).__module__.split(".")[0] for m in twin.modules()} <= {"torch", "dlkern"}
    assert not any(r.status == "convertible" for r in dlkern.conversion_report(ours))
    assert not any(r.status == "dlkern" for r in dlkern.conversion_report(twin))


def gentle(parameters):
    # At a rate where ResNet-18 diverges on batches of four, two runs of torch itself have nothing in common.
    return torch.optim.SGD(parameters, lr=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "size", "draws"), [(lenet, 16, 4), (resnet18, 4, 1)])
def test_twenty_training_steps(make, size, draws):
    """Output, every gradient, the loss curve, and weights and running statistics at the end."""
    drawn = list(digit_batches(20, size, colour=make is resnet18))
    with dlkern.trace() as calls:
        certificate = check_training(make, drawn, draws=draws, optimizer=gentle)
    certificate.raise_if_failed()
    assert {call.backend for call in calls} == {"cpu"}
    tensors = {row.tensor for row in certificate.rows}
    assert {f"grad of {n}" for n, _ in make(torch.nn).named_parameters()} < tensors
    assert {"output", "loss curve", "parameters at the end"} < tensors
    assert len(certificate.losses["dlkern"]) == 20


def test_the_rule_of_training_can_fail():
    def broken(nn):
        model = lenet(nn)
        if nn is dlkern.nn:
            model.classifier[1].register_forward_hook(lambda module, args, y: y * (1 + 1e-5))
        return model

    assert not check_training(broken, list(digit_batches(2, 8))).ok


def test_resnet18_is_torchvisions():
    torch.manual_seed(0)
    theirs = torchvision().models.resnet18(num_classes=10).eval()
    ours, twin = models.resnet18(10).eval(), models.resnet18(10, nn=torch.nn).eval()
    for model in (ours, twin):
        model.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 33, 40)
    assert torch.equal(twin(x), theirs(x))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", [lenet, resnet18])
def test_compiles_whole(network):
    torch._dynamo.reset()
    model = network(dlkern.nn).eval()
    x = torch.randn(1, 1 if network is lenet else 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_side_by_side():
    data = digits()
    few = Data(data.train_images[:64], data.train_labels[:64], data.test_images[:20], data.test_labels[:20])
    seen = []
    result = train_side_by_side(
        lambda nn: models.lenet(nn=nn), few, steps=6, batch=16, evaluations=2, progress=lambda i, r: seen.append(i)
    )
    assert seen == [1, 2, 3, 4, 5, 6]
    for run in (result.torch, result.dlkern):
        assert len(run.losses) == len(run.milliseconds) == 6
        assert [step for step, _ in run.accuracy] == [3, 6]
    torch.testing.assert_close(torch.tensor(result.dlkern.losses), torch.tensor(result.torch.losses))
    assert result.speedup > 0


def test_digits():
    data = digits()
    assert data.train_images.shape == (1438, 1, 32, 32) and data.test_images.shape == (359, 1, 32, 32)
    assert data.train_images.min() == -1 and data.train_images.max() <= 1
    first, again = next(batches(data, 8, 5)), next(batches(data, 8, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape == (8, 1, 32, 32) and not torch.equal(first[0], next(batches(data, 8, 6))[0])
