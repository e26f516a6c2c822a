"""RNN, LSTM and GRU with options (layer normalisation, a mask on the recurrent product, zoneout, peepholes) or an LSTM's
projection, one layer in one direction.

A step is two launches, since a normalisation needs all units of a row: the recurrent product of all sequences, by tiles;
then gates, cell and state, a program a row. A projection is a third, a product with the state behind it. State and cell
lie in buffers that a step changes for the sequences that have it. Backward goes the same way back: the product by tiles,
with the state's gradient behind it; the projection's product; the rows. The gradients of weights are sums over all steps,
made afterwards. Floor: the latency of a step's launches times T, or 2 rows gates H (I + S) flops.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from dlkern.kernels import configs
from dlkern.kernels._launch import accumulator_dtype, check, check_tensors, launch
from dlkern.kernels._rnn_options_backward import rnn_options_backward_kernel, rnn_state_backward_kernel
from dlkern.kernels._rnn_rows import _FRESH, _SHARE, RUNTIME, _product, _statistics, _step, _tile, _zoned
from dlkern.kernels.linear import matmul, weight_gradient
from dlkern.kernels.rnn import (
    _GRU,
    _LSTM,
    _clear_padding,
    _gru_cell,
    _keep,
    _lstm_cell,
    _or,
    _plain_cell,
    _Sequence,
    _sigmoid,
)
from dlkern.reference.rnn import GRU, LSTM


@triton.jit(do_not_specialize=RUNTIME)
def rnn_product_kernel(
    a_ptr, weight_ptr, out_ptr, B, N, K, stride_n, stride_k,
    ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # out [B, N] = a [B, K] @ weight; one program a tile.
    b, j = _tile(BLOCK_B, BLOCK_J)
    sums = _product(a_ptr, weight_ptr, b, j, B, N, K, stride_n, stride_k, ACC, OPERAND, PRECISION, BLOCK_B, BLOCK_J, BLOCK_K)
    tl.store(out_ptr + b[:, None] * N + j[None, :], sums, mask=(b < B)[:, None] & (j < N)[None, :])


@triton.jit
def rnn_copy_kernel(x_ptr, factor_ptr, y_ptr, count, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    # y = x, or x * factor, in y's type.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count, other=0.0)
    if SCALED:
        x = x.to(y_ptr.dtype.element_ty) * tl.load(factor_ptr + i, mask=i < count, other=0.0).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + i, x.to(y_ptr.dtype.element_ty), mask=i < count)


@triton.jit
def rnn_norm_kernel(x_ptr, norms_ptr, COLUMNS, SIZE, KEEP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    # One program: a row of the input's part of the gates, normalised in place; KEEP: and into norms, for the backward.
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    inside = j < COLUMNS
    x = tl.load(x_ptr + row * COLUMNS + j, mask=inside, other=0.0)
    mean, scale = _statistics(x, inside, COLUMNS, ACC)
    x = (x - mean) * scale
    tl.store(x_ptr + row * COLUMNS + j, x, mask=inside)
    if KEEP:
        tl.store(norms_ptr + row * SIZE + j, x.to(norms_ptr.dtype.element_ty), mask=inside)
        tl.store(norms_ptr + row * SIZE + SIZE - 3, scale.to(norms_ptr.dtype.element_ty))


# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _finish(
    h, state_ptr, factor_ptr, masked_ptr, fresh_ptr, share, output_ptr, at, out, here, stored,
    ZONEOUT: tl.constexpr, MASK: tl.constexpr, ACC: tl.constexpr,
):
    # The state, at `at` of [B, S] and at `out` of the output, from the new one.
    old = tl.load(state_ptr + at, mask=here, other=0.0)
    h = tl.where(here, _zoned(h, old, fresh_ptr, out, here, share, ZONEOUT, ACC), 0.0)
    tl.store(state_ptr + at, h, mask=here)
    if MASK:
        tl.store(masked_ptr + at, h * tl.load(factor_ptr + at, mask=here, other=0.0).to(ACC), mask=here)
    tl.store(output_ptr + out, h.to(output_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _side(
    from_ptr, weight_ptr, bias_ptr, to_ptr, mean, scale, j, here,
    NORM: tl.constexpr, BIASED: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr,
):
    # What one of the two products gives to a gate.
    x = tl.load(from_ptr + j, mask=here, other=0.0).to(ACC)
    if NORM:
        x = (x - mean) * scale
        if KEEP:
            tl.store(to_ptr + j, x.to(to_ptr.dtype.element_ty), mask=here)
        x *= tl.load(weight_ptr + j, mask=here, other=0.0).to(ACC)
    if BIASED:
        x += tl.load(bias_ptr + j, mask=here, other=0.0).to(ACC)
    return x


@triton.jit(do_not_specialize=RUNTIME)
def rnn_options_forward_kernel(
    given_ptr, sums_ptr, bias_ih_ptr, bias_hh_ptr, peephole_ptr, norm_ih_ptr, norm_hh_ptr, norm_c_ptr, norm_c_bias_ptr,
    factor_ptr, fresh_h_ptr, fresh_c_ptr, offsets_ptr, lengths_ptr, state_ptr, masked_ptr, cell_ptr, made_ptr, output_ptr,
    gates_ptr, cells_ptr, norms_ptr, B, T, n, H, SIZE, share_h: tl.float64, share_c: tl.float64,
    MODE: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr, BIASED: tl.constexpr,
    NORM: tl.constexpr, NORM_C_BIAS: tl.constexpr, PEEPHOLE: tl.constexpr, MASK: tl.constexpr, ZONEOUT_H: tl.constexpr,
    ZONEOUT_C: tl.constexpr, PROJECT: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_W: tl.constexpr,
):
    # One program: the n-th step of one sequence, BLOCK_J of its units, all of them where they are normalised. given, sums:
    # what input and state give to the gates. PROJECT: the output is left in made, else the step is finished.
    COUNT: tl.constexpr = 4 if MODE == _LSTM else 3 if MODE == _GRU else 1
    b = tl.program_id(0)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    row, active, _, _ = _step(n, b, B, T, offsets_ptr, lengths_ptr, REVERSE, PACKED, RAGGED)
    here = active & (j < H)
    given_ptr += row * (COUNT * H)
    sums_ptr += b * (COUNT * H)
    norm_ptr = norms_ptr + row * SIZE
    normed_ptr = norm_ptr + COUNT * H
    KEPT: tl.constexpr = norms_ptr.dtype.element_ty
    mean, scale = 0.0, 1.0
    if NORM:
        column = tl.arange(0, BLOCK_W)
        inside = active & (column < COUNT * H)
        mean, scale = _statistics(tl.load(sums_ptr + column, mask=inside, other=0.0), inside, COUNT * H, ACC)
        if KEEP:
            tl.store(norm_ptr + SIZE - 2, scale.to(KEPT), mask=active)
    x0 = _side(given_ptr, norm_ih_ptr, bias_ih_ptr, given_ptr, 0.0, 1.0, j, here, NORM, BIASED, False, ACC)
    y0 = _side(sums_ptr, norm_hh_ptr, bias_hh_ptr, normed_ptr, mean, scale, j, here, NORM, BIASED, KEEP, ACC)
    if COUNT > 1:
        k = H + j
        x1 = _side(given_ptr, norm_ih_ptr, bias_ih_ptr, given_ptr, 0.0, 1.0, k, here, NORM, BIASED, False, ACC)
        y1 = _side(sums_ptr, norm_hh_ptr, bias_hh_ptr, normed_ptr, mean, scale, k, here, NORM, BIASED, KEEP, ACC)
        k = 2 * H + j
        x2 = _side(given_ptr, norm_ih_ptr, bias_ih_ptr, given_ptr, 0.0, 1.0, k, here, NORM, BIASED, False, ACC)
        y2 = _side(sums_ptr, norm_hh_ptr, bias_hh_ptr, normed_ptr, mean, scale, k, here, NORM, BIASED, KEEP, ACC)
    if COUNT == 4:
        k = 3 * H + j
        x3 = _side(given_ptr, norm_ih_ptr, bias_ih_ptr, given_ptr, 0.0, 1.0, k, here, NORM, BIASED, False, ACC)
        y3 = _side(sums_ptr, norm_hh_ptr, bias_hh_ptr, normed_ptr, mean, scale, k, here, NORM, BIASED, KEEP, ACC)

    GATE: tl.constexpr = gates_ptr.dtype.element_ty
    gate = gates_ptr + row * ((1 if COUNT == 1 else 4) * H) + j
    if MODE == _LSTM:
        place = b * H + j
        c = tl.load(cell_ptr + place, mask=here, other=0.0)
        x0 += y0
        x1 += y1
        x3 += y3
        if PEEPHOLE:
            x0 += tl.load(peephole_ptr + j, mask=here, other=0.0).to(ACC) * c
            x1 += tl.load(peephole_ptr + H + j, mask=here, other=0.0).to(ACC) * c
        i, f, g, made = _lstm_cell(x0, x1, x2 + y2, c)
        if PEEPHOLE:
            x3 += tl.load(peephole_ptr + 2 * H + j, mask=here, other=0.0).to(ACC) * made
        o = _sigmoid(x3)
        seen = made
        if NORM:
            mean, scale = _statistics(made, here, H, ACC)
            seen = (made - mean) * scale
            if KEEP:
                tl.store(normed_ptr + COUNT * H + j, seen.to(KEPT), mask=here)
                tl.store(norm_ptr + SIZE - 1, scale.to(KEPT), mask=active)
            seen *= tl.load(norm_c_ptr + j, mask=here, other=0.0).to(ACC)
            if NORM_C_BIAS:
                seen += tl.load(norm_c_bias_ptr + j, mask=here, other=0.0).to(ACC)
        new = o * libdevice.tanh(seen)
        c = _zoned(made, c, fresh_c_ptr, row * H + j, here, share_c, ZONEOUT_C, ACC)
        tl.store(cell_ptr + place, c, mask=here)
        if KEEP:
            _keep(gate, i, f, g, o, here, H, GATE)
            tl.store(cells_ptr + row * H + j, c.to(cells_ptr.dtype.element_ty), mask=here)
        if PROJECT:
            tl.store(made_ptr + place, new, mask=here)
    elif MODE == _GRU:
        h = tl.load(state_ptr + b * H + j, mask=here, other=0.0)
        r, z, candidate, new = _gru_cell(x0 + y0, x1 + y1, x2, y2, h)
        if KEEP:
            _keep(gate, y2, r, z, candidate, here, H, GATE)
    else:
        new, slope = _plain_cell(x0 + y0, MODE)
        if KEEP:
            tl.store(gate, slope.to(GATE), mask=here)
    if not PROJECT:
        stored = here if PACKED else j < H
        _finish(
            new, state_ptr, factor_ptr, masked_ptr, fresh_h_ptr, share_h, output_ptr, b * H + j, row * H + j, here, stored,
            ZONEOUT_H, MASK, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def rnn_project_kernel(
    made_ptr, weight_ptr, factor_ptr, fresh_h_ptr, offsets_ptr, lengths_ptr, state_ptr, masked_ptr, output_ptr,
    B, T, n, H, S, share_h: tl.float64,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr, MASK: tl.constexpr, ZONEOUT_H: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # One program: the n-th step's state of BLOCK_B sequences and BLOCK_J of S columns, from what is projected.
    b, j = _tile(BLOCK_B, BLOCK_J)
    row, active, _, _ = _step(n, b, B, T, offsets_ptr, lengths_ptr, REVERSE, PACKED, RAGGED)
    h = _product(made_ptr, weight_ptr, b, j, B, S, H, H, 1, ACC, OPERAND, PRECISION, BLOCK_B, BLOCK_J, BLOCK_K)
    here = active[:, None] & (j < S)[None, :]
    stored = here if PACKED else (b < B)[:, None] & (j < S)[None, :]
    _finish(
        h, state_ptr, factor_ptr, masked_ptr, fresh_h_ptr, share_h, output_ptr, b[:, None] * S + j[None, :],
        row[:, None] * S + j[None, :], here, stored, ZONEOUT_H, MASK, ACC,
    )  # fmt: skip


# --- launchers --------------------------------------------------------------------------------------------------------


class _Options:
    """A layer's options, checked, and the launches of its steps."""

    def __init__(
        self, s, weight_hr, peephole, norm_ih, norm_hh, norm_c, norm_c_bias, mask, fresh_h, fresh_c, zoneout_h, zoneout_c
    ):
        self.s, op, lstm = s, s.op, s.mode == LSTM
        weights = {"peephole": (peephole, 3, s.hidden), "norm_ih": (norm_ih, s.width), "norm_hh": (norm_hh, s.width),
                   "norm_c": (norm_c, s.hidden), "norm_c_bias": (norm_c_bias, s.hidden)}  # fmt: skip
        for name, (weight, *size) in weights.items():
            if weight is not None:
                check_tensors(op, s.like, weight)
                s.size(name, weight, *size)
        only = peephole is None and fresh_c is None and zoneout_c == 0
        check(lstm or only, f"{op}: peephole, fresh_c and zoneout_c are LSTM's")
        together = (norm_ih is None) == (norm_hh is None) and (norm_c is not None) == (lstm and norm_ih is not None)
        check(
            together and (norm_c is not None or norm_c_bias is None),
            f"{op}: norm_ih, norm_hh and, of LSTM, norm_c come together, norm_c_bias with norm_c",
        )
        dtype = accumulator_dtype(s.like.dtype)
        for name, x, rows, units in (
            ("mask", mask, s.batch, s.state), ("fresh_h", fresh_h, s.rows, s.state), ("fresh_c", fresh_c, s.rows, s.hidden),
        ):  # fmt: skip
            fits = x is None or (
                x.device == s.device and x.dtype == dtype and x.dim() > 1 and x.numel() == rows * units and x.shape[-1] == units
            )
            check(fits, f"{op}: {name} is not one number of {dtype} for each of {rows} x {units} units")
        for share in (zoneout_h, zoneout_c):
            if not 0 <= share <= 1:
                raise ValueError(f"{op}: zoneout has to be between 0 and 1, but got {share}")
        self.normed, self.projects, self.shares = norm_ih is not None, weight_hr is not None, (zoneout_h, zoneout_c)
        self.norm_size = 2 * s.width + (s.hidden if lstm else 0) + 3 if self.normed else 0
        like = s.like
        self.weights = [_or(w, like) for w in (peephole, norm_ih, norm_hh, norm_c, norm_c_bias)]
        self.mask, self.fresh_h, self.fresh_c = (_or(x, like) for x in (mask, fresh_h, fresh_c))
        self.steps = [_or(s.offsets, like), _or(s.lengths, like)]
        self.masked = mask is not None

        def kind(fresh, share):
            return _FRESH.value if fresh is not None else _SHARE.value if share else 0

        self.zoneout = {"ZONEOUT_H": kind(fresh_h, zoneout_h), "ZONEOUT_C": kind(fresh_c, zoneout_c)}
        self.row_constants = {
            "MODE": s.mode, **s.steps_are, "NORM": self.normed, "NORM_C_BIAS": norm_c_bias is not None,
            "PEEPHOLE": peephole is not None, "PROJECT": self.projects, "ACC": s.types["ACC"],
            **configs.rnn_row(like, s.hidden, self.normed),
        }  # fmt: skip

    def norm_block(self):
        return triton.next_power_of_2(max(self.s.width, 16)) if self.normed else 16

    def rows_grid(self):
        return self.s.batch, triton.cdiv(self.s.hidden, self.row_constants["BLOCK_J"])

    def by_tiles(self, kernel, units, *args, **constants):
        """A launch of tiles of sequences x units."""
        s = self.s
        config = configs.rnn_product(s.like, s.batch, units, s.operand, s.types["PRECISION"] == "tf32")
        grid = triton.cdiv(s.batch, config["BLOCK_B"]), triton.cdiv(units, config["BLOCK_J"])
        launch(kernel, grid, *args, **constants, **s.types, **config)

    def copied(self, x, to, factor=None):
        config = configs.elementwise(to)
        launch(
            rnn_copy_kernel, (triton.cdiv(to.numel(), config["BLOCK"]),), x, _or(factor, x), to, to.numel(),
            SCALED=factor is not None, **config,
        )  # fmt: skip
        return to


