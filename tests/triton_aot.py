"""Triton kernels compiled ahead of time for GPUs that are not here, and what the machine code uses.

A fake driver names the target, and the real launchers run on CPU tensors whose launch is turned into `warmup`: so
grid, block sizes, constants and specialisation (alignment, ones) are the ones the JIT would use on such a GPU.
tests/test_triton_aot.py holds the results to tests/budgets/triton-<version>/<family>.json; after a change that is
meant, write those again with

    python tests/triton_aot.py [family ...]        (without families: those whose sources changed)

and read the difference: more registers, a lost tensor-core instruction or a spill is a regression. Budgets are keyed
by Triton's version, because compilers differ, and name the sources they were measured on (sources.py).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from sources import digest, module_file
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dlkern.kernels import (
    _lp_pooling,
    _rnn_options,
    attention,
    attention_varlen,
    batch_norm,
    configs,
    conv,
    dropout,
    embedding,
    layer_norm,
    linear,
    loss,
    optim,
    pooling,
    positions,
    rnn,
)

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = ROOT / "tests" / "budgets" / f"triton-{triton.__version__}"
TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Tensor-core instruction of a target for 16-bit floats (Triton makes none for Turing), and what shows that loads are
# pipelined.
MATRIX = {"sm_75": "", "sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
PIPELINED = {"sm_80": "LDGSTS", "sm_90": "LDGSTS", "sm_100": "LDGSTS"}
COUNTED = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "v_mfma")


class _FakeDriver:
    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@contextlib.contextmanager
def compiling(target: GPUTarget) -> Iterator[list]:
    """Launches inside compile for the target instead of running; the list fills with (kernel name, compiled kernel)."""
    compiled: list = []
    run, architecture, active = JITFunction.run, configs.architecture, driver._active
    cache = os.environ.get("TRITON_CACHE_DIR")

    def compile_only(self, *args, grid, warmup, **named):
        self.device_caches.clear()  # they belong to another target
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **named)))

    JITFunction.run = compile_only
    configs.architecture = lambda tensor: target.arch
    os.environ["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton-aot")
    driver.set_active(_FakeDriver(target))
    try:
        yield compiled
    finally:
        for kernel, _ in compiled:
            getattr(kernel, "device_caches", {}).clear()
        JITFunction.run, configs.architecture, driver._active = run, architecture, active
        os.environ.pop("TRITON_CACHE_DIR")
        if cache is not None:
            os.environ["TRITON_CACHE_DIR"] = cache


# --- representative calls ---------------------------------------------------------------------------------------------


def _empty(*shape: int, dtype: torch.dtype, channels_last: bool = False) -> torch.Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, memory_format=layout)  # never touched: costs no memory


def _dropout(half):
    dropout.dropout(_empty(1 << 22, dtype=half), 0.3, torch.tensor(1))
    dropout.feature_dropout(_empty(32, 64, 56, 56, dtype=half, channels_last=True), 0.3, torch.tensor(1))


def _linear(half):
    x, w, b = _empty(4096, 1024, dtype=half), _empty(2048, 1024, dtype=half), _empty(2048, dtype=half)
    dy = _empty(4096, 2048, dtype=half)
    linear.linear_forward(x, w, b, 1)
    linear.linear_backward_input(dy, w)
    linear.linear_backward_weight(dy, x, True)
    linear.activation_backward(dy, dy, 2)
    x, w = _empty(4096, 1024, dtype=torch.float32), _empty(2048, 1024, dtype=torch.float32)
    linear.linear_forward(x, w, None, 0)


def _conv(half):
    one, two = (1, 1), (2, 2)
    image = functools.partial(_empty, dtype=half, channels_last=True)
    x, w, y = image(32, 128, 56, 56), image(128, 128, 3, 3), image(32, 128, 56, 56)
    b = _empty(128, dtype=half)
    conv.conv2d_forward(x, w, b, one, one, one, 1)
    conv.conv2d_backward_weight(y, x, w.shape, one, one, one, 1, True, True)
    conv.conv2d_backward_input(image(32, 128, 28, 28), w, x.shape, two, one, one, 1, True)
    conv.conv2d_forward(image(32, 3, 224, 224), image(64, 3, 7, 7), None, two, (3, 3), one, 1)
    w = image(128, 1, 3, 3)
    conv.conv2d_forward(x, w, b, one, one, one, 128)
    conv.conv2d_backward_input(y, w, x.shape, one, one, one, 128, True)
    conv.conv2d_backward_weight(y, x, w.shape, one, one, one, 128, True, True)
    conv.conv_transpose2d_forward(image(32, 128, 28, 28), image(128, 128, 4, 4), b, two, one, (0, 0), 1, one)
    conv.conv2d_backward_bias(y)
    single = _empty(32, 128, 56, 56, dtype=torch.float32)
    conv.conv2d_forward(single, _empty(128, 128, 3, 3, dtype=torch.float32), None, one, one, one, 1)


def _pooling(half):
    window = (3, 3, 2, 2, 1, 1)
    x = _empty(32, 64, 112, 112, dtype=half, channels_last=True)
    y, place = pooling.max_pool2d_forward(x, (*window, 1, 1), False, 1)
    pooling.max_pool2d_backward(y, place, x.shape, (*window, 1, 1), True)
    y = pooling.avg_pool2d_forward(x, window, False, True, None)
    pooling.avg_pool2d_backward(y, x.shape, window, False, True, None, True)
    y = pooling.adaptive_avg_pool2d_forward(x, (7, 7))
    pooling.adaptive_avg_pool2d_backward(y, x.shape, True)
    y, place = pooling.adaptive_max_pool2d_forward(x, (7, 7))
    pooling.adaptive_max_pool2d_backward(y, place, x.shape, True)
    for norm in (2.0, 2.5):
        y = _lp_pooling.lp_pool2d_forward(x, norm, window[:4], False)
        _lp_pooling.lp_pool2d_backward(y, x, norm, window[:4], False)


def _batch_norm(half):
    channel = torch.empty(64)
    for dtype, channels_last in ((half, True), (torch.float32, False)):
        x = _empty(32, 64, 56, 56, dtype=dtype, channels_last=channels_last)
        batch_norm.batch_norm_train_forward(x, x, channel, channel, channel, channel, 0.1, 1e-5, 1)
        batch_norm.batch_norm_backward(x, x, x, channel, channel, channel, True, 1, True)


def _layer_norm(half):
    parameter = torch.empty(16384)
    for rows, columns, dtype in ((8192, 1024, half), (8192, 4096, torch.float32), (512, 16384, half)):
        x, row, weight = _empty(rows, columns, dtype=dtype), torch.empty(rows), parameter[:columns]
        layer_norm.layer_norm_forward(x, 1, weight, weight, 1e-5)
        layer_norm.layer_norm_backward(x, x, 1, weight, row, row, True, True, True)


def _loss(half):
    x, target = _empty(4096, 32000, dtype=half), torch.zeros(4096, dtype=torch.int64)
    value, lse, total = loss.cross_entropy_forward(x, target, None, None, 1, -100, 0.1)
    loss.cross_entropy_backward(value, x, target, None, None, lse, total, 1, -100, 0.1)
    value, kept = loss.probabilities_forward(x, x, None, 1, 0.1)
    loss.probabilities_backward(value, x, x, None, kept, 1, 0.1, True, True)


def _embedding(half):
    weight, index = _empty(32000, 1024, dtype=half), torch.zeros(4096, dtype=torch.int64)
    embedding.embedding_forward(weight, index)
    embedding.embedding_backward(_empty(4096, 1024, dtype=half), index, 32000, 0, True)


def _optim(half):
    """Two tensors of 16 bits with everything; float32; an address that fits no wide access, and steps on the device."""

    def step(tensors, *ops):
        zeros, numbers = [0] * len(tensors), [torch.zeros(()) for _ in tensors]
        grads, first, second, third = ([torch.empty_like(x) for x in tensors] for _ in range(4))
        if "sgd" in ops:
            optim.sgd(tensors, grads, first, zeros, zeros, [0.1, 0.9, 0.0, 0.0, 0.0, 0.0])
        if "lars" in ops:
            optim.lars(tensors, grads, first, zeros, [0.1, 0.9, 0.0, 0.01, 0.0, 0.0])
        optim.adam(tensors, grads, first, second, third, numbers, zeros, [0.1, 0.9, 0.99, 1e-8, 0.0, 0.0, 0.0])

    tensors = [_empty(1024, 4096, dtype=half), _empty(4099, dtype=half)]
    step(tensors, "sgd", "lars")
    optim.clip_grad_value(tensors, 1.0)
    for order in (2.0, float("inf"), 3.0, 0.0):
        optim.clip_grad_norm(tensors, 1.0, order, False)
    step([_empty(512, 512, dtype=torch.float32)], "sgd", "lars")
    with mock.patch.object(optim, "_on_host", lambda step: False):
        step([_empty(8193, dtype=torch.float32)[1:]])


def _positions(half):
    x, heads = _empty(4, 8, 1024, 128, dtype=half), _empty(4, 1024, 8, 96, dtype=half).transpose(1, 2)
    angles = torch.empty(1, 1, 1024, 64)
    positions.rotary(x, angles, angles, False, False)
    positions.rotary(heads, angles[..., :32], angles[..., :32], True, True)


def _rnn(half):
    """Weights in registers, programs that wait for each other, a launch a step; the products before are linear's."""
    with mock.patch.multiple(rnn, matmul=mock.DEFAULT, weight_gradient=mock.DEFAULT):
        for mode, batch, size, dtype, reverse in (
            (2, 16, 128, half, False), (0, 16, 64, half, True), (2, 64, 1024, half, False), (3, 32, 2816, half, False),
            (2, 16, 32, torch.float32, False), (3, 1024, 2048, torch.float32, False),
        ):  # fmt: skip
            empty = functools.partial(_empty, dtype=dtype)
            gates, slots, lstm = (1, 1, 4, 3)[mode], (1, 1, 4, 4)[mode], mode == 2
            x, h, w, bias = empty(1, batch, size), empty(batch, size), empty(gates * size, size), empty(gates * size)
            c = h if lstm else None
            rnn.rnn_forward(x, w, w, bias, bias, None, h, c, None, None, mode, reverse, True)
            kept = [_empty(n, columns, dtype=torch.float32) for n, columns in ((batch, slots * size), (batch * lstm, size))]
            rnn.rnn_backward(x, h, c, x, w, w, None, h, c, x, *kept, None, None, mode, reverse, True, True, True)
    _options_of_rnn(half)


