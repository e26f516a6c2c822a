"""RNN (tanh, relu), LSTM and GRU, one layer in one direction over a whole sequence.

The product of all inputs with their weight is one matrix product into the gates' memory. One program then computes all
gates of a tile of sequences x hidden units, so that a unit's gates are applied right after the product h W^T. There are
three ways to go through time, one kernel for all (configs.rnn chooses):
- CARRY, small layers: a program has all units of its sequences and takes every step; weights and state stay in registers.
- SYNC, as many programs as are resident at once: each takes every step of its tile and waits, step by step, for the others
  with the same sequences, by a counter that all of them raise (release) and read (acquire).
- otherwise a launch a step.
Backward goes the same ways, from the gradient of a step's gates to that of the step before; the gradients of input and
weights are one matrix product each over all steps. Sequences of different lengths are a mask: row b has the steps
t < length[b]; T and B are runtime arguments that compile nothing anew. Floor: 2 rows gates H (I + H) flops over the
tensor cores' peak, or a step's latency times T.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from dlkern.kernels import configs
from dlkern.kernels._launch import (
    accumulator,
    accumulator_dtype,
    allow_tf32_cudnn,
    check,
    check_tensors,
    dot_precision,
    launch,
    triton_type,
)
from dlkern.kernels.linear import matmul, weight_gradient
from dlkern.reference.rnn import GATES, GRU, LSTM

_LSTM, _GRU = tl.constexpr(LSTM), tl.constexpr(GRU)
_FEW_PRODUCTS = 65536  # as csrc/cpu/rnn_steps.h
_RUNTIME = ["B", "T", "first", "last"]  # never compiled anew for


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _plain_cell(x, MODE: tl.constexpr):
    # The state, and the activation's derivative.
    if MODE == 0:
        new = libdevice.tanh(x)
        slope = 1.0 - new * new
    else:
        new = tl.where(x <= 0, 0.0, x)  # NaN stays
        slope = tl.where(x > 0, 1.0, new)
    return new, slope


@triton.jit
def _gru_cell(x0, x1, x2, recurrent, h):
    # r, z, n and the state.
    r = _sigmoid(x0)
    z = _sigmoid(x1)
    candidate = libdevice.tanh(x2 + r * recurrent)
    return r, z, candidate, candidate + z * (h - candidate)


@triton.jit
def _lstm_cell(x0, x1, x2, c):
    # i, f, g and the cell.
    i = _sigmoid(x0)
    f = _sigmoid(x1)
    g = libdevice.tanh(x2)
    return i, f, g, f * c + i * g


@triton.jit
def _gru_gradients(dh, recurrent, r, z, candidate, h):
    # Of what the recurrent product gave to n, of r, z and n, before their activations.
    dn = dh * (1.0 - z) * (1.0 - candidate * candidate)
    return dn * r, dn * recurrent * r * (1.0 - r), dh * (h - candidate) * z * (1.0 - z), dn


@triton.jit
def _lstm_gradients(dc, i, f, g, c_before):
    # Of i, f and g, before their activations.
    return dc * g * i * (1.0 - i), dc * c_before * f * (1.0 - f), dc * i * (1.0 - g * g)


@triton.jit
def _rows(t, b, B, T, offsets_ptr, PACKED: tl.constexpr):
    # Rows of step t in memory; nonsense where there is no step t.
    if PACKED:
        return (tl.load(offsets_ptr + t, mask=(t >= 0) & (t < T), other=0) + b).to(tl.int64)
    return (t * B + b).to(tl.int64)


@triton.jit
def _state(output_ptr, h0_ptr, row, b, unit, exists, active, H):
    # The state in `row`, or the initial one where that does not exist; 0 where the sequence has no such step.
    # [BLOCK_B, units]
    units = (unit < H)[None, :]
    later = tl.load(output_ptr + row[:, None] * H + unit[None, :], mask=(active & exists)[:, None] & units, other=0.0)
    initial = tl.load(h0_ptr + b[:, None] * H + unit[None, :], mask=(active & (exists == 0))[:, None] & units, other=0.0)
    return tl.where(exists[:, None], later, initial)


@triton.jit
def _arrive(arrived_ptr):
    # All of this program's stores come before the count.
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="release")


@triton.jit
def _wait(arrived_ptr, count):
    # Until `count` arrivals, whose stores are then seen.
    while tl.load(arrived_ptr, volatile=True) < count:
        pass
    tl.atomic_add(arrived_ptr, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _keep(at, x0, x1, x2, x3, mask, H, DTYPE: tl.constexpr):
    # The four blocks of a row of gates.
    tl.store(at, x0.to(DTYPE), mask=mask)
    tl.store(at + H, x1.to(DTYPE), mask=mask)
    tl.store(at + 2 * H, x2.to(DTYPE), mask=mask)
    tl.store(at + 3 * H, x3.to(DTYPE), mask=mask)


# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _recurrent_weight(weight_ptr, gate, unit, k, H):
    # Transposed rows of a gate's units: [BLOCK_K, BLOCK_J].
    return tl.load(
        weight_ptr + (gate * H + unit)[None, :] * H + k[:, None], mask=(k < H)[:, None] & (unit < H)[None, :], other=0.0
    )


@triton.jit
def _bias(bias_ih_ptr, bias_hh_ptr, at, inside, ACC: tl.constexpr):
    of_input = tl.load(bias_ih_ptr + at, mask=inside, other=0.0).to(ACC)
    return of_input, tl.load(bias_hh_ptr + at, mask=inside, other=0.0).to(ACC)


@triton.jit(do_not_specialize=_RUNTIME)
def rnn_forward_kernel(
    inputs_ptr, gates_ptr, weight_ptr, bias_ih_ptr, bias_hh_ptr, h0_ptr, c0_ptr, offsets_ptr, lengths_ptr, cell_ptr,
    arrived_ptr, output_ptr, h_n_ptr, c_n_ptr, cells_ptr, B, T, H, first, last,
    MODE: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr, BIASED: tl.constexpr,
    KEEP: tl.constexpr, APART: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    CARRY: tl.constexpr, SYNC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # One program: steps [first, last) of BLOCK_B sequences and BLOCK_J units. inputs: the input's part of the gates. KEEP:
    # gates gets them after their activations, GRU's behind what the recurrent product gives to n; unless APART, in place.
    COUNT: tl.constexpr = 4 if MODE == _LSTM else 3 if MODE == _GRU else 1
    SLOT: tl.constexpr = 1 if MODE == _GRU and KEEP and not APART else 0  # where the input's part begins
    DTYPE: tl.constexpr = output_ptr.dtype.element_ty
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    k = tl.arange(0, BLOCK_K)
    units = (j < H)[None, :]
    inside = (b < B)[:, None] & units
    place = b[:, None] * H + j[None, :]  # in a state [B, H]
    length = tl.zeros((BLOCK_B,), tl.int32) + T
    if RAGGED:
        length = tl.load(lengths_ptr + b, mask=b < B, other=0)
    bias0 = tl.zeros((BLOCK_J,), ACC)
    bias1, bias2, bias3 = bias0, bias0, bias0
    if BIASED:
        of_input, of_state = _bias(bias_ih_ptr, bias_hh_ptr, j, j < H, ACC)
        bias0 = of_input + of_state
        if COUNT > 1:
            of_input, of_state = _bias(bias_ih_ptr, bias_hh_ptr, H + j, j < H, ACC)
            bias1 = of_input + of_state
            bias2, bias3 = _bias(bias_ih_ptr, bias_hh_ptr, 2 * H + j, j < H, ACC)  # GRU's n: r multiplies the second
        if COUNT == 4:
            bias2 += bias3
            of_input, of_state = _bias(bias_ih_ptr, bias_hh_ptr, 3 * H + j, j < H, ACC)
            bias3 = of_input + of_state
    if CARRY:
        h = tl.load(h0_ptr + place, mask=inside, other=0.0).to(ACC)
        w0 = _recurrent_weight(weight_ptr, 0, j, k, H).to(OPERAND)
        if COUNT > 1:
            w1 = _recurrent_weight(weight_ptr, 1, j, k, H).to(OPERAND)
            w2 = _recurrent_weight(weight_ptr, 2, j, k, H).to(OPERAND)
        if COUNT == 4:
            w3 = _recurrent_weight(weight_ptr, 3, j, k, H).to(OPERAND)
    if MODE == _LSTM:
        c = tl.load(c0_ptr + place, mask=inside & (first == 0), other=0.0).to(ACC)
        c += tl.load(cell_ptr + place, mask=inside & (first > 0), other=0.0)

    for n in range(first, last):
        t = n
        before = n - 1
        if REVERSE:
            t = T - 1 - n
            before = T - n
        active = (b < B) & (t < length)
        here = active[:, None] & units
        row = _rows(t, b, B, T, offsets_ptr, PACKED)
        given = inputs_ptr + row[:, None] * ((COUNT + SLOT) * H) + SLOT * H + j[None, :]
        gate = gates_ptr + row[:, None] * ((1 if COUNT == 1 else 4) * H) + j[None, :]
        x0 = tl.load(given, mask=here, other=0.0).to(ACC)
        if COUNT > 1:
            x1 = tl.load(given + H, mask=here, other=0.0).to(ACC)
            x2 = tl.load(given + 2 * H, mask=here, other=0.0).to(ACC)
        if COUNT == 4:
            x3 = tl.load(given + 3 * H, mask=here, other=0.0).to(ACC)

        sum0 = tl.zeros((BLOCK_B, BLOCK_J), ACC)
        sum1, sum2, sum3 = sum0, sum0, sum0
        if CARRY:
            a = h.to(DTYPE).to(OPERAND)  # [BLOCK_B, BLOCK_K]
            sum0 = tl.dot(a, w0, sum0, input_precision=PRECISION, out_dtype=ACC)
            if COUNT > 1:
                sum1 = tl.dot(a, w1, sum1, input_precision=PRECISION, out_dtype=ACC)
                sum2 = tl.dot(a, w2, sum2, input_precision=PRECISION, out_dtype=ACC)
            if COUNT == 4:
                sum3 = tl.dot(a, w3, sum3, input_precision=PRECISION, out_dtype=ACC)
        else:
            if SYNC:
                _wait(arrived_ptr + tl.program_id(0), (n - first) * tl.num_programs(1))
            exists = (before >= 0) & (before < length)
            row_before = _rows(before, b, B, T, offsets_ptr, PACKED)
            if MODE == _GRU:
                h = _state(output_ptr, h0_ptr, row_before, b, j, exists, active, H).to(ACC)
            for start in range(0, H, BLOCK_K):
                at = start + k
                a = _state(output_ptr, h0_ptr, row_before, b, at, exists, active, H).to(OPERAND)
                w = _recurrent_weight(weight_ptr, 0, j, at, H).to(OPERAND)
                sum0 = tl.dot(a, w, sum0, input_precision=PRECISION, out_dtype=ACC)
                if COUNT > 1:
                    w = _recurrent_weight(weight_ptr, 1, j, at, H).to(OPERAND)
                    sum1 = tl.dot(a, w, sum1, input_precision=PRECISION, out_dtype=ACC)
                    w = _recurrent_weight(weight_ptr, 2, j, at, H).to(OPERAND)
                    sum2 = tl.dot(a, w, sum2, input_precision=PRECISION, out_dtype=ACC)
                if COUNT == 4:
                    w = _recurrent_weight(weight_ptr, 3, j, at, H).to(OPERAND)
                    sum3 = tl.dot(a, w, sum3, input_precision=PRECISION, out_dtype=ACC)

        end = length - 1
        if REVERSE:
            end = tl.zeros_like(length)
        last_here = here & (t == end)[:, None]
        if MODE == _LSTM:
            i, f, g, new_c = _lstm_cell(
                x0 + bias0[None, :] + sum0, x1 + bias1[None, :] + sum1, x2 + bias2[None, :] + sum2, c
            )
            o = _sigmoid(x3 + bias3[None, :] + sum3)
            new = o * libdevice.tanh(new_c)
            c = tl.where(here, new_c, c)
            tl.store(c_n_ptr + place, c.to(DTYPE), mask=last_here)
            if KEEP:
                _keep(gate, i, f, g, o, here, H, gates_ptr.dtype.element_ty)
                tl.store(cells_ptr + row[:, None] * H + j[None, :], c.to(cells_ptr.dtype.element_ty), mask=here)
        elif MODE == _GRU:
            recurrent = sum2 + bias3[None, :]
            r, z, candidate, new = _gru_cell(
                x0 + bias0[None, :] + sum0, x1 + bias1[None, :] + sum1, x2 + bias2[None, :], recurrent, h
            )
            if KEEP:
                _keep(gate, recurrent, r, z, candidate, here, H, gates_ptr.dtype.element_ty)
        else:
            new, slope = _plain_cell(x0 + bias0[None, :] + sum0, MODE)
            if KEEP:
                tl.store(gate, slope.to(gates_ptr.dtype.element_ty), mask=here)
        if CARRY:
            h = tl.where(here, new, h)
        result = tl.where(here, new, 0.0).to(DTYPE)
        tl.store(output_ptr + row[:, None] * H + j[None, :], result, mask=here if PACKED else inside)
        tl.store(h_n_ptr + place, result, mask=last_here)
        if SYNC:
            _arrive(arrived_ptr + tl.program_id(0))
    if MODE == _LSTM:
        tl.store(cell_ptr + place, c, mask=inside & (last < T))


# --- backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _backward_weight(weight_ptr, gate, k, unit, H):
    # Rows of a gate's units: [BLOCK_K, BLOCK_J].
    return tl.load(
        weight_ptr + (gate * H + k)[:, None] * H + unit[None, :], mask=(k < H)[:, None] & (unit < H)[None, :], other=0.0
    )


@triton.jit(do_not_specialize=_RUNTIME)
def rnn_backward_kernel(
    grad_output_ptr, grad_h_n_ptr, grad_c_n_ptr, weight_ptr, h0_ptr, c0_ptr, output_ptr, gates_ptr, cells_ptr,
    offsets_ptr, lengths_ptr, carried_ptr, arrived_ptr, grad_gates_ptr, previous_ptr, grad_h0_ptr, grad_c0_ptr,
    B, T, H, first, last,
    MODE: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr, PREVIOUS: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, CARRY: tl.constexpr, SYNC: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # One program: BLOCK_B sequences and BLOCK_J units; n = 0 is the recurrence's last step, n = T the initial states.
    # carried: what goes to the step before past the gates: LSTM's gradient of c, GRU's of h times z.
    # PREVIOUS: writes the state before each row, for the weight's gradient.
    COUNT: tl.constexpr = 4 if MODE == _LSTM else 3 if MODE == _GRU else 1
    SLOTS: tl.constexpr = 1 if COUNT == 1 else 4
    DTYPE: tl.constexpr = output_ptr.dtype.element_ty
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    k = tl.arange(0, BLOCK_K)
    units = (j < H)[None, :]
    inside = (b < B)[:, None] & units
    place = b[:, None] * H + j[None, :]
    length = tl.zeros((BLOCK_B,), tl.int32) + T
    if RAGGED:
        length = tl.load(lengths_ptr + b, mask=b < B, other=0)
    if CARRY:
        d0 = tl.zeros((BLOCK_B, BLOCK_K), OPERAND)  # the gradient of the gates of the step after
        w0 = _backward_weight(weight_ptr, 0, k, j, H).to(OPERAND)
        if COUNT > 1:
            d1, d2 = d0, d0
            w1 = _backward_weight(weight_ptr, 1, k, j, H).to(OPERAND)
            w2 = _backward_weight(weight_ptr, 2, k, j, H).to(OPERAND)
        if COUNT == 4:
            d3 = d0
            w3 = _backward_weight(weight_ptr, 3, k, j, H).to(OPERAND)
    if COUNT > 1:
        carried = tl.load(carried_ptr + place, mask=inside & (first > 0), other=0.0)

    for n in range(first, last):
        t = T - 1 - n
        after = T - n
        before = t - 1
        if REVERSE:
            t = n
            after = n - 1
            before = n + 1
        active = (b < B) & (t >= 0) & (t < length)
        goes_on = (b < B) & (after >= 0) & (after < length)
        exists = (before >= 0) & (before < length)
        here = active[:, None] & units
        row = _rows(t, b, B, T, offsets_ptr, PACKED)
        at = row[:, None] * H + j[None, :]  # in [rows, H]
        dh = tl.load(grad_output_ptr + at, mask=here, other=0.0).to(ACC)
        dh += tl.load(grad_h_n_ptr + place, mask=here & (goes_on == 0)[:, None], other=0.0).to(ACC)

        sums = tl.zeros((BLOCK_B, BLOCK_J), ACC)
        if CARRY:
            sums = tl.dot(d0, w0, sums, input_precision=PRECISION, out_dtype=ACC)
            if COUNT > 1:
                sums = tl.dot(d1, w1, sums, input_precision=PRECISION, out_dtype=ACC)
                sums = tl.dot(d2, w2, sums, input_precision=PRECISION, out_dtype=ACC)
            if COUNT == 4:
                sums = tl.dot(d3, w3, sums, input_precision=PRECISION, out_dtype=ACC)
        else:
            if SYNC:
                _wait(arrived_ptr + tl.program_id(0), (n - first) * tl.num_programs(1))
            row_after = _rows(after, b, B, T, offsets_ptr, PACKED)
            for part in tl.static_range(COUNT):
                slot = (part + 1) % 3 if MODE == _GRU else part
                for start in range(0, H, BLOCK_K):
                    unit = start + k
                    d = tl.load(
                        grad_gates_ptr + row_after[:, None] * (SLOTS * H) + slot * H + unit[None, :],
                        mask=goes_on[:, None] & (unit < H)[None, :], other=0.0,
                    )  # [BLOCK_B, BLOCK_K]
                    w = _backward_weight(weight_ptr, part, unit, j, H).to(OPERAND)
                    sums = tl.dot(d, w, sums, input_precision=PRECISION, out_dtype=ACC)
        if MODE == _GRU:
            sums += carried
        begins = (goes_on & (active == 0))[:, None] & units  # the step after was the sequence's first
        tl.store(grad_h0_ptr + place, sums.to(DTYPE), mask=begins)
        if MODE == _LSTM:
            tl.store(grad_c0_ptr + place, carried.to(DTYPE), mask=begins)
        dh += tl.where(goes_on[:, None], sums, 0.0)

        row_before = _rows(before, b, B, T, offsets_ptr, PACKED)
        if MODE == _GRU or PREVIOUS:
            h = _state(output_ptr, h0_ptr, row_before, b, j, exists, active, H)
        stored = here if PACKED else inside & (t >= 0) & (t < T)
        if PREVIOUS:
            tl.store(previous_ptr + at, h, mask=stored)
        gate = gates_ptr + row[:, None] * (SLOTS * H) + j[None, :]
        to = grad_gates_ptr + row[:, None] * (SLOTS * H) + j[None, :]
        x0 = tl.load(gate, mask=here, other=0.0).to(ACC)
        if COUNT == 1:
            grad0 = tl.where(here, dh * x0, 0.0).to(OPERAND)
            tl.store(to, grad0, mask=stored)
        else:
            x1 = tl.load(gate + H, mask=here, other=0.0).to(ACC)
            x2 = tl.load(gate + 2 * H, mask=here, other=0.0).to(ACC)
            x3 = tl.load(gate + 3 * H, mask=here, other=0.0).to(ACC)
            if MODE == _LSTM:  # i, f, g, o
                c = libdevice.tanh(tl.load(cells_ptr + at, mask=here, other=0.0).to(ACC))
                c_before = _state(cells_ptr, c0_ptr, row_before, b, j, exists, active, H).to(ACC)
                carried += tl.load(grad_c_n_ptr + place, mask=here & (goes_on == 0)[:, None], other=0.0).to(ACC)
                dc = carried + dh * x3 * (1.0 - c * c)
                grad0, grad1, grad2 = _lstm_gradients(dc, x0, x1, x2, c_before)
                grad3 = dh * c * x3 * (1.0 - x3)
                carried = tl.where(here, dc * x1, carried)
            else:  # what the recurrent product gave to n, r, z, n
                grad0, grad1, grad2, grad3 = _gru_gradients(dh, x0, x1, x2, x3, h.to(ACC))
                carried = tl.where(here, dh * x2, carried)
            grad0 = tl.where(here, grad0, 0.0).to(OPERAND)
            grad1 = tl.where(here, grad1, 0.0).to(OPERAND)
            grad2 = tl.where(here, grad2, 0.0).to(OPERAND)
            grad3 = tl.where(here, grad3, 0.0).to(OPERAND)
            _keep(to, grad0, grad1, grad2, grad3, stored, H, OPERAND)
        if CARRY:
            if MODE == _GRU:
                d0, d1, d2 = grad1, grad2, grad0
            elif MODE == _LSTM:
                d0, d1, d2, d3 = grad0, grad1, grad2, grad3
            else:
                d0 = grad0
        if SYNC:
            _arrive(arrived_ptr + tl.program_id(0))
    if COUNT > 1:
        tl.store(carried_ptr + place, carried, mask=inside & (last <= T))


@triton.jit
def rnn_clear_padding_kernel(x_ptr, lengths_ptr, y_ptr, count, B, I, BLOCK: tl.constexpr):
    # y = x [T, B, I], zero beyond the lengths.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = i // I
    length = tl.load(lengths_ptr + row % B, mask=i < count, other=0)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=(i < count) & (row // B < length), other=0.0), mask=i < count)


# --- launchers --------------------------------------------------------------------------------------------------------


def _numbers(op, name, x):
    check(
        x.device.type == "cpu" and x.dtype == torch.int64 and x.dim() == 1, f"{op}: {name} is not a 1-D int64 tensor on the CPU"
    )
    return x.tolist()


class _Sequence:
    """Sizes of a layer's tensors, checked, and the launch that its kernels share."""

    def __init__(self, op, input, weight_ih, weight_hh, weight_hr, h0, c0, batch_sizes, lengths, mode, reverse):
        check_tensors(op, input, weight_ih, weight_hh, h0, c0)
        check(0 <= mode <= 3, f"{op}: no mode {mode}")
        dims = 3 if batch_sizes is None else 2
        check(input.dim() == dims, f"{op}: input has {input.dim()} dimensions, expected {dims}")
        check(weight_hh.dim() == 2, f"{op}: weight_hh has {weight_hh.dim()} dimensions, expected 2")
        check(batch_sizes is None or lengths is None, f"{op}: batch_sizes and lengths exclude each other")
        self.op, self.mode, self.like, self.device = op, mode, input, input.device
        lstm_weight = weight_hr is None or (mode == LSTM and weight_hr.dim() == 2)
        check(lstm_weight, f"{op}: weight_hr is an LSTM's projection, [state, hidden]")
        self.inputs, self.state = input.shape[-1], weight_hh.shape[1]
        self.hidden = self.state if weight_hr is None else weight_hr.shape[1]
        self.width = GATES[mode] * self.hidden
        self.slots = 4 if mode == GRU else GATES[mode]
        check(min(self.hidden, self.state, self.inputs) > 0, f"{op}: input, hidden or state size is zero")
        each, offsets = None, None
        if batch_sizes is not None:
            sizes = _numbers(op, "batch_sizes", batch_sizes)
            self.steps, self.batch, self.rows = len(sizes), sizes[0] if sizes else 0, input.shape[0]
            ordered = all(0 < size <= before for size, before in zip(sizes, sizes[:1] + sizes))
            check(ordered, f"{op}: batch sizes must be positive and not grow")
            check(sum(sizes) == self.rows, f"{op}: batch_sizes count {sum(sizes)} rows, input has {self.rows}")
            offsets = [0]
            for size in sizes[:-1]:
                offsets.append(offsets[-1] + size)
            each = [0] * self.batch  # the n-th step is the last of the sequences that the next one lacks
            for n, size in enumerate(sizes):
                following = sizes[n + 1] if n + 1 < len(sizes) else 0
                each[following:size] = [n + 1] * (size - following)
        else:
            self.steps, self.batch = input.shape[:2]
            self.rows = self.steps * self.batch
            if lengths is not None:
                each = _numbers(op, "lengths", lengths)
                check(len(each) == self.batch, f"{op}: expected {self.batch} lengths, got {len(each)}")
                check(
                    all(length > 0 for length in each),
                    "Length of all samples has to be greater than 0, but found an element in 'lengths' that is <= 0",
                )
                longest = max(each, default=0)
                check(longest <= self.steps, f"{op}: a length of {longest}, but input has {self.steps} time steps")
        check(self.steps > 0 and self.batch > 0, f"{op}: no time steps, or no sequences")
        self.size("weight_ih", weight_ih, self.width, self.inputs)
        self.size("weight_hh", weight_hh, self.width, self.state)
        if weight_hr is not None:
            self.size("weight_hr", weight_hr, self.state, self.hidden)
        self.size("h0", h0, self.batch, self.state)
        check((c0 is not None) == (mode == LSTM), f"{op}: c0 is for LSTM, and LSTM wants one")
        if c0 is not None:
            self.size("c0", c0, self.batch, self.hidden)
        self.offsets, self.lengths = self._on_device(offsets), self._on_device(each)
        # Among few roundings chance decides who errs more: then products and what is between kernels are in a wider type.
        few = self.rows * self.width * (self.inputs + self.state) <= _FEW_PRODUCTS
        wider = torch.float32 if input.element_size() == 2 else torch.float64
        self.operand = wider if few else input.dtype
        precision = dot_precision(self.operand, allow_tf32_cudnn())
        self.steps_are = {"REVERSE": reverse, "PACKED": offsets is not None, "RAGGED": each is not None}
        self.types = {"ACC": accumulator(self.operand), "OPERAND": triton_type(self.operand), "PRECISION": precision}
        self.product = {"operand": self.operand, "allow_tf32": allow_tf32_cudnn()}  # how matrix products are to be made

    @functools.cached_property
    def config(self):
        return configs.rnn(self.like, self.batch, self.hidden, self.operand, self.types["PRECISION"] == "tf32")

    def size(self, name, x, *expected):
        check(tuple(x.shape) == expected, f"{self.op}: {name} is {list(x.shape)}, not {list(expected)}")

    def check_backward(self, grad_output, grad_h_n, grad_c_n, output, gates, cells, of_weight, of_bias):
        """Sizes of the backward's tensors, whose dtype and device are checked but for gates and cells."""
        op, lstm, steps = self.op, self.mode == LSTM, self.like.shape[:-1]
        self.size("grad_output", grad_output, *steps, self.state)
        self.size("output", output, *steps, self.state)
        self.size("grad_h_n", grad_h_n, self.batch, self.state)
        check((grad_c_n is not None) == lstm, f"{op}: grad_c_n is for LSTM, and LSTM wants one")
        if lstm:
            self.size("grad_c_n", grad_c_n, self.batch, self.hidden)
        dtype = accumulator_dtype(self.like.dtype)
        check(gates.dtype == cells.dtype == dtype, f"{op}: gates or cells are not what the forward gave")
        check(gates.device == cells.device == self.device, f"{op}: gates or cells are not on {self.device}")
        self.size("gates", gates, self.rows, self.slots * self.hidden)
        self.size("cells", cells, self.rows if lstm else 0, self.hidden)
        check(of_weight or not of_bias, f"{op}: gradients of biases come with those of weights")

    def _on_device(self, numbers):
        return None if numbers is None else torch.tensor(numbers, dtype=torch.int32).to(self.device)

    def launch(self, kernel, tensors, steps, **constants):
        """One launch of all steps where the configuration allows it, else a launch a step."""
        constants |= {"MODE": self.mode, **self.steps_are, **self.types, **self.config}
        grid = (triton.cdiv(self.batch, self.config["BLOCK_B"]), triton.cdiv(self.hidden, self.config["BLOCK_J"]))
        at_once = self.config["CARRY"] or self.config["SYNC"]
        for first in range(0, 1 if at_once else steps):
            launch(
                kernel, grid, *tensors, self.batch, self.steps, self.hidden, first, steps if at_once else first + 1,
                **constants, launch_cooperative_grid=self.config["SYNC"] and grid[1] > 1,
            )

    def counters(self):
        """Arrivals of the programs that share sequences."""
        return torch.zeros(self.batch if self.config["SYNC"] else 1, dtype=torch.int32, device=self.device)


