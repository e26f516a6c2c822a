"""convert(fuse=True): which rows are found, that nothing changes but speed, and what must be left alone."""

import copy
import pickle
from collections import Counter

import pytest
import test_conv
import torch
import torch.nn.functional as TF
from torchvision_stub import torchvision

import dlkern
import dlkern.nn.functional as F
from dlkern import Activation, models
from dlkern.testing import check
from dlkern.testing._training import check_training

LAYOUTS = [torch.contiguous_format, torch.channels_last]
ROWS = {
    "resnet18": {"conv + batch_norm + relu": 9, "conv + batch_norm + add + relu": 8, "conv + batch_norm": 3},
    "densenet121": {"conv + batch_norm + relu": 59, "batch_norm + relu": 62},
    "googlenet": {"conv + batch_norm + relu": 57},
    "vgg11_bn": {"conv + batch_norm + relu": 8},
    "alexnet": {"conv + relu": 5},
}


def plain(name):
    settings = dict(aux_logits=False, init_weights=False) if name == "googlenet" else {}
    torch.manual_seed(0)
    model = getattr(torchvision().models, name)(num_classes=10, **settings)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def fused(name):
    return dlkern.convert(plain(name), fuse=True)


def run(model, layout=torch.contiguous_format, **context):
    """The model's answer as a function, in the dtype of its input, without gradients or as the caller has it."""
    def call(x):
        with torch.set_grad_enabled(context.get("grad", False)):
            return model.to(x.dtype)(x.contiguous(memory_format=layout)).detach()

    return call


@pytest.mark.parametrize("name", ROWS)
def test_torchvisions_networks(name):
    """The rows that are found; names and order of parameters; state_dicts both ways."""
    theirs, model = plain(name), plain(name)
    ours = dlkern.convert(model, fuse=True)
    assert Counter(fusion.what for fusion in ours.fusions) == ROWS[name]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert [id(p) for p in ours.parameters()] == [id(p) for p in model.parameters()]  # an optimizer's order
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    with dlkern.trace() as calls:
        ours(torch.randn(2, 3, 64, 65))
        ours.eval()(torch.randn(2, 3, 64, 65))
    assert {c.backend for c in calls} == {"cpu"} and any(c.op in ("conv2d_act", "batch_norm") for c in calls)


@pytest.mark.parametrize("name", ["densenet121", "googlenet", "vgg11_bn"])
def test_training_without_additions_gives_the_same_bits(name):
    """A ReLU taken along rounds nothing anew: outputs, gradients and statistics are the unfused model's.

    (In whole networks of this size the rule of training has no say: a few of millions of ReLUs have an input within
    rounding of zero, in torch's runs as in ours, and each that falls on the other side moves a gradient by a percent.)
    """
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 65)
    seen = []
    for model in (dlkern.convert(plain(name)), fused(name)):
        y = model(x)
        seen.append([y, *torch.autograd.grad(y.sum(), list(model.parameters())), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "googlenet"])
def test_torchvisions_networks_by_the_rule(name):
    """Answers in evaluation, with batch norm folded and not, with statistics that training has moved."""
    trained = plain(name)
    for _ in range(20):
        trained(torch.randn(4, 3, 64, 65))
    theirs, ours = plain(name).eval(), fused(name).eval()
    for model in (theirs, ours):
        model.load_state_dict(trained.state_dict())
    for grad in (False, True):
        check(
            run(ours, grad=grad), run(theirs, grad=grad), lambda: [torch.randn(2, 3, 64, 65)], draws=4, name=f"{name} answers"
        ).raise_if_failed()


def small(nn, **settings):
    torch.manual_seed(0)
    return models.resnet18(10, width=8, nn=nn)


def test_training_by_the_rule():
    def make(nn):
        model = small(torch.nn)
        return model if nn is torch.nn else dlkern.convert(model, fuse=True)

    batches = [(torch.randn(8, 3, 33, 33), torch.randint(0, 10, (8,))) for _ in range(4)]
    check_training(make, batches, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3), name="fused").raise_if_failed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_folded_inference_by_the_rule(dtype, layout):
    theirs, made = small(torch.nn), small(torch.nn)
    for model in (theirs, made):
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                torch.nn.init.normal_(module.weight)
                torch.nn.init.normal_(module.bias)
    ours = dlkern.convert(made.eval(), fuse=True, memory_format=layout)
    check(
        run(ours, layout), run(theirs.eval(), layout), lambda: [torch.randn(4, 3, 33, 33)], dtype=dtype, draws=8, name="folded"
    ).raise_if_failed()


