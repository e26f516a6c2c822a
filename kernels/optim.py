"""Steps of SGD, Adam (AdamW) and LARS, and clipping of gradients: one launch for all tensors of a device and dtype.

A table on the device holds a row for each tensor: its first block, its number of elements, addresses, settings. It is
built on the host once a call and sent by one asynchronous copy from pinned memory. A program owns a block of elements,
finds its tensor in the table by bisection, and reads and writes each element once. Norms are a launch before: one sum a
block in float64, which a second launch adds in their order, so that the bits are the same every time. Nothing waits for
the GPU but clip_grad_norm_ with error_if_nonfinite, which has to know the norm before it may write.
Floor: bytes of parameters, gradients and state over the bandwidth.
"""

import math
import struct

import torch
import triton
import triton.language as tl

from dlkern.kernels import configs
from dlkern.kernels._launch import DTYPES, accumulator, check, launch, triton_type

# What every row begins with. The gradient of a clipped tensor stands in the parameter's place.
_FIRST, _COUNT, _PARAM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SQUARES, MAGNITUDES, NONZEROS, LARGEST, SMALLEST, POWERS = range(6)
_SQUARES, _MAGNITUDES, _NONZEROS = tl.constexpr(SQUARES), tl.constexpr(MAGNITUDES), tl.constexpr(NONZEROS)
_LARGEST, _SMALLEST = tl.constexpr(LARGEST), tl.constexpr(SMALLEST)


