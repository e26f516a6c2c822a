"""Saving and loading: state_dicts between torch and dlkern, whole models, chosen layers, safetensors."""

import io

import pytest
import safetensors.torch
import torch
from test_models import NETWORKS, make
from torch import nn
from torch.utils._pytree import tree_leaves as leaves

import dlkern


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def disturbed(model):
    """Another state than the one it was made with, integers too."""
    with torch.no_grad():
        for i, x in enumerate(model.state_dict().values()):
            x.add_(torch.randn_like(x) * 0.1) if x.is_floating_point() else x.add_(i + 1)
    return model


def through_a_file(thing, **options):
    stream = io.BytesIO()
    torch.save(thing, stream)
    stream.seek(0)
    return torch.load(stream, **options)


def round_trip(make, inputs, first, second):
    """A state from one library into a model of the other, and the same answer; a whole model of dlkern's, and the same bits."""
    libraries = {"torch": nn, "dlkern": dlkern.nn}
    saved = disturbed(make(libraries[first])).double().eval()
    loaded = make(libraries[second]).double().eval()
    assert loaded.load_state_dict(through_a_file(saved.state_dict())).missing_keys == []
    same(loaded.state_dict(), saved.state_dict())
    with torch.no_grad():
        answer = loaded(*inputs)
        torch.testing.assert_close(answer, saved(*inputs))
        if second == "dlkern":
            whole = through_a_file(loaded, weights_only=False)
            assert [type(m) for m in whole.modules()] == [type(m) for m in loaded.modules()]
            assert all(torch.equal(a, b) for a, b in zip(*(leaves(y) for y in (whole(*inputs), answer)), strict=True))


# The two that test_models leaves out, since they train as their siblings do.
EVERY = NETWORKS | {
    "vgg16": (make("vgg16", classes=10, dropout=0.0, hidden=256), 3, 32, 4),
    "preact_resnet50": (make("preact_resnet50", classes=10), 3, 33, 4),
}


def test_every_network_is_here():
    factories = {name for name in dlkern.models.__all__ if name.islower()}
    others = {"detached", "generate", "seq2seq", "transformer"}  # functions, and what SEQUENCES has
    assert {name.split()[0] for name in EVERY} == factories - others


directions = pytest.mark.parametrize("first, second", [("torch", "dlkern"), ("dlkern", "torch")])


@directions
@pytest.mark.parametrize("name", EVERY)
def test_networks(name, first, second):
    build, channels, size, _ = EVERY[name]
    round_trip(build, [torch.randn(1, channels, size, size).double()], first, second)


def tokens(*shape):
    return torch.randint(7, shape)


# Models of sequences: how to make one from a library's layers, and inputs.
SEQUENCES = {
    **{
        cell: (lambda n, cell=cell: dlkern.models.LanguageModel(7, 6, 2, cell=cell, nn=n), [tokens(5, 3)])
        for cell in ("rnn", "gru", "lstm")
    },
    "tied": (lambda n: dlkern.models.LanguageModel(7, 6, embedding=6, tied=True, nn=n), [tokens(5, 3)]),
    "encoder, decoder": (
        lambda n: dlkern.models.EncoderDecoder(7, 9, 6, embedding=5, bidirectional=True, nn=n), [tokens(4, 3), tokens(5, 3)],
    ),
    "Bahdanau": (
        lambda n: dlkern.models.seq2seq(7, 9, embedding=5, hidden=6, nn=n),
        [tokens(3, 4), torch.tensor([4, 2, 3]), tokens(3, 5)],
    ),
    "Transformer": (
        lambda n: dlkern.models.transformer(7, 9, width=8, heads=2, feedforward=10, max_len=8, nn=n),
        [tokens(3, 4), torch.tensor([4, 2, 3]), tokens(3, 5)],
    ),
}  # fmt: skip


@directions
@pytest.mark.parametrize("name", SEQUENCES)
def test_models_of_sequences(name, first, second):
    make, inputs = SEQUENCES[name]
    round_trip(make, inputs, first, second)


def test_a_whole_model_keeps_its_tie():
    model = through_a_file(SEQUENCES["tied"][0](dlkern.nn), weights_only=False)
    assert model.embedding.weight is model.head.weight


