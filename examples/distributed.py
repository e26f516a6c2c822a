"""One training script for one process or many: each trains on its share of the batch, and all end with the same network.

    python examples/distributed.py                              # alone
    torchrun --nproc_per_node 2 examples/distributed.py         # two processes; over NCCL where each has a GPU, else gloo

LeNet with batch norm on scikit-learn's digits. DistributedDataParallel averages the processes' gradients, SyncBatchNorm
takes mean and variance over all of their images. The shares need not be equal: each process divides its sum of losses by the
whole batch, not by its share, so that the average over processes times their number is the gradient of the whole batch's mean.
The losses themselves go to a file beside the picture.

What to see: each process's loss (thin) is that of its own images and jumps on its own; the loss of the whole batch (thick)
lies, step for step, on the one (dashed) that a single process computes from all images. Without the shared statistics it
would drift away, because each process would normalise by its own images.
"""

import json
import os

import torch
import torch.distributed as dist
from common import figure, run, save
from torch.nn.parallel import DistributedDataParallel

import dlkern
from dlkern import nn
from dlkern.training import batches, digits

BATCH = 45  # not divisible by two, so that shares differ


def lenet():
    """LeNet; batch norm goes between a layer and its sigmoid."""
    return torch.nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), torch.nn.Sigmoid(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), torch.nn.Sigmoid(), nn.AvgPool2d(2), torch.nn.Flatten(),
        nn.Linear(400, 120), nn.BatchNorm1d(120), torch.nn.Sigmoid(), nn.Linear(120, 10),
    )  # fmt: skip


def gathered(value):
    """The number of every process, [world size], in all of them."""
    if not dist.is_initialized():
        return value[None]
    found = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(found, value)
    return torch.stack(found)


def train(steps, dtype, device):
    """The processes' shares of the loss at each step, [steps, world size]; each row's sum is the loss of the whole batch."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    model = lenet().to(device, dtype)
    if dist.is_initialized():
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
        # After wrapping: DistributedDataParallel lets no SyncBatchNorm in on a CPU. The parameters stay the same objects.
        nn.SyncBatchNorm.convert_sync_batchnorm(model.module)
    optimizer = dlkern.optim.SGD(model.parameters(), lr=0.2)
    stream, losses = batches(digits(), BATCH, 0), []
    for _ in range(steps):
        images, labels = (t.tensor_split(world)[rank].to(device) for t in next(stream))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images.to(dtype)), labels, reduction="sum") / BATCH
        (loss * world).backward()
        optimizer.step()
        losses.append(gathered(loss.detach()).cpu())
    return torch.stack(losses)


def main(steps=100, report=None, dtype="float32"):
    dtype, device = getattr(torch, dtype), torch.device("cpu")
    world = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets it
    if world > 1:
        local = int(os.environ["LOCAL_RANK"])
        if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        rank, shares = dist.get_rank(), train(steps, dtype, device)
        dist.destroy_process_group()
        if rank > 0:
            return {}
    alone = train(steps, dtype, device)[:, 0]
    joint = shares.sum(1) if world > 1 else alone
    drawing, ((a,),) = figure(1, 1, (8, 4.5))
    if world > 1:
        sizes = torch.tensor([len(t) for t in torch.arange(BATCH).tensor_split(world)])
        for i, curve in enumerate((shares * BATCH / sizes).T):
            a.plot(curve, linewidth=0.7, label=f"process {i}")
    a.plot(joint, linewidth=3, alpha=0.6, label="whole batch")
    a.plot(alone, "--", color="black", label="one process")
    a.set(xlabel="step", ylabel="loss", title=f"{world} process" + "es" * (world > 1))
    a.legend()
    picture = save(drawing, report, "distributed")
    picture.with_suffix(".json").write_text(json.dumps({"losses": joint.tolist()}))
    return {
        "processes": world, "first loss": joint[0].item(), "last loss": joint[-1].item(),
        "largest difference from one process": (joint - alone).abs().max().item(),
    }


if __name__ == "__main__":
    run(main, 100, dtype=("float32", "float64"))
