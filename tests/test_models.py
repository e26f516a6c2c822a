"""Reference networks against their torch twins."""

import pytest
import torch
from torchvision_stub import torchvision

import dlkern
from dlkern import models
from dlkern.testing._training import check_training
from dlkern.training import Data, batches, digits, train_side_by_side


def make(name, **settings):
    """A factory of the network by its name, without dropout, from one seed."""

    def build(nn):
        torch.manual_seed(0)
        return getattr(models, name)(nn=nn, **settings)

    return build


# name -> the factory, the input's channels and size (the smallest that every layer has work at), the batch.
NETWORKS = {
    "mlp": (make("mlp"), 1, 32, 16),
    "lenet": (make("lenet"), 1, 32, 16),
    "alexnet": (make("alexnet", classes=10, dropout=0.0, hidden=256), 3, 63, 4),
    "vgg11": (make("vgg11", classes=10, dropout=0.0, hidden=256), 3, 32, 4),
    "vgg16 with batch norm": (make("vgg16", classes=10, dropout=0.0, hidden=256, batch_norm=True), 3, 32, 4),
    "nin": (make("nin", dropout=0.0), 3, 32, 4),
    "googlenet": (make("googlenet", classes=10, dropout=0.0), 3, 33, 4),
    "resnet18": (make("resnet18", classes=10), 3, 24, 4),
    "resnet50": (make("resnet50", classes=10), 3, 33, 4),
    "preact_resnet18": (make("preact_resnet18", classes=10), 3, 24, 4),
    "densenet121": (make("densenet121", classes=10), 3, 33, 4),
}
each_network = pytest.mark.parametrize("name", NETWORKS)
lenet, resnet18 = NETWORKS["lenet"][0], NETWORKS["resnet18"][0]


def digit_batches(count, batch, channels=1, size=32, seed=3):
    stream = batches(digits(), batch, seed=seed)
    for _ in range(count):
        x, y = next(stream)
        x = torch.nn.functional.interpolate(x, size, mode="bilinear") if size > 32 else x[..., :size, :size]
        yield x.expand(-1, channels, -1, -1).contiguous(), y


@each_network
def test_twins_have_the_same_start_and_state(name):
    make = NETWORKS[name][0]
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
@each_network
def test_twenty_training_steps(name):
    """Output, every gradient, the loss curve, and weights and running statistics at the end."""
    make, channels, size, batch = NETWORKS[name]
    for seed in (3, 4, 5):  # a run through so many layers is chance, too: others tell that from a fault
        drawn = list(digit_batches(20, batch, channels, size, seed))
        with dlkern.trace() as calls:
            certificate = check_training(make, drawn, draws=4 if batch > 4 else 1, optimizer=gentle, name=name)
        if certificate.ok:
            break
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


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "vgg16_bn", "googlenet", "resnet18", "resnet50", "densenet121"])
def test_networks_are_torchvisions(name):
    """Its parameters load, and give its output. (In training mode: with untouched statistics the logits are biases.)"""
    torch.manual_seed(0)
    settings = dict(aux_logits=False, init_weights=False) if name == "googlenet" else {}
    theirs = getattr(torchvision().models, name)(num_classes=10, **settings).train()
    settings = dict(batch_norm=True) if name.endswith("_bn") else {}
    x = torch.randn(2, 3, 64, 65)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for nn in (torch.nn, dlkern.nn):
        model = getattr(models, name.removesuffix("_bn"))(10, nn=nn, **settings).train()
        model.load_state_dict(theirs.state_dict())
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        actual = model(x)
        if nn is torch.nn:  # the twin, by which test_twenty_training_steps measures ours
            assert torch.equal(actual, theirs(x))
        assert actual.isfinite().all()


def test_wrong_widths_raise():
    with pytest.raises(ValueError, match="widths of input and output"):
        models.mlp((10,))


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
