"""Block sizes, warps and pipeline stages by architecture and shape class: heuristics, nothing is timed on a first call.

`architecture` is 75, 80, 90, 100, ... for NVIDIA (compute capability), "gfx942" and the like for AMD, and 0 where
there is no GPU: the smallest sensible tiles. Every function returns the keyword arguments of a launch.
"""

import functools

import torch
import triton


@functools.cache
def _device_architecture(index):
    properties = torch.cuda.get_device_properties(index)
    name = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    return name.split(":")[0] or 10 * properties.major + properties.minor


def architecture(tensor):
    """Architecture of the tensor's device."""
    return _device_architecture(tensor.device.index) if tensor.is_cuda else 0


def _processors(x):
    """Multiprocessors of the tensor's device; an H100's where it is compiled for a GPU that is not here."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def elementwise(x):
    """One element (or one random counter) a lane, several a thread."""
    if architecture(x) == 0:
        return {"BLOCK": 1024}
    return {"BLOCK": 1024 if x.numel() >= 1 << 20 else 256, "num_warps": 4}


def _block(size, smallest, largest):
    return max(smallest, min(largest, triton.next_power_of_2(max(size, 1))))


# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) of a full-size tile: 16-bit floats, TF32 or float32, float64.
# Triton makes no tensor-core code for sm_75: small tiles there, or the products spill.
_MATMUL = {
    75: ((64, 64, 16, 4, 2), (64, 64, 16, 4, 2), (32, 32, 16, 4, 2)),
    80: ((128, 128, 32, 8, 3), (64, 64, 32, 4, 3), (32, 32, 16, 4, 2)),
    90: ((128, 128, 64, 8, 3), (64, 64, 32, 4, 3), (64, 32, 16, 4, 2)),
    100: ((128, 128, 64, 8, 3), (64, 64, 32, 4, 3), (64, 32, 16, 4, 2)),
    "gfx": ((128, 128, 32, 8, 2), (64, 64, 32, 4, 2), (32, 32, 16, 4, 2)),
    0: ((32, 32, 32, 4, 1), (32, 32, 32, 4, 1), (32, 32, 32, 4, 1)),
}


def _tile(blocks, warps, stages):
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return dict(zip(names, (*blocks, warps, stages)))


def _row(table, arch):
    if isinstance(arch, str):
        return table["gfx"]
    return table[max(key for key in table if isinstance(key, int) and key <= max(arch, 0 if arch < 75 else 75))]


def _kind(dtype):
    return {torch.float64: 2, torch.float32: 1}.get(dtype, 0)


def matmul(a, M, N, K, operand=None):
    """Tile of an [M, K] x [K, N] product; shrinks to the matrix, never below what tensor cores take.

    operand: the dtype it is multiplied in, where that is not a's.
    """
    block_m, block_n, block_k, warps, stages = _row(_MATMUL, architecture(a))[_kind(operand or a.dtype)]
    block_m, block_n, block_k = _block(M, 16, block_m), _block(N, 16, block_n), _block(K, 16, block_k)
    if block_m * block_n <= 64 * 64:
        warps = min(warps, 4)
    return {**_tile((block_m, block_n, block_k), warps, stages), "GROUP_M": 8}


def split(a, M, N, K, tile=None, groups=1):
    """How many parts to cut a long contraction into, so that few output tiles still fill the machine."""
    tile = tile or matmul(a, M, N, K)
    tiles = triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]) * groups
    if architecture(a) == 0:
        return min(2, triton.cdiv(K, tile["BLOCK_K"]))
    wanted = 2 * torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 256
    steps = triton.cdiv(K, tile["BLOCK_K"])
    return max(1, min(wanted // tiles, steps // 4, 64))


# The same for convolutions, whose address arithmetic wants registers: four warps.
_CONV = {
    75: ((64, 32, 16, 4, 2), (64, 32, 16, 4, 2), (32, 32, 16, 4, 2)),
    80: ((128, 64, 32, 4, 3), (64, 64, 16, 4, 3), (32, 32, 16, 4, 2)),
    90: ((128, 128, 64, 4, 3), (64, 64, 32, 4, 3), (64, 32, 16, 4, 2)),
    100: ((128, 64, 64, 4, 3), (64, 64, 32, 4, 3), (64, 32, 16, 4, 2)),
    "gfx": ((128, 64, 32, 4, 2), (64, 64, 16, 4, 2), (32, 32, 16, 4, 2)),
    0: ((32, 32, 16, 4, 1), (32, 32, 16, 4, 1), (32, 32, 16, 4, 1)),
}


def conv(x, M, N, channels, taps):
    """Tile of M pixels x N channels, and FLAT: whether the contraction's (r, s, channel) is cut as one range.

    A group with fewer channels than a tile is deep is cut flat; every element then has its own address, and the tile
    is smaller to keep those in registers.
    """
    block_m, block_n, block_k, warps, stages = _row(_CONV, architecture(x))[_kind(x.dtype)]
    flat = channels < block_k
    if flat:
        block_m, block_k = min(block_m, 64), min(block_k, 32)
    blocks = _block(M, 16, block_m), _block(N, 16, block_n), _block(channels * taps, 16, block_k)
    return {**_tile(blocks, warps, stages), "FLAT": flat}


def conv_weight(x, K, columns, M):
    """Tile of K output channels x columns filter elements; the contraction is over pixels."""
    block_m, block_n, block_k, warps, stages = _row(_CONV, architecture(x))[_kind(x.dtype)]
    blocks = _block(K, 16, min(block_m, 64)), _block(columns, 16, block_n), _block(M, 16, min(block_k, 32))
    return _tile(blocks, warps, stages)


def batch_norm(x, rows, channels, channels_innermost):
    """Tile of rows x channels, long in the contiguous direction."""
    if architecture(x) == 0:
        return {"BLOCK_M": 32, "BLOCK_C": 16}
    long, short = (128, 16) if x.element_size() <= 2 else (64, 16)
    if channels_innermost:
        block_c = _block(channels, 8, long)
        return {"BLOCK_M": max(short, 2048 // block_c), "BLOCK_C": block_c, "num_warps": 4}
    block_m = _block(rows, 64, 1024)
    return {"BLOCK_M": block_m, "BLOCK_C": max(1, min(4, 2048 // block_m)), "num_warps": 4}


def row_blocks(x, rows, channels, tile):
    """How many blocks of rows, and rows a block: enough programs for the machine, few enough partials to merge."""
    tiles = triton.cdiv(rows, tile["BLOCK_M"])
    if architecture(x) == 0:
        wanted = 3
    else:
        wanted = max(1, 8 * _processors(x) // triton.cdiv(channels, tile["BLOCK_C"]))
    rows_per_block = triton.cdiv(tiles, min(wanted, tiles, 1024)) * tile["BLOCK_M"]
    return triton.cdiv(rows, rows_per_block), rows_per_block


def layer_norm(x, columns):
    """Tile of rows x columns; a row longer than the largest block is taken in several."""
    if architecture(x) == 0:
        return {"BLOCK_M": 8, "BLOCK_N": _block(columns, 16, 64)}
    block_n = _block(columns, 16, 2048 if x.dtype == torch.float64 else 4096)
    return {"BLOCK_M": max(1, min(16, 1024 // block_n)), "BLOCK_N": block_n, "num_warps": 8 if block_n > 2048 else 4}


def layer_norm_parts(x, rows, tile):
    """How many programs share the rows whose sums they keep, and rows a program: a few programs a processor."""
    tiles = triton.cdiv(rows, tile["BLOCK_M"])
    wanted = 4 * _processors(x) if architecture(x) else 2
    program_rows = triton.cdiv(tiles, min(wanted, tiles)) * tile["BLOCK_M"]
    return triton.cdiv(rows, program_rows), program_rows


# (BLOCK_B, BLOCK_J) of sequences x hidden units, the smallest first.
_RNN_TILES = ((16, 16), (32, 16), (32, 32), (64, 32))


def rnn(x, batch, hidden, operand, tf32):
    """Tile of sequences x hidden units, and how a kernel goes through time: CARRY, SYNC, or neither (kernels/rnn.py).

    Args:
        operand: the dtype the recurrent product is made in.
        tf32: whether float32 has tensor cores; without, only small tiles keep off the stack.
    """
    arch, processors = architecture(x), _processors(x)
    half, amd = operand.itemsize == 2, isinstance(arch, str)
    if arch == 0:
        block = 16 if hidden <= 16 else 32
        return {**_rnn_tile((16, block, block), 4, 1), "CARRY": hidden <= 16, "SYNC": 16 < hidden <= 32}
    tensor_cores = arch != 75 and (half or tf32)
    if tensor_cores and hidden <= (128 if half and not amd else 64):  # weights fit the registers
        block = _block(hidden, 16, 128)
        return {**_rnn_tile((16, block, block), max(1, block // 16), 1), "CARRY": True, "SYNC": False}
    tile = rnn_product(x, batch, hidden, operand, tf32)
    # A program waits for others, which must be resident: no more programs than processors, launched as one group.
    programs = triton.cdiv(batch, tile["BLOCK_B"]) * triton.cdiv(hidden, tile["BLOCK_J"])
    return {**tile, "CARRY": False, "SYNC": not amd and programs <= processors}


def rnn_product(x, batch, units, operand, tf32):
    """Tile of sequences x units of a step's product: as many programs as the GPU has processors, where that many there are."""
    arch, half = architecture(x), operand.itemsize == 2
    if arch == 0:
        return _rnn_tile((16, 32, 32), 4, 1)
    if arch == 75 or not (half or tf32):
        return _rnn_tile((16, 32, 16), 8, 1)
    few = [t for t in _RNN_TILES if triton.cdiv(batch, t[0]) * triton.cdiv(units, t[1]) <= _processors(x)]
    tile = few[0] if few else _RNN_TILES[-1]
    large = tile[0] * tile[1] > 512
    return _rnn_tile((*tile, (64 if half else 32) // (1 + large)), 8 if large else 4, 3)


def rnn_row(x, hidden, whole):
    """Units of a sequence's step that a program has: all of them where it normalises."""
    if architecture(x) == 0:
        return {"BLOCK_J": _block(hidden, 16, 1 << 20) if whole else 16}
    block = _block(hidden, 32, 1 << 20 if whole else 256)
    return {"BLOCK_J": block, "num_warps": max(1, min(16, block // 64))}


def _rnn_tile(blocks, warps, stages):
    names = ("BLOCK_B", "BLOCK_J", "BLOCK_K", "num_warps", "num_stages")
    return dict(zip(names, (*blocks, warps, stages)))


def finalize(x):
    """Tile of partials x channels, merged by one program."""
    return {"BLOCK_B": 32 if architecture(x) else 4, "BLOCK_C": 32, "num_warps": 4}


def optimizer():
    """A block of one tensor's elements a program, 8 a thread: Adam has five such rows in registers."""
    return {"BLOCK": 4096, "num_warps": 16}


def cross_entropy(x, positions, classes):
    """Tile of positions x classes; few classes share a program among many positions."""
    if architecture(x) == 0:
        return {"BLOCK_M": 16, "BLOCK_C": 16}
    block_c = _block(classes, 16, 2048)
    return {"BLOCK_M": max(1, min(64, 2048 // block_c)), "BLOCK_C": block_c, "num_warps": 4}


def embedding(weight, width):
    """Tile of positions x columns, long in the contiguous direction."""
    if architecture(weight) == 0:
        return {"BLOCK_M": 8, "BLOCK_D": 16}
    block_d = _block(width, 16, 512)
    return {"BLOCK_M": max(1, 2048 // block_d), "BLOCK_D": block_d, "num_warps": 4}


def embedding_backward(grad_output, width):
    """Positions of a row that are read together x columns."""
    if architecture(grad_output) == 0:
        return {"BLOCK_P": 4, "BLOCK_D": 16}
    return {"BLOCK_P": 16, "BLOCK_D": _block(width, 16, 128), "num_warps": 4}


# (queries, keys, columns of the depth, num_warps, num_stages) of attention's tiles, by kernel: the first row that holds the
# depth, or the last, which cuts it into blocks. Then the same with dropout, an added or bool mask, a cap or slopes, whose
# registers leave less to the tile.
_ATTENTION = {
    75: {
        "forward": (((32, 32, 64, 4, 1), (32, 16, 128, 4, 1)), ((16, 64, 64, 8, 1),)),
        "query": (((16, 32, 64, 4, 1),), ((16, 64, 64, 8, 1),)),
        "key": (((16, 32, 64, 4, 1),), ((16, 64, 64, 8, 1),)),
    },
    80: {
        "forward": (
            ((128, 64, 64, 4, 3), (128, 64, 128, 8, 3), (64, 64, 256, 8, 2)),
            ((128, 64, 64, 8, 2), (128, 64, 128, 8, 3), (64, 64, 256, 8, 2)),
        ),
        "query": (
            ((64, 64, 64, 4, 2), (64, 64, 128, 8, 2), (64, 64, 256, 8, 2)), ((32, 64, 64, 4, 2), (32, 64, 128, 8, 2))
        ),
        "key": (((64, 64, 64, 4, 2), (32, 64, 128, 8, 2)), ((32, 64, 64, 4, 2), (32, 64, 128, 8, 2))),
    },
    90: {
        "forward": (
            ((128, 64, 64, 4, 3), (128, 64, 128, 8, 3), (128, 64, 256, 8, 2)),
            ((128, 64, 64, 8, 3), (128, 64, 128, 8, 2), (64, 64, 256, 8, 2)),
        ),
        "query": (
            ((64, 64, 64, 4, 2), (64, 64, 128, 8, 2), (64, 64, 256, 8, 2)), ((64, 64, 64, 8, 2), (64, 64, 128, 8, 2))
        ),
        "key": (((64, 64, 64, 4, 2), (32, 64, 128, 8, 2)), ((32, 64, 128, 8, 2),)),
    },
    "gfx": {
        "forward": (((128, 64, 64, 4, 2), (64, 64, 128, 4, 2)), ((64, 64, 128, 4, 2),)),
        "query": (((64, 64, 64, 4, 2), (64, 64, 128, 4, 2), (32, 64, 64, 4, 2)), ((32, 64, 128, 4, 2), (32, 64, 64, 4, 2))),
        "key": (((32, 64, 128, 4, 2), (32, 64, 64, 4, 2)),) * 2,
    },
    0: dict.fromkeys(("forward", "query", "key"), (((64, 64, 32, 4, 1),),) * 2),
}  # fmt: skip
# All kernels in float32 and float64, which have no tensor cores on NVIDIA (TF32 apart): rows, rows with dropout.
_ATTENTION_WIDE = {
    75: ((((16, 32, 64, 8, 1), (16, 16, 128, 8, 1)), ((16, 64, 64, 8, 1),)), (((16, 16, 32, 4, 1),), ((16, 64, 64, 8, 1),))),
    80: ((((32, 32, 64, 4, 2), (16, 32, 128, 4, 2)), ((16, 64, 128, 8, 1),)), (((16, 16, 64, 4, 1),), ((16, 64, 64, 8, 1),))),
}  # fmt: skip


def attention(query, kind, depth, value_depth, dropout, busy, product, shared, rotary=False):
    """Tile of attention's kernels ("forward", "query", "key", "mask"), and how depths are cut into blocks.

    `busy`: scores are masked by elements, capped or lowered by distance. `product`: they are products of matrices; others
    hold no operands, but a sum for every element of the tile. `shared`: several heads of queries share one of keys. `rotary`:
    operands are turned, whose partners and angles want registers, and shared memory that only sm_90 and later have where
    they are loaded ahead.
    Dropout's words come 64 keys at a time.
    """
    arch = architecture(query)
    rows = _row(_ATTENTION, arch)["query" if kind == "mask" else kind][dropout or busy]
    if arch and query.element_size() > 2:
        rows = _row({**_ATTENTION_WIDE, "gfx": _ATTENTION_WIDE[80]}, arch)[query.element_size() > 4][dropout]
    block_m, block_n, largest, warps, stages = next((r for r in rows if r[2] >= max(depth, value_depth)), rows[-1])
    if not product and arch:
        block_m, block_n, stages = min(block_m, 32), 64 if dropout else min(block_n, 32), 1
        if kind != "forward":
            block_m, warps = 16, 4 if arch == 75 else 8
    if kind == "key" and shared and isinstance(arch, int) and arch >= 100:
        stages = 1  # its loop over heads, and pipelined loops in it, would spill there
    if rotary and isinstance(arch, str):
        largest = 64 if kind == "key" else largest
    elif rotary and (query.element_size() > 2 or arch < 90):
        stages = 1
        if query.element_size() > 2:
            warps = 8
        elif kind == "forward":
            block_m = min(block_m, 64)
    block_d, block_v = _block(depth, 16, largest), _block(value_depth, 16, largest)
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "D_BLOCKS": max(1, triton.cdiv(depth, block_d)),
        "BLOCK_V": block_v, "V_BLOCKS": max(1, triton.cdiv(value_depth, block_v)), "num_warps": warps,
        "num_stages": stages,
    }  # fmt: skip


def attention_rows(x):
    """Tile of vectors x depth, for their lengths."""
    return {"BLOCK": 16, "BLOCK_D": 32 if architecture(x) == 0 else 64, "num_warps": 4}


def rotary(x, columns):
    """Tile of rows x pairs of columns."""
    block_d = _block(columns, 8, 64)
    return {"BLOCK": max(1, 1024 // block_d), "BLOCK_D": block_d, "num_warps": 4}
