"""Optimisers and clipping of the CUDA column, run on the host: test_optim.py's cases on this column, tables longer than a
launch's parameters, addresses without packs. tests/test_cuda_builds.py runs this file again on the checked build, and part
of it under sanitizers."""

import functools
from types import SimpleNamespace

import pytest
import test_optim as cases
import torch
from cuda_column import library, no_findings, on_cuda  # noqa: F401
from torch import nn

import dlkern
from dlkern import columns
from dlkern.ops import optim as ops
from dlkern.testing import check, compare, cuda_on_host

FEW = 3
DTYPES = cases.DTYPES[:3]
MOST = [(name, torch.float32) for name in cases.OPTIMIZERS]
MOST += zip(("sgd momentum", "sgd nesterov", "adamw amsgrad", "adam decoupled"), (*DTYPES[1:], *DTYPES[1:]))


@pytest.mark.parametrize(("name", "dtype"), MOST, ids=[f"{name}-{dtype}" for name, dtype in MOST])
def test_optim_parity_over_a_few_steps(name, dtype):
    kind, settings = cases.OPTIMIZERS[name]
    with on_cuda():
        check(
            lambda *x: cases.trained(lambda p: getattr(dlkern.optim, kind)(p, **settings), *x),
            lambda *x: cases.trained(lambda p: getattr(torch.optim, kind)(p, foreach=False, **settings), *x),
            functools.partial(cases.drawn, FEW), dtype=dtype, draws=4, name=name,
        ).raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", cases.LARS_SETTINGS.values(), ids=cases.LARS_SETTINGS)
def test_lars_follows_its_paper(settings, dtype):
    half = len(cases.SHAPES)
    tensors = [x.to(dtype) for x in cases.drawn(FEW)]
    exact = cases.numpy_lars(tensors[:half], tensors[half:], **settings)
    with on_cuda():
        ours = cases.trained(lambda p: dlkern.optim.LARS(p, **settings), *tensors)[0]
    rows = compare("lars", [ours], [cases.lars_formula(settings, *tensors)], [exact], dtype)
    assert rows and all(row.ok for row in rows), rows


def test_lars_at_zero_norms_and_in_groups():
    with on_cuda():
        cases.test_lars_at_zero_norms_and_in_groups()


CLIPPED = [*((norm_type, torch.float32, 1 / 3) for norm_type in cases.NORMS), (2.0, torch.float32, 3),
           (2.0, torch.bfloat16, 1 / 3), (3.5, torch.float16, 1 / 3)]  # fmt: skip


@pytest.mark.parametrize(("norm_type", "dtype", "share"), CLIPPED)
def test_clipping_by_norm(norm_type, dtype, share):
    with on_cuda():
        cases.test_clipping_by_norm(dtype, norm_type, [share], 6)


def test_clipping_by_value_and_of_what_is_not_finite():
    with on_cuda():
        for dtype in DTYPES:
            cases.test_clipping_by_value(dtype)
        for bad in (float("nan"), float("inf")):
            cases.test_norms_that_are_not_finite(bad)
        cases.test_clipping_takes_what_torchs_does()


def test_optim_groups_and_shared_memory():
    with on_cuda():
        cases.test_groups_missing_gradients_and_schedulers()
        cases.test_parameters_that_share_memory_are_updated_in_their_order()


@pytest.mark.parametrize("kind", ["SGD", "Adam", "LARS"])
def test_optim_views(kind):
    with on_cuda():
        cases.test_any_strides(kind)


def test_optim_views_at_odd_addresses():
    """An address that fits no wide access gives the same bits, also where a step's other tensors do."""
    values = [torch.randn(n) for n in (5, 4097, 8192, 33, 1)]
    dtypes = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float16)
    ends = []
    for offset in (0, 1):
        ends.append([])
        for kind, settings in (cases.OPTIMIZERS["adamw amsgrad"], cases.OPTIMIZERS["sgd momentum"], ("LARS", {})):
            params, rooms = [], []
            for i, (x, dtype) in enumerate(zip(values, dtypes)):
                shift = offset if i != 2 else 0
                rooms.append(torch.full((x.numel() + 2 * shift,), 7.0, dtype=dtype))
                params.append(nn.Parameter(rooms[-1][shift : shift + x.numel()].copy_(x)))
                params[-1].grad = x.to(dtype).sin()
            with on_cuda():
                getattr(dlkern.optim, kind)(params, **settings).step()
                norm = dlkern.nn.utils.clip_grad_norm_(params, 0.5)
                dlkern.nn.utils.clip_grad_value_(params, 0.003)
            ends[-1] += [norm, *(x for p in params for x in (p.detach(), p.grad))]
            assert all(room[0] == room[-1] == 7 for room, x in zip(rooms, values) if len(room) > len(x))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("kind", ["sgd nesterov", "adamw amsgrad", "lars"])
