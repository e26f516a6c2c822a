"""Optimisers and gradient clipping against torch's, LARS against its paper's formula in NumPy."""

import copy
import functools
import io
import json

import numpy as np
import pytest
import torch
from torch import nn

import dlkern
from dlkern.testing import check, compare

SHAPES = [(5, 3, 3, 2), (7,), (4099,), (1,), (0, 3), (6, 50), ()]
STEPS = 20
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

OPTIMIZERS = {
    "sgd": ("SGD", dict(lr=0.1)),
    "sgd decay maximize": ("SGD", dict(lr=0.05, weight_decay=0.1, maximize=True)),
    "sgd momentum": ("SGD", dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=1e-2)),
    "sgd nesterov": ("SGD", dict(lr=0.1, momentum=0.8, nesterov=True, maximize=True)),
    "adam": ("Adam", dict(lr=0.01)),
    "adam amsgrad": ("Adam", dict(lr=0.01, betas=(0.8, 0.95), eps=1e-4, amsgrad=True, weight_decay=0.1)),
    "adam decoupled": ("Adam", dict(lr=0.01, decoupled_weight_decay=True, weight_decay=0.5)),
    "adamw": ("AdamW", dict(lr=0.01, maximize=True)),
    "adamw amsgrad": ("AdamW", dict(lr=0.02, amsgrad=True, weight_decay=0.3)),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def drawn(steps=STEPS, shapes=SHAPES):
    """Parameters and, for each, its gradients of all steps."""
    params = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    # Gradients that lean one way, so that averages are no sums of noise.
    return params + [torch.randn(steps, *p.shape).double() + torch.randn(p.shape).double() for p in params]


def joined(tensors):
    """One row of all elements: of the few in a small tensor chance decides whose rounding is the smaller."""
    return torch.cat([x.reshape(-1) for x in tensors])


def trained(make, *tensors):
    """Parameters, and each kind of state, after a step with each of the gradients."""
    half = len(tensors) // 2
    params = [nn.Parameter(x.clone(memory_format=torch.preserve_format)) for x in tensors[:half]]
    optimizer = make(params)
    for step in range(tensors[half].shape[0]):
        for param, grads in zip(params, tensors[half:]):
            param.grad = grads[step].clone()
        optimizer.step()
    keys = [key for key in optimizer.state[params[0]] if key != "step"]
    return [joined(p.detach() for p in params)] + [joined(optimizer.state[p][key] for p in params) for key in keys]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_optimizer
def test_parity_over_twenty_steps(name, dtype):
    kind, settings = OPTIMIZERS[name]
    with dlkern.trace() as calls:
        check(
            lambda *x: trained(lambda p: getattr(dlkern.optim, kind)(p, **settings), *x),
            lambda *x: trained(lambda p: getattr(torch.optim, kind)(p, foreach=False, **settings), *x),
            drawn, dtype=dtype, draws=4, name=name,
        ).raise_if_failed()
    assert {call.backend for call in calls} == {"cpu"} and len({call.op for call in calls}) == 1


def numpy_lars(params, grads, lr, momentum, weight_decay, trust_coefficient):
    """Algorithm 1 of the paper, word by word, in float64."""
    weights = [p.double().numpy().copy() for p in params]
    moments = [np.zeros_like(w) for w in weights]
    for step in range(grads[0].shape[0]):
        for i, w in enumerate(weights):
            g = grads[i][step].double().numpy()
            local = 1.0
            if trust_coefficient is not None and np.linalg.norm(w) > 0 and np.linalg.norm(g) > 0:
                local = trust_coefficient * np.linalg.norm(w) / (np.linalg.norm(g) + weight_decay * np.linalg.norm(w))
            moments[i] = momentum * moments[i] + lr * local * (g + weight_decay * w)
            weights[i] = np.asarray(w - moments[i])
    return joined(torch.from_numpy(w) for w in weights)


def lars_formula(settings, *tensors):
    """The same in torch expressions of the tensors' dtype."""
    half, decay, trust = len(tensors) // 2, settings["weight_decay"], settings["trust_coefficient"]
    params, moments = [x.clone() for x in tensors[:half]], [torch.zeros_like(x) for x in tensors[:half]]
    for step in range(tensors[half].shape[0]):
        for p, v, grads in zip(params, moments, tensors[half:]):
            g, local = grads[step], 1.0
            if trust is not None and p.norm() > 0 and g.norm() > 0:
                local = trust * p.norm() / (g.norm() + decay * p.norm())
            v.mul_(settings["momentum"]).add_(settings["lr"] * local * (g + decay * p))
            p.sub_(v)
    return joined(params)


