"""convert and revert: the same model on dlkern, and back."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torchvision_stub import torchvision
from torchvision_stub import transformers as import_transformers

import dlkern
from dlkern.testing._training import distances, move


class Scaled(nn.Conv2d):
    """A user's own layer, as timm's StdConv2d is one."""

    def forward(self, x):
        return super().forward(x) * 2


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(),
        nn.Linear(8 * 9, 10),
    )  # fmt: skip


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 3, 8, 8), generator=torch.Generator().manual_seed(1))


SWAPPED = ["0", "1", "3", "4", "6"]  # of net()


def results(model, args, output=lambda y: y):
    """The output and every gradient, of a cotangent that is the same for every dtype."""
    model.zero_grad()
    y = output(model(*args))
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(cotangent.to(y.dtype))
    return {"output": y.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_parity(model, args, output=lambda y: y, moved=None):
    """convert(model) against model by the rule of whole networks: five torch runs with moved inputs are the measure."""
    generator = torch.Generator().manual_seed(3)
    converted = dlkern.convert(copy.deepcopy(model))
    double = copy.deepcopy(model).double()
    exact = results(double, [x.double() if x.is_floating_point() else x for x in args], output)
    theirs = []
    for _ in range(5):
        other = copy.deepcopy(model)
        if moved is not None:
            moved(other, generator)
        theirs.append(results(other, [move(x, generator) for x in args], output))
    with dlkern.trace() as calls:
        ours = results(converted, args, output)
    for row in distances(ours, theirs, exact, torch.float32):
        assert row.ok, row
    assert ours.keys() == exact.keys()
    return converted, calls


def test_swaps_in_place_and_keeps_everything():
    model = net()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    parameters, modules, shown = list(model.parameters()), list(model.modules()), repr(model)
    fired = []
    model[0].register_forward_hook(lambda *a: fired.append("forward"))
    model[0].register_forward_pre_hook(lambda *a: fired.append("before"))
    model[0].register_full_backward_hook(lambda *a: fired.append("backward"))
    model[1].eval()
    assert dlkern.convert(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert repr(model) == shown
    assert [i for i, m in model.named_children() if type(m).__module__.startswith("dlkern.")] == SWAPPED
    assert all(isinstance(m, getattr(nn, type(m).__name__)) for m in model)
    assert not model[1].training and model[0].training
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with dlkern.trace() as calls:
        model(images()).sum().backward()
    assert fired == ["before", "forward", "backward"]
    assert [call.op for call in calls] == ["conv2d", "batch_norm", "max_pool2d", "conv2d", "linear"]
    assert {call.backend for call in calls} == {"cpu"}


def test_parity_small():
    assert_parity(net(), [images()])


def test_converting_twice_and_reverting():
    model = net()
    classes, contents = [type(m) for m in model.modules()], [dict(vars(m)) for m in model.modules()]
    dlkern.convert(dlkern.convert(model))
    swapped = [type(m) for m in model.modules()]
    assert dlkern.revert(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [dict(vars(m)) for m in model.modules()] == contents
    dlkern.convert(model)
    assert [type(m) for m in model.modules()] == swapped


def test_a_single_layer():
    layer = nn.Linear(3, 4)
    assert dlkern.convert(layer) is layer
    assert type(layer) is dlkern.nn.Linear
    assert type(dlkern.revert(layer)) is nn.Linear


def test_copies_pickles_and_checkpoints(tmp_path):
    model = dlkern.convert(net()).eval()
    expected = model(images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is dlkern.nn.Conv2d
        assert torch.equal(other(images()), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = net()
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(dlkern.convert(fresh.eval())(images()), expected)


def test_tied_modules_and_parameters_stay_tied():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"] = model["a"]
    model["c"].weight = model["a"].weight
    dlkern.convert(model)
    assert model["a"] is model["b"]
    assert model["c"].weight is model["a"].weight
    assert type(copy.deepcopy(model)["b"]) is dlkern.nn.Linear


def test_optimizer_made_before_steps_the_converted_model():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dlkern.convert(model)
    before = model[0].weight.detach().clone()
    model(images()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("first", ["convert", "compile"])
def test_compile(first):
    torch._dynamo.reset()
    model = net().eval()
    if first == "compile":
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(images())
        dlkern.convert(model)
    else:
        compiled = torch.compile(dlkern.convert(model), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images()), model(images()))
    with dlkern.trace() as calls:
        model(images())
    assert len(calls) == len(SWAPPED)


def test_fx_keeps_our_modules_whole():
    model = net().eval()
    targets = [(n.op, n.target) for n in torch.fx.symbolic_trace(model).graph.nodes]
    traced = torch.fx.symbolic_trace(dlkern.convert(model))
    assert [(n.op, n.target) for n in traced.graph.nodes] == targets
    assert torch.equal(traced(images()), model(images()))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_script_says_what_to_do():
    model = dlkern.convert(net().eval())
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile dlkern's Conv2d: script dlkern\.revert"):
        torch.jit.script(model)
    assert type(model[0]) is dlkern.nn.Conv2d
    scripted = torch.jit.script(dlkern.revert(copy.deepcopy(model)))
    torch.testing.assert_close(scripted(images()), model(images()))


def test_export():
    model = dlkern.convert(net().eval())
    exported = torch.export.export(model, (images(),))
    assert torch.equal(exported.module()(images()), model(images()))
    assert any("dlkern" in str(n.target) for n in exported.graph.nodes)


@pytest.mark.parametrize("parametrize_it", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_modules(parametrize_it):
    model = net().eval()
    parametrize_it(model[0])
    expected = model(images())
    keys = list(model.state_dict())
    dlkern.convert(model)
    assert isinstance(model[0], dlkern.nn.Conv2d) and parametrize.is_parametrized(model[0])
    assert list(model.state_dict()) == keys
    with dlkern.trace() as calls:
        ours = model(images())
    assert calls[0].op == "conv2d" and len(calls) == len(SWAPPED)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(copy.deepcopy(model)(images()), expected)
    assert {r.name: r.status for r in dlkern.conversion_report(model)}["0"] == "dlkern"
    dlkern.revert(model)
    assert not isinstance(model[0], dlkern.nn.Conv2d)
    assert torch.equal(model(images()), expected)
    dlkern.convert(model)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is dlkern.nn.Conv2d


def test_parametrized_after_convert_and_back():
    model = dlkern.convert(net().eval())
    expected = model(images())
    parametrizations.weight_norm(model[0])
    torch.testing.assert_close(model(images()), expected)
    dlkern.revert(model)
    assert type(model[0]).__bases__ == (nn.Conv2d,)


def test_lazy_modules_become_ours():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(5))
    dlkern.convert(model)
    with dlkern.trace() as calls:
        model(images())
    assert [call.op for call in calls] == ["conv2d", "batch_norm", "linear"]  # the first call already
    assert [type(m) for m in model] == [dlkern.nn.Conv2d, dlkern.nn.BatchNorm2d, nn.Flatten, dlkern.nn.Linear]


def test_left_alone_and_why():
    patched = nn.Conv2d(3, 4, 3)
    patched.forward = lambda x: x
    model = nn.ModuleDict({
        "own": Scaled(3, 4, 3), "patched": patched, "conv": nn.Conv2d(3, 4, 3), "kept": nn.Linear(2, 2),
        "relu": nn.ReLU(), "norm": nn.GroupNorm(2, 4), "attention": nn.MultiheadAttention(4, 2),
        "script": torch.jit.script(nn.Linear(2, 2)), "group": nn.Sequential(nn.Conv2d(3, 4, 3)),
    })  # fmt: skip
    before = {r.name: r for r in dlkern.conversion_report(model)}
    assert before["conv"].status == before["group.0"].status == "convertible" and before["own"].status == "torch"
    dlkern.convert(model, skip=lambda name, module: name == "kept")
    report = {r.name: r for r in dlkern.conversion_report(model)}
    assert "group" not in report
    assert [n for n, r in report.items() if r.status == "dlkern"] == ["conv", "attention", "group.0"]
    assert report["kept"].status == "convertible"
    assert "subclass of Conv2d" in report["own"].reason and type(model["own"]) is Scaled
    assert "replaced on the instance" in report["patched"].reason and type(patched) is nn.Conv2d
    assert "activations stay torch's" in report["relu"].reason
    assert "dlkern has no GroupNorm" in report["norm"].reason
    assert "never called" in report["attention.out_proj"].reason
    assert "TorchScript" in report["script"].reason


def test_verbose_prints(capsys):
    dlkern.convert(net(), verbose=True)
    printed = capsys.readouterr().out
    assert "Conv2d" in printed and "activations stay torch's" in printed


@pytest.mark.parametrize("call", [dlkern.convert, dlkern.revert])
def test_not_a_model(call):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got list"):
        call([nn.Linear(2, 2)])


@pytest.mark.filterwarnings("ignore:.*nested tensor.*")
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_takes_no_shortcut(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = images(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    kept = dict(vars(model))
    with torch.inference_mode():
        expected = model(x, src_key_padding_mask=padding)
        dlkern.convert(model)
        with dlkern.trace() as calls:
            ours = model(x, src_key_padding_mask=padding)
    assert [call.op for call in calls].count("linear") == 8  # four a layer
    torch.testing.assert_close(ours[~padding], expected[~padding])
    dlkern.revert(model)
    assert vars(model) == kept
    copy.deepcopy(dlkern.convert(model)).train()(x).sum().backward()


@pytest.mark.filterwarnings("ignore:.*nested tensor.*")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors_are_torchs(layout):
    pieces = [torch.randn(3, 8), torch.randn(5, 8)]
    x = torch.nested.nested_tensor(pieces, layout=layout)
    for module in (nn.Linear(8, 6), nn.LayerNorm(8), nn.Dropout(0.5)):
        torch.manual_seed(0)
        expected = module(x)
        torch.manual_seed(0)
        with dlkern.enabled():
            inside = module(x)
        torch.manual_seed(0)
        with dlkern.trace() as calls:
            ours = dlkern.convert(module)(x)
        assert [call.backend for call in calls] == ["torch"]
        for a, b, c in zip(expected.unbind(), ours.unbind(), inside.unbind(), strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.filterwarnings("ignore:.*nested tensor.*")
def test_torchs_fast_path_of_nested_tensors():
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad():
        for call in (lambda: layer(x), lambda: layer.self_attn(x, x, x, need_weights=False)[0]):
            expected = call()
            dlkern.convert(layer)
            for a, b in zip(expected.unbind(), call().unbind(), strict=True):
                torch.testing.assert_close(a, b)
            dlkern.revert(layer)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_sparse_weights_are_torchs():
    layer, x = nn.Linear(8, 6), torch.randn(3, 8)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)
    expected = layer(x)
    with dlkern.trace() as calls:
        assert torch.equal(dlkern.convert(layer)(x), expected)
    assert [(call.backend, call.reason) for call in calls] == [("torch", "layout torch.sparse_csr")]


def test_transformer_encoder_parity():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
    assert_parity(model, [images(2, 5, 8)])


@pytest.mark.parametrize("first", ["convert", "ddp"])
def test_distributed_data_parallel(first, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, expected = net(), net()
        if first == "convert":
            dlkern.convert(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        if first == "ddp":
            dlkern.convert(wrapped)
        with dlkern.trace() as calls:
            wrapped(images()).square().sum().backward()
        assert len(calls) == len(SWAPPED)
        dlkern.convert(expected)(images()).square().sum().backward()
        for a, b in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_torchvision_resnet18():
    torch.manual_seed(0)
    model = torchvision().models.resnet18(num_classes=10)
    converted, calls = assert_parity(model, [images(4, 3, 33, 33)])
    report = dlkern.conversion_report(converted)
    assert {r.kind for r in report if r.status == "torch"} == {"ReLU"}
    assert len(calls) == sum(r.status == "dlkern" for r in report) == 20 + 20 + 3
    assert {call.backend for call in calls} == {"cpu"}
    assert len(torch.fx.symbolic_trace(converted).graph.nodes) == len(torch.fx.symbolic_trace(model).graph.nodes)
    reverted = dlkern.revert(converted)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in model.modules()]


def test_transformers_bert():
    transformers = import_transformers()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertModel(config)
    tokens = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))

    def move_weights(model, generator):  # the inputs are integers: what they select is moved
        with torch.no_grad():
            weight = model.embeddings.word_embeddings.weight
            weight.copy_(move(weight, generator))

    converted, calls = assert_parity(model, [tokens], lambda y: y.last_hidden_state, move_weights)
    names = [call.op for call in calls]
    assert set(names) == {"embedding", "linear", "layer_norm"}
    assert names.count("embedding") == 3  # words, positions, kinds
    assert names.count("linear") == 6 * 2 + 1  # six a layer, and the pooler
    assert names.count("layer_norm") == 2 * 2 + 1  # two a layer, and that of the embeddings
    assert type(converted) is transformers.BertModel