def _or(tensor, other):
    """A pointer for an argument the kernel will not read."""
    return other if tensor is None else tensor.contiguous()


def rnn_forward(
    input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0, batch_sizes, lengths, mode, reverse, keep
):
    """output, h_n, c_n, and for the backward (where keep) the gates after their activations and the cells."""
    op = "rnn_forward"
    check(weight_hr is None, f"{op}: a projection is rnn_options_{op[4:]}'s in the triton column")
    s = _Sequence(op, input, weight_ih, weight_hh, weight_hr, h0, c0, batch_sizes, lengths, mode, reverse)
    check_tensors(op, input, bias_ih, bias_hh)
    check((bias_ih is None) == (bias_hh is None), f"{op}: one of the biases is missing")
    for name, bias in (("bias_ih", bias_ih), ("bias_hh", bias_hh)):
        if bias is not None:
            s.size(name, bias, s.width)
    dtype, lstm = accumulator_dtype(input.dtype), mode == LSTM
    new = input.new_empty
    output, h_n = new((*input.shape[:-1], s.hidden)), new((s.batch, s.hidden))
    c_n = new((s.batch if lstm else 0, s.hidden))
    gates = new((s.rows if keep else 0, s.slots * s.hidden), dtype=dtype)
    apart = not keep or s.operand != input.dtype  # what is kept is narrower then
    inputs = new((s.rows, s.width), dtype=accumulator_dtype(s.operand)) if apart else gates
    cells = new((s.rows if keep and lstm else 0, s.hidden), dtype=dtype)
    cell = new((s.batch if lstm else 0, s.hidden), dtype=accumulator_dtype(s.operand))
    matmul(
        input.reshape(s.rows, s.inputs), weight_ih.t(), inputs[:, -s.width :], row_stride=inputs.shape[1], **s.product
    )
    h0 = h0.contiguous()
    s.launch(
        rnn_forward_kernel,
        (inputs, gates, weight_hh.contiguous(), _or(bias_ih, h0), _or(bias_hh, h0), h0, _or(c0, h0), _or(s.offsets, h0),
         _or(s.lengths, h0), cell, s.counters(), output, h_n, c_n, cells), s.steps, BIASED=bias_ih is not None, KEEP=keep,
        APART=apart,
    )  # fmt: skip
    return output, h_n, c_n, gates, cells