@pytest.mark.parametrize("convert", [False, True])
def test_whole_models(convert):
    model = NETWORKS["lenet"][0](nn if convert else dlkern.nn).eval()
    if convert:
        dlkern.convert(model)
    loaded = through_a_file(model, weights_only=False)
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded(x), model(x)) and [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    same(loaded.state_dict(), model.state_dict())


def test_chosen_layers_only():
    """A classifier of other classes takes the features of the old one; what is missing is told as torch tells it."""
    old = disturbed(dlkern.models.resnet18(nn=nn, classes=10))
    new = dlkern.models.resnet18(classes=3)
    head = {key: value.clone() for key, value in new.state_dict().items() if key.startswith("fc")}
    assert head
    features = {key: value for key, value in old.state_dict().items() if key not in head}
    missing, unexpected = new.load_state_dict(features, strict=False)
    assert set(missing) == set(head) and unexpected == []
    same({k: v for k, v in new.state_dict().items() if k not in head}, features)
    same({k: v for k, v in new.state_dict().items() if k in head}, head)
    with pytest.raises(RuntimeError, match="size mismatch for fc"):
        new.load_state_dict(old.state_dict())
    new.layer1.load_state_dict(dlkern.models.resnet18(nn=nn, classes=2).layer1.state_dict())  # one stage


def test_safetensors(tmp_path):
    saved, loaded = disturbed(NETWORKS["lenet"][0](dlkern.nn)), NETWORKS["lenet"][0](nn)
    path = str(tmp_path / "lenet.safetensors")
    safetensors.torch.save_model(saved, path)
    assert safetensors.torch.load_model(loaded, path) == (set(), [])
    same(loaded.state_dict(), saved.state_dict())
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tied["b"].weight = tied["a"].weight
    dlkern.convert(tied)
    safetensors.torch.save_model(tied, path)  # a tied weight is stored once
    fresh = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    fresh["b"].weight = fresh["a"].weight
    safetensors.torch.load_model(fresh, path)
    assert torch.equal(fresh["b"].weight, tied["a"].weight) and fresh["b"].weight is fresh["a"].weight


def test_tied_modules_gather_gradients_from_both_places():
    """One layer used twice: convert() keeps it one, and its gradient is the sum of what two layers of its values get."""
    torch.manual_seed(0)
    first, second, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(3, 4)
    second.load_state_dict(first.state_dict())
    apart = nn.Sequential(first, nn.Tanh(), second)
    shared = nn.Linear(4, 4)
    shared.load_state_dict(first.state_dict())
    tied = dlkern.convert(nn.Sequential(shared, nn.Tanh(), shared))
    assert tied[0] is tied[2] and type(tied[0]) is dlkern.nn.Linear and len(list(tied.parameters())) == 2
    apart(x).square().sum().backward()
    tied(x).square().sum().backward()
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(shared, name).grad, getattr(first, name).grad + getattr(second, name).grad)
    optimizer = dlkern.optim.SGD(tied.parameters(), lr=0.1)
    before = shared.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(shared.weight.detach(), before - 0.1 * shared.weight.grad)
    loaded = nn.Sequential(other := nn.Linear(4, 4), nn.Tanh(), other)
    loaded.load_state_dict(tied.state_dict())
    assert torch.equal(other.weight, shared.weight)


def test_lazy_models_load_and_convert():
    """Sizes come from the first call or from a state_dict; convert() works before and after."""
    def lazy(library):
        return library.Sequential(
            library.LazyConv2d(4, 3), library.LazyBatchNorm2d(), library.Flatten(), library.LazyLinear(5)
        )

    nnd = type("dlkern_nn", (), {**vars(nn), **{k: getattr(dlkern.nn, k) for k in dlkern.nn.__all__}})
    whole, x = lazy(nn), torch.randn(2, 3, 6, 6)
    whole(x)
    for model in (lazy(nnd), dlkern.convert(lazy(nn))):
        model.load_state_dict(whole.state_dict())
        torch.testing.assert_close(model(x), dlkern.convert(whole)(x))
        assert [type(m) for m in model] == [dlkern.nn.Conv2d, dlkern.nn.BatchNorm2d, nn.Flatten, dlkern.nn.Linear]
    for optimizer in (torch.optim.SGD, dlkern.optim.SGD):
        model = dlkern.convert(lazy(nn))
        model(x)
        steps = optimizer(model.parameters(), lr=0.1)
        model(x).square().sum().backward()
        steps.step()