class Net(torch.nn.Module):
    """One row, and what a test changes of it."""

    def __init__(self, body):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(3)
        self.relu = torch.nn.ReLU()
        self.body = body

    def forward(self, x):
        return self.body(self, x)


BODIES = {
    "row": (lambda m, x: m.relu(m.norm(m.conv(x))), ["conv + batch_norm + relu"]),
    "residual left": (lambda m, x: m.relu(x + m.norm(m.conv(x))), ["conv + batch_norm + add + relu"]),
    "residual method": (lambda m, x: m.norm(m.conv(x)).add_(x).relu_(), ["conv + batch_norm + add + relu"]),
    "function": (lambda m, x: TF.relu(m.norm(m.conv(x)), inplace=True), ["conv + batch_norm + relu"]),
    "no relu": (lambda m, x: m.norm(m.conv(x)) * 2, ["conv + batch_norm"]),
    "convolution and relu": (lambda m, x: torch.relu(m.conv(x)), ["conv + relu"]),
    "convolution, add, relu": (lambda m, x: torch.relu(m.conv(x) + x), ["conv + add + relu"]),
    "norm and relu": (lambda m, x: m.relu(m.norm(x)), ["batch_norm + relu"]),
    "broadcast residual": (
        lambda m, x: m.relu(m.norm(m.conv(x)) + x.mean((2, 3), keepdim=True)), ["conv + batch_norm + add + relu"],
    ),
    "broadcast result": (lambda m, x: m.relu(m.norm(m.conv(x[:, :, :1, :1])) + x), ["conv + batch_norm + add + relu"]),
    "convolution seen twice": (lambda m, x: (lambda y: m.relu(m.norm(y)) + y)(m.conv(x)), ["batch_norm + relu"]),
    "norm seen twice": (lambda m, x: (lambda y: m.relu(y) + y)(m.norm(m.conv(x))), []),
    "added to itself": (lambda m, x: (lambda y: m.relu(y + y))(m.norm(m.conv(x))), ["conv + batch_norm"]),
    "number added": (lambda m, x: m.relu(m.norm(m.conv(x)) + 1), ["conv + batch_norm"]),
    "written into, seen later": (
        lambda m, x: (lambda y: m.relu(y.add_(m.norm(m.conv(x)))) + y)(x * 2), ["conv + batch_norm"],
    ),
    "used twice": (lambda m, x: m.relu(m.norm(m.conv(m.relu(m.norm(m.conv(x)))))), ["conv + batch_norm + relu"] * 2),
}


@pytest.mark.parametrize("name", BODIES)
def test_rows(name):
    body, expected = BODIES[name]
    torch.manual_seed(0)
    theirs = Net(body)
    ours = Net(body)
    ours.load_state_dict(theirs.state_dict())
    fused = dlkern.convert(ours, fuse=True)
    assert [fusion.what for fusion in fused.fusions] == expected
    assert fused.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(4, 3, 5, 6)
    for mode in (True, False):
        fused.train(mode), theirs.train(mode)
        torch.testing.assert_close(fused(x.clone()), theirs(x.clone()))
    with torch.no_grad():
        torch.testing.assert_close(fused(x.clone()), theirs(x.clone()))
    torch.testing.assert_close(dict(fused.named_buffers()), dict(theirs.named_buffers()))


def test_what_is_left_alone():
    body = BODIES["row"][0]
    hooked = Net(body)
    seen = []
    hooked.norm.register_forward_hook(lambda *args: seen.append(1))
    fused = dlkern.convert(hooked, fuse=True)
    assert fused.fusions == []
    fused(torch.randn(2, 3, 4, 4))
    assert seen == [1]
    assert dlkern.convert(Net(body), fuse=True, skip=lambda name, _: name == "norm").fusions == []
    mirrored = Net(body)
    mirrored.conv = torch.nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
    assert [f.what for f in dlkern.convert(mirrored, fuse=True).fusions] == ["batch_norm + relu"]


def test_an_untraceable_model_is_unchanged():
    model = Net(lambda m, x: m.conv(x) if x.sum() > 0 else x)
    with pytest.raises(ValueError, match=r"torch\.fx cannot trace Net"):
        dlkern.convert(model, fuse=True)
    assert type(model.conv) is torch.nn.Conv2d


def test_unused_modules_keep_their_parameters():
    model = Net(lambda m, x: m.relu(m.conv(x)))
    fused = dlkern.convert(model, fuse=True)
    assert fused.state_dict().keys() == model.state_dict().keys()