def _options_of_rnn(half):
    """A projection; all options with one; a GRU's normalisation in float32; zoneout's expectation alone."""
    for mode, batch, inputs, size, dtype, projects, normed, chosen, share in (
        (2, 64, 512, 1024, half, 256, False, False, 0.0), (2, 64, 512, 1024, half, 256, True, True, 0.0),
        (3, 32, 512, 512, torch.float32, 0, True, False, 0.0), (0, 64, 512, 1024, half, 0, False, False, 0.1),
    ):  # fmt: skip
        empty = functools.partial(_empty, dtype=dtype)
        wide = functools.partial(_empty, dtype=torch.float32)
        gates, slots, lstm = (1, 1, 4, 3)[mode], (1, 1, 4, 4)[mode], mode == 2
        state, width = projects or size, gates * size
        x, w_ih, w_hh, bias = empty(1, batch, inputs), empty(width, inputs), empty(width, state), empty(width)
        w_hr, h, c = empty(state, size) if projects else None, empty(batch, state), empty(batch, size) if lstm else None
        norms = [empty(width)] * 2 + [empty(size)] * 2 * lstm if normed else []
        weights = [empty(3, size) if normed and lstm else None, *norms, *[None] * (4 - len(norms))]
        masks = [wide(1, batch, n) if chosen else None for n in (state, state, size)]
        layer, rest = (w_hr, h, c, *weights, *masks), (None, None, mode, False, share, 0.0)
        y = empty(1, batch, state)
        norm_size = (2 * width + size * lstm + 3) * normed
        kept = wide(batch, slots * size), wide(batch * lstm, size), wide(batch * normed, norm_size)
        with mock.patch.multiple(_rnn_options, matmul=mock.DEFAULT, weight_gradient=mock.DEFAULT):
            _rnn_options.rnn_options_forward(x, w_ih, w_hh, bias, bias, *layer, *rest, True)
            _rnn_options.rnn_options_backward(y, h, c, x, w_ih, w_hh, *layer, y, *kept, *rest, True, True, True)


