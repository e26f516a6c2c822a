"""Scores of attention heads, and pruning."""

import copy

import pytest
import torch
from torch import nn

import dlkern
from dlkern.nn import head_importance, prune_heads

KINDS = {
    "plain": dict(),
    "without bias": dict(bias=False),
    "other widths": dict(kdim=5, vdim=7),
    "bias of keys": dict(add_bias_kv=True, add_zero_attn=True),
    "batch first": dict(batch_first=True),
}
each_module = pytest.mark.parametrize("namespace", [nn, dlkern.nn], ids=["torch", "dlkern"])


def without(module, heads):
    """The same module with the heads' outputs at 0."""
    masked = copy.deepcopy(module)
    with torch.no_grad():
        for head in heads:
            masked.out_proj.weight[:, head * module.head_dim : (head + 1) * module.head_dim] = 0.0
    return masked


@each_module
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [[1], [0, 3], [0, 1, 3]], ids=str)
def test_pruned_is_masked(namespace, kind, heads):
    torch.manual_seed(0)
    settings = KINDS[kind]
    module = namespace.MultiheadAttention(12, 4, dtype=torch.float64, **settings)
    nn.init.normal_(module.out_proj.bias) if module.out_proj.bias is not None else None
    masked = without(module, heads)
    size = sum(p.numel() for p in module.parameters())
    prune_heads(module, heads)
    assert module.num_heads == 4 - len(heads) and sum(p.numel() for p in module.parameters()) < size * 0.85
    assert module.out_proj.weight.shape == (12, 3 * module.num_heads) and "Pruned" in type(module).__name__
    shape = (2, 5) if settings.get("batch_first") else (5, 2)
    q = torch.randn(*shape, 12, dtype=torch.float64, requires_grad=True)
    k = torch.randn(*shape, settings.get("kdim", 12), dtype=torch.float64)
    v = torch.randn(*shape, settings.get("vdim", 12), dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    arguments = dict(key_padding_mask=padding, attn_mask=causal)
    with dlkern.trace() as calls:
        y, weights = module(q, k, v, average_attn_weights=False, **arguments)
    assert {call.backend for call in calls} == {"cpu"}
    expected, every = masked(q, k, v, average_attn_weights=False, **arguments)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(weights, every[:, [h for h in range(4) if h not in heads]])
    y, expected = (m(q, k, v, need_weights=False, **arguments)[0] for m in (module, masked))
    cotangent = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(t, q, cotangent)[0] for t in (y, expected)))
    if k.shape == q.shape:
        torch.testing.assert_close(module(q, q, q)[0], masked(q, q, q)[0])
        single = q[0] if settings.get("batch_first") else q[:, 0]
        torch.testing.assert_close(module(single, single, single)[0], masked(single, single, single)[0])


@each_module
def test_pruning_inside_models(namespace):
    torch.manual_seed(0)
    model = namespace.TransformerEncoder(namespace.TransformerEncoderLayer(12, 4, 16, batch_first=True), 2).double().eval()
    masked = copy.deepcopy(model)
    for i, heads in enumerate(([2], [0, 1])):
        masked.layers[i].self_attn = without(model.layers[i].self_attn, heads)
        prune_heads(model.layers[i].self_attn, heads)
    x = torch.randn(2, 5, 12).double()
    for context in (torch.no_grad, torch.enable_grad):  # without gradients, torch would take its shortcut
        with context():
            torch.testing.assert_close(model(x), masked(x))
    statuses = {r.status for r in dlkern.conversion_report(model) if r.kind == "PrunedMultiheadAttention"}
    assert statuses == {"dlkern"}
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    dlkern.revert(dlkern.convert(again))
    torch.testing.assert_close(again(x), masked(x))
    prune_heads(model.layers[0].self_attn, [0])
    assert model.layers[0].self_attn.num_heads == 2 and model(x).shape == x.shape


def test_pruned_trains_and_compiles():
    torch.manual_seed(0)
    module = dlkern.nn.MultiheadAttention(8, 4, batch_first=True)
    module.in_proj_bias.requires_grad_(False)
    prune_heads(module, [1, 2])
    x = torch.randn(2, 3, 8)
    module(x, x, x)[0].sum().backward()
    assert module.in_proj_weight.grad.shape == (12, 8) and module.in_proj_bias.grad is None
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, x)[0], module(x, x, x)[0])