def test_compiles_and_says_what_it_is(capsys):
    fused = dlkern.convert(Net(BODIES["residual left"][0]).eval(), fuse=True, verbose=True)
    assert "conv + batch_norm + add + relu" in capsys.readouterr().out
    assert "conv + batch_norm + relu" in repr(fused.fused_0)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), fused(x))


@pytest.mark.parametrize("name", test_conv.CASES)
def test_fused_convolution_is_exact_on_integers(name):
    """relu(conv + bias + residual), every bit; the gradients too."""
    size, weight_size, stride, padding, dilation, groups, bias = test_conv.CASES[name]
    for layout in LAYOUTS:
        inputs = [torch.randint(-4, 5, s).float() for s in (size, weight_size, *([weight_size[:1]] if bias else []))]
        inputs[0] = inputs[0].to(memory_format=layout)
        settings = (stride, padding, dilation, groups)
        residual = torch.randint(-9, 10, TF.conv2d(*inputs, *([] if bias else [None]), *settings).shape).float()
        inputs = [t.requires_grad_() for t in (*inputs, residual)]

        def ours(x, w, *rest):
            b = rest[0] if len(rest) == 2 else None
            return F.conv2d_act(x, w, b, *settings, activation=Activation.RELU, residual=rest[-1])  # noqa: B023

        def theirs(x, w, *rest):
            return torch.relu(TF.conv2d(x, w, rest[0] if len(rest) == 2 else None, *settings) + rest[-1])  # noqa: B023

        outputs = [f(*inputs) for f in (ours, theirs)]
        assert torch.equal(*outputs) and outputs[0].stride() == TF.conv2d(*inputs[:2], None, *settings).stride()
        cotangent = torch.randint(-4, 5, residual.shape).float()
        for actual, expected in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in outputs)):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("activation", Activation)
def test_fused_convolution_derivatives(activation):
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4, 4), (4, 3, 3, 3), (4,)))
    r = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    f = lambda x, w, b, r: F.conv2d_act(x, w, b, activation=activation, residual=r)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, w, b, r))
    assert torch.autograd.gradgradcheck(f, (x, w, b, r))


def test_fused_convolution_of_one_image_and_under_autocast():
    x, w, r = torch.randn(3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4, 5, 5)
    y = F.conv2d_act(x, w, padding="same", activation=Activation.TANH, residual=r)
    torch.testing.assert_close(y, torch.tanh(TF.conv2d(x, w, padding="same") + r))
    with torch.autocast("cpu", torch.bfloat16):
        assert F.conv2d_act(x, w, padding="same", residual=r).dtype == (TF.conv2d(x, w, padding="same") + r).dtype
        assert F.conv2d_act(x, w, padding="same", residual=r.bfloat16()).dtype == torch.bfloat16


def test_fused_convolution_wrong_arguments():
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    for residual in (torch.randn(2, 4, 3, 2), torch.randn(4, 3, 3), torch.randn(2, 4, 3, 3).double(), 1.0):
        with pytest.raises(ValueError, match="residual"):
            F.conv2d_act(x, w, residual=residual)
    with pytest.raises(ValueError, match="17"):
        F.conv2d_act(x, w, activation=17)
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        F.conv2d_act(x[:, :2], w, activation=Activation.RELU)
    raw_op = torch.ops.dlkern.conv2d_act_forward_cpu
    plain = ([1, 1], [0, 0], [1, 1], 1)
    for bias, residual, activation in (
        (None, torch.randn(2, 4, 3, 2), 1), (None, torch.randn(4, 3, 3), 1), (None, None, 4), (None, None, -1),
        (None, torch.randn(2, 3, 3, 4).permute(0, 3, 1, 2), 1), (torch.randn(3), None, 1),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            raw_op(x, w, bias, residual, *plain, activation)


class Changed(torch.nn.Module):
    """A convolution whose input is written to before its row ends."""

    def __init__(self, body):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4)
        self.relu, self.body = torch.nn.ReLU(inplace=True), body

    def forward(self, x):
        return self.body(self, x * 1)


def through_a_view(m, x):
    v = x.view(-1, 4, 8, 8)
    return torch.relu(v.add_(m.conv(x))) + x