LARS_SETTINGS = {
    "scaled": dict(lr=0.5, momentum=0.9, weight_decay=5e-3, trust_coefficient=0.02),
    "plain": dict(lr=0.1, momentum=0.0, weight_decay=0.0, trust_coefficient=0.1),
    "unscaled": dict(lr=0.01, momentum=0.9, weight_decay=0.1, trust_coefficient=None),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", LARS_SETTINGS.values(), ids=LARS_SETTINGS)
def test_lars_follows_its_paper(settings, dtype):
    """torch has none: the baseline is the formula in torch expressions of the dtype."""

    formula = functools.partial(lars_formula, settings)
    half = len(SHAPES)
    tensors = [x.to(dtype) for x in drawn()]
    exact = numpy_lars(tensors[:half], tensors[half:], **settings)
    # Two float64 codes of one formula: their distance, in units of float32's roundoff, is no one's error.
    torch.testing.assert_close(formula(*[t.double() for t in tensors]), exact, rtol=1e-12, atol=1e-13)
    check(
        lambda *x: trained(lambda p: dlkern.optim.LARS(p, **settings), *x)[0], formula, tensors, dtype=dtype, name="lars"
    ).raise_if_failed()
    if dtype != torch.float64:
        ours = trained(lambda p: dlkern.optim.LARS(p, **settings), *tensors)[0]
        rows = compare("lars", [ours], [formula(*tensors)], [exact], dtype)
        assert rows and all(row.ok for row in rows)


def test_lars_at_zero_norms_and_in_groups():
    zero, one, plain = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = dlkern.optim.LARS([{"params": [zero, one]}, {"params": [plain], "trust_coefficient": None}], lr=0.5)
    zero.grad, one.grad, plain.grad = torch.ones(3), torch.zeros(3), torch.full((2,), 2.0)
    optimizer.step()
    assert zero.tolist() == [-0.5] * 3 and one.tolist() == [1.0] * 3 and plain.tolist() == [0.0, 0.0]
    for argument in ("lr", "momentum", "weight_decay", "trust_coefficient", "eps"):
        with pytest.raises(ValueError, match=argument):
            dlkern.optim.LARS([one], **{argument: -1.0})


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 36, 5))


def steps_of(net, optimizer, count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        net(torch.randn(4, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "sgd momentum", "adam", "adam amsgrad", "adamw"])
def test_state_dicts_load_into_each_other(name):
    """Three steps on one side and three on the other are close to six on torch's, whoever begins; through a file."""
    kind, settings = OPTIMIZERS[name]
    ends = {}
    for first, second in [("torch", "torch"), ("torch", "dlkern"), ("dlkern", "torch"), ("dlkern", "dlkern")]:
        net = model()
        optimizer = getattr({"torch": torch, "dlkern": dlkern}[first].optim, kind)(net.parameters(), **settings)
        steps_of(net, optimizer, 3, 1)
        stream = io.BytesIO()
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, stream)
        stream.seek(0)
        saved = torch.load(stream)
        net = model()
        net.load_state_dict(saved["net"])
        optimizer = getattr({"torch": torch, "dlkern": dlkern}[second].optim, kind)(net.parameters(), lr=7.0)
        optimizer.load_state_dict(saved["optimizer"])
        assert optimizer.param_groups[0]["lr"] == settings["lr"]
        steps_of(net, optimizer, 3, 2)
        ends[first, second] = optimizer.state_dict(), [p.detach() for p in net.parameters()]
    reference_state, reference = ends.pop(("torch", "torch"))
    for state, params in ends.values():
        assert state["param_groups"] == reference_state["param_groups"]
        for i, entries in reference_state["state"].items():
            assert entries.keys() == state["state"][i].keys()
            for key, value in entries.items():
                assert state["state"][i][key].dtype == value.dtype and state["state"][i][key].shape == value.shape
        for a, b in zip(params, reference):
            torch.testing.assert_close(a, b)


def test_groups_missing_gradients_and_schedulers():
    """Groups of their own settings, parameters whose gradient comes later or never, a rate that changes."""
    ends = []
    for library in (torch, dlkern):
        torch.manual_seed(0)
        a, b, c, d = (nn.Parameter(torch.randn(n)) for n in (3, 4, 5, 6))
        optimizer = library.optim.SGD(
            [{"params": [a, b]}, {"params": [c], "momentum": 0.0, "lr": 0.3}, {"params": [d], "weight_decay": 0.2}],
            lr=0.1, momentum=0.9, dampening=0.5,
        )
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for step in range(5):
            optimizer.zero_grad()
            loss = (a**2).sum() + (c**3).sum() + ((b**2).sum() if step > 1 else 0)
            loss.backward()
            optimizer.step()
            schedule.step()
        ends.append([a, b, c, d])
        assert "momentum_buffer" not in optimizer.state[c] and not optimizer.state.get(d)
    for ours, theirs in zip(*ends):
        torch.testing.assert_close(ours, theirs)


