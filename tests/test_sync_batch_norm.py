"""SyncBatchNorm in two real processes (gloo, on the CPU) against batch norm of the joined batch, by the rule."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dlkern

ROOT = Path(__file__).resolve().parent.parent
C = 7
# name -> sizes of the two processes' batches, shape behind the channels, dtype, options
CASES = {
    "images": ((3, 3), (5, 4), torch.float32, {}),
    "different batches": ((1, 5), (4, 3), torch.float32, {}),
    "one empty": ((0, 4), (4, 3), torch.float32, {}),
    "the other empty": ((4, 0), (2, 2), torch.float64, {}),
    "one element each": ((1, 1), (), torch.float32, {}),
    "vectors": ((9, 14), (), torch.float32, {}),
    "bfloat16": ((4, 3), (6, 5), torch.bfloat16, {}),
    "float64": ((2, 3), (3, 5), torch.float64, {}),
    "not affine, not tracked": ((2, 4), (3, 3), torch.float32, dict(affine=False, track_running_stats=False)),
    "cumulative": ((2, 4), (3, 3), torch.float32, dict(momentum=None)),
    "volumes": ((2, 1), (2, 3, 4), torch.float32, dict(eps=1e-3, momentum=0.3)),
}


def drawn(name):
    """Input of both processes, cotangent, weight, bias: the same in every process."""
    (first, second), rest, dtype, _ = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    size = (first + second, C, *rest)
    x = torch.randn(size, generator=generator, dtype=torch.float64) * 2 + 3
    x[first:] += 5  # the processes' means differ
    g, w, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (size, C, C))
    return x.to(dtype), g.to(dtype), w.float().double(), b.float().double()


def run(module, name, part, dtype):
    """Output, gradients of input, weight and bias, running statistics of one call on a part of the batch."""
    x, g, w, b = drawn(name)
    module = module.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if module.weight is not None:
        module.weight.data.copy_(w)
        module.bias.data.copy_(b)
    x = x[part].to(dtype).requires_grad_()
    if x.dim() == 4:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = module(x)
    y.backward(g[part].to(dtype))
    found = dict(output=y.detach(), grad_input=x.grad)
    if module.weight is not None:
        found |= dict(grad_weight=module.weight.grad, grad_bias=module.bias.grad)
    if module.running_mean is not None:
        found |= dict(running_mean=module.running_mean, running_var=module.running_var)
    return found


def process(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}/init", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for name, ((first, _), _, dtype, options) in CASES.items():
        part = slice(0, first) if rank == 0 else slice(first, None)
        with dlkern.trace() as calls:
            results[name] = run(dlkern.nn.SyncBatchNorm(C, **options), name, part, dtype)
        assert [(call.op, call.backend) for call in calls] == [("batch_norm", "cpu")]
    # In evaluation nobody else is asked, so a call on one process alone returns.
    if rank == 0:
        module = dlkern.nn.SyncBatchNorm(C).eval()
        results["evaluation"] = module(torch.ones(2, C))
    torch.save(results, f"{path}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(path)], cwd=ROOT, env=environment) for rank in (0, 1)
    ]
    assert [each.wait(timeout=300) for each in started] == [0, 0]
    return [torch.load(path / f"{rank}.pt") for rank in (0, 1)]


def plain(dims, **options):
    return [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dims](C, **options)


@pytest.mark.parametrize("name", CASES)
def test_is_batch_norm_of_the_joined_batch(name, processes):
    sizes, rest, dtype, options = CASES[name]
    narrow = torch.float32 if dtype == torch.float64 else dtype
    theirs = run(plain(len(rest), **options), name, slice(None), narrow)
    exact = run(plain(len(rest), **options), name, slice(None), torch.float64)
    first, second = (found[name] for found in processes)
    assert len(first["output"]) == sizes[0] and len(second["output"]) == sizes[1]
    ours = {}
    for key in first:
        if key in ("output", "grad_input"):
            ours[key] = torch.cat([first[key], second[key]])
        elif key.startswith("grad"):
            ours[key] = first[key] + second[key]
        else:
            assert torch.equal(first[key], second[key])
            ours[key] = first[key]
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        of_parameter = torch.float64 if dtype == torch.float64 else torch.float32
        assert value.dtype == (dtype if key in ("output", "grad_input") else of_parameter)
        rows = dlkern.testing.compare(key, [value], [theirs[key]], [exact[key]], narrow)
        assert all(row.ok for row in rows), [row for row in rows if not row.ok]


def test_evaluation_asks_nobody(processes):
    expected = dlkern.nn.BatchNorm1d(C).eval()(torch.ones(2, C))  # fresh statistics in both
    assert torch.equal(processes[0]["evaluation"], expected)


def test_outside_a_process_group_it_is_batch_norm():
    x = torch.randn(4, C, 3, 2)
    ours, theirs = dlkern.nn.SyncBatchNorm(C), dlkern.nn.BatchNorm2d(C)
    for _ in range(2):
        assert torch.equal(ours(x), theirs(x))
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    with pytest.raises(ValueError, match="expected at least 2D input"):
        ours(torch.ones(3))


def test_conversions():
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.Sequential(nn.BatchNorm1d(C)))
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(dlkern.convert(model))
    assert type(synced[1]) is nn.SyncBatchNorm
    converted = dlkern.convert(synced)
    assert type(converted[1]) is type(converted[2][0]) is dlkern.nn.SyncBatchNorm
    assert repr(converted[1]) == repr(nn.SyncBatchNorm(C))
    assert type(dlkern.revert(converted)[1]) is nn.SyncBatchNorm
    direct = dlkern.nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()))
    assert type(direct[0]) is dlkern.nn.SyncBatchNorm


if __name__ == "__main__":
    process(int(sys.argv[1]), sys.argv[2])