def _clear_padding(s, input):
    """A copy of the input whose padding, which may be anything, is zero."""
    clean = torch.empty_like(input)
    config = configs.elementwise(clean)
    launch(
        rnn_clear_padding_kernel, (triton.cdiv(clean.numel(), config["BLOCK"]),), input, s.lengths, clean, clean.numel(),
        s.batch, s.inputs, **config,
    )
    return clean


def rnn_backward(
    grad_output, grad_h_n, grad_c_n, input, weight_ih, weight_hh, weight_hr, h0, c0, output, gates, cells, batch_sizes,
    lengths, mode, reverse, of_input, of_weight, of_bias,
):
    """Gradients of input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0 and c0."""
    op = "rnn_backward"
    check(weight_hr is None, f"{op}: a projection is rnn_options_{op[4:]}'s in the triton column")
    s = _Sequence(op, input, weight_ih, weight_hh, weight_hr, h0, c0, batch_sizes, lengths, mode, reverse)
    check_tensors(op, input, grad_output, grad_h_n, grad_c_n, output)
    lstm = mode == LSTM
    s.check_backward(grad_output, grad_h_n, grad_c_n, output, gates, cells, of_weight, of_bias)
    new = input.new_empty
    grad_gates = new((s.rows, s.slots * s.hidden), dtype=s.operand)
    previous = new((s.rows if of_weight else 0, s.hidden))
    grad_h0, grad_c0 = new((s.batch, s.hidden)), new((s.batch if lstm else 0, s.hidden))
    carried = new((s.batch if s.slots == 4 else 0, s.hidden), dtype=accumulator_dtype(s.operand))
    h0 = h0.contiguous()
    s.launch(
        rnn_backward_kernel,
        (grad_output.contiguous(), grad_h_n.contiguous(), _or(grad_c_n, h0), weight_hh.contiguous(), h0, _or(c0, h0),
         output.contiguous(), gates.contiguous(), cells.contiguous(), _or(s.offsets, h0), _or(s.lengths, h0), carried,
         s.counters(), grad_gates, previous, grad_h0, grad_c0), s.steps + 1, PREVIOUS=of_weight,
    )  # fmt: skip

    of_gates = grad_gates[:, -s.width :]  # GRU's recurrent side has n in the first block
    grad_input = new(input.shape if of_input else 0)
    if of_input:
        matmul(of_gates, weight_ih, grad_input, **s.product)
    rows, biases = s.width if of_weight else 0, s.width if of_bias else 0
    grad_weight_ih, grad_weight_hh = new((rows, s.inputs)), new((rows, s.hidden))
    grad_bias_ih, grad_bias_hh = new(biases), new(biases)
    if of_weight:
        x = input.contiguous() if lengths is None else _clear_padding(s, input.contiguous())
        weight_gradient(of_gates, x.view(s.rows, s.inputs), grad_weight_ih, grad_bias_ih if of_bias else None, **s.product)
        half = 2 * s.hidden
        parts = [(slice(s.hidden, 3 * s.hidden), slice(half)), (slice(s.hidden), slice(half, None))]
        for slots, gate in parts if mode == GRU else [(slice(None), slice(None))]:
            bias = grad_bias_hh[gate] if of_bias else None
            weight_gradient(grad_gates[:, slots], previous, grad_weight_hh[gate], bias, **s.product)
    return (
        grad_input, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh, new((0, s.hidden)), grad_h0, grad_c0
    )  # fmt: skip
