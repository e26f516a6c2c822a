"""RNN, LSTM and GRU with options or a projection, backward: the kernels (launched by _rnn_options.py).

A step: the product of the gates' gradients of the step after, by tiles, with the state's gradient behind it; then the
gradients of the gates, a program a row. Where a projection is, its product lies between.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from dlkern.kernels._rnn_rows import RUNTIME, _product, _step, _tile, _zoned
from dlkern.kernels.rnn import _GRU, _LSTM, _gru_gradients, _keep, _lstm_gradients, _state


@triton.jit
def _before_norm(
    d0, d1, d2, d3, weight_ptr, normed_ptr, scale, j, here, H, COUNT: tl.constexpr, ACC: tl.constexpr
):
    # The gradient before a normalisation of COUNT blocks of units from that of its result times the weight; and the
    # products of the gradients with what was normalised.
    a0 = tl.load(normed_ptr + j, mask=here, other=0.0).to(ACC)
    g0 = d0 * tl.load(weight_ptr + j, mask=here, other=0.0).to(ACC)
    mean, along = tl.sum(g0, axis=0), tl.sum(g0 * a0, axis=0)
    a1, a2, a3, g1, g2, g3 = a0, a0, a0, g0, g0, g0
    if COUNT > 1:
        a1 = tl.load(normed_ptr + H + j, mask=here, other=0.0).to(ACC)
        a2 = tl.load(normed_ptr + 2 * H + j, mask=here, other=0.0).to(ACC)
        g1 = d1 * tl.load(weight_ptr + H + j, mask=here, other=0.0).to(ACC)
        g2 = d2 * tl.load(weight_ptr + 2 * H + j, mask=here, other=0.0).to(ACC)
        mean += tl.sum(g1, axis=0) + tl.sum(g2, axis=0)
        along += tl.sum(g1 * a1, axis=0) + tl.sum(g2 * a2, axis=0)
    if COUNT == 4:
        a3 = tl.load(normed_ptr + 3 * H + j, mask=here, other=0.0).to(ACC)
        g3 = d3 * tl.load(weight_ptr + 3 * H + j, mask=here, other=0.0).to(ACC)
        mean += tl.sum(g3, axis=0)
        along += tl.sum(g3 * a3, axis=0)
    mean /= tl.cast(COUNT * H, ACC)
    along /= tl.cast(COUNT * H, ACC)
    return (
        scale * (g0 - mean - a0 * along), scale * (g1 - mean - a1 * along), scale * (g2 - mean - a2 * along),
        scale * (g3 - mean - a3 * along), d0 * a0, d1 * a1, d2 * a2, d3 * a3,
    )


@triton.jit
def _put(at, x0, x1, x2, x3, mask, H, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    # COUNT blocks of a row.
    if COUNT == 4:
        _keep(at, x0, x1, x2, x3, mask, H, DTYPE)
    else:
        tl.store(at, x0.to(DTYPE), mask=mask)
    if COUNT == 3:
        tl.store(at + H, x1.to(DTYPE), mask=mask)
        tl.store(at + 2 * H, x2.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def rnn_state_backward_kernel(
    step_ptr, weight_ptr, grad_output_ptr, factor_ptr, fresh_h_ptr, output_ptr, h0_ptr, offsets_ptr, lengths_ptr, carry_ptr,
    grads_ptr, grad_states_ptr, previous_ptr, grad_h0_ptr, B, T, n, S, WIDTH, share_h: tl.float64,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr, MASK: tl.constexpr, ZONEOUT_H: tl.constexpr,
    KEEP_GRADS: tl.constexpr, PREVIOUS: tl.constexpr, END: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # One program: the gradient of the n-th step's new state, of BLOCK_B sequences and BLOCK_J units, from `step`, that of
    # the product after it; what passes the step goes to carry. KEEP_GRADS: the gradients of all steps, PREVIOUS: the states
    # that they multiplied, for the weights'. END: the initial state's gradient instead.
    b, j = _tile(BLOCK_B, BLOCK_J)
    units = (j < S)[None, :]
    inside = (b < B)[:, None] & units
    place = b[:, None] * S + j[None, :]
    dh = _product(step_ptr, weight_ptr, b, j, B, S, WIDTH, 1, S, ACC, OPERAND, PRECISION, BLOCK_B, BLOCK_J, BLOCK_K)
    if MASK:
        factor = tl.load(factor_ptr + place, mask=inside, other=0.0).to(ACC)
        dh *= factor
    dh += tl.load(carry_ptr + place, mask=inside, other=0.0)
    if END:
        tl.store(grad_h0_ptr + place, dh.to(grad_h0_ptr.dtype.element_ty), mask=inside)
    else:
        row, active, row_before, exists = _step(n, b, B, T, offsets_ptr, lengths_ptr, REVERSE, PACKED, RAGGED)
        here = active[:, None] & units
        at = row[:, None] * S + j[None, :]
        dh += tl.load(grad_output_ptr + at, mask=here, other=0.0).to(ACC)
        nothing = tl.zeros_like(dh)
        tl.store(carry_ptr + place, _zoned(nothing, dh, fresh_h_ptr, at, here, share_h, ZONEOUT_H, ACC), mask=here)
        grads = tl.where(here, _zoned(dh, nothing, fresh_h_ptr, at, here, share_h, ZONEOUT_H, ACC), 0.0)
        tl.store(grads_ptr + place, grads, mask=here)
        stored = here if PACKED else inside
        if KEEP_GRADS:
            tl.store(grad_states_ptr + at, grads.to(OPERAND), mask=stored)
        if PREVIOUS:
            h = _state(output_ptr, h0_ptr, row_before, b, j, exists, active, S).to(ACC)
            if MASK:
                h *= factor
            tl.store(previous_ptr + at, h.to(OPERAND), mask=stored)


@triton.jit
def _row_before(later_ptr, initial_ptr, row_before, exists, b, j, here, H, ACC: tl.constexpr):
    # What one sequence had before a step.
    later = tl.load(later_ptr + row_before * H + j, mask=here & exists, other=0.0).to(ACC)
    return tl.where(exists, later, tl.load(initial_ptr + b * H + j, mask=here & (exists == 0), other=0.0).to(ACC))


@triton.jit(do_not_specialize=RUNTIME)
def rnn_options_backward_kernel(
    grads_ptr, gates_ptr, cells_ptr, norms_ptr, output_ptr, h0_ptr, c0_ptr, peephole_ptr, norm_ih_ptr, norm_hh_ptr,
    norm_c_ptr, norm_c_bias_ptr, fresh_c_ptr, offsets_ptr, lengths_ptr, carry_ptr, carry_cell_ptr, grad_given_ptr,
    grad_product_ptr, step_ptr, terms_ptr, projected_ptr, B, T, n, H, SIZE, TERMS, share_c: tl.float64,
    MODE: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
    NORM: tl.constexpr, NORM_C_BIAS: tl.constexpr, PEEPHOLE: tl.constexpr, ZONEOUT_C: tl.constexpr, PROJECT: tl.constexpr,
    WEIGHTS: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr, BLOCK_J: tl.constexpr,
):
    # One program: the n-th step of one sequence, BLOCK_J of its units, all of them where they were normalised. grad_given,
    # grad_product: the gradients of both products; the second also to `step`. WEIGHTS: terms gets what the gradients of
    # the options' weights are sums of, and of biases where there are normalisations.
    COUNT: tl.constexpr = 4 if MODE == _LSTM else 3 if MODE == _GRU else 1
    b = tl.program_id(0)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    row, active, row_before, exists = _step(n, b, B, T, offsets_ptr, lengths_ptr, REVERSE, PACKED, RAGGED)
    here = active & (j < H)
    stored = here if PACKED else j < H
    place = b * H + j
    norm_ptr = norms_ptr + row * SIZE
    terms_ptr += row * TERMS + j
    gate = gates_ptr + row * ((1 if COUNT == 1 else 4) * H) + j
    dh = tl.load(grads_ptr + place, mask=here, other=0.0)
    x0 = tl.load(gate, mask=here, other=0.0).to(ACC)
    if COUNT > 1:
        x1 = tl.load(gate + H, mask=here, other=0.0).to(ACC)
        x2 = tl.load(gate + 2 * H, mask=here, other=0.0).to(ACC)
        x3 = tl.load(gate + 3 * H, mask=here, other=0.0).to(ACC)
    if MODE == _LSTM:  # i, f, g, o
        before = _row_before(cells_ptr, c0_ptr, row_before, exists, b, j, here, H, ACC)
        made = x1 * before + x0 * x2
        seen = made
        if NORM:
            seen = tl.load(norm_ptr + 2 * COUNT * H + j, mask=here, other=0.0).to(ACC)
            seen *= tl.load(norm_c_ptr + j, mask=here, other=0.0).to(ACC)
            if NORM_C_BIAS:
                seen += tl.load(norm_c_bias_ptr + j, mask=here, other=0.0).to(ACC)
        seen = libdevice.tanh(seen)
        d3 = dh * seen * x3 * (1.0 - x3)
        dc = dh * x3 * (1.0 - seen * seen)
        if PROJECT:
            tl.store(projected_ptr + row * H + j, tl.where(here, x3 * seen, 0.0).to(OPERAND), mask=stored)
        if NORM:
            dc = tl.where(here, dc, 0.0)
            scale = tl.load(norm_ptr + SIZE - 1, mask=active, other=0.0).to(ACC)
            of_seen = dc
            dc, _, _, _, along, _, _, _ = _before_norm(
                dc, dc, dc, dc, norm_c_ptr, norm_ptr + 2 * COUNT * H, scale, j, here, H, 1, ACC
            )
            if WEIGHTS:
                tl.store(terms_ptr + 4 * COUNT * H, along, mask=stored)
                tl.store(terms_ptr + 4 * COUNT * H + H, of_seen, mask=stored)
        after = tl.load(carry_cell_ptr + place, mask=here, other=0.0)
        nothing = tl.zeros_like(after)
        dc += _zoned(after, nothing, fresh_c_ptr, row * H + j, here, share_c, ZONEOUT_C, ACC)
        passed = _zoned(nothing, after, fresh_c_ptr, row * H + j, here, share_c, ZONEOUT_C, ACC)
        if PEEPHOLE:
            dc += d3 * tl.load(peephole_ptr + 2 * H + j, mask=here, other=0.0).to(ACC)
        d0, d1, d2 = _lstm_gradients(dc, x0, x1, x2, before)
        passed += dc * x1
        if PEEPHOLE:
            passed += d0 * tl.load(peephole_ptr + j, mask=here, other=0.0).to(ACC)
            passed += d1 * tl.load(peephole_ptr + H + j, mask=here, other=0.0).to(ACC)
            if WEIGHTS:
                at = terms_ptr + TERMS - 3 * H
                tl.store(at, tl.where(here, d0 * before, 0.0), mask=stored)
                tl.store(at + H, tl.where(here, d1 * before, 0.0), mask=stored)
                tl.store(at + 2 * H, tl.where(here, d3 * made, 0.0), mask=stored)
        tl.store(carry_cell_ptr + place, passed, mask=here)
        h2 = d2
    elif MODE == _GRU:  # what the recurrent product gave to n, r, z, n
        before = _row_before(output_ptr, h0_ptr, row_before, exists, b, j, here, H, ACC)
        h2, d0, d1, d2 = _gru_gradients(dh, x0, x1, x2, x3, before)
        d3 = d2
        carried = tl.load(carry_ptr + place, mask=here, other=0.0)
        tl.store(carry_ptr + place, carried + dh * x2, mask=here)
    else:
        d0 = dh * x0
        d1, d2, d3, h2 = d0, d0, d0, d0
    d0, d1, d2 = tl.where(here, d0, 0.0), tl.where(here, d1, 0.0), tl.where(here, d2, 0.0)
    d3, h2 = tl.where(here, d3, 0.0), tl.where(here, h2, 0.0)
    given = grad_given_ptr + row * (COUNT * H) + j
    product = grad_product_ptr + row * (COUNT * H) + j
    step = step_ptr + b * (COUNT * H) + j
    if NORM:
        if WEIGHTS:
            _put(terms_ptr, d0, d1, d2, d3, stored, H, COUNT, ACC)
            _put(terms_ptr + COUNT * H, d0, d1, h2, d3, stored, H, COUNT, ACC)
        scale = tl.load(norm_ptr + SIZE - 3, mask=active, other=0.0).to(ACC)
        e0, e1, e2, e3, along0, along1, along2, along3 = _before_norm(
            d0, d1, d2, d3, norm_ih_ptr, norm_ptr, scale, j, here, H, COUNT, ACC
        )
        _put(given, e0, e1, e2, e3, stored, H, COUNT, OPERAND)
        if WEIGHTS:
            _put(terms_ptr + 2 * COUNT * H, along0, along1, along2, along3, stored, H, COUNT, ACC)
        scale = tl.load(norm_ptr + SIZE - 2, mask=active, other=0.0).to(ACC)
        d0, d1, h2, d3, along0, along1, along2, along3 = _before_norm(
            d0, d1, h2, d3, norm_hh_ptr, norm_ptr + COUNT * H, scale, j, here, H, COUNT, ACC
        )
        if WEIGHTS:
            _put(terms_ptr + 3 * COUNT * H, along0, along1, along2, along3, stored, H, COUNT, ACC)
    elif MODE == _GRU:
        _put(given, d0, d1, d2, d3, stored, H, COUNT, OPERAND)
    _put(product, d0, d1, h2, d3, stored, H, COUNT, OPERAND)
    _put(step, d0, d1, h2, d3, here, H, COUNT, OPERAND)
