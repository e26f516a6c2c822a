"""The tool that runs CUDA kernels on the host: planted bugs are found in every thread order, right kernels are not
accused, and what the emulated instructions compute is exact."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlkern.testing import cuda_on_host

ROOT = Path(__file__).resolve().parent.parent
ORDERS = [("forward", 1), ("reverse", 1), *[("random", seed) for seed in range(1, 6)]]

# What the checked build must say of each planted bug; where it depends on the order, either.
FINDINGS = {
    "all_of_shared_written": ["read of shared memory nobody wrote"],
    "atomic_counting": ["race in a result"],
    "barrier_after_acquire": ["race in a result", "read of a result nobody wrote"],
    "barrier_after_cp_async_wait": ["race in shared memory", "nobody wrote", "cp.async is still to fill"],
    "barrier_before_overwrite": ["race in shared memory: write after another thread's read", "race in shared memory"],
    "barrier_before_read": ["race in shared memory", "read of shared memory nobody wrote"],
    "barrier_before_release": ["race in a result", "read of a result nobody wrote"],
    "counter_waited_for": ["race in a result", "read of a result nobody wrote"],
    "cp_async_wait_for_all": ["read of shared memory that cp.async is still to fill"],
    "everybody_arrives": ["deadlock"],
    "everybody_shuffles": ["deadlock"],
    "global_read_inside": ["read of global memory outside every tensor"],
    "global_write_inside": ["write of global memory outside every tensor"],
    "grid_sync_before_read": ["race in a result", "read of a result nobody wrote"],
    "hopper_a_fence": ["no wgmma.fence since"],
    "hopper_a_write": ["A's registers were written"],
    "hopper_alignment": ["not a multiple of 1024"],
    "hopper_arrivals": ["deadlock"],
    "hopper_barrier_after_init": ["no mbarrier there was initialised", "race in shared memory", "nobody wrote"],
    "hopper_bytes": ["deadlock", "a block ended with"],
    "hopper_copies": ["a block ended with cp.async.bulk copies not waited for", "race in shared memory"],
    "hopper_empty_wait": ["more arrivals in a phase", "race in shared memory: cp.async.bulk", "nobody wrote"],
    "hopper_full_parity": ["deadlock", "cp.async is still to fill", "race in shared memory: wgmma", "nobody wrote"],
    "hopper_full_wait": ["cp.async is still to fill", "race in shared memory: wgmma", "nobody wrote"],
    "hopper_init_fence": ["no fence after the init"],
    "hopper_last_wait": ["read of an accumulator that wgmma is still to fill"],
    "hopper_operand_write": ["write of what a wgmma not waited for reads", "race in shared memory"],
    "hopper_proxy_fence": ["no fence.proxy.async"],
    "hopper_release_after_wait": ["cp.async.bulk of what a wgmma not waited for reads"],
    "hopper_tensor": ["read of global memory outside every tensor"],
    "hopper_wgmma_fence": ["no wgmma.fence"],
    "inputs_only_read": ["write to an input"],
    "ldmatrix_after_barrier": ["race in shared memory", "read of shared memory nobody wrote"],
    "named_barrier_count": ["deadlock", "expect different numbers"],
    "named_barrier_wait": ["race in shared memory", "read of shared memory nobody wrote"],
    "one_barrier_for_all": ["different barriers"],
    "one_writer_a_result": ["race in a result"],
    "shared_in_a_block": ["233472 bytes of shared memory, 232448 of them dynamic; this launch may have 232448"],
    "shared_in_all": ["50176 bytes of shared memory, 49152 of them dynamic; this launch may have 49152"],
    "shared_read_inside": ["read of shared memory outside every array"],
    "shared_write_inside": ["write of shared memory outside every array"],
    "some_blocks": ["a grid of 0 x 1 x 1 blocks"],
    "syncwarp_before_read": ["race in shared memory", "read of shared memory nobody wrote"],
    "vector_read_inside": ["read of global memory outside every tensor"],
}
EXACT = ["atomics", "ballots", "block_sums", "cooperative_grid", "shuffles"]


def built(variant: str) -> Path:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_native", "--variant", variant], cwd=ROOT, check=True,
        stdout=subprocess.DEVNULL,
    )
    return ROOT / "build" / variant


@pytest.fixture(scope="module", params=["cuda_on_host", "cuda_on_host_checked"])
def planted(request):
    library = cuda_on_host.open_library(built(request.param) / "libplanted.so")
    library.case_names.restype = library.cuda_on_host_messages.restype
    library.run_case.restype = library.cuda_on_host_errors.restype
    yield library
    library.cuda_on_host_set_order(0, 1)


@pytest.fixture(params=ORDERS, ids=lambda order: f"{order[0]}{order[1]}")
def in_order(request, planted):
    order, seed = request.param
    planted.cuda_on_host_set_order(cuda_on_host.ORDERS.index(order), seed)
    planted.cuda_on_host_clear()
    return planted


def test_every_planted_bug_is_listed_here(planted):
    bugs, exact = planted.case_names().decode().split("\n\n")
    assert bugs.split() == sorted(FINDINGS)
    assert exact.split() == EXACT


@pytest.mark.parametrize("name", sorted(FINDINGS))
def test_planted_bug_is_reported_and_the_right_kernel_is_not(in_order, name):
    assert in_order.run_case(name.encode(), 0) == 0, in_order.cuda_on_host_messages().decode()
    if not in_order.cuda_on_host_is_checked():
        return
    assert in_order.run_case(name.encode(), 1) > 0
    first = in_order.cuda_on_host_messages().decode().splitlines()[0]
    assert first.startswith(f"{name}: ")
    assert any(text in first for text in FINDINGS[name]), first


@pytest.mark.parametrize(
    "name",
    ["everybody_arrives", "everybody_shuffles", "one_barrier_for_all", "shared_in_all", "shared_write_inside", "some_blocks"],
)
def test_the_plain_build_sees_some(in_order, name):
    in_order.run_case(name.encode(), 1)
    assert in_order.cuda_on_host_errors() > 0


@pytest.mark.parametrize("name", EXACT)
def test_exact(in_order, name):
    assert in_order.run_exact(name.encode()) == 1
    assert in_order.cuda_on_host_errors() == 0, in_order.cuda_on_host_messages().decode()


def conformance(directory: Path, program: str = "conformance") -> dict[str, list[int]]:
    """Words each case of csrc/cuda/<program>.cu printed."""
    text = subprocess.run([directory / program], capture_output=True, text=True, check=True).stdout
    words: dict[str, list[int]] = {}
    for line in text.splitlines():
        head, tail = line.split(": ")
        words.setdefault(head.split()[0], []).extend(int(word, 16) for word in tail.split())
    return words


def inputs(count: int) -> list[int]:
    state, words = 12345, []
    for _ in range(count):
        state = (state * 1664525 + 1013904223) % 2**32
        words.append(state)
    return words


def test_instruction_twins():
    """The conformance program's ldmatrix, mma and cp.async against plain Python, from the PTX manual's layouts."""
    found = conformance(ROOT / "build" / "cuda_on_host")
    assert found == conformance(ROOT / "build" / "cuda_on_host_checked")
    x = inputs(4096)

    assert found["counters"] == found["grid_sync"]
    halves = [half for word in x[:128] for half in (word & 0xFFFF, word >> 16)]
    rows = [halves[8 * r : 8 * r + 8] for r in range(32)]
    expected, transposed = [], []
    for lane in range(32):
        for matrix in range(4):
            block = [rows[(8 * matrix + r) * 5 % 32] for r in range(8)]
            r, c = lane // 4, 2 * (lane % 4)
            expected.append(block[r][c] | block[r][c + 1] << 16)
            transposed.append(block[c][r] | block[c + 1][r] << 16)
    assert found["ldmatrix"] == expected + transposed

    def integer(lane: int, i: int) -> int:
        return x[16 * lane + i] % 31 - 15

    a, b, c = ([[0] * width for _ in range(16)] for width in (16, 8, 8))
    for lane in range(32):
        g, t = lane // 4, 2 * (lane % 4)
        for i, (row, column) in enumerate([(g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8)]):
            a[row][column], a[row][column + 1] = integer(lane, 2 * i), integer(lane, 2 * i + 1)
        for i, row in enumerate([t, t + 8]):
            b[row][g], b[row + 1][g] = integer(lane, 8 + 2 * i), integer(lane, 9 + 2 * i)
        for i, row in enumerate([g, g + 8]):
            c[row][t], c[row][t + 1] = integer(lane, 12 + 2 * i), integer(lane, 13 + 2 * i)
    swapped = [b[(k + 8) % 16] for k in range(16)]
    for row in range(16):
        for column in range(8):
            c[row][column] += sum(a[row][k] * (b[k][column] + swapped[k][column]) for k in range(16))
    import struct

    for lane in range(32):
        g, t = lane // 4, 2 * (lane % 4)
        exact = [c[g][t], c[g][t + 1], c[g + 8][t], c[g + 8][t + 1]]
        for first in (0, 128):  # bfloat16, float16
            got = struct.unpack("4f", struct.pack("4I", *found["mma"][first + 4 * lane :][:4]))
            assert list(got) == exact

    a, b, c = ([[0] * 8 for _ in range(rows)] for rows in (16, 8, 16))
    for lane in range(32):
        g, t = lane // 4, lane % 4
        a[g][t], a[g + 8][t], a[g][t + 4], a[g + 8][t + 4] = (integer(lane, i) for i in range(4))
        b[t][g], b[t + 4][g] = integer(lane, 4), integer(lane, 5)
        c[g][2 * t], c[g][2 * t + 1], c[g + 8][2 * t], c[g + 8][2 * t + 1] = (integer(lane, 6 + i) for i in range(4))
    for lane in range(32):
        g, t = lane // 4, 2 * (lane % 4)
        exact = [c[row][column] + sum(a[row][k] * (b[k][column] + b[(k + 4) % 8][column]) for k in range(8))
                 for row, column in ((g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1))]
        assert list(struct.unpack("4f", struct.pack("4I", *found["mma_tf32"][4 * lane :][:4]))) == exact
    for word, rounded in zip(x[:1024], found["tf32"], strict=True):
        magnitude = word & 0x7FFFFFFF
        if magnitude > 0x7F800000:
            word = magnitude = 0x3F800000  # NaN was made 1
        assert rounded == (word & 0x80000000) | (magnitude + 0x1000) // 0x2000 * 0x2000

    staged = [[x[4 * (32 * stage + 31 - lane) + i] if i < 4 - 2 * stage else 0 for lane in range(32) for i in range(4)]
              for stage in range(3)]
    assert found["cp_async"] == [word for stage in staged for word in stage]

    for case, divisor in enumerate([1, 2, 3, 7, 224, 65537, 0x7FFFFFFF]):
        for i in range(1024):
            at = 2048 * case + 2 * i
            assert tuple(found["divide"][at : at + 2]) == divmod(x[i] & 0x7FFFFFFF, divisor)


def test_hopper_instruction_twins():
    """The same of conformance_sm90: tensor copies, im2col and wgmma, against NumPy and the manual's layouts."""
    import numpy as np

    found = {name: np.array(words, dtype=np.uint32)
             for name, words in conformance(ROOT / "build" / "cuda_on_host", "conformance_sm90").items()}
    checked = conformance(ROOT / "build" / "cuda_on_host_checked", "conformance_sm90")
    assert {name: words.tolist() for name, words in found.items()} == checked

    def rows(words) -> np.ndarray:
        """What a tile in shared memory holds: its 16-byte pieces are swizzled within each row of 128 bytes."""
        halves = words.view(np.uint16).astype(np.uint32) << 16
        pieces = halves.view(np.float32).reshape(-1, 8, 8)
        return np.stack([piece[np.arange(8) ^ r % 8].reshape(64) for r, piece in enumerate(pieces)])

    matrix = (np.arange(100 * 136) % 29 - 14).reshape(100, 136).astype(np.float32)
    around = np.pad(matrix, 200)
    for case, (x, y) in enumerate([(8, 3), (96, 60), (-8, -5)]):
        expected = around[200 + y :, 200 + x :][:64, :64]
        assert np.array_equal(rows(found["copy"][2048 * case :][:2048]), expected)

    a, b, depth = matrix[:64, :64], matrix[32:96, 64:128], np.r_[0:16, 48:64]
    for case, (a_first, b_first) in enumerate(2 * [(False, False), (False, True), (True, False), (True, True)]):
        product = (a.T if a_first else a)[:, depth] @ (b.T if b_first else b)[:, depth].T
        registers = found["product"][4096 * case :][:4096].view(np.float32).reshape(4, 8, 4, 8, 2, 2)  # w, g, t, j, i, e
        assert np.array_equal(registers.transpose(0, 4, 1, 3, 2, 5).reshape(64, 64), product)

    a = ((5 * np.arange(64)[:, None] + 3 * np.arange(32)) % 29 - 14).astype(np.float32)
    for case, right in enumerate(2 * [b, b.T]):
        registers = found["registers"][4096 * case :][:4096].view(np.float32).reshape(4, 8, 4, 8, 2, 2)
        assert np.array_equal(registers.transpose(0, 4, 1, 3, 2, 5).reshape(64, 64), a @ right[:, depth].T)

    flat = (np.arange(256 * 576) % 29 - 14).astype(np.float32)
    large = flat.reshape(256, 576)
    for case, right in enumerate([large[32:160, 64:128], large[32:96, 64:192].T]):
        registers = found["registers128"][8192 * case :][:8192].view(np.float32).reshape(4, 8, 4, 16, 2, 2)
        assert np.array_equal(registers.transpose(0, 4, 1, 3, 2, 5).reshape(64, 128), a @ right[:, depth].T)

    def operand(outer: int, k_first: bool) -> np.ndarray:
        """[outer, k], stored so or k first."""
        return flat[: 576 * outer].reshape(576, outer).T if k_first else flat[: 576 * outer].reshape(outer, 576)

    tiles = found["tile"].view(np.float32)
    for columns, a_first, b_first in ((256, True, True), (128, False, True), (64, True, False)):
        expected = operand(128, a_first) @ operand(columns, b_first).T
        assert np.array_equal(tiles[: expected.size].reshape(expected.shape), expected)
        tiles = tiles[expected.size :]
    assert not tiles.size

    thread = np.arange(128)
    x = (thread * 40503 % 65521).astype(np.float32) / np.float32(77)
    pairs = torch.from_numpy(np.stack([x, np.float32(-1) / (x + np.float32(1))], 1)).bfloat16().view(torch.int16).numpy()
    numbers = np.ascontiguousarray(found["numbers"][:256].reshape(128, 2).T)
    assert np.array_equal(numbers[0].view(np.int16).reshape(128, 2), pairs)
    halves = np.stack([x * np.float32(100), np.float32(-1e-4) / (x + np.float32(1))], 1)
    halves = torch.from_numpy(halves).half().view(torch.int16).numpy()
    assert np.array_equal(found["numbers"][256:].view(np.int16).reshape(128, 2), halves)
    powers = np.where((thread < 37) | (thread == 127), 0, 2.0 ** ((thread - 100) * 2)).astype(np.float32)
    assert np.array_equal(numbers[1].view(np.float32), powers)

    handed = [[3 * (1000 * turn + 63 - i) for i in range(64)] for turn in range(2)]
    assert found["barriers"].tolist() == handed[0] + handed[1]

    heads = np.pad(matrix.ravel()[:7200].reshape(2, 30, 3, 40).transpose(0, 2, 1, 3), [(0, 0), (0, 0), (9, 64), (0, 64)])
    for case, (w, z, y, x) in enumerate([(1, 1, 5, 8), (0, 2, -3, 0)]):
        assert np.array_equal(rows(found["copy4"][2048 * case :][:2048]), heads[w, z, 9 + y :, x:][:64, :64])

    planes = np.pad(matrix.ravel()[:11200].reshape(4, 70, 40), [(0, 0), (9, 64), (0, 64)])
    for case, (z, y, x) in enumerate([(2, 5, 8), (3, -3, 0)]):
        assert np.array_equal(rows(found["copy3"][2048 * case :][:2048]), planes[z, 9 + y :, x:][:64, :64])

    images = np.pad(matrix.ravel()[: 3 * 5 * 7 * 72].reshape(3, 5, 7, 72), [(0, 9), (20, 20), (20, 20), (0, 64)])
    places = [(n, h, w) for n in range(9) for h in range(-2, 4) for w in range(-1, 6, 2)]
    for case, (c, first, (down, right)) in enumerate([(0, (0, -2, -1), (0, 0)), (64, (1, 0, 1), (3, 2))]):
        start = places.index(first)
        expected = [images[n, 20 + h + down, 20 + w + right, c : c + 64] for n, h, w in places[start : start + 64]]
        assert np.array_equal(rows(found["im2col"][2048 * case :][:2048]), np.stack(expected))
    start = places.index((0, -1, 3))
    expected = [images[n, 23 + h, 20 + w, 8:72] for n, h, w in places[start : start + 128]]
    assert np.array_equal(rows(found["im2col128"]), np.stack(expected))


def test_fibers_on_ucontext(tmp_path):
    """The portable switch between stacks serves as the assembly one does."""
    compiler = os.environ.get("CXX", "g++").split()
    program = tmp_path / "conformance"
    sources = [*sorted(str(path) for path in (ROOT / "csrc" / "cuda_on_host").glob("*.cpp"))]
    subprocess.run(
        [*compiler, "-std=c++20", "-O0", "-w", "-fno-strict-aliasing", "-DDLKERN_UCONTEXT", *sources, "-x", "c++",
         str(ROOT / "csrc" / "cuda" / "conformance.cu"), "-o", str(program)], check=True)
    assert conformance(tmp_path) == conformance(built("cuda_on_host"))