def _attention(half):
    """Plain; causal with shared keys; dropout; a mask that wants its gradient; float32, as a product and as a sum; rotary
    positions; sequences one after another."""

    def both(depth, dtype=half, key_heads=8, mask=None, p=0.0, right=-1, score=0, forward=True, backward=True):
        q, k = (_empty(4, heads, 1024, depth, dtype=dtype) for heads in (8, key_heads))
        weight = _empty(depth, dtype=dtype) if score == 2 else None
        operands, settings = (None, None, weight, torch.tensor(1)), (p, 0.1, 0.0, -1, right, score)
        if forward:
            attention.attention_forward(q, k, k, mask, *operands, *settings)
        if backward:
            statistics = torch.empty(2, *q.shape[:3])
            attention.attention_backward(q, q, k, k, mask, *operands, q, statistics, *settings, mask is not None)

    both(64)
    both(128, key_heads=2, right=0)
    both(64, p=0.1, backward=False)
    both(64, mask=_empty(1, 8, 1024, 1024, dtype=half), forward=False)
    both(64, dtype=torch.float32, backward=False)
    both(64, dtype=torch.float32, score=2, backward=False)

    q, angles, statistics = _empty(4, 8, 1024, 128, dtype=half), torch.empty(1, 1, 1024, 64), torch.empty(2, 4, 8, 1024)
    options, settings = (None, None, None, None, angles, angles), (0.0, 0.1, 0.0, -1, 0, False)
    attention.attention_rotary_forward(q, q, q, *options, *settings)
    attention.attention_rotary_backward(q, q, q, q, *options, q, statistics, *settings, False)
    q, starts, statistics = _empty(4096, 8, 64, dtype=half), torch.tensor([0, 1000, 4096]), torch.empty(2, 8 * 4096)
    options, settings = (starts, starts, None), (0.0, 0.1, 0.0, -1, 0)
    attention_varlen.attention_varlen_forward(q, q, q, *options, *settings)
    attention_varlen.attention_varlen_backward(q, q, q, q, *options, q, statistics, *settings)