def test_wrong_pruning():
    module = dlkern.nn.MultiheadAttention(8, 4)
    before = {n: p.clone() for n, p in module.named_parameters()}
    for heads, error in (([4], IndexError), ([-1], IndexError), (range(4), ValueError)):
        with pytest.raises(error):
            prune_heads(module, heads)
    with pytest.raises(TypeError):
        prune_heads(nn.Linear(2, 2), [0])
    prune_heads(module, [])
    assert type(module) is dlkern.nn.MultiheadAttention
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    prune_heads(module, [0])
    with pytest.raises(RuntimeError, match="sizes"):
        module(*torch.randn(3, 2, 3, 6))


class Scorer(nn.Module):
    """Two layers of attention; heads 1 and 2 of the first do nothing, one by its values and one by its output."""

    def __init__(self, namespace):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (namespace.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64) for _ in "ab")
        with torch.no_grad():
            self.first.in_proj_weight[24 + 4 : 24 + 8] = 0.0  # values of head 1
            self.first.out_proj.weight[:, 8:12] = 0.0  # what becomes of head 2

    def forward(self, x):
        x = x + self.first(x, x, x, need_weights=False)[0]
        return x + self.second(x, x, x, need_weights=False)[0]


@each_module
def test_scores(namespace):
    model = Scorer(namespace)
    batches = [torch.randn(2, 5, 12, dtype=torch.float64) for _ in range(3)]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    loss = lambda x: model(x).square().mean()  # noqa: E731
    scores = {m: head_importance(model, loss, batches, m) for m in ("variance", "gradient_norm", "ablation")}
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(s.keys() == {"first", "second"} and s["second"].shape == (3,) for s in scores.values())

    variance, gradient, ablation = (scores[m]["first"] for m in ("variance", "gradient_norm", "ablation"))
    assert variance[1] == 0 and variance[0] > 1e-3 and variance[2] > 1e-3
    assert gradient[2] == 0 and gradient[0] > 1e-3 and gradient[1] > 1e-3
    assert ablation[1].abs() < 1e-12 and ablation[2].abs() < 1e-12 and ablation[0].abs() > 1e-6
    assert all((s["second"].abs() > 1e-6).all() for s in scores.values())

    # By hand, from the formula: the second layer's heads
    expected = {"variance": [], "gradient_norm": torch.zeros(3, dtype=torch.float64), "ablation": torch.zeros(3)}
    heads = []
    for x in batches:
        x = x + model.first(x, x, x)[0]
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (x @ model.second.in_proj_weight.T).chunk(3, -1))
        h = torch.softmax(q @ k.mT / 2, -1) @ v  # the biases are 0
        h = h.detach().requires_grad_()
        value = (x.detach() + h.transpose(1, 2).flatten(2) @ model.second.out_proj.weight.T).square().mean()
        expected["gradient_norm"] += torch.autograd.grad(value, h)[0].square().sum((0, 2, 3)).sqrt() / 3
        heads.append(h.detach().transpose(1, 2).flatten(0, 1))
        for i in range(3):
            less = torch.where(torch.arange(3)[:, None, None] == i, 0.0, h)
            shrunk = (x + less.transpose(1, 2).flatten(2) @ model.second.out_proj.weight.T).square().mean()
            expected["ablation"] = expected["ablation"] + torch.eye(3)[i] * (shrunk - value).detach() / 3
    expected["variance"] = torch.cat(heads).var(0, correction=0).mean(-1)
    for method, values in expected.items():
        torch.testing.assert_close(scores[method]["second"], values.double())


def test_scores_of_a_whole_model_and_wrong_calls():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 9, dropout=0.0, batch_first=True), 2).eval()
    loss, batches = lambda x: model(x).pow(3).mean(), [torch.randn(2, 3, 8)]
    for method in ("variance", "gradient_norm", "ablation"):
        scores = head_importance(model, loss, batches, method)
        assert set(scores) == {"layers.0.self_attn", "layers.1.self_attn"} and all(s.abs().min() > 0 for s in scores.values())
    with pytest.raises(ValueError, match="method"):
        head_importance(model, loss, batches, "size")
    with pytest.raises(ValueError, match="0 batches"):
        head_importance(model, loss, [])
    with pytest.raises(ValueError, match="0 modules"):
        head_importance(nn.Linear(2, 2), loss, batches)