IN_PLACE = {
    "a module": lambda m, x: (lambda y: torch.relu(y + m.relu(x)))(m.conv(x)),
    "batch norm": lambda m, x: (lambda y: torch.relu(y + torch.nn.functional.relu(x, inplace=True)))(m.norm(m.conv(x))),
    "a method": lambda m, x: (lambda y: torch.relu(y + x.mul_(3)))(m.conv(x)),
    "before batch norm": lambda m, x: (lambda y: torch.relu(m.norm(y) + x.abs_()))(m.conv(x)),
    "a view": through_a_view,
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_written_in_place_keeps_its_order(name, training):
    model = Changed(IN_PLACE[name]).train(training)
    fused, x = dlkern.convert(copy.deepcopy(model), fuse=True), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(fused(x.clone()), model(x.clone()))


def test_reverting_gives_torchs_layers():
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    x = torch.randn(2, 4, 8, 8)
    for mode in (True, False):
        model.train(mode)
        expected = copy.deepcopy(model)(x)
        fused = dlkern.convert(copy.deepcopy(model), fuse=True)
        dlkern.revert(fused)
        with dlkern.trace() as calls, torch.no_grad():
            torch.testing.assert_close(fused(x), expected)
        assert not calls


def test_state_dict_of_shared_modules_and_buffers():
    conv = torch.nn.Conv2d(4, 4, 3, padding=1)
    shared = torch.nn.Sequential(conv, torch.nn.ReLU(), conv)
    model = Changed(lambda m, x: torch.relu(m.conv(x)) * m.scale[0])
    model.register_buffer("scale", torch.tensor([2.0]))
    model.register_buffer("unused", torch.zeros(3))
    model.register_buffer("passing", torch.zeros(3), persistent=False)
    for original in (shared, model):
        fused = dlkern.convert(copy.deepcopy(original), fuse=True)
        assert list(fused.state_dict()) == list(original.state_dict())
        fused.load_state_dict(original.state_dict())
        x = torch.randn(2, 4, 8, 8)
        torch.testing.assert_close(fused(x), original(x))


def test_frozen_rows_see_a_changed_eps():
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
    frozen, x = dlkern.freeze(dlkern.convert(copy.deepcopy(model), fuse=True)), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        frozen(x)
        model[1].eps = getattr(frozen, "1").eps = 0.5
        torch.testing.assert_close(frozen(x), model(x))


class Drops(torch.nn.Module):
    """Its mode as a keyword, by place, in a module within, and in one that holds no others."""

    class Path(torch.nn.Module):
        def forward(self, x):
            return x * torch.zeros(()).bernoulli_(0.5) if self.training else x

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)

        def forward(self, x):
            return TF.dropout(TF.relu(self.norm(self.conv(x))), 0.5, self.training)

    def __init__(self):
        super().__init__()
        self.block, self.path = self.Block(), self.Path()

    def forward(self, x):
        return TF.dropout(self.path(self.block(x)) + 1, p=0.5, training=self.training)


@pytest.mark.parametrize("mode", [True, False])
def test_functions_follow_the_mode(mode):
    """The model's code is traced once, in one mode; its functional dropout must hear of train() and eval()."""
    torch.manual_seed(0)
    theirs = Drops().train(mode)
    ours = dlkern.convert(copy.deepcopy(theirs), fuse=True)
    assert [fusion.what for fusion in ours.fusions] == ["conv + batch_norm + relu"]
    x = torch.randn(8, 3, 8, 8)
    assert ours.block.training == mode
    for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(model.eval()(x), theirs.eval()(x))
        # Twice 1 where the block's ReLU or dropout gave zero, or the path was dropped; zeros by the last dropout.
        model.block.train()
        model.in_mode_1.eval()
        seen = torch.stack([model(x) for _ in range(40)])
        assert {(y == 1).all().item() for y in seen} == {False}
        model.path.train()
        seen = torch.stack([model(x) for _ in range(40)])
        assert {(y == 1).all().item() for y in seen} == {False, True}  # the whole path dropped or not
        assert (seen[(seen != 1).flatten(1).any(1)] == 1).float().mean() > 0.6  # ReLU alone: a half
        model.in_mode_1.train()
        assert 0.4 < (model(x) == 0).float().mean() < 0.6
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_two_ways_in_two_modes_are_told():
    model = torchvision().models.googlenet(num_classes=5, init_weights=False).eval()
    with pytest.warns(UserWarning, match="takes that of eval"):
        ours = dlkern.convert(model, fuse=True)
    assert isinstance(ours.train()(torch.randn(2, 3, 64, 64)), torch.Tensor)  # as in eval: no auxiliary classifiers


def test_stochastic_depth_ends_with_training():
    """EfficientNet drops blocks by chance in training."""
    model = torchvision().models.efficientnet_b0(num_classes=5)
    x = torch.randn(2, 3, 64, 64)
    theirs = copy.deepcopy(model).eval()(x)
    torch.testing.assert_close(dlkern.convert(model, fuse=True).eval()(x), theirs)