CALLS = {
    "attention": _attention, "batch_norm": _batch_norm, "conv": _conv, "dropout": _dropout, "embedding": _embedding,
    "layer_norm": _layer_norm, "linear": _linear, "loss": _loss, "optim": _optim, "pooling": _pooling,
    "positions": _positions, "rnn": _rnn,
}


@functools.cache
def sources(family: str) -> str:
    """Digest of what decides a family's numbers: this file, and the modules of kernels that the family's calls name."""
    calls = [CALLS[family], *([_options_of_rnn] if family == "rnn" else [])]
    values = [globals().get(name) for call in calls for name in call.__code__.co_names]
    modules = {value.__name__ for value in values if inspect.ismodule(value)}
    files = [path for name in sorted(modules) if name.startswith("dlkern.kernels.") for path in module_file(name)]
    return digest(files, triton.__version__, Path(__file__).read_text())


# --- what the machine code uses ---------------------------------------------------------------------------------------


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def usage(compiled) -> dict:
    """Registers, shared memory, stack, local memory, spills, and counts of the instructions that matter."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # noqa: E731
        result = {
            "registers": number("vgpr_count"), "stack": number("private_segment_fixed_size"), "local": 0,
            "spills": number("vgpr_spill_count"),  # scalar registers spill into vector ones, not into memory
        }
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            resources = _tool("cuobjdump", "--dump-resource-usage", file.name)
            text = _tool("nvdisasm", "-c", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", resources)
        registers, stack, local = map(int, found.groups())
        # A spilled kernel may show few registers: the stack and its loads and stores tell.
        result = {
            "registers": registers, "stack": stack, "local": local, "spills": len(re.findall(r"\b(?:STL|LDL)\b", text)),
        }
    result["shared"] = compiled.metadata.shared
    result["warps"] = compiled.metadata.num_warps
    counts = {name: len(re.findall(rf"\b{name}", text)) for name in COUNTED}
    result["instructions"] = {name: n for name, n in counts.items() if n}
    return result


def measure(family: str, target: str) -> dict[str, dict]:
    """Usage of every kernel the family's calls launch, by kernel name and number of the launch."""
    half = torch.float16 if target == "sm_75" else torch.bfloat16  # Turing's tensor cores have no bfloat16
    with compiling(TARGETS[target]) as compiled:
        CALLS[family](half)
    rows: dict[str, dict] = {}
    for name, kernel in compiled:
        number = sum(row.split(" ")[0] == name for row in rows)
        rows[f"{name} {number}" if number else name] = usage(kernel)
    return rows


def write(families: list[str]) -> None:
    BUDGETS.mkdir(parents=True, exist_ok=True)
    for family in families or CALLS:
        path = BUDGETS / f"{family}.json"
        if not families and path.exists() and json.loads(path.read_text()).get("sources") == sources(family):
            continue
        rows = {target: measure(family, target) for target in TARGETS}
        path.write_text(json.dumps({"sources": sources(family), **rows}, indent=1) + "\n")
        for target, kernels in rows.items():
            for name, row in kernels.items():
                print(f"{target:7s} {name:42s} {row}", flush=True)


if __name__ == "__main__":
    write(sys.argv[1:])