def test_more_tensors_than_a_table_has_rows(kind):
    """Tensors of one, two and many blocks on both sides of a launch's last row, each with a rate of its own."""
    name, settings = cases.OPTIMIZERS.get(kind, ("LARS", dict(momentum=0.9)))
    sizes = [4100 if i % 37 == 36 else 9000 if i == 70 else i % 5 + 1 for i in range(180)]
    ends = []
    for column in ("cpu", "cuda"):
        torch.manual_seed(1)
        params = [nn.Parameter(torch.randn(n)) for n in sizes]
        groups = [{"params": [p], "lr": 0.001 * (i + 1)} for i, p in enumerate(params)]
        optimizer = getattr(dlkern.optim, name)(groups, **{**settings, "lr": 0.1})
        with dlkern.testing.emulated(), dlkern.backend(column):
            for _ in range(2):
                for p in params:
                    p.grad = p.detach().sin() + 1
                norms = [dlkern.nn.utils.clip_grad_norm_(params, 100.0, order) for order in (2.0, 0.0, float("inf"))]
                optimizer.step()
        ends.append([*norms, *(p.detach() for p in params)])
    for ours, theirs in zip(*reversed(ends), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta", [0.9, 0.0])
def test_steps_counted_on_the_device_and_on_the_host(beta):
    """As torch keeps them with fused=True, and without; here a step in float64 is the host's."""
    tensors, ends = [x.float() for x in cases.drawn(FEW)], []
    for kinds in ([torch.float32], [torch.float64], [torch.float32, torch.float64]):
        params = [x.clone() for x in tensors[: len(cases.SHAPES)]]
        state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        steps = [torch.zeros((), dtype=kinds[i % len(kinds)]) for i in range(len(params))]
        for step in range(FEW):
            grads = [x[step] for x in tensors[len(cases.SHAPES) :]]
            cases.raw("adam", "cuda")(params, grads, *state, [], steps, [0] * len(params), [0.01, beta, 0.99, 1e-8, 0, 0, 0])
        assert [step.item() for step in steps] == [FEW] * len(params)
        ends.append(cases.joined(params))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_optim_nothing_to_do(amsgrad):
    with on_cuda():
        cases.steps_of_empty_parameters_are_counted(amsgrad)
        empty = cases.with_grads(torch.ones(0))
        assert dlkern.nn.utils.clip_grad_norm_(empty, 1.0) == 0 and dlkern.nn.utils.clip_grad_norm_(empty, 1.0, 0.0) == 0


@pytest.mark.parametrize("case", cases.BAD_CALLS)
def test_optim_wrong_arguments(case):
    cases.test_wrong_raw_calls_raise_and_write_nothing(case, "cuda")


def test_optim_wrong_arguments_of_other_ops():
    one, steps = torch.ones(2), [torch.zeros(())]
    for name, wrong in {
        "adam": [([one], [one], [one], [], [], steps, [0], [0.1] * 7), ([one], [one], [one], [one], [], [], [0], [0.1] * 7),
                 ([one], [one], [one], [one], [], [torch.zeros((), dtype=torch.long)], [0], [0.1] * 7)],
        "lars": [([one], [one], [], [0], [0.1] * 5), ([one.double()], [one.double()], [], [0], [0.1] * 6)],
        "clip_grad_norm": [([], 1.0, 2.0, False), ([one, one[:0]], 1.0, -1.0, False), ([one.double()], 1.0, 2.0, False)],
        "clip_grad_value": [([one, one.long()], 0.5), ([one, one[:1].expand(3)], 0.5)],
    }.items():
        for arguments in wrong:
            with pytest.raises((RuntimeError, ValueError)):
                cases.raw(name, "cuda")(*arguments)
    assert one.eq(1).all() and steps[0] == 0


@pytest.mark.parametrize("column", ["cpu", "cuda"])
def test_norm_of_two_16_bit_types(column):
    grads = [torch.full((4,), 3.0).bfloat16(), torch.full((4,), 4.0).half()]
    norm = cases.raw("clip_grad_norm", column)(grads, 5.0, 2.0, False)
    assert norm.dtype == torch.float32 and norm == 10 and grads[0][0] == 1.5 and grads[1][0] == 2


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_optim_same_bits_in_every_thread_order(order):
    def sample():
        grads = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (9001, 7, 4096)]
        with on_cuda():
            found = cases.clipped(dlkern.nn.utils, 1.0, 2.0, *grads) + cases.clipped(dlkern.nn.utils, 1.0, 0.0, *grads)
            for make in (dlkern.optim.LARS, dlkern.optim.AdamW):
                found += cases.trained(functools.partial(make, lr=0.1), *grads, *(g[None].sin() for g in grads))
        return found

    forward = sample()
    with cuda_on_host.thread_order(order, 1):
        other = sample()
    assert all(torch.equal(a, b) for a, b in zip(forward, other, strict=True))


def test_schemas_and_fake_kernels(request):
    cases.test_schemas_and_fake_kernels("cuda", request)


@pytest.mark.parametrize(("dtypes", "served"), [((0, 1), "cuda"), ((0, 3), "triton"), ((3, 1, 0), "triton")])
def test_one_column_takes_all_dtypes_of_a_step(dtypes, served, monkeypatch):
    """float64 is no dtype of this column; a step that has some is Triton's as a whole."""
    monkeypatch.setattr(columns, "unavailable", lambda column: None)
    monkeypatch.setattr(columns, "order", lambda op, device, dtype, facts=(): ("cuda", "triton"))
    monkeypatch.setattr(columns, "_cache", {})
    tensors = [SimpleNamespace(device=torch.device("cuda", 0), dtype=cases.DTYPES[i]) for i in dtypes]
    assert ops.choose("sgd", tensors) == served