def rnn_options_forward(
    input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0, peephole, norm_ih, norm_hh, norm_c, norm_c_bias, mask,
    fresh_h, fresh_c, batch_sizes, lengths, mode, reverse, zoneout_h, zoneout_c, keep,
):
    """output, h_n, c_n, and for the backward (where keep) gates, cells and what the normalisations leave."""
    op = "rnn_options_forward"
    s = _Sequence(op, input, weight_ih, weight_hh, weight_hr, h0, c0, batch_sizes, lengths, mode, reverse)
    check_tensors(op, input, bias_ih, bias_hh, weight_hr)
    check((bias_ih is None) == (bias_hh is None), f"{op}: one of the biases is missing")
    for name, bias in (("bias_ih", bias_ih), ("bias_hh", bias_hh)):
        if bias is not None:
            s.size(name, bias, s.width)
    o = _Options(
        s, weight_hr, peephole, norm_ih, norm_hh, norm_c, norm_c_bias, mask, fresh_h, fresh_c, zoneout_h, zoneout_c
    )
    lstm, wide, kept = mode == LSTM, accumulator_dtype(s.operand), accumulator_dtype(input.dtype)
    new, rows = input.new_empty, s.rows if keep else 0
    output, h_n = new((*input.shape[:-1], s.state)), new((s.batch, s.state))
    c_n = new((s.batch if lstm else 0, s.hidden))
    gates = new((rows, s.slots * s.hidden), dtype=kept)
    cells = new((rows if lstm else 0, s.hidden), dtype=kept)
    norms = new((rows if o.normed else 0, o.norm_size), dtype=kept)

    given = new((s.rows, s.width), dtype=wide)
    matmul(input.reshape(s.rows, s.inputs), weight_ih.t(), given, **s.product)
    if o.normed:
        block = o.norm_block()
        launch(
            rnn_norm_kernel, (s.rows,), given, norms, s.width, o.norm_size, KEEP=keep, ACC=s.types["ACC"], BLOCK=block,
            num_warps=max(1, min(16, block // 256)),
        )  # fmt: skip
    h0 = h0.contiguous()
    state = o.copied(h0, new((s.batch, s.state), dtype=wide))
    masked = o.copied(h0, torch.empty_like(state), o.mask) if o.masked else state
    cell = o.copied(c0.contiguous(), new((s.batch, s.hidden), dtype=wide)) if lstm else state
    sums = new((s.batch, s.width), dtype=wide)
    made = new((s.batch if o.projects else 0, s.hidden), dtype=wide)
    w_hh, w_hr = weight_hh.contiguous(), _or(weight_hr, input)
    biases = _or(bias_ih, input), _or(bias_hh, input)
    for n in range(s.steps):
        o.by_tiles(rnn_product_kernel, s.width, masked, w_hh, sums, s.batch, s.width, s.state, s.state, 1)
        launch(
            rnn_options_forward_kernel, o.rows_grid(), given, sums, *biases, *o.weights, o.mask, o.fresh_h, o.fresh_c, *o.steps,
            state, masked, cell, made, output, gates, cells, norms, s.batch, s.steps, n, s.hidden, o.norm_size, *o.shares,
            BIASED=bias_ih is not None, MASK=o.masked, **o.zoneout, KEEP=keep, BLOCK_W=o.norm_block(), **o.row_constants,
        )  # fmt: skip
        if o.projects:
            o.by_tiles(
                rnn_project_kernel, s.state, made, w_hr, o.mask, o.fresh_h, *o.steps, state, masked, output, s.batch, s.steps,
                n, s.hidden, s.state, zoneout_h, **s.steps_are, MASK=o.masked, ZONEOUT_H=o.zoneout["ZONEOUT_H"],
            )  # fmt: skip
    o.copied(state, h_n)
    if lstm:
        o.copied(cell, c_n)
    return output, h_n, c_n, gates, cells, norms


def rnn_options_backward(
    grad_output, grad_h_n, grad_c_n, input, weight_ih, weight_hh, weight_hr, h0, c0, peephole, norm_ih, norm_hh, norm_c,
    norm_c_bias, mask, fresh_h, fresh_c, output, gates, cells, norms, batch_sizes, lengths, mode, reverse, zoneout_h, zoneout_c,
    of_input, of_weight, of_bias,
):
    """Gradients of input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0 and of the options' weights."""
    op = "rnn_options_backward"
    s = _Sequence(op, input, weight_ih, weight_hh, weight_hr, h0, c0, batch_sizes, lengths, mode, reverse)
    check_tensors(op, input, grad_output, grad_h_n, grad_c_n, output, weight_hr)
    o = _Options(
        s, weight_hr, peephole, norm_ih, norm_hh, norm_c, norm_c_bias, mask, fresh_h, fresh_c, zoneout_h, zoneout_c
    )
    lstm, gru, wide = mode == LSTM, mode == GRU, accumulator_dtype(s.operand)
    s.check_backward(grad_output, grad_h_n, grad_c_n, output, gates, cells, of_weight, of_bias)
    check(norms.device == input.device and norms.dtype == gates.dtype, f"{op}: norms is not what rnn_options_forward gave")
    s.size("norms", norms, s.rows if o.normed else 0, o.norm_size)
    new = input.new_empty
    grad_product = new((s.rows, s.width), dtype=s.operand)
    grad_given = torch.empty_like(grad_product) if gru or o.normed else grad_product
    step = torch.zeros((s.batch, s.width), dtype=s.operand, device=s.device)  # of sequences that have not begun: zero
    previous = new((s.rows if of_weight else 0, s.state), dtype=s.operand)
    keeps = of_weight and o.projects
    grad_states = new((s.rows if keeps else 0, s.state), dtype=s.operand)
    projected = new((s.rows if o.projects else 0, s.hidden), dtype=s.operand)
    rows, biases = s.width if of_weight else 0, s.width if of_bias else 0
    grad_weight_ih, grad_weight_hh = new((rows, s.inputs)), new((rows, s.state))
    grad_weight_hr = new((s.state if keeps else 0, s.hidden))
    grad_bias_ih, grad_bias_hh = new(biases), new(biases)
    grad_peephole, grad_norm_ih, grad_norm_hh, grad_norm_c, grad_norm_c_bias = of_options = [
        new(w.shape if of_weight and w is not None else 0) for w in (peephole, norm_ih, norm_hh, norm_c, norm_c_bias)
    ]
    # What is a sum of terms, in the order of their columns.
    sums = [(s.width, g) for g in (grad_bias_ih, grad_bias_hh, grad_norm_ih, grad_norm_hh)] if o.normed else []
    sums += [(s.hidden, g) for g in (grad_norm_c, grad_norm_c_bias)] if o.normed and lstm else []
    sums += [(3 * s.hidden, grad_peephole)] if peephole is not None else []
    terms = new((s.rows if of_weight else 0, sum(size for size, _ in sums)), dtype=wide)
    h0, output = h0.contiguous(), output.contiguous()
    carry = o.copied(grad_h_n.contiguous(), new((s.batch, s.state), dtype=wide))
    carry_cell = o.copied(grad_c_n.contiguous(), new((s.batch, s.hidden), dtype=wide)) if lstm else carry
    of_state = new((s.batch, s.state), dtype=wide)  # the gradient of a step's new state, and of what is projected to it
    grads = new((s.batch, s.hidden), dtype=wide) if o.projects else of_state
    grad_h0, grad_c0 = new((s.batch, s.state)), new((s.batch if lstm else 0, s.hidden))
    w_hh, w_hr, g = weight_hh.contiguous(), _or(weight_hr, input), grad_output.contiguous()
    saved = gates.contiguous(), cells.contiguous(), norms.contiguous()

    def state_backward(n, end):
        o.by_tiles(
            rnn_state_backward_kernel, s.state, step, w_hh, g, o.mask, o.fresh_h, output, h0, *o.steps, carry, of_state,
            grad_states, previous, grad_h0, s.batch, s.steps, n, s.state, s.width, zoneout_h, **s.steps_are, MASK=o.masked,
            ZONEOUT_H=o.zoneout["ZONEOUT_H"], KEEP_GRADS=keeps, PREVIOUS=of_weight, END=end,
        )  # fmt: skip

    for n in reversed(range(s.steps)):
        state_backward(n, False)
        if o.projects:
            o.by_tiles(rnn_product_kernel, s.hidden, of_state, w_hr, grads, s.batch, s.hidden, s.state, 1, s.hidden)
        launch(
            rnn_options_backward_kernel, o.rows_grid(), grads, *saved, output, h0, _or(c0, h0), *o.weights, o.fresh_c, *o.steps,
            carry, carry_cell, grad_given, grad_product, step, terms, projected, s.batch, s.steps, n, s.hidden, o.norm_size,
            terms.shape[1], zoneout_c, ZONEOUT_C=o.zoneout["ZONEOUT_C"], WEIGHTS=of_weight, OPERAND=s.types["OPERAND"],
            **o.row_constants,
        )  # fmt: skip
    state_backward(0, True)
    if lstm:
        o.copied(carry_cell, grad_c0)

    grad_input = new(input.shape if of_input else 0)
    if of_input:
        matmul(grad_given, weight_ih, grad_input, **s.product)
    if of_weight:
        x = input.contiguous() if lengths is None else _clear_padding(s, input.contiguous())
        beside = of_bias and not o.normed  # else they are sums of terms
        weight_gradient(grad_given, x.view(s.rows, s.inputs), grad_weight_ih, grad_bias_ih if beside else None, **s.product)
        weight_gradient(grad_product, previous, grad_weight_hh, grad_bias_hh if beside else None, **s.product)
        if o.projects:
            weight_gradient(grad_states, projected, grad_weight_hr, None, **s.product)
        first = 0
        for size, total in sums:
            part = terms[:, first : first + size]
            if total.numel():
                matmul(part.t(), part[:, :0], total, row_sums=total, operand=wide, allow_tf32=False)
            first += size
    return (
        grad_input, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh, grad_weight_hr, grad_h0, grad_c0, *of_options
    )  # fmt: skip