def test_one_launch_for_all_groups_and_dtypes():
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in DTYPES]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = dlkern.optim.AdamW([{"params": [p], "lr": 0.1 * i} for i, p in enumerate(params)])
    with dlkern.trace() as calls:
        optimizer.step()
    assert [(call.op, call.backend, len(call.shapes)) for call in calls] == [("adam", "cpu", len(DTYPES))]
    assert [p.dtype for p in params] == DTYPES and params[0][0] == 1 and params[1][0] < 1


@pytest.mark.parametrize("kind", ["SGD", "Adam", "LARS"])
def test_any_strides(kind):
    """Parameters, gradients and state whose layouts differ, with gaps between elements, give what contiguous ones do."""
    settings = dict(lr=0.1, momentum=0.9) if kind != "Adam" else dict(lr=0.1)
    values, grads = torch.randn(3, 4, 5, 3), torch.randn(3, 3, 4, 5, 3)
    ends = []
    for layout in ("contiguous", "channels_last", "mixed", "gaps", "transposed"):
        x = values.clone()
        if layout in ("channels_last", "mixed"):
            x = x.contiguous(memory_format=torch.channels_last)
        if layout == "gaps":
            x = torch.full((3, 4, 5, 7), 99.0)[..., 1:4].copy_(values)
        if layout == "transposed":
            x = x.transpose(0, 3).contiguous().transpose(0, 3)
        param = nn.Parameter(x)
        optimizer = getattr(dlkern.optim, kind)([param], **settings)
        for step, grad in enumerate(grads):
            param.grad = grad.contiguous(memory_format=torch.channels_last) if layout != "mixed" else grad.clone()
            optimizer.step()
            for key, value in optimizer.state[param].items():
                if layout == "mixed" and step == 0 and value.dim() == 4:
                    optimizer.state[param][key] = value.contiguous()
        ends.append(param.detach().clone(memory_format=torch.contiguous_format))
        if layout == "gaps":
            assert x._base[..., :1].eq(99).all() and x._base[..., 4:].eq(99).all()
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_parameters_that_share_memory_are_updated_in_their_order():
    ends = []
    for library, gap in ((torch, 1), (dlkern, 1), (dlkern, 2)):  # with gaps, kernels see copies
        room = torch.arange(12.0)
        flat = room[::2].copy_(room[:6].clone()) if gap == 2 else room[:6]
        first, second = nn.Parameter(flat[:4]), nn.Parameter(flat[2:])
        optimizer = library.optim.SGD([first, second], lr=0.1, momentum=0.9, weight_decay=0.5)
        for _ in range(3):
            first.grad, second.grad = torch.ones(4), torch.full((4,), 2.0)
            optimizer.step()
        ends.append(flat)
    torch.testing.assert_close(ends[1], ends[0])
    torch.testing.assert_close(ends[2], ends[0])


def test_closure_hooks_and_versions():
    param = nn.Parameter(torch.ones(3))
    optimizer = dlkern.optim.SGD([param], lr=0.1, momentum=0.9)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    product = param * param  # keeps param for its backward

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    before = param._version
    assert optimizer.step(closure).item() == 3.0 and seen == ["pre", "post"]
    assert param._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    assert isinstance(optimizer, torch.optim.SGD) and isinstance(copy.deepcopy(optimizer), dlkern.optim.SGD)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_what_no_kernel_takes_is_torchs_step(kind):
    ends = []
    for library in (torch, dlkern):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        optimizer = getattr(library.optim, kind)([param], lr=0.1)
        optimizer.register_step_post_hook(lambda *_: ends.append("hook"))
        param.grad = torch.ones_like(param)
        with dlkern.trace() as calls:
            optimizer.step()
        ends.append(param)
    assert [call.backend for call in calls] == ["torch"] and "complex64" in calls[0].reason
    assert ends.count("hook") == 2 and torch.equal(ends[1], ends[3])
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer = getattr(dlkern.optim, kind)(embedding.parameters(), lr=0.1)
    if kind == "SGD":
        before = embedding.weight.detach().clone()
        optimizer.step()
        assert (embedding.weight != before).any(1).tolist() == [False, True, True, False, False]
    else:
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()