@triton.jit
def _block_of_program(table_ptr, tensors, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """(row of the tensor that this program's block is of, the block's first element, the elements from there on)."""
    block = tl.program_id(0)
    low = block * 0
    high = low + tensors
    while high - low > 1:  # the last tensor that starts at or before the block
        middle = (low + high) // 2
        before = tl.load(table_ptr + middle * ROW + _FIRST) <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    row = table_ptr + low * ROW
    first = (block - tl.load(row + _FIRST)) * BLOCK
    return row, first, tl.load(row + _COUNT) - first


@triton.jit
def _pointer(row, place, first, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a block of the tensor begins whose address is in a row's place."""
    ptr = tl.load(row + place).to(tl.pointer_type(TYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr + first


@triton.jit
def _number(row, place):
    return tl.load(row + place).to(tl.float64, bitcast=True)


@triton.jit
def _set_number(row, place, value, mask):
    tl.store(row + place, value.to(tl.int64, bitcast=True), mask=mask)


@triton.jit
def _read(ptr, left, ACC: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if FULL:
        x = tl.load(ptr + i)
    else:
        x = tl.load(ptr + i, mask=i < left, other=0.0)
    return x.to(ACC)


@triton.jit
def _write(ptr, value, left, FULL: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = value.to(ptr.dtype.element_ty)
    if FULL:
        tl.store(ptr + i, value)
    else:
        tl.store(ptr + i, value, mask=i < left)


# --- steps ------------------------------------------------------------------------------------------------------------


@triton.jit
def _sgd_block(
    row, param_ptr, grad_ptr, buffer_ptr, left,
    KEEPS: tl.constexpr, ACC: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):
    lr, momentum, kept = _number(row, 5).to(ACC), _number(row, 6).to(ACC), _number(row, 7).to(ACC)
    decay, nesterov, sign, fresh = _number(row, 8).to(ACC), _number(row, 9), _number(row, 10).to(ACC), _number(row, 11)
    param = _read(param_ptr, left, ACC, FULL, BLOCK)
    grad = _read(grad_ptr, left, ACC, FULL, BLOCK) * sign
    grad = tl.where(decay != 0, grad + decay * param, grad)
    if KEEPS:
        buffer = momentum * _read(buffer_ptr, left, ACC, FULL, BLOCK) + kept * grad
        buffer = tl.where(fresh != 0, grad, buffer)  # what a fresh buffer holds may be anything
        _write(buffer_ptr, buffer, left, FULL, BLOCK)
        grad = tl.where(nesterov != 0, grad + momentum * buffer, buffer)
    _write(param_ptr, param - lr * grad, left, FULL, BLOCK)


@triton.jit(do_not_specialize=["tensors"])
def sgd_kernel(
    table_ptr, tensors, KEEPS: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    # One program: BLOCK elements of one tensor.
    row, first, left = _block_of_program(table_ptr, tensors, ROW, BLOCK)
    param_ptr = _pointer(row, _PARAM, first, TYPE, ALIGNED)
    grad_ptr = _pointer(row, 3, first, TYPE, ALIGNED)
    buffer_ptr = _pointer(row, 4, first, TYPE, ALIGNED)
    if left >= BLOCK:  # without masks, which would make accesses narrow
        _sgd_block(row, param_ptr, grad_ptr, buffer_ptr, left, KEEPS, ACC, True, BLOCK)
    else:
        _sgd_block(row, param_ptr, grad_ptr, buffer_ptr, left, KEEPS, ACC, False, BLOCK)


@triton.jit
def _precise_quotient(x, y, ACC: tl.constexpr):
    if ACC == tl.float32:
        result = tl.div_rn(x, y)
    else:
        result = x / y
    return result


@triton.jit
def _precise_root(x, ACC: tl.constexpr):
    # (tl.sqrt would take small averages of squares for 0.)
    if ACC == tl.float32:
        result = tl.sqrt_rn(x)
    else:
        result = tl.sqrt(x)
    return result


@triton.jit
def _adam_block(
    row, param_ptr, grad_ptr, mean_ptr, square_ptr, largest_ptr, left,
    AMSGRAD: tl.constexpr, ACC: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):
    step_size, root, factor = _number(row, 8).to(ACC), _number(row, 9).to(ACC), _number(row, 10).to(ACC)
    decay, sign, new1 = _number(row, 11).to(ACC), _number(row, 12).to(ACC), _number(row, 13).to(ACC)
    beta2, new2, eps = _number(row, 14).to(ACC), _number(row, 15).to(ACC), _number(row, 16).to(ACC)
    param = _read(param_ptr, left, ACC, FULL, BLOCK) * factor
    grad = _read(grad_ptr, left, ACC, FULL, BLOCK) * sign
    grad = tl.where(decay != 0, grad + decay * param, grad)
    mean = _read(mean_ptr, left, ACC, FULL, BLOCK)
    mean += new1 * (grad - mean)
    square = beta2 * _read(square_ptr, left, ACC, FULL, BLOCK) + new2 * grad * grad
    _write(mean_ptr, mean, left, FULL, BLOCK)
    _write(square_ptr, square, left, FULL, BLOCK)
    if AMSGRAD:
        largest = _read(largest_ptr, left, ACC, FULL, BLOCK)
        square = tl.where((largest > square) | (largest != largest), largest, square)
        _write(largest_ptr, square, left, FULL, BLOCK)
    below = _precise_quotient(_precise_root(square, ACC), root, ACC) + eps
    _write(param_ptr, param - _precise_quotient(step_size * mean, below, ACC), left, FULL, BLOCK)


@triton.jit(do_not_specialize=["tensors"])
def adam_kernel(
    table_ptr, tensors, AMSGRAD: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    # One program: BLOCK elements of one tensor.
    row, first, left = _block_of_program(table_ptr, tensors, ROW, BLOCK)
    param_ptr = _pointer(row, _PARAM, first, TYPE, ALIGNED)
    grad_ptr = _pointer(row, 3, first, TYPE, ALIGNED)
    mean_ptr = _pointer(row, 4, first, TYPE, ALIGNED)
    square_ptr = _pointer(row, 5, first, TYPE, ALIGNED)
    largest_ptr = _pointer(row, 6, first, TYPE, ALIGNED)
    if left >= BLOCK:
        _adam_block(row, param_ptr, grad_ptr, mean_ptr, square_ptr, largest_ptr, left, AMSGRAD, ACC, True, BLOCK)
    else:
        _adam_block(row, param_ptr, grad_ptr, mean_ptr, square_ptr, largest_ptr, left, AMSGRAD, ACC, False, BLOCK)


@triton.jit(do_not_specialize=["tensors"])
def adam_count_kernel(table_ptr, tensors, ROW: tl.constexpr, BLOCK: tl.constexpr):
    # One program: BLOCK tensors. Steps that are kept on the device go up by one, and what follows from them is put into
    # the table: lr / (1 - beta1^step) and sqrt(1 - beta2^step).
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = table_ptr + tensor * ROW
    address = tl.load(row + 7, mask=tensor < tensors, other=0)
    inside = address != 0  # steps on the host have none
    step_ptr = address.to(tl.pointer_type(tl.float32))
    count = tl.load(step_ptr, mask=inside, other=0.0) + 1.0
    tl.store(step_ptr, count, mask=inside)
    count = count.to(tl.float64)
    lr = tl.load(row + 17, mask=inside, other=0).to(tl.float64, bitcast=True)
    log_beta1 = tl.load(row + 18, mask=inside, other=0).to(tl.float64, bitcast=True)
    log_beta2 = tl.load(row + 19, mask=inside, other=0).to(tl.float64, bitcast=True)
    _set_number(row, 8, lr / (1.0 - tl.exp(count * log_beta1)), inside)
    _set_number(row, 9, tl.sqrt(1.0 - tl.exp(count * log_beta2)), inside)


@triton.jit
def _lars_block(
    row, param_ptr, grad_ptr, buffer_ptr, left,
    KEEPS: tl.constexpr, ACC: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):
    rate, momentum, decay = _number(row, 5).to(ACC), _number(row, 6).to(ACC), _number(row, 7).to(ACC)
    sign = _number(row, 8).to(ACC)
    param = _read(param_ptr, left, ACC, FULL, BLOCK)
    change = _read(grad_ptr, left, ACC, FULL, BLOCK) * sign
    change = tl.where(decay != 0, change + decay * param, change) * rate
    if KEEPS:
        change += momentum * _read(buffer_ptr, left, ACC, FULL, BLOCK)
        _write(buffer_ptr, change, left, FULL, BLOCK)
    _write(param_ptr, param - change, left, FULL, BLOCK)


@triton.jit(do_not_specialize=["tensors"])
def lars_kernel(
    table_ptr, tensors, KEEPS: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    # One program: BLOCK elements of one tensor. You, Gitman, Ginsburg 2017, algorithm 1.
    row, first, left = _block_of_program(table_ptr, tensors, ROW, BLOCK)
    param_ptr = _pointer(row, _PARAM, first, TYPE, ALIGNED)
    grad_ptr = _pointer(row, 3, first, TYPE, ALIGNED)
    buffer_ptr = _pointer(row, 4, first, TYPE, ALIGNED)
    if left >= BLOCK:
        _lars_block(row, param_ptr, grad_ptr, buffer_ptr, left, KEEPS, ACC, True, BLOCK)
    else:
        _lars_block(row, param_ptr, grad_ptr, buffer_ptr, left, KEEPS, ACC, False, BLOCK)


# --- norms ------------------------------------------------------------------------------------------------------------


@triton.jit
def _block_norm(ptr, left, power, KIND: tl.constexpr, ACC: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """What a block adds to a norm's sum; the largest or smallest magnitude, NaN where there is one."""
    x = tl.abs(_read(ptr, left, ACC, FULL, BLOCK)).to(tl.float64)
    if KIND == _SQUARES:
        result = tl.sum(x * x, axis=0)
    elif KIND == _MAGNITUDES:
        result = tl.sum(x, axis=0)
    elif KIND == _NONZEROS:
        result = tl.sum(tl.where(x == 0, 0.0, 1.0).to(tl.float64), axis=0)
    else:
        inside = tl.arange(0, BLOCK) < left
        if KIND == _LARGEST or KIND == _SMALLEST:
            result = _extreme(x, inside, KIND)
        else:
            result = tl.sum(tl.where(inside, tl.exp(power * tl.log(x)), 0.0), axis=0)
    return result


@triton.jit
def _extreme(x, inside, KIND: tl.constexpr):
    if KIND == _LARGEST:
        result = tl.max(tl.where(inside, x, 0.0), axis=0)
    else:
        result = tl.min(tl.where(inside, x, float("inf")), axis=0)
    strange = tl.max((inside & (x != x)).to(tl.int32), axis=0)
    return tl.where(strange != 0, float("nan"), result)


@triton.jit(do_not_specialize=["tensors"])
def grad_sums_kernel(
    table_ptr, parts_ptr, tensors, power: tl.float64, KIND: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    # One program: the part of BLOCK elements of one tensor; for LARS of a parameter, or of its gradient beside it.
    row, first, left = _block_of_program(table_ptr, tensors, ROW, BLOCK)
    ptr = _pointer(row, _PARAM + tl.program_id(1), first, TYPE, ALIGNED)
    if left >= BLOCK:
        part = _block_norm(ptr, left, power, KIND, ACC, True, BLOCK)
    else:
        part = _block_norm(ptr, left, power, KIND, ACC, False, BLOCK)
    tl.store(parts_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), part)


@triton.jit
def _sum_of_tensor(row, parts_ptr, BLOCK_OF_TENSOR: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of a tensor's parts, in their order."""
    parts_ptr += tl.load(row + _FIRST)
    count = tl.cdiv(tl.load(row + _COUNT), BLOCK_OF_TENSOR).to(tl.int32)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(parts_ptr + i, mask=i < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def lars_rate_kernel(
    table_ptr, parts_ptr, blocks, ROW: tl.constexpr, BLOCK_OF_TENSOR: tl.constexpr, BLOCK: tl.constexpr
):
    # One program: a tensor's rate, from the squares of all its blocks, in lr's place.
    row = table_ptr + tl.program_id(0) * ROW
    param_norm = tl.sqrt(_sum_of_tensor(row, parts_ptr, BLOCK_OF_TENSOR, BLOCK))
    grad_norm = tl.sqrt(_sum_of_tensor(row, parts_ptr + blocks, BLOCK_OF_TENSOR, BLOCK))
    lr, decay, trust, eps = _number(row, 5), _number(row, 7), _number(row, 9), _number(row, 10)
    scaled = lr * (trust * param_norm / (grad_norm + decay * param_norm + eps))
    _set_number(row, 5, tl.where((trust >= 0) & (param_norm > 0) & (grad_norm > 0), scaled, lr), True)


@triton.jit
def grad_nonzero_kernel(
    table_ptr, parts_ptr, found_ptr, ROW: tl.constexpr, BLOCK_OF_TENSOR: tl.constexpr, BLOCK: tl.constexpr
):
    # One program: whether a tensor has a number that is not 0.
    row = table_ptr + tl.program_id(0) * ROW
    found = _sum_of_tensor(row, parts_ptr, BLOCK_OF_TENSOR, BLOCK) > 0
    tl.store(found_ptr + tl.program_id(0), found.to(tl.float64))


@triton.jit
def grad_norm_kernel(
    parts_ptr, norm_ptr, total_ptr, COUNT, power: tl.float64, max_norm: tl.float64, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    # One program: the norm from all parts, in their order, and what the gradients are to be multiplied by.
    total = tl.zeros((BLOCK,), tl.float64)
    if KIND == _SMALLEST:
        total += float("inf")
    for start in range(0, COUNT, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if KIND == _LARGEST or KIND == _SMALLEST:
            part = tl.load(parts_ptr + i, mask=i < COUNT, other=0.0 if KIND == _LARGEST else float("inf"))
            further = part > total if KIND == _LARGEST else part < total
            total = tl.where(further | (part != part), part, total)
        else:
            total += tl.load(parts_ptr + i, mask=i < COUNT, other=0.0)
    if KIND == _LARGEST or KIND == _SMALLEST:
        norm = _extreme(total, tl.full((BLOCK,), True, tl.int1), KIND)
    else:
        norm = tl.sum(total, axis=0)
        if KIND == _SQUARES:
            norm = tl.sqrt(norm)
        elif KIND != _MAGNITUDES and KIND != _NONZEROS:
            norm = tl.exp(tl.log(norm) / power)
    factor = max_norm / (norm + 1e-6)
    tl.store(norm_ptr, norm)
    tl.store(norm_ptr + 1, tl.where(factor >= 1, 1.0, factor))  # NaN stays
    tl.store(total_ptr, norm.to(total_ptr.dtype.element_ty))


# --- clipping ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tensors"])
def grad_scale_kernel(
    table_ptr, factor_ptr, tensors, TYPE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program: BLOCK elements of one gradient, times the factor; nothing where that is 1.
    factor = tl.load(factor_ptr)
    if factor != 1:
        row, first, left = _block_of_program(table_ptr, tensors, ROW, BLOCK)
        ptr = _pointer(row, _PARAM, first, TYPE, ALIGNED)
        by = factor.to(ACC)
        if left >= BLOCK:
            _write(ptr, _read(ptr, left, ACC, True, BLOCK) * by, left, True, BLOCK)
        else:
            _write(ptr, _read(ptr, left, ACC, False, BLOCK) * by, left, False, BLOCK)


@triton.jit
def _clamp_block(ptr, limit, left, ACC: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    x = _read(ptr, left, ACC, FULL, BLOCK)
    x = tl.where(x < -limit, -limit, x)
    x = tl.where(x > limit, limit, x)
    _write(ptr, tl.where(limit == limit, x, limit), left, FULL, BLOCK)  # what torch clamps to NaN is NaN


@triton.jit(do_not_specialize=["tensors"])
def grad_clamp_kernel(
    table_ptr, tensors, limit: tl.float64, TYPE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    # One program: BLOCK elements of one gradient, clamped to [-limit, limit].
    row, first, left = _block_of_program(table_ptr, tensors, ROW, BLOCK)
    ptr = _pointer(row, _PARAM, first, TYPE, ALIGNED)
    by = limit.to(ACC)
    if left >= BLOCK:
        _clamp_block(ptr, by, left, ACC, True, BLOCK)
    else:
        _clamp_block(ptr, by, left, ACC, False, BLOCK)


# --- the table --------------------------------------------------------------------------------------------------------


def _is_dense(x):
    """Every element has its own place and there are no gaps."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _laid_out_as(x, model):
    return x.stride() == model.stride() or all(
        size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), model.stride())
    )


def _operands(tensors, written, copies):
    """Tensors of one shape in one dense layout, the first one's where that has no gaps. Copies of those that are written
    are added to `copies` as (original, copy)."""
    model = tensors[0]
    dense = _is_dense(model)
    used = []
    for x, changes in zip(tensors, written):
        if _laid_out_as(x, model) if dense else x.is_contiguous():
            used.append(x)
            continue
        if dense:
            copy = torch.empty_strided(x.shape, model.stride(), dtype=x.dtype, device=x.device)
        else:
            copy = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        used.append(copy.copy_(x))
        if changes:
            copies.append((x, copy))
    return used


def _examined(op, lists, names, written):
    """For each parameter (number of elements, its tensors, their addresses if all are contiguous); raises RuntimeError
    unless they are of one shape, dtype and device."""
    rows = []
    for tensors in zip(*lists):  # a few hundred in each step: every call here counts
        first = tensors[0]
        shape, dtype, device, addresses, contiguous = first.shape, first.dtype, first.get_device(), [], True
        check(dtype in DTYPES, f"{op}: the triton column has no {dtype}")
        for place, x in enumerate(tensors):
            if x.layout is not torch.strided or x.dtype is not dtype or x.shape != shape or x.get_device() != device:
                raise RuntimeError(
                    f"{op}: {names[place]}: {tuple(x.shape)}, {x.dtype}, {x.layout} on {x.device}; "
                    f"expected {tuple(shape)}, {dtype}, strided on {first.device}"
                )
            if x.is_contiguous():
                addresses.append(x.data_ptr())
                continue
            contiguous = False
            if written[place] and any(stride == 0 and size > 1 for size, stride in zip(shape, x.stride())):
                raise RuntimeError(f"{op}: a tensor of {names[place]} has several elements in one place of memory")
        rows.append((first.numel(), tensors, addresses if contiguous else None))
    return rows


def _overlapping(rows):
    """Whether two tensors share memory: then order matters, as in a loop over the parameters."""
    ranges = []
    for count, tensors, addresses in rows:
        size = tensors[0].element_size()
        if not count:
            continue
        if addresses:
            ranges += [(begin, begin + count * size) for begin in addresses]
            continue
        for x in tensors:
            last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
            ranges.append((x.data_ptr(), x.data_ptr() + (last + 1) * size))
    ranges.sort()
    end = 0
    for begin, after in ranges:
        if begin < end:
            return True
        end = after
    return False


class _Table:
    """Rows on the device for some tensors of one device and dtype."""

    def __init__(self, rows, indices, written, places, numbers):
        """Of rows `indices`. `places` addresses, absent ones the parameter's, are followed by numbers(i), packed."""
        config = configs.optimizer()
        block, pack = config["BLOCK"], struct.Struct(f"{2 + places}q").pack
        self.indices, self.blocks = indices, 0
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        packed, reached, bits = bytearray(), [], 0
        for i in indices:
            count, tensors, addresses = rows[i]
            if not addresses:
                tensors = _operands(tensors, written, self.copies)
                addresses = [x.data_ptr() for x in tensors]
            for address in addresses:
                bits |= address
            packed += pack(self.blocks, count, *addresses, *addresses[:1] * (places - len(addresses))) + numbers(i)
            self.blocks += -(-count // block)
            reached += tensors
        device, dtype = reached[0].device, reached[0].dtype
        self.rows = torch.frombuffer(packed, dtype=torch.int64)
        if device.type != "cpu":
            self.rows = self.rows.pin_memory().to(device, non_blocking=True)
        self.rows.reached = reached  # type: ignore[attr-defined]  # for the interpreter's check of addresses
        self.row = len(packed) // (8 * len(indices))
        self.options = dict(TYPE=triton_type(dtype), ACC=accumulator(dtype), ALIGNED=bits % 16 == 0, ROW=self.row, **config)

    def finish(self):
        """Copies back what was copied and written."""
        for original, copy in self.copies:
            original.copy_(copy)


def _tables(rows, written, places, numbers, in_turn):
    """Tables of all tensors that have elements: one a device and dtype, or one a tensor."""
    groups: dict[object, list[int]] = {}
    for i, (count, tensors, _) in enumerate(rows):
        if count:
            groups.setdefault(i if in_turn else (tensors[0].get_device(), tensors[0].dtype), []).append(i)
    for indices in groups.values():
        yield _Table(rows, indices, written, places, numbers)


# --- launchers --------------------------------------------------------------------------------------------------------


def _settings_of_step(op, params, grads, state, groups, settings, row):
    """Rows of settings, once the lengths of all lists are known to fit."""
    n = len(params)
    if len(grads) != n or len(groups) != n:
        raise ValueError(f"{op}: expected {n} gradients and indices of groups, got {len(grads)} and {len(groups)}")
    if len(settings) % row:
        raise ValueError(f"{op}: a group has {row} settings, got {len(settings)} numbers")
    rows = [tuple(settings[i : i + row]) for i in range(0, len(settings), row)]
    if groups and not 0 <= min(groups) <= max(groups) < len(rows):
        raise IndexError(f"{op}: no group {max(groups)}")
    for tensors in state:
        if len(tensors) not in (0, n):
            raise ValueError(f"{op}: expected {n} tensors of state, got {len(tensors)}")
    return rows


def _tables_of_step(op, params, grads, state, places, numbers):
    """Tables of a step, after all tensors were examined."""
    lists = [params, grads, *(tensors for tensors in state if tensors)]
    written = (True, False, *(True for _ in state))
    rows = _examined(op, lists, ("params", "grads", *("state" for _ in state)), written)
    return _tables(rows, written, places, numbers, len(rows) > 1 and _overlapping(rows))


def sgd(params, grads, momentum_buffers, fresh, groups, settings):
    """A step of torch.optim.SGD."""
    rows = _settings_of_step("sgd", params, grads, (momentum_buffers,), groups, settings, 6)
    if len(fresh) != len(momentum_buffers):
        raise ValueError(f"sgd: fresh has {len(fresh)} elements, expected {len(momentum_buffers)}")
    pack = struct.Struct("7d").pack

    def numbers(i):
        lr, momentum, dampening, decay, nesterov, maximize = rows[groups[i]]
        return pack(lr, momentum, 1 - dampening, decay, nesterov, -1 if maximize else 1, bool(fresh and fresh[i]))

    for table in _tables_of_step("sgd", params, grads, (momentum_buffers,), 3, numbers):
        launch(
            sgd_kernel, (table.blocks,), table.rows, len(table.indices), KEEPS=bool(momentum_buffers), **table.options
        )
        table.finish()


def _on_host(step):
    return step.device.type == "cpu"


def adam(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, groups, settings):
    """A step of torch.optim.Adam or AdamW. Steps are on the host or, in float32, on their parameters' device, where they
    are counted without waiting for them."""
    state = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    rows = _settings_of_step("adam", params, grads, state, groups, settings, 7)
    n = len(params)
    if not len(exp_avgs) == len(exp_avg_sqs) == len(steps) == n:
        raise ValueError(f"adam: expected {n} averages and steps")
    counted = [_on_host(step) for step in steps]
    for step, param, host in zip(steps, params, counted):
        check(step.numel() == 1, "adam: a step is one number")
        if step.dtype is not torch.float32 and not (host and step.dtype is torch.float64):
            raise RuntimeError(f"adam: expected steps in float32, on the host also in float64; got {step.dtype}")
        check(host or step.device == param.device, f"adam: a step on {step.device}")
    counts = [0.0] * n
    pack = struct.Struct("q12d").pack
    known: dict[tuple[int, float], bytes] = {}

    def numbers(i):
        group, count = groups[i], counts[i]
        found = known.get((group, count)) if counted[i] else None
        if found is None:
            lr, beta1, beta2, eps, decay, decoupled, maximize = rows[group]
            step_size, root = (lr / (1 - beta1**count), math.sqrt(1 - beta2**count)) if counted[i] else (0.0, 0.0)
            found = pack(
                0 if counted[i] else steps[i].data_ptr(), step_size, root, 1 - lr * decay if decoupled else 1,
                0 if decoupled else decay, -1 if maximize else 1, 1 - beta1, beta2, 1 - beta2, eps, lr,
                *(math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)),
            )
            if counted[i]:
                known[group, count] = found
        return found

    tables = _tables_of_step("adam", params, grads, state, 5, numbers)
    for i, step in enumerate(steps):  # nothing can be wrong any more
        if counted[i]:
            counts[i] = step.item() + 1
            step.fill_(counts[i])
        elif not params[i].numel():  # has no row; its step counts all the same, as in torch
            step.add_(1)
    for table in tables:
        tensors = len(table.indices)
        on_device = [steps[i] for i in table.indices if not counted[i]]
        if on_device:
            table.rows.reached += on_device
            launch(adam_count_kernel, (triton.cdiv(tensors, 128),), table.rows, tensors, ROW=table.row, BLOCK=128)
        launch(adam_kernel, (table.blocks,), table.rows, tensors, AMSGRAD=bool(max_exp_avg_sqs), **table.options)
        table.finish()


def _sums(table, parts, kind, power, operands=1):
    launch(
        grad_sums_kernel, (table.blocks, operands), table.rows, parts, len(table.indices), power, KIND=kind, **table.options
    )


def lars(params, grads, momentum_buffers, groups, settings):
    """A step of dlkern.optim.LARS."""
    rows = _settings_of_step("lars", params, grads, (momentum_buffers,), groups, settings, 6)
    pack = struct.Struct("6d").pack

    def numbers(i):
        lr, momentum, decay, trust, eps, maximize = rows[groups[i]]
        return pack(lr, momentum, decay, -1 if maximize else 1, trust, eps)

    for table in _tables_of_step("lars", params, grads, (momentum_buffers,), 3, numbers):
        tensors = len(table.indices)
        if any(rows[groups[i]][3] >= 0 for i in table.indices):
            parts = torch.empty((2, table.blocks), dtype=torch.float64, device=table.rows.device)
            _sums(table, parts, SQUARES, 0.0, 2)
            launch(
                lars_rate_kernel, (tensors,), table.rows, parts, table.blocks, ROW=table.row,
                BLOCK_OF_TENSOR=table.options["BLOCK"], BLOCK=256,
            )
        launch(lars_kernel, (table.blocks,), table.rows, tensors, KEEPS=bool(momentum_buffers), **table.options)
        table.finish()


def _gradients(op, grads):
    """Rows of gradients, each a parameter of its own to `_examined`; and whether some share memory."""
    rows = _examined(op, (grads,), ("grads",), (True,))
    return rows, len(rows) > 1 and _overlapping(rows)


def _no_numbers(i):
    return b""


def clip_grad_norm(grads, max_norm, norm_type, error_if_nonfinite):
    """torch.nn.utils.clip_grad_norm_ on one device."""
    op = "clip_grad_norm_"
    if not grads:
        raise ValueError(f"{op}: no gradients")
    rows, in_turn = _gradients(op, grads)
    device = grads[0].device
    check(all(x.device == device for x in grads), f"{op}: gradients on several devices")
    if norm_type < 0 or math.isinf(norm_type):
        for x in grads:
            check(x.numel() > 0, f"{op}: no norm of order {norm_type} of a gradient without elements")
    kinds = {2.0: SQUARES, 1.0: MAGNITUDES, 0.0: NONZEROS, math.inf: LARGEST, -math.inf: SMALLEST}
    kind = kinds.get(norm_type, POWERS)
    tables = list(_tables(rows, (True,), 1, _no_numbers, False))
    # A part for each block; of order 0, which counts tensors, one for each tensor in the end.
    parts = torch.empty(sum(table.blocks for table in tables), dtype=torch.float64, device=device)
    found = torch.empty(len(grads) if kind == NONZEROS else 0, dtype=torch.float64, device=device)
    block = tensor = 0
    for table in tables:
        mine = parts[block : block + table.blocks]
        _sums(table, mine, kind, norm_type)
        if kind == NONZEROS:
            launch(
                grad_nonzero_kernel, (len(table.indices),), table.rows, mine, found[tensor:], ROW=table.row,
                BLOCK_OF_TENSOR=table.options["BLOCK"], BLOCK=256,
            )
        block, tensor = block + table.blocks, tensor + len(table.indices)
    dtype = grads[0].dtype
    for x in grads:
        dtype = torch.promote_types(dtype, x.dtype)
    total = torch.empty((), dtype=dtype, device=device)
    norm = torch.empty(2, dtype=torch.float64, device=device)  # and what the gradients are multiplied by
    parts = found[:tensor] if kind == NONZEROS else parts
    launch(grad_norm_kernel, (1,), parts, norm, total, len(parts), norm_type, max_norm, KIND=kind, BLOCK=1024)
    if error_if_nonfinite and not math.isfinite(norm[0].item()):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be clipped. "
            "To disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    if in_turn:
        tables = _tables(rows, (True,), 1, _no_numbers, True)
    for table in tables:
        launch(grad_scale_kernel, (table.blocks,), table.rows, norm[1:], len(table.indices), **table.options)
        table.finish()
    return total


def clip_grad_value(grads, clip_value):
    """torch.nn.utils.clip_grad_value_."""
    rows, in_turn = _gradients("clip_grad_value_", grads)
    for table in _tables(rows, (True,), 1, _no_numbers, in_turn):
        launch(grad_clamp_kernel, (table.blocks,), table.rows, len(table.indices), clip_value, **table.options)
        table.finish()