def test_gradient_scaler():
    """With fused=True, torch's GradScaler leaves dividing to the optimiser."""
    ends = []
    for library in (torch, dlkern):
        param = nn.Parameter(torch.ones(3))
        optimizer = library.optim.AdamW([param], lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for value in (1.0, float("inf"), 2.0):
            optimizer.zero_grad()
            scaler.scale((param * value).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append(param.detach())
    torch.testing.assert_close(*ends)


def raw(name, column="cpu"):
    return getattr(torch.ops.dlkern, f"{name}_{column}")


BAD_CALLS = {
    "shape": lambda p, g: ([p, p.new_ones(2)], [g, g], [], [], [0, 0], [0.1, 0, 0, 0, 0, 0]),
    "dtype": lambda p, g: ([p, p.double()], [g, g], [], [], [0, 0], [0.1, 0, 0, 0, 0, 0]),
    "count": lambda p, g: ([p, p.clone()], [g], [], [], [0, 0], [0.1, 0, 0, 0, 0, 0]),
    "group": lambda p, g: ([p, p.clone()], [g, g], [], [], [0, 1], [0.1, 0, 0, 0, 0, 0]),
    "settings": lambda p, g: ([p, p.clone()], [g, g], [], [], [0, 0], [0.1, 0, 0]),
    "buffers": lambda p, g: ([p, p.clone()], [g, g], [g.clone()], [0], [0, 0], [0.1, 0.9, 0, 0, 0, 0]),
    "fresh": lambda p, g: ([p], [g], [g.clone()], [], [0], [0.1, 0.9, 0, 0, 0, 0]),
    "overlap": lambda p, g: ([p, p.new_ones(1).expand(3)], [g, g], [], [], [0, 0], [0.1, 0, 0, 0, 0, 0]),
    "integers": lambda p, g: ([p, p.long()], [g, g.long()], [], [], [0, 0], [0.1, 0, 0, 0, 0, 0]),
    "sparse": lambda p, g: ([p, p.clone()], [g, g.to_sparse()], [], [], [0, 0], [0.1, 0, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("column", ["cpu", "triton"])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_wrong_raw_calls_raise_and_write_nothing(case, column):
    if column == "triton":
        pytest.importorskip("triton")
    param, grad = torch.ones(3), torch.ones(3)
    with pytest.raises((RuntimeError, ValueError, IndexError, NotImplementedError)):
        raw("sgd", column)(*BAD_CALLS[case](param, grad))
    assert param.eq(1).all()
    if case in ("shape", "dtype", "integers"):
        with pytest.raises(RuntimeError):
            raw("clip_grad_norm", column)([grad, torch.ones(2, dtype=torch.long)], 0.1, 2.0, False)
        steps = [torch.zeros(()), torch.zeros(2)]
        with pytest.raises(RuntimeError):
            raw("adam", column)([param] * 2, [grad] * 2, [grad.clone()] * 2, [grad.clone()] * 2, [], steps, [0, 0], [0.1] * 7)
        assert grad.eq(1).all() and param.eq(1).all() and steps[0] == 0


NORMS = [2.0, 1.0, 3.5, float("inf"), float("-inf"), 0.0, -1.0, 0.5]


def with_grads(*grads):
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads):
        p.grad = g.clone(memory_format=torch.preserve_format)
    return params


def clipped(utils, max_norm, norm_type, *grads):
    params = with_grads(*grads)
    return [utils.clip_grad_norm_(params, max_norm, norm_type), *(p.grad for p in params)]


def clipped_and_joined(utils, *arguments):
    norm, *grads = clipped(utils, *arguments)
    return norm, joined(grads)


def exactly_clipped(max_norm, norm_type, *grads):
    """In NumPy's longest floats: torch's float64 norm is no reference for one that is summed more exactly."""
    values = [g.detach().double().numpy().astype(np.longdouble).reshape(-1) for g in grads if g.numel()]
    norms = np.array([np.linalg.norm(v, norm_type) for v in values])
    norm = np.linalg.norm(norms, norm_type)
    factor = min(np.longdouble(1), max_norm / (norm + np.longdouble(1e-6)))
    scaled = np.concatenate(values) * factor
    return torch.tensor(float(norm), dtype=torch.float64), torch.from_numpy(scaled.astype(np.float64))


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clipping_by_norm(dtype, norm_type, shares=(1 / 3, 3), draws=16):
    shapes = [s for s in SHAPES if 0 not in s] if norm_type < 0 or norm_type == float("inf") else SHAPES
    grads = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if norm_type == 0:
        grads[1] = torch.zeros(7, dtype=torch.float64)
    norm = clipped(torch.nn.utils, 1e30, norm_type, *grads)[0].item()
    for max_norm in (share * norm for share in shares):
        # Of a handful of roundings chance decides: 16 draws of the signs and places of the same numbers.
        check(
            functools.partial(clipped_and_joined, dlkern.nn.utils, max_norm, norm_type),
            functools.partial(exactly_clipped, max_norm, norm_type),
            lambda: [g.reshape(-1)[torch.randperm(g.numel())].reshape(g.shape) for g in grads],
            dtype=dtype, draws=draws, name=f"norm {norm_type}",
            baseline=functools.partial(clipped_and_joined, torch.nn.utils, max_norm, norm_type),
        ).raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clipping_by_value(dtype):
    grads = [torch.randn(shape).to(dtype) for shape in SHAPES]
    grads[1][2], grads[1][3], grads[1][4] = float("nan"), float("inf"), -float("inf")
    for value in (0.5, 0.0, float("inf"), -0.5, float("nan")):
        ours, theirs = with_grads(*grads), with_grads(*grads)
        dlkern.nn.utils.clip_grad_value_(ours, value)
        torch.nn.utils.clip_grad_value_(theirs, value)
        for a, b in zip(ours, theirs):
            assert torch.equal(a.grad.nan_to_num(77.0), b.grad.nan_to_num(77.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norms_that_are_not_finite(bad):
    grads = [torch.ones(3), torch.tensor([1.0, bad])]
    for norm_type in (2.0, 1.0, float("inf"), 3.0):
        params = with_grads(*grads)
        with pytest.raises(RuntimeError, match="non-finite"):
            dlkern.nn.utils.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True)
        assert torch.equal(params[0].grad, grads[0])
        ours, theirs = (clipped(u, 1.0, norm_type, *grads) for u in (dlkern.nn.utils, torch.nn.utils))
        for a, b in zip(ours, theirs):
            assert torch.equal(a.nan_to_num(77.0, 78.0), b.nan_to_num(77.0, 78.0)), (norm_type, a, b)


def test_clipping_takes_what_torchs_does():
    single = with_grads(torch.full((4,), 2.0))[0]
    assert dlkern.nn.utils.clip_grad_norm_(single, 1) == 4.0 and single.grad[0] < 0.5
    assert dlkern.nn.utils.clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0) == 0.0
    with pytest.warns(UserWarning, match="empty generator"):
        assert dlkern.nn.utils.clip_grad_norm_((p for p in []), 1.0) == 0.0
    assert clipped(dlkern.nn.utils, 1.0, "inf", torch.tensor([3.0, -4.0]))[0] == 4.0
    mixed = clipped(dlkern.nn.utils, 1.0, 2.0, torch.ones(3).bfloat16(), torch.ones(3))
    assert mixed[0].dtype == torch.float32 and mixed[1].dtype == torch.bfloat16
    half = clipped(dlkern.nn.utils, 1.0, 2.0, torch.ones(4).half())
    assert half[0].dtype == torch.float16 and half[1][0] == 0.5
    for norm_type in (float("inf"), float("-inf"), -1.0):
        with pytest.raises(RuntimeError):
            clipped(dlkern.nn.utils, 1.0, norm_type, torch.ones(3), torch.ones(0))
    strided = with_grads(torch.ones(4, 3))[0]
    strided.grad = torch.ones(4, 6)[:, ::2]
    assert abs(dlkern.nn.utils.clip_grad_norm_(strided, 1.0).item() ** 2 - 12) < 1e-5
    torch.testing.assert_close(strided.grad, torch.full((4, 3), 12**-0.5))
    assert strided.grad._base[:, 1::2].eq(1).all()


def test_same_bits_at_any_number_of_threads():
    grads = [torch.randn(n) for n in (100_003, 7, 40_000, 65_536)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            lars = trained(lambda p: dlkern.optim.LARS(p, lr=0.1, momentum=0.9), *grads, *[g[None].sin() for g in grads])
            results.append(clipped(dlkern.nn.utils, 1.0, 2.0, *grads) + lars)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_no_aten_compute_in_a_step():
    params = with_grads(torch.randn(5, 3), torch.randn(4))
    optimizers = [dlkern.optim.SGD(params, momentum=0.9), dlkern.optim.AdamW(params), dlkern.optim.LARS(params, momentum=0.9)]
    for optimizer in optimizers:
        optimizer.step()
    with torch.profiler.profile() as profile:
        dlkern.nn.utils.clip_grad_norm_(params, 0.1)
        for optimizer in optimizers:
            optimizer.step()
    names = {event.name for event in profile.events()}
    assert {"dlkern::sgd_cpu", "dlkern::adam_cpu", "dlkern::lars_cpu", "dlkern::clip_grad_norm_cpu"} <= names
    assert not {name for name in names if name.startswith("aten::")} - {"aten::detach"}, names


def test_step_inside_a_compiled_function():
    ends = []
    for library in (torch, dlkern):
        torch.manual_seed(0)
        net = model()
        optimizer = library.optim.Adam(net.parameters(), lr=0.01)

        def train(x, net=net, optimizer=optimizer):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

        step = torch.compile(train, backend="eager") if library is dlkern else train
        for seed in range(2):
            step(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))
        ends.append([p.detach() for p in net.parameters()])
    for ours, theirs in zip(*ends):
        torch.testing.assert_close(ours, theirs)


def test_the_benchmark(tmp_path):
    from dlkern import bench

    steps = ["adam", "lars", "clip_grad_norm_", "clip_grad_value_"]
    assert bench.main(["optim", *steps, "--network", "lenet", "--seconds", "0.02", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "optim.json").read_text())["rows"]
    assert [row["step"] for row in rows] == steps
    compared = [set(row["ratio"]) for row in rows]
    assert compared == [{"foreach", "fused", "single"}, {"foreach"}, {"foreach", "single"}, {"foreach", "single"}]
    assert all(row["floor ms"] > 0 for row in rows)


def test_the_benchmarks_lars_is_ours():
    """Both sides of the row compute the same step, of zeros too."""
    from dlkern.bench import optim

    _, settings, _ = optim.STEPS["lars"]
    ours, theirs = (optim._parameters("lenet", "cpu") for _ in range(2))
    for parameters in (ours, theirs):
        parameters[0].data.zero_()
    steps = dlkern.optim.LARS(ours, **settings).step, optim._foreach_lars(theirs, **settings)
    for _ in range(3):
        for step in steps:
            step()
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours[0], torch.zeros_like(ours[0]))


def test_plain_expressions_agree():
    """The reference column, which serves LARS and clipping where no kernel does."""
    tensors = [x.float() for x in drawn()]
    settings = dict(lr=0.5, momentum=0.9, weight_decay=5e-3, trust_coefficient=0.02, maximize=True)

    def results():
        lars = trained(lambda p: dlkern.optim.LARS(p, **settings), *tensors)
        params = with_grads(*tensors)
        norm = dlkern.nn.utils.clip_grad_norm_(params, 0.5)
        dlkern.nn.utils.clip_grad_value_(params, 1e-3)
        return [*lars, norm, joined(p.grad for p in params)]

    ours = results()
    with dlkern.backend("reference"), dlkern.trace() as calls:
        plain = results()
        sgd = trained(lambda p: dlkern.optim.SGD(p, lr=0.1), *tensors)
    assert {(call.op, call.backend) for call in calls} == {
        ("lars", "reference"), ("clip_grad_norm_", "reference"), ("clip_grad_value_", "reference"), ("sgd", "torch"),
    }  # fmt: skip
    for a, b in zip([*ours, *trained(lambda p: dlkern.optim.SGD(p, lr=0.1), *tensors)], [*plain, *sgd], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("column", ["cpu", "triton"])
def test_schemas_and_fake_kernels(column, request):
    if column == "triton":
        request.getfixturevalue("triton_column")

    def some():
        return [torch.randn(3, 2), torch.randn(5)]

    zero, row = [torch.zeros(()), torch.zeros(())], [0.1, 0.9, 0.99, 1e-8, 0.01, 1.0, 0.0]
    calls = {
        "sgd": (some(), some(), some(), [0, 1], [0, 0], [0.1, 0.9, 0.0, 0.0, 0.0, 0.0]),
        "adam": (some(), some(), [x.abs() for x in some()], [x.abs() for x in some()], [], zero, [0, 0], row),
        "lars": (some(), some(), some(), [0, 1], [0.1, 0.9, 0.0, 0.01, 0.0, 0.0] * 2),
        "clip_grad_norm": (some(), 0.5, 2.0, False),
        "clip_grad_value": (some(), 0.5),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(raw(name, column).default, arguments, test_utils=["test_schema", "test_faketensor"])


# --- the Triton column, interpreted: a step takes it 50 ms ------------------------------------------------------------


@pytest.fixture
def triton_column():
    pytest.importorskip("triton")
    with dlkern.testing.emulated(), dlkern.backend("triton"):
        yield


FEW = 3
MOST = [(name, torch.float32) for name in OPTIMIZERS]
MOST += zip(("sgd momentum", "sgd nesterov", "adamw amsgrad", "adam decoupled", "sgd momentum"), (*DTYPES[1:], *DTYPES[1:3]))


@pytest.mark.parametrize(("name", "dtype"), MOST, ids=[f"{name}-{dtype}" for name, dtype in MOST])
def test_triton_parity_over_a_few_steps(name, dtype, triton_column):
    kind, settings = OPTIMIZERS[name]
    with dlkern.trace() as calls:
        check(
            lambda *x: trained(lambda p: getattr(dlkern.optim, kind)(p, **settings), *x),
            lambda *x: trained(lambda p: getattr(torch.optim, kind)(p, foreach=False, **settings), *x),
            functools.partial(drawn, FEW), dtype=dtype, draws=4, name=name,
        ).raise_if_failed()
    assert {call.backend for call in calls} == {"triton"}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("settings", LARS_SETTINGS.values(), ids=LARS_SETTINGS)
def test_triton_lars_follows_its_paper(settings, dtype, triton_column):
    half = len(SHAPES)
    tensors = [x.to(dtype) for x in drawn(FEW)]
    exact = numpy_lars(tensors[:half], tensors[half:], **settings)
    with dlkern.trace() as calls:
        ours = trained(lambda p: dlkern.optim.LARS(p, **settings), *tensors)[0]
    rows = compare("lars", [ours], [lars_formula(settings, *tensors)], [exact], dtype)
    assert rows and all(row.ok for row in rows), rows
    assert {call.backend for call in calls} == {"triton"}


def test_triton_lars_at_zero_norms_and_in_groups(triton_column):
    test_lars_at_zero_norms_and_in_groups()


CLIPPED = [*((norm_type, torch.float32, 1 / 3) for norm_type in NORMS), (2.0, torch.float32, 3),
           (2.0, torch.bfloat16, 1 / 3), (3.5, torch.float16, 1 / 3), (2.0, torch.float64, 1 / 3)]  # fmt: skip


@pytest.mark.parametrize(("norm_type", "dtype", "share"), CLIPPED)
def test_triton_clipping_by_norm(norm_type, dtype, share, triton_column):
    test_clipping_by_norm(dtype, norm_type, [share], 6)


def test_triton_clipping_by_value_and_of_what_is_not_finite(triton_column):
    for dtype in DTYPES:
        test_clipping_by_value(dtype)
    for bad in (float("nan"), float("inf")):
        test_norms_that_are_not_finite(bad)
    test_clipping_takes_what_torchs_does()


def test_triton_groups_and_shared_memory(triton_column):
    test_groups_missing_gradients_and_schedulers()
    test_parameters_that_share_memory_are_updated_in_their_order()


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_triton_takes_any_strides(kind, triton_column):
    test_any_strides(kind)


def test_triton_dtypes_in_one_step_and_odd_addresses(triton_column):
    """A launch a dtype; an address that fits no wide access gives the same bits."""
    kind, settings = OPTIMIZERS["adamw amsgrad"]
    values = [torch.randn(n) for n in (5, 4097, 33, 1)]
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float64)
    ends = []
    for offset in (0, 1):
        params = []
        for x, dtype in zip(values, dtypes):
            room = torch.empty(x.numel() + offset, dtype=dtype)
            params.append(nn.Parameter(room[offset:].copy_(x)))
            params[-1].grad = x.to(dtype).sin()
        optimizer = getattr(dlkern.optim, kind)(params, **settings)
        optimizer.step()
        dlkern.nn.utils.clip_grad_norm_(params, 0.5)
        ends.append([x for p in params for x in (p.detach(), p.grad)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert len({x.dtype for x in ends[0]}) == 3


def test_triton_steps_counted_on_the_device(triton_column, monkeypatch):
    """As torch keeps them with fused=True; on this machine every step looks like the host's."""
    from dlkern.kernels import optim as kernels

    tensors, ends = [x.float() for x in drawn(FEW)], []
    for beta in (0.9, 0.0):
        for on_host in (True, False):
            monkeypatch.setattr(kernels, "_on_host", lambda step, on_host=on_host: on_host)
            params = [nn.Parameter(x.clone()) for x in tensors[: len(SHAPES)]]
            optimizer = dlkern.optim.Adam(params, lr=0.01, betas=(beta, 0.99))
            for step in range(FEW):
                for param, grads in zip(params, tensors[len(SHAPES) :]):
                    param.grad = grads[step].clone()
                optimizer.step()
            assert [optimizer.state[p]["step"].item() for p in params] == [FEW] * len(SHAPES)
            ends.append(joined(p.detach() for p in params))
        torch.testing.assert_close(ends[-1], ends[-2], rtol=1e-6, atol=1e-7)


def test_triton_addresses_in_a_table_are_checked(triton_column):
    from dlkern.kernels import optim as kernels

    x = torch.ones(3)
    (table,) = kernels._tables([(3, (x,), [x.data_ptr()])], [True], 1, lambda i: b"", False)
    table.rows.reached.clear()
    with pytest.raises(MemoryError):
        kernels.launch(kernels.grad_clamp_kernel, (1,), table.rows, 1, 0.5, **table.options)
    assert x.eq(1).all()


def test_a_rate_on_a_gpu_is_torchs():
    from dlkern.optim._common import settings_on_a_gpu

    optimizer = dlkern.optim.Adam([nn.Parameter(torch.ones(1))], lr=torch.tensor(0.1), foreach=False)
    assert settings_on_a_gpu(optimizer) == ""
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
    assert "GPU" in settings_on_a_gpu(optimizer)


@pytest.mark.parametrize("fused", [True, False])
def test_steps_are_counted_in_torchs_dtype(fused):
    before, kinds = torch.get_default_dtype(), []
    torch.set_default_dtype(torch.float64)
    try:
        for library in (torch, dlkern):
            param = nn.Parameter(torch.ones(2))
            param.grad = torch.ones(2)
            optimizer = library.optim.AdamW([param], fused=fused)
            optimizer.step()
            kinds.append(optimizer.state[param]["step"].dtype)
    finally:
        torch.set_default_dtype(before)
    assert kinds[0] == kinds[1]


def steps_of_empty_parameters_are_counted(amsgrad, *tensors):
    states = []
    for namespace in (dlkern.optim, torch.optim):
        params = with_grads(torch.ones(0, 3), torch.ones(2), *tensors)
        optimizer = namespace.Adam(params, amsgrad=amsgrad)
        for _ in range(3):
            optimizer.step()
        states.append(optimizer.state_dict()["state"])
    for ours, theirs in zip(*(s.values() for s in states), strict=True):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"] == 3


@pytest.mark.parametrize("amsgrad", [False, True])
def test_steps_of_empty_parameters_are_counted(amsgrad):
    steps_of_empty_parameters_are_counted(amsgrad, torch.ones(0).double())


@pytest.mark.parametrize("cls", ["Adam", "AdamW"])
def test_capturable_on_a_cpu_is_refused_as_by_torch(cls):
    messages = []
    for namespace in (dlkern.optim, torch.optim):
        (param,) = with_grads(torch.ones(2))
        with pytest.raises(AssertionError) as caught:
            getattr(namespace, cls)([param], capturable=True).step()
        messages.append(str(caught.value))
        assert param.eq(param[0]).all()
    assert messages[0] == messages[1]


def ends_of_all(device):
    """Parameters after a few steps of every optimiser, clipped in between, and the norms."""
    ends = {}
    for name, (kind, settings) in {**OPTIMIZERS, "lars": ("LARS", LARS_SETTINGS["scaled"])}.items():
        for fused in (False, True) if "adam" in name else (False,):
            torch.manual_seed(0)
            params = [nn.Parameter(torch.randn(shape).to(device)) for shape in SHAPES]
            optimizer = getattr(dlkern.optim, kind)(params, **settings, **({"fused": True} if fused else {}))
            norms = []
            for step in range(FEW):
                for param in params:
                    param.grad = torch.randn(param.shape).to(device)
                order = (2.0, 1.0, 0.0)[step]
                norms.append(dlkern.nn.utils.clip_grad_norm_(params, 1.0 + 40 * step, order))
                dlkern.nn.utils.clip_grad_value_(params, 0.5)
                optimizer.step()
            ends[name, fused] = [x.detach().cpu() for x in (*params, *norms)]
    return ends


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("column", ["triton", "cuda"])
def test_steps_on_a_gpu(column):
    with dlkern.backend(column), dlkern.trace() as calls:
        ours = ends_of_all("cuda")
        again = ends_of_all("cuda")
    assert {call.backend for call in calls} == {column}
    expected = ends_of_all("cpu")
    for name, tensors in ours.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, again[name], strict=True)), name
        for a, b in zip(tensors, expected[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
